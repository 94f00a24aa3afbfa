"""A pid is never mistaken for another process, and the waits are real."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from executed import wait_until_executed

from sandbox_gateway.host import processes
from sandbox_gateway.host.processes import ProcessRef


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that does nothing."""
    with subprocess.Popen(["sleep", "100"], env={"PATH": os.defpath, "SLEEPER": str(os.getpid())}) as process:
        wait_until_executed(process.pid)
        yield process
        process.kill()


def reference(process: subprocess.Popen[bytes]) -> ProcessRef:
    """Its reference."""
    found = ProcessRef.of(process.pid)
    assert found is not None
    return found


def test_reference_survives_json(sleeper: subprocess.Popen[bytes]) -> None:
    """What a handle stores finds the same process again."""
    ref = reference(sleeper)
    assert ProcessRef.from_json(ref.as_json()) == ref
    assert ref.alive()


@pytest.mark.parametrize("value", [None, [], [1], ["1", 2], [1, 2, 3], {"pid": 1}, [True, 2]])
def test_damaged_reference_is_no_process(value: object) -> None:
    """Whatever else a handle holds is nobody."""
    assert ProcessRef.from_json(value) is None


def test_recycled_pid_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    """The same pid with another start time is neither alive nor killed."""
    ref = reference(sleeper)
    other = ProcessRef(ref.pid, ref.start - 1)
    assert not other.alive()
    assert other.open() is None
    assert not other.kill()
    assert processes.kill_all([other], 1) == []
    assert ref.alive()


def test_zombie_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    """A process that ended and was not reaped does not run."""
    ref = reference(sleeper)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not ref.alive()
    assert ProcessRef.of(sleeper.pid) is None


def test_kill_all_returns_when_they_are_gone(sleeper: subprocess.Popen[bytes]) -> None:
    """After kill_all nothing runs any more, and what was gone before is no error."""
    ref = reference(sleeper)
    assert processes.kill_all([ref, ProcessRef(2**22 - 1, 1)], 10) == []
    assert not ref.alive()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_kill_all_names_those_that_outlive_it() -> None:
    """Init is not ours to kill: as an ordinary user it is left, and said so."""
    if os.geteuid() == 0:
        pytest.skip("root may kill anything here")
    init = ProcessRef.of(1)
    assert init is not None
    assert processes.kill_all([init], 0.01) == [init]


async def test_wait_exit_returns_at_the_end_and_not_before(sleeper: subprocess.Popen[bytes]) -> None:
    """The wait ends with the process; on one that is gone it does not begin."""
    ref = reference(sleeper)
    waiting = asyncio.create_task(processes.wait_exit(ref))
    await asyncio.sleep(0)
    assert not waiting.done()
    ref.kill()
    await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(processes.wait_exit(ref), 10)


def test_find_sees_environment_and_arguments(sleeper: subprocess.Popen[bytes]) -> None:
    """A process is found by a variable it was started with, and we are never among the found."""
    entry = f"SLEEPER={os.getpid()}"
    found = processes.find(lambda argv, environment: entry in environment and argv == ["sleep", "100"])
    assert found == [reference(sleeper)]
    assert os.getpid() not in [ref.pid for ref in processes.find(lambda argv, environment: True)]


def test_descendants_and_usage_count_children(sleeper: subprocess.Popen[bytes]) -> None:
    """What is below a process belongs to it, with memory, time and threads."""
    assert sleeper.pid in processes.descendants([os.getpid()])
    used = processes.usage([os.getpid(), sleeper.pid, 2**22 - 1])
    assert used.memory > 1 << 20
    assert used.cpu_seconds > 0
    assert used.threads >= 2


def test_usage_without_permission_falls_back(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the proportional size may not be read, private plus shared memory stands for it."""
    monkeypatch.setattr(processes, "_proportional", lambda pid: None)
    assert processes.usage([os.getpid()]).memory > 1 << 20


def test_process_that_is_gone_has_no_arguments() -> None:
    """Looking at a process that has ended is no error."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(30)
    assert processes.command_line(process.pid) == []
    assert processes.environment(process.pid) == []
