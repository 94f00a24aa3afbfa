"""jupyter_server's own kernel and session tests, and Kernel Gateway's WebSocket tests, pass against ours.

The suites are not copied into this repository: pip takes them from the source packages when the test runs, in the
versions and with the hashes below. Each runs in a process of its own with ours (``upstream_plugin.py``); what does not
pass there runs once more, with the stock server. What passes with that one only is listed here, each with its reason,
and ``docs/reference/gateway-compatibility.md`` lists the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from acceptance import KERNEL, PLAIN, Product
from suite_report import outcomes, short

pytestmark = pytest.mark.skipif(KERNEL == PLAIN, reason="the gateway has sandboxes only")

HERE = Path(__file__).resolve().parent
COMPATIBILITY = HERE.parents[1] / "docs" / "reference" / "gateway-compatibility.md"

SOURCES = {
    "jupyter_server": ("2.21.1", "a8960aa29263f6041283e97d4756b099fb49b767baab6371891ecb1bd40a63df"),
    "jupyter_kernel_gateway": ("3.0.1", "900690c4c0e796867355468d685f7fa1cf3c7775d08e871c157f77d65fbd6d7f"),
}
"""Version and sha256 of each source package that has a suite."""

LIMIT = 1100
"""Seconds that a suite may take."""

AT_ONCE = ("-n", "3", "--dist", "loadfile")
"""Files of a suite run at the same time: their tests wait most of the time."""

SERVER_TESTS = ("tests/services/kernels", "tests/services/sessions")
GATEWAY_TESTS = ("tests/test_jupyter_websocket.py",)

_PATHS = "a sandbox's files are its own: the server does not look for paths in there"
_CULLING = "a sandbox that idles is paused and suspended by its profile's policy, not culled"
_UUID = "the id that a client chooses for a kernel has to be a UUID, since it is the sandbox's"
_CURVE = "the endpoints of a sandboxed kernel are unix sockets of its owner's, which nobody else can listen to"

SERVER_DIFFERENCES = {
    **{
        f"test_api::test_resolve_path_{what}[jp_server_config{number}]": _PATHS
        for what in ("kernel", "server_and_kernel")
        for number in range(3)
    },
    "test_cull::test_cull_idle[jp_server_config1]": _CULLING,
    "test_cull::test_cull_connected[jp_server_config1]": _CULLING,
    "test_api::test_create_deprecated[jp_server_config1]": _UUID,
    "test_transport_encryption::test_transport_encryption_provisions_curve_keys[auto]": _CURVE,
    "test_transport_encryption::test_transport_encryption_provisions_curve_keys[required]": _CURVE,
}
"""Tests of jupyter_server that pass with the stock managers only."""

_OPTION = "tests an option of Kernel Gateway's own: "
_AS_SERVER = "as in jupyter_server, "

GATEWAY_DIFFERENCES = {
    "TestDefaults::test_headless": "the root leads to `/api/status`, which the test's client does not follow",
    "TestDefaults::test_check_origin": f"{_AS_SERVER}a request with a token may come from a page of any origin",
    "TestDefaults::test_auth_token[jp_server_config0]": (
        f"{_AS_SERVER}`GET /api` tells its version to everybody, and who is refused gets 403"
    ),
    "TestDefaults::test_cors_headers": f"{_OPTION}`ServerApp.allow_origin` is ours",
    "TestDefaults::test_cors_options_headers": f"{_OPTION}`ServerApp.allow_origin` is ours",
    "TestDefaults::test_max_kernels": f"{_OPTION}quotas of each user are ours",
    "TestDefaults::test_no_discovery": f"{_OPTION}everybody sees his own kernels, and nobody another's",
    "TestDefaults::test_json_errors": f"{_OPTION}everybody sees his own kernels, and nobody another's",
    "TestDefaults::test_kernel_env[jp_argv0]": (
        f"{_OPTION}`SandboxGateway.environment` names what may be chosen (everything, unless it is set), and a "
        "variable that may not is refused, not left out"
    ),
    "TestDefaults::test_get_swagger_yaml_spec": "our description is at `/api/sandboxes/openapi.yaml`",
    "TestDefaults::test_get_swagger_json_spec": "our description is at `/api/sandboxes/openapi.yaml`",
}
"""Tests of Kernel Gateway that pass with it only."""

GATEWAY_LEFT_OUT = {
    "TestDefaults::test_config_bad_api_value": f"{_OPTION}personalities",
    "TestCustomDefaultKernel": f"{_OPTION}`SandboxGateway.default_profile` is ours",
    "TestForceKernel": f"{_OPTION}clients name the profiles that are offered",
    "TestPrespawnKernels": f"{_OPTION}kernels start from templates, and a profile may hold some ready",
    "TestSeedURI": f"{_OPTION}a notebook that each kernel runs first; a profile may preload modules",
    "TestRemoteSeedURI": f"{_OPTION}a notebook that each kernel runs first, from the internet",
    "TestBadSeedURI": f"{_OPTION}a notebook that each kernel runs first",
    "TestKernelLanguageSupport": f"{_OPTION}a notebook that each kernel runs first",
    "TestSessionApi": "makes Kernel Gateway's own managers, without any server",
}
"""Tests, or classes of them, that are about nothing of ours and are not run."""


def _source(name: str, folder: Path, *wanted: str) -> Path:
    """Unpack the folders ``wanted`` of a source package; skips with pip's reason where there is none."""
    version, digest = SOURCES[name]
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-binary", name, "--require-hashes", "-d", str(folder), "-r", str(requirements)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip cannot get the tests of {name}: {last}")
    unpacked = folder / "suite"
    with tarfile.open(folder / f"{name}-{version}.tar.gz") as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]
            if member.name.startswith(wanted):
                archive.extract(member, unpacked, filter="data")
    # Not the package's own settings: they ask for plugins and warnings that are not the subject here.
    (unpacked / "pytest.ini").write_text("[pytest]\n")
    return unpacked


