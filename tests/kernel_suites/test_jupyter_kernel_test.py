"""jupyter_kernel_test's suite passes in a sandbox exactly where it passes with the plain kernel."""

# ruff: noqa: RUF012 - the suite itself asks for plain class attributes

from __future__ import annotations

import json
import os
import shutil
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jupyter_kernel_test
import pytest
from acceptance import KERNEL, PLAIN, Product, environment
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_kernel_test.msgspec_v5 import validate_message

pytestmark = [
    pytest.mark.timeout(300),
    # jupyter_client's heart, where it is stopped before its thread has begun (as here on a busy machine), opens sockets
    # until there are no more, and ends with this.
    pytest.mark.filterwarnings(
        "ignore:(?s)Exception in thread .*Too many open files:pytest.PytestUnhandledThreadExceptionWarning"
    ),
]


PATIENCE = 15.0
"""Seconds that a kernel may take for a message, as the suite has it for replies."""


class Patient(jupyter_kernel_test.KernelTests):  # type: ignore[misc]
    """The suite, which otherwise gives a kernel 0.1 seconds for each message on iopub, and takes as long a silence for
    the end of what came before."""

    __test__ = False

    def flush_channels(self) -> None:
        """Take all that came before: what the kernel is asked now it answers after that."""
        asked = self.kc.kernel_info()
        for channel in (self.kc.shell_channel, self.kc.iopub_channel):
            over = False
            while not over:
                message = channel.get_msg(timeout=PATIENCE)
                validate_message(message)
                over = message["parent_header"].get("msg_id") == asked and (
                    message["msg_type"] == "kernel_info_reply" or message["content"].get("execution_state") == "idle"
                )

    def execute_helper(self, *args: Any, **options: Any) -> Any:
        """Run code and give its reply and its output."""
        channel = self.kc.iopub_channel
        get_msg = channel.get_msg
        with mock.patch.object(channel, "get_msg", lambda timeout: get_msg(timeout=PATIENCE)):
            return super().execute_helper(*args, **options)


class PythonTests(Patient):
    """ipykernel with every optional sample of the suite filled in.

    ``range`` is left out of the history operations as ipykernel's own tests do: its reply says session 0.
    """

    __test__ = False
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = [
        {"text": "zi", "matches": {"zip"}},
        {"text": "import itertools; itertools.starm"},
        {"text": "no_such_name_anywhere.x"},
    ]
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('no')"
    code_execute_result = [
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
    ]
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class BashTests(Patient):
    """bash_kernel: written by others, started by its own argv, not ipykernel's."""

    __test__ = False
    language_name = "bash"
    file_extension = ".sh"
    code_hello_world = "echo 'hello, world'"
    code_stderr = "echo problem >&2"
    completion_samples = [{"text": "fdis"}, {"text": "ech"}]
    complete_code_samples = ["ls"]
    code_generate_error = "false"
    code_display_data = [{"code": "echo '<b>test</b>' | displayHTML", "mime": "text/html"}]


class WelcomeTests(jupyter_kernel_test.IopubWelcomeTests):  # type: ignore[misc]
    """The first message on iopub is the welcome."""

    __test__ = False
    support_iopub_welcome = True


def run_suite(case: type[unittest.TestCase], kernel_name: str) -> dict[str, str]:
    """Run one suite against one kernel; test name -> ``passed``, ``skipped``, or the failure's text."""
    named = type(case.__name__, (case,), {"kernel_name": kernel_name})
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(named)
    outcome = {test.id().rsplit(".", 1)[-1]: "passed" for test in tests}  # type: ignore[union-attr]
    result = unittest.TestResult()
    tests.run(result)
    for test, text in [*result.failures, *result.errors]:
        method = test.id().rsplit(".", 1)[-1].split(" ")[0]
        outcome[method] = text
        if method.startswith("setUpClass"):
            pytest.fail(f"{kernel_name} did not start: {text}")
    for test, reason in result.skipped:
        method = test.id().rsplit(".", 1)[-1].split(" ")[0]
        if outcome[method] == "passed":
            outcome[method] = f"skipped: {reason}"
    return outcome


def _passed(outcome: dict[str, str]) -> set[str]:
    return {name for name, text in outcome.items() if text == "passed"}


def _compare(case: type[unittest.TestCase], plain: str, tested: str) -> dict[str, str]:
    reference = run_suite(case, plain)
    outcome = run_suite(case, tested)
    worse = {name: outcome.get(name) for name in _passed(reference) - _passed(outcome)}
    assert not worse, "passes with the plain kernel only:\n" + "\n".join(f"{n}: {t}" for n, t in worse.items())
    assert {n: t for n, t in outcome.items() if t.startswith("skipped")} == {
        n: t for n, t in reference.items() if t.startswith("skipped")
    }
    return reference


def test_every_sample_of_the_suite_passes_with_ipykernel(product: Product) -> None:
    reference = _compare(PythonTests, PLAIN, KERNEL)
    assert {name: text for name, text in reference.items() if text != "passed"} == {
        "test_history": "skipped: History range not supported"  # the rest of that test has run
    }


def test_iopub_begins_with_the_welcome(product: Product) -> None:
    reference = _compare(WelcomeTests, PLAIN, KERNEL)
    assert set(reference.values()) == {"passed"}, reference


@pytest.fixture
def bash_kernels(product: Product, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two kernelspecs of bash_kernel that differ in the provisioner alone: ``(plain, tested)``."""
    pytest.importorskip("bash_kernel", reason="bash_kernel is not installed")
    spec = {
        "argv": [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"],
        "display_name": "Bash",
        "language": "bash",
        "env": {"PS1": "$"},
    }
    stanza = KernelSpecManager().get_kernel_spec(KERNEL).metadata if KERNEL != PLAIN else {}
    for name, metadata in (("bash-plain", {}), ("bash-tested", stanza)):
        folder = tmp_path / "share" / "kernels" / name
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps({**spec, "metadata": metadata}))
    with environment(JUPYTER_PATH=os.pathsep.join([str(tmp_path / "share"), os.environ.get("JUPYTER_PATH", "")])):
        yield "bash-plain", "bash-tested"
    shutil.rmtree(tmp_path / "share")


def test_a_kernel_that_is_not_ipykernel_passes_as_it_does_without_a_sandbox(bash_kernels: tuple[str, str]) -> None:
    reference = _compare(BashTests, *bash_kernels)
    assert {"test_kernel_info", "test_execute_stdout", "test_completion"} <= _passed(reference), reference


def test_the_suite_is_the_whole_of_jupyter_kernel_test() -> None:
    """A sample that a newer jupyter_kernel_test asks for must be filled in above, not skipped unseen."""
    known = {name for name in dir(jupyter_kernel_test.KernelTests) if name.startswith("test_")}
    assert len(known) == 12, sorted(known)
