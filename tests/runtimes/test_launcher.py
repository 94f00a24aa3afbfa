"""The launcher: what it starts outlives us, is reaped, and is found again."""

from __future__ import annotations

import asyncio
import marshal
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from executed import wait_until_executed

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import processes
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.runtimes import launcher
from sandbox_gateway.runtimes.forkserver import Forkserver
from sandbox_gateway.runtimes.launcher import MARKER, Fifos, Launched, Launcher


@pytest.fixture
def directory(paths: Paths) -> Path:
    """A sandbox's runtime directory with its pipes."""
    path = paths.sandbox("one")
    path.mkdir()
    Fifos.inside(path).make()
    return path


_forkserver: Forkserver


@pytest.fixture(autouse=True)
def forkserver() -> Iterator[Forkserver]:
    """What forks the launchers, one for each test."""
    global _forkserver
    with closing(Forkserver()) as _forkserver:
        yield _forkserver


async def launch(argv: list[str], directory: Path, **arguments: Any) -> Launched:
    """By the test's forkserver."""
    return await launcher.launch(argv, directory, _forkserver, **arguments)


@asynccontextmanager
async def launched(directory: Path, code: str, **arguments: Any) -> AsyncIterator[Launched]:
    """A Python program under a holder; both are ended afterwards."""
    found = await launch([sys.executable, "-S", "-c", code], directory, **arguments)
    try:
        yield found
    finally:
        processes.kill_all([found.process], 10)
        processes.kill_all([found.holder], 10)


async def test_program_runs_on_the_pipes_and_carries_the_mark(directory: Path) -> None:
    """Its output is in the pipe for whoever opens it, and its environment names the sandbox."""
    code = "import os, time; os.write(1, b'hello\\n'); time.sleep(100)"
    async with launched(directory, code) as found:
        fd = os.open(Fifos.inside(directory).stdout, os.O_RDWR)
        try:
            assert os.read(fd, 100) == b"hello\n"
        finally:
            os.close(fd)
        for ref in (found.process, found.holder):
            wait_until_executed(ref.pid)
            assert f"{MARKER}={directory}" in processes.environment(ref.pid)


async def test_a_launcher_that_is_told_nothing_is_gone_when_it_is_closed(
    directory: Path, forkserver: Forkserver
) -> None:
    """It starts while a sandbox is prepared, which may fail; meanwhile it is known as the sandbox's."""
    program = Launcher(directory, forkserver)
    await asyncio.shield(program._connecting)
    await asyncio.wait_for(_found(directory), 10)
    await program.close()
    assert not marked(directory)


def marked(directory: Path) -> list[ProcessRef]:
    """The processes that bear the sandbox's marker."""
    return processes.find(lambda argv, environment: f"{MARKER}={directory}" in environment)


def _parent(ref: ProcessRef) -> int:
    return int(Path(f"/proc/{ref.pid}/stat").read_text().rpartition(")")[2].split()[1])


async def _found(directory: Path) -> None:
    while not marked(directory):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("end", ["closed", "dropped"])
async def test_what_forks_the_launchers_ends_with_who_has_it_and_what_runs_goes_on(directory: Path, end: str) -> None:
    """The end of its socket is all that it hears of a killed application, too; it is nobody's child."""
    mine = Forkserver()
    found = await launcher.launch([sys.executable, "-S", "-c", "import time; time.sleep(100)"], directory, mine)
    server = ProcessRef.of(_parent(found.holder))
    try:
        assert server is not None
        assert b"--serve" in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert server.pid not in processes.descendants([os.getpid()])
        if end == "closed":
            mine.close()
        else:
            del mine
        await asyncio.wait_for(processes.wait_exit(server), 10)
        assert found.holder.alive()
        assert found.process.alive()
    finally:
        processes.kill_all([found.process], 10)
        processes.kill_all([found.holder], 10)


async def test_another_one_begins_where_it_was_killed_or_closed(directory: Path, forkserver: Forkserver) -> None:
    """A killed one costs nothing but the time to begin."""
    for _ in range(2):
        async with launched(directory, "import time; time.sleep(100)") as found:
            parent = _parent(found.holder)
            server = ProcessRef.of(parent)
            assert server is not None
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.wait_for(processes.wait_exit(server), 10)
    forkserver.close()
    async with launched(directory, "import time; time.sleep(100)") as found:
        assert found.process.alive()