class _Run:
    """One run of a suite in a process of its own."""

    def __init__(self, suite: Path, tests: Sequence[str], options: Sequence[str], **variables: str) -> None:
        self._end = time.monotonic() + LIMIT
        self._report = suite / f"{variables.get('UPSTREAM_SERVER', 'stock')}.xml"
        self._log = self._report.with_suffix(".log")
        path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-p", "no:cacheprovider", "-c", "pytest.ini"]
                + ["--rootdir", ".", "--timeout=60", f"--junitxml={self._report}", *options, *tests],
                cwd=suite,
                env={**os.environ, "PYTHONPATH": path, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def outcome(self) -> dict[str, str]:
        """Wait for its end; test's id -> ``passed``, ``skipped`` or the failure's text."""
        try:
            self.process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run does not end: {self._log.read_text(errors='replace')[-3000:]}")
        finally:
            self.close()
        assert self._report.exists(), self._log.read_text(errors="replace")[-3000:]
        return outcomes(self._report)

    def close(self) -> None:
        """End it, if it has not."""
        self.process.kill()
        self.process.wait()


_PLUGINS = ("pytest_jupyter.jupyter_core", "pytest_jupyter.jupyter_server", "upstream_plugin")
OURS = tuple(option for plugin in _PLUGINS for option in ("-p", plugin))
"""In this order: fixtures of the last one take the place of others'."""


def _compare(
    suite: Path,
    tests: Sequence[str],
    stock: Sequence[str],
    ours: Sequence[str],
    server: str,
    differences: Mapping[str, str],
    at_least: int,
) -> None:
    """Run it with ours, then what did not pass with the stock one; hold the difference against the list."""
    tested = _Run(suite, tests, [*OURS, *ours], UPSTREAM_SERVER=server, UPSTREAM_KERNEL=KERNEL).outcome()
    failed = [test for test, text in tested.items() if text != "passed"]
    reference = _Run(suite, failed, stock).outcome() if failed else {}
    worse = {short(test): tested[test] for test in failed if reference.get(test, "not run") in ("passed", "not run")}
    passed = {short(test) for test, text in tested.items() if text == "passed"}
    print(f"{suite.parent.name}: {len(passed)} of {len(tested)} pass here, {len(worse)} with the stock server only")
    for test in failed:
        if short(test) not in worse:
            print(f"  fails with the stock server too: {test}")
    assert len(passed) + len(worse) >= at_least, {test: tested[test] for test in failed}
    unexpected = {name: text for name, text in worse.items() if name not in differences}
    assert not unexpected, "pass with the stock server only:\n" + "\n\n".join(
        f"{name}:\n{text}" for name, text in unexpected.items()
    )
    gone = passed & set(differences)
    assert not gone, f"no difference any more: {gone}"


@pytest.fixture(scope="module")
def image(product: Product) -> None:
    """The image is there: its build would count as a test's time."""
    pytest.importorskip("pytest_jupyter", reason="pytest-jupyter is not installed")
    done = product.command("image", "build", timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(1200)
def test_jupyter_servers_kernel_and_session_tests_pass(image: None, tmp_path: Path) -> None:
    suite = _source("jupyter_server", tmp_path, "tests/")
    _compare(suite, SERVER_TESTS, [], AT_ONCE, "extension", SERVER_DIFFERENCES, 170)


@pytest.mark.timeout(1200)
def test_kernel_gateways_websocket_tests_pass(image: None, tmp_path: Path) -> None:
    suite = _source("jupyter_kernel_gateway", tmp_path, "tests/", "kernel_gateway/")
    left_out = [f"--deselect={GATEWAY_TESTS[0]}::{name}" for name in GATEWAY_LEFT_OUT]
    _compare(suite, GATEWAY_TESTS, left_out, [*left_out, "--noconftest"], "headless", GATEWAY_DIFFERENCES, 17)


def test_each_difference_is_documented_with_its_reason() -> None:
    text = COMPATIBILITY.read_text()
    for name, reason in {**SERVER_DIFFERENCES, **GATEWAY_DIFFERENCES, **GATEWAY_LEFT_OUT}.items():
        assert f"`{name}`" in text, name
        assert reason in text, reason
    for name, (version, _) in SOURCES.items():
        assert f"{name} {version}" in text
