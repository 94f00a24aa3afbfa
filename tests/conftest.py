"""Fixtures of all tests: a runsc, an installation of its own, and a look for what was left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent))

from leaks import Watched

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.host.setup import find_runsc
from sandbox_gateway.runtimes.gvisor import GvisorRuntime

# How long an example takes says more about the machine than about the code. The suite tries the same examples each
# time, so that a failure belongs to a change; `make fuzz` looks for new ones.
settings.register_profile("any-machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

WATCHED = Watched()
WATCHED.install()

SETTLE = 20.0
"""Seconds that the kernel may need to take an ended process away, and a template's builder beside a start to end."""


@pytest.fixture(scope="session", autouse=True)
def _watch_test_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Watch pytest's own directory too, and let nothing at all outlive the session."""
    WATCHED.add(tmp_path_factory.getbasetemp())
    before = WATCHED.look()
    yield
    _no_more_than(before, "the session")
    WATCHED.remove_runtimes()


@pytest.fixture(autouse=True)
def leak_check(_watch_test_directories: None) -> Iterator[None]:
    """After every test: no process, mount, control group or named pipe of ours more than before it."""
    before = WATCHED.look()
    yield
    _no_more_than(before, "this test")


def _no_more_than(before: object, whose: str) -> None:
    end = time.monotonic() + SETTLE
    while lines := (found := WATCHED.look()).since(before):  # type: ignore[arg-type]
        if time.monotonic() > end:
            found.end_processes(before)  # type: ignore[arg-type]
            pytest.fail(f"{whose} left behind:\n" + "\n".join(lines), pytrace=False)
        time.sleep(0.05)  # exits are no event for one who is not the parent


@pytest.fixture(scope="session")
def runsc_binary() -> Path:
    """A runsc that passes the probe here; skips, with the reason, where there is none."""
    reasons = []
    candidates: list[Path] = []
    try:
        candidates += [path for path in [find_runsc(discover(), os.environ)] if path is not None]
    except SandboxGatewayError as error:
        reasons.append(str(error))
    on_path = shutil.which("runsc")
    candidates += [Path(on_path)] if on_path else []
    with tempfile.TemporaryDirectory(prefix="sg-") as home:
        paths = discover({"SANDBOX_GATEWAY_HOME": home}).ensure()
        for binary in candidates:
            run = asyncio.run(GvisorRuntime(paths, binary).probe()).get("run")
            if run.available:
                return binary
            reasons.append(run.reason)
    pytest.skip("no usable runsc: " + ("; ".join(reasons) or "none installed, none on PATH"))


@pytest.fixture
def paths() -> Iterator[Paths]:
    """An installation of this test's own, under a short path."""
    home = Path(tempfile.mkdtemp(prefix="sg-"))
    try:
        yield discover({"SANDBOX_GATEWAY_HOME": str(home)}).ensure()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what failed at the first of two tries: a second one that passes must not hide a bug."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)
        for name, text in report.sections:
            terminalreporter.section(name, sep="-")
            terminalreporter.write_line(text)