async def test_one_that_cannot_begin_or_does_not_stay_says_so(
    directory: Path, forkserver: Forkserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason reaches who wants a sandbox, and nobody tries for ever."""
    code = marshal.dumps(compile("import no_such_module", "launch.py", "exec"))
    monkeypatch.setattr("sandbox_gateway.runtimes.forkserver.launch_code", lambda: code)
    with pytest.raises(SandboxGatewayError, match="the launcher failed: ModuleNotFoundError"):
        await forkserver.launcher("marker")
    code = marshal.dumps(compile("pass", "launch.py", "exec"))
    with pytest.raises(SandboxGatewayError, match="does not stay"):
        await forkserver.launcher("marker")


async def test_twenty_at_once_have_one_forkserver(paths: Paths, forkserver: Forkserver) -> None:
    """Whoever comes first begins it, and each gets a launcher of its own."""
    places = [paths.sandbox(f"kernel-{number}") for number in range(20)]
    for place in places:
        place.mkdir()
    programs = [Launcher(place, forkserver) for place in places]
    try:
        await asyncio.gather(*(asyncio.shield(program._connecting) for program in programs))
        for place in places:
            await asyncio.wait_for(_found(place), 10)
        parents = {_parent(ref) for place in places for ref in marked(place)}
        assert len(parents) == 1
    finally:
        for program in programs:
            await program.close()
    assert not any(map(marked, places))


async def test_a_launcher_that_fails_says_why(directory: Path, forkserver: Forkserver) -> None:
    """What it cannot read, and a marker that has no room, come back as its last words."""
    for marker, said in ((f"{MARKER}=x", b"bad marshal data"), ("x" * 8000, b"too long")):
        connection = await forkserver.launcher(marker)
        with connection:
            connection.setblocking(True)
            connection.settimeout(10)
            connection.sendall(b"\xff")
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                assert said in answer.read()


async def test_one_that_is_killed_before_it_answers_is_an_error(directory: Path, forkserver: Forkserver) -> None:
    """Whoever waits for it is not left waiting."""
    program = Launcher(directory, forkserver)
    try:
        await asyncio.wait_for(_found(directory), 10)
        processes.kill_all(marked(directory), 10)
        with pytest.raises(SandboxGatewayError, match="the launcher failed: it was killed"):
            await program.launch([sys.executable, "-c", "pass"])
    finally:
        await program.close()


async def test_holder_reaps_what_is_left_to_it(directory: Path) -> None:
    """The ended process is no zombie, and neither is an orphan below it."""
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(100)\nos.read(0, 1)\nos._exit(0)"
    async with launched(directory, code) as found:
        await asyncio.wait_for(_asleep(found.holder), 10)  # one that never saw its process has nothing to hold
        Fifos.inside(directory).stdin.write_bytes(b"x")
        await asyncio.wait_for(processes.wait_exit(found.process), 10)
        (orphan,) = [pid for pid in processes.descendants([found.holder.pid]) if pid != found.holder.pid]
        ref = ProcessRef.of(orphan)
        assert ref is not None
        ref.kill()
        await asyncio.wait_for(processes.wait_exit(ref), 10)
        for _ in range(200):
            if not os.path.exists(f"/proc/{orphan}"):
                break
            await asyncio.sleep(0.01)
        assert not os.path.exists(f"/proc/{orphan}")


async def _asleep(holder: ProcessRef) -> None:
    """Return when it has become what it stays, and waits."""
    wait_until_executed(holder.pid)
    seen = 0
    while seen < 5:
        state = Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0]
        seen = seen + 1 if state == "S" else 0
        await asyncio.sleep(0.01)


async def test_without_gnu_tail_python_holds(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback holder ends by itself with the process."""
    monkeypatch.setattr(launcher, "holder_command", lambda: None)
    async with launched(directory, "import time; time.sleep(100)") as found:
        assert found.holder.alive()
        found.process.kill()
        await asyncio.wait_for(processes.wait_exit(found.holder), 10)


async def test_failure_is_told_in_the_programs_own_words(directory: Path, tmp_path: Path) -> None:
    """A command that fails gives its last line, and nothing stays."""
    code = "import sys; print('first', file=sys.stderr); sys.exit('out of luck')"
    with pytest.raises(SandboxGatewayError, match="out of luck"):
        await launch([sys.executable, "-S", "-c", code], directory, pid_file=tmp_path / "pid")
    assert processes.find(lambda argv, environment: f"{MARKER}={directory}" in environment) == []


async def test_missing_program_and_missing_group_are_errors(directory: Path) -> None:
    """What cannot be started or joined is an error of the runtime, not a hang."""
    with pytest.raises(SandboxGatewayError, match="No such file"):
        await launch(["/nonexistent/program"], directory)
    with pytest.raises(SandboxGatewayError, match=r"cgroup\.procs"):
        await launch([sys.executable], directory, join=["/nonexistent/cgroup.procs"])


async def test_cores_are_bound(directory: Path) -> None:
    """Where time cannot be limited the program gets some of the cores."""
    core = min(os.sched_getaffinity(0))
    async with launched(directory, "import time; time.sleep(100)", cores=[core]) as found:
        assert os.sched_getaffinity(found.process.pid) == {core}


async def test_last_words_survive_their_speaker(directory: Path) -> None:
    """What was said on standard error can be read after the end, by who held it or while the holder is there."""
    # It stays a moment: a holder that finds nobody alive does not stay either.
    async with launched(directory, "import os, time; os.write(2, b'farewell'); time.sleep(1)") as found:
        with launcher.LastWords(directory) as held:
            await asyncio.wait_for(processes.wait_exit(found.process), 10)
            with launcher.LastWords(directory) as later:
                assert later.read() == "farewell"
            assert held.read() == ""
    with launcher.LastWords(directory / "none") as nothing:
        assert nothing.read() == ""


async def test_our_own_process_is_no_subreaper(directory: Path) -> None:
    """An embedding application's children stay what they were: nothing global is changed."""
    import ctypes

    async with launched(directory, "import time; time.sleep(100)") as found:
        value = ctypes.c_int(-1)
        assert ctypes.CDLL(None).prctl(37, ctypes.byref(value), 0, 0, 0) == 0
        assert value.value == 0
        assert found.holder.pid not in processes.descendants([os.getpid()])
