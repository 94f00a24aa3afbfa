from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_host import AgentProcess, Host, ipykernel_fields


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    process = AgentProcess()
    try:
        process.host.attach()
        yield process
    finally:
        process.end()


@pytest.fixture
def host(agent: AgentProcess) -> Host:
    return agent.host


@pytest.fixture(params=[False, True], ids=["zmq", "pipe"])
def fast_iopub(request: pytest.FixtureRequest) -> bool:
    """Both ways on which IOPub messages come out of ipykernel."""
    return bool(request.param)


@pytest.fixture
def start(host: Host, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def start(**changes: Any) -> dict[str, Any]:
        answer = host.call("start_kernel", **ipykernel_fields(tmp_path, **changes))
        host.event("kernel_ready", generation=answer["generation"])
        return answer

    return start


@pytest.fixture
def kernel(start: Callable[..., dict[str, Any]], host: Host, fast_iopub: bool) -> Host:
    """An agent with a running ipykernel."""
    start(fast_iopub=fast_iopub)
    return host


@pytest.fixture
def open_python() -> Iterator[tuple[str, dict[str, str], Path]]:
    """An interpreter with ipykernel that any uid may run: program, environment, home. Skips where there is none.

    Ask for it before the agent: what is asked for last ends first, and the home goes when nobody lives in it any more.
    """
    if os.getuid() != 0:
        pytest.skip("switching to another uid needs root")
    packages = sysconfig.get_paths()["purelib"]
    for candidate in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if candidate is None:
            continue
        tried = (
            subprocess.run(
                [candidate, "-c", "import sys; print(sys.version_info[:2])"],
                user=54321,
                group=54321,
                cwd="/",
                capture_output=True,
                text=True,
                check=False,
            )
            if _enterable(candidate)
            else None
        )
        if tried is not None and tried.stdout.strip() == str(sys.version_info[:2]):
            home = Path(os.path.realpath("/tmp")) / f"agent-test-{os.getpid()}"
            home.mkdir(mode=0o777, exist_ok=True)
            home.chmod(0o777)
            yield candidate, {"PYTHONPATH": packages, "PATH": "/usr/bin:/bin", "HOME": str(home)}, home
            shutil.rmtree(home)
            return
    pytest.skip("no Python of this version that another uid may run")


def _enterable(program: str) -> bool:
    """Whether every folder on the way to a program lets others through."""
    return all(parent.stat().st_mode & 0o001 for parent in Path(program).resolve().parents)
