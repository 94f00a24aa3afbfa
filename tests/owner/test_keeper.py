"""The keeper: one per installation, there when it is needed, gone when it is not, and in nobody's way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef, wait_exit
from sandbox_gateway.keeper import (
    ask_keeper,
    drive,
    ensure_keeper,
    keeper_directory,
    keeper_log,
    keeper_pid,
    process,
    spawn,
    start,
    take_over,
)
from sandbox_gateway.keeper.process import Keeper
from sandbox_gateway.keeper.start import keeper_socket
from sandbox_gateway.kernel_exit import KernelExit
from sandbox_gateway.model import Death, DeathKind, OnOwnerExit, State
from sandbox_gateway.owner import OwnerLock, OwnerServer, ask, holder, report_progress


@dataclass
class Record:
    on_owner_exit: OnOwnerExit
    name: str = ""


@dataclass
class Channels:
    settled: bool = True


@dataclass
class Seat:
    connected: bool = False
    channels: Channels = field(default_factory=Channels)


@dataclass
class Kernel:
    exit: KernelExit | None = None


class Sandbox:
    """One that is only played: its lock is held, and its record can be changed."""

    def __init__(self, sandbox_id: str, lock: OwnerLock, policy: OnOwnerExit) -> None:
        self.id = sandbox_id
        self.lock = lock
        self.record = Record(policy)
        self.state = State.RUNNING
        self.seat = Seat()
        self.kernel = Kernel()
        self.death: Death | None = None

    async def destroy(self, death: Death) -> None:
        self.death = death
        self.lock.release(remove=True)

    async def amend(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)


@dataclass
class Outcome:
    id: str
    error: SandboxGatewayError | None = None


class Lifecycle:
    """What a keeper drives, without sandboxes: it holds locks, and answers for them."""

    def __init__(self, paths: Paths, policy: OnOwnerExit = OnOwnerExit.TERMINATE) -> None:
        self.paths = paths
        self.policy = policy
        self.live: dict[str, Sandbox] = {}
        self.asked: list[tuple[str, str, Mapping[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        # Several play in one process.
        socket_path = paths.runtime / "owners" / f"{id(self)}.sock"
        self.server = OwnerServer(paths, self.answer, socket_path=socket_path)
        self.closed = False

    async def adopt(self, sandbox_id: str) -> Sandbox:
        if sandbox_id.startswith("unknown"):
            raise SandboxGatewayError("unknown_sandbox", f"there is no sandbox {sandbox_id}")
        if not self.server.path.exists():
            await self.server.start()
        lock = OwnerLock(self.paths.sandbox(sandbox_id), self.server.path)
        lock.acquire()
        self.live[sandbox_id] = Sandbox(sandbox_id, lock, self.policy)
        return self.live[sandbox_id]

    async def spawn(self, snapshot_id: str, count: int = 1) -> list[Outcome]:
        children = [Outcome((await self.adopt(f"{snapshot_id}-{number}")).id) for number in range(count - 1)]
        return [*children, Outcome("last", SandboxGatewayError("restore_failed", "no memory for the last"))]

    async def answer(self, op: str, sandbox_id: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append((op, sandbox_id, params))
        if sandbox_id not in self.live:
            raise SandboxGatewayError("unknown_sandbox", f"this process does not own sandbox {sandbox_id}")
        if op in ("hand_over", "stop"):
            self.live.pop(sandbox_id).lock.release(remove=op == "stop")
        report_progress({"message": op})
        answer = self.answers.get(op, {"did": op})
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def hand_over(self, sandbox_id: str) -> None:
        self.live.pop(sandbox_id).lock.release(remove=True)

    async def close(self) -> None:
        self.closed = True
        for sandbox in self.live.values():
            sandbox.lock.release(remove=True)
        self.live.clear()
        await self.server.stop()


@contextlib.asynccontextmanager
async def keeping(paths: Paths) -> AsyncIterator[tuple[Lifecycle, asyncio.Task[None]]]:
    """A keeper of this process, with a lifecycle that only plays."""
    directory = keeper_directory(paths)
    lock = OwnerLock(directory, server=keeper_socket(paths))
    lock.acquire()
    lifecycle = Lifecycle(paths)

    async def make() -> Lifecycle:
        return lifecycle

    made = Keeper(paths, lock, make)
    up = asyncio.Event()
    running = asyncio.create_task(made.run(up.set))
    up_or_failed = asyncio.create_task(up.wait())
    await asyncio.wait({running, up_or_failed}, return_when=asyncio.FIRST_COMPLETED)
    up_or_failed.cancel()
    try:
        yield lifecycle, running
    finally:
        made.end()
        await running


@contextlib.asynccontextmanager
async def owning(paths: Paths, sandbox_id: str) -> AsyncIterator[Lifecycle]:
    """An application of this process that owns a sandbox."""
    lifecycle = Lifecycle(paths)
    await lifecycle.adopt(sandbox_id)
    try:
        yield lifecycle
    finally:
        await lifecycle.close()


async def ended(pid: int, timeout: float = 30.0) -> None:
    """Wait for a process that is nobody's child here."""
    found = ProcessRef.of(pid)
    if found is not None:
        async with asyncio.timeout(timeout):
            await wait_exit(found)


async def end_keeper(paths: Paths) -> None:
    pid = keeper_pid(paths)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        await ended(pid)


@pytest.fixture(autouse=True)
def lingering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keepers here and in processes of their own stay long without a sandbox: a slow machine takes its time between
    two steps of a test, which ends them itself."""
    monkeypatch.setattr(process, "LINGER", 60.0)
    folder = tmp_path / "lingering"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("from sandbox_gateway.keeper import process\nprocess.LINGER = 60.0\n")
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", search)


@pytest.fixture
async def after(paths: Paths) -> AsyncIterator[Paths]:
    """The installation; a keeper that is left is ended."""
    yield paths
    await end_keeper(paths)


# In this process


async def test_it_adopts_what_nobody_owns_and_is_then_the_owner(paths: Paths) -> None:
    async with keeping(paths) as (lifecycle, _):
        await ask_keeper(paths, "adopt", "s1")
        await ask_keeper(paths, "adopt", "s1")
        assert list(lifecycle.live) == ["s1"] and holder(paths.sandbox("s1")) == os.getpid()
        assert await drive(paths, "s1", "resume") == {"did": "resume"}


async def test_it_takes_nothing_from_an_application(paths: Paths) -> None:
    async with owning(paths, "s1") as application, keeping(paths) as (lifecycle, _):
        with pytest.raises(SandboxGatewayError) as caught:
            await ask_keeper(paths, "adopt", "s1")
        assert caught.value.code == "owned_elsewhere"
        assert list(application.live) == ["s1"] and lifecycle.live == {}


async def test_an_application_takes_over_from_it(paths: Paths) -> None:
    async with keeping(paths) as (lifecycle, _):
        await ask_keeper(paths, "adopt", "s1")
        application = Lifecycle(paths)
        assert (await take_over(application, "s1")).id == "s1"
        assert list(application.live) == ["s1"] and lifecycle.live == {}
        with pytest.raises(SandboxGatewayError, match="there is no sandbox"):
            await take_over(application, "unknown")
        await application.close()


@pytest.mark.parametrize(
    ("policy", "then"),
    [
        (OnOwnerExit.TERMINATE, OnOwnerExit.KEEP),
        (OnOwnerExit.KEEP, OnOwnerExit.KEEP),
        (OnOwnerExit.SUSPEND, OnOwnerExit.SUSPEND),
    ],
)
async def test_what_it_keeps_does_not_end_with_it(paths: Paths, policy: OnOwnerExit, then: OnOwnerExit) -> None:
    async with keeping(paths) as (lifecycle, _):
        lifecycle.policy = policy
        await ask_keeper(paths, "adopt", "s1")
        assert lifecycle.live["s1"].record.on_owner_exit is then


async def test_children_are_its_own_and_each_outcome_is_told(paths: Paths) -> None:
    async with keeping(paths) as (lifecycle, _):
        children = await spawn(paths, "snap", 3, "a name")
        assert [child["id"] for child in children] == ["snap-0", "snap-1", "last"]
        assert [child["error"] and child["error"]["message"] for child in children] == [
            None,
            None,
            "no memory for the last",
        ]
        assert {child.record.name for child in lifecycle.live.values()} == {"a name"}
        assert {child.record.on_owner_exit for child in lifecycle.live.values()} == {OnOwnerExit.KEEP}
        with pytest.raises(SandboxGatewayError) as caught:
            await ask_keeper(paths, "spawn", "snap", {"count": "many"})
        assert caught.value.code == "invalid_request"


async def test_what_takes_long_is_not_taken_for_stuck(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_gateway.owner.SIGN_OF_LIFE", 0.05)
    told: list[Mapping[str, Any]] = []

    async def slow(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(4.5)
        return {}

    server = OwnerServer(paths, slow)
    await server.start()
    with OwnerLock(paths.sandbox("s1")):
        assert await ask(paths, "s1", "suspend", 3.0, on_progress=told.append) == {}
    assert told == []
    await server.stop()


async def test_what_drives_a_sandbox_asks_the_owner_there_is(paths: Paths) -> None:
    told: list[Mapping[str, Any]] = []
    async with owning(paths, "s1") as application:
        assert await drive(paths, "s1", "suspend", {"reason": "x"}, told.append) == {"did": "suspend"}
        assert application.asked == [("suspend", "s1", {"reason": "x"})] and told == [{"message": "suspend"}]
        assert keeper_pid(paths) is None, "nobody needed a keeper"


async def test_what_drives_a_sandbox_without_owner_has_the_keeper_adopt_it(paths: Paths) -> None:
    async with keeping(paths) as (lifecycle, _):
        assert await drive(paths, "s1", "connect") == {"did": "connect"}
        assert lifecycle.asked == [("connect", "s1", {})]


async def test_the_owners_error_is_the_answer(paths: Paths) -> None:
    async with keeping(paths) as (lifecycle, _):
        lifecycle.answers["resume"] = SandboxGatewayError("restore_failed", "no heartbeat")
        with pytest.raises(SandboxGatewayError, match="no heartbeat") as caught:
            await drive(paths, "s1", "resume")
        assert caught.value.code == "restore_failed"
        with pytest.raises(SandboxGatewayError) as caught:
            await drive(paths, "unknown", "resume")
        assert caught.value.code == "unknown_sandbox"


async def test_an_owner_that_is_about_to_let_go_is_waited_for(paths: Paths) -> None:
    async with keeping(paths) as (lifecycle, _):
        leaving = Lifecycle(paths)
        lock = (await leaving.adopt("s1")).lock
        leaving.live.clear()

        async def let_go() -> None:
            while not leaving.asked:
                await asyncio.sleep(0)
            lock.release()

        going = asyncio.create_task(let_go())
        assert await drive(paths, "s1", "resume") == {"did": "resume"}
        assert leaving.asked and list(lifecycle.live) == ["s1"]
        await going
        await leaving.close()


async def test_it_ends_when_it_has_owned_nothing_for_a_moment(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LOOK", 0.05)
    async with keeping(paths) as (lifecycle, running):
        await ask_keeper(paths, "adopt", "s1")
        monkeypatch.setattr(process, "LINGER", 0.3)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.8):
                await asyncio.shield(running)
        await drive(paths, "s1", "stop")
        async with asyncio.timeout(10):
            await running
        assert lifecycle.closed
    assert keeper_pid(paths) is None and not keeper_directory(paths).exists()


async def test_it_ends_what_has_no_kernel_any_more_once_its_clients_have_everything(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_LOOK", 0.02)
    async with keeping(paths) as (lifecycle, _):
        for name in ("alive", "ended", "unread"):
            await ask_keeper(paths, "adopt", name)
        unread, ended = lifecycle.live["unread"], lifecycle.live["ended"]
        unread.seat.channels.settled = False
        unread.kernel.exit = KernelExit(None, 11, "tail", False)
        ended.kernel.exit = KernelExit(0, None, "", False)
        async with asyncio.timeout(10):
            while ended.death is None:
                await asyncio.sleep(0.01)
        lifecycle.live.pop("ended")
        assert ended.death == Death(DeathKind.EXITED, "the kernel exited with code 0", 0, None, "")
        assert unread.death is None and lifecycle.live["alive"].death is None
        monkeypatch.setattr(process, "LET_GO", 0.1)
        async with asyncio.timeout(10):
            while unread.death is None:
                await asyncio.sleep(0.01)
        lifecycle.live.pop("unread")
        assert (unread.death.signal, unread.death.stderr_tail) == (11, "tail")
        assert "SIGSEGV" in unread.death.describe()


async def test_it_lets_go_of_what_is_suspended_and_has_no_clients(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LET_GO", 0.3)
    monkeypatch.setattr(process, "_LOOK", 0.02)
    async with keeping(paths) as (lifecycle, running):
        for name in ("running", "watched", "alone"):
            await ask_keeper(paths, "adopt", name)
        lifecycle.live["watched"].state = lifecycle.live["alone"].state = State.SUSPENDED
        lifecycle.live["watched"].seat.connected = True
        async with asyncio.timeout(10):
            while "alone" in lifecycle.live:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert set(lifecycle.live) == {"running", "watched"} and not running.done()
        assert holder(paths.sandbox("alone")) is None


async def test_garbage_on_its_socket_is_refused_and_changes_nothing(paths: Paths) -> None:
    async with keeping(paths) as (_, running):
        for garbage in (b"\n", b"\x00" * 4096 + b"\n", b"[" * 100_000 + b"\n", b'{"op": 1}\n', b'{"op":"x","id":""}\n'):
            reader, writer = await asyncio.open_unix_connection(keeper_socket(paths))
            writer.write(garbage)
            answer = json.loads(await reader.readline())
            assert answer["error"]["code"] == "invalid_request"
            writer.close()
            await writer.wait_closed()
        for _ in range(20):
            reader, writer = await asyncio.open_unix_connection(keeper_socket(paths))
            writer.write(os.urandom(2 << 20))
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        assert await ask_keeper(paths, "ping") == {"sandboxes": 0}
        assert not running.done()


async def test_a_socket_whose_file_is_removed_comes_back(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_gateway.owner.WATCH_INTERVAL", 0.05)
    async with owning(paths, "s1") as application:
        application.server.path.unlink()
        application.server.path.parent.rmdir()
        assert await drive(paths, "s1", "resume") == {"did": "resume"}


async def test_of_many_that_take_over_each_gets_it_in_turn(paths: Paths) -> None:
    async with owning(paths, "s1"):
        takers = [Lifecycle(paths) for _ in range(5)]
        turns = []

        async def one(taker: Lifecycle) -> None:
            await take_over(taker, "s1")
            assert [other for other in takers if other.live] == [taker]
            turns.append(taker)

        await asyncio.gather(*map(one, takers))
        assert len(turns) == 5
        for taker in takers:
            await taker.close()


# As a process of its own


async def test_it_is_started_detached_with_nothing_of_its_starter(
    after: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET_OF_THE_STARTER", "hunter2")
    with socket.socket() as inherited:
        inherited.set_inheritable(True)
        await ensure_keeper(after)
        pid = keeper_pid(after)
        assert pid is not None
        proc = Path("/proc", str(pid))
        targets = [os.readlink(link) for link in (proc / "fd").iterdir()]
        assert f"socket:[{os.fstat(inherited.fileno()).st_ino}]" not in targets
    assert b"hunter2" not in (proc / "environ").read_bytes()
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    assert int(fields[3]) != os.getsid(0), "it is in a session of its own"
    assert int(fields[1]) != os.getpid(), "it is not our child"
    assert os.readlink(proc / "cwd") == "/"
    assert os.readlink(proc / "fd" / "0") == os.devnull
    assert os.readlink(proc / "fd" / "1") == os.readlink(proc / "fd" / "2") == str(keeper_log(after))
    assert keeper_log(after).stat().st_mode & 0o777 == 0o600


async def test_sigterm_ends_it_and_it_leaves_no_file(after: Paths) -> None:
    await ensure_keeper(after)
    pid = keeper_pid(after)
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    await ended(pid)
    assert keeper_pid(after) is None
    assert list(after.runtime.iterdir()) == []


async def test_after_kill_9_the_next_one_takes_its_place(after: Paths) -> None:
    await ensure_keeper(after)
    first = keeper_pid(after)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await ended(first)
    await ensure_keeper(after)
    assert keeper_pid(after) not in (None, first)


STARTER = """
import asyncio, sys
from sandbox_gateway.host.paths import discover
from sandbox_gateway.keeper import ensure_keeper, keeper_pid
paths = discover({"SANDBOX_GATEWAY_HOME": sys.argv[1]}).ensure()
print("ready", flush=True)
sys.stdin.read()
asyncio.run(ensure_keeper(paths))
print(keeper_pid(paths))
"""


async def test_many_that_start_one_at_once_get_the_same(after: Paths) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(after.home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(20)
    ]
    try:
        for starter in starters:
            assert starter.stdout is not None and starter.stdout.readline() == "ready\n"
        for starter in starters:
            assert starter.stdin is not None
            starter.stdin.close()
        pids = set()
        for starter in starters:
            assert starter.stdout is not None
            pids.add(await asyncio.to_thread(starter.stdout.read))
            assert starter.wait(60) == 0
        assert len(pids) == 1, pids
    finally:
        for starter in starters:
            starter.kill()
            starter.wait()
            for pipe in (starter.stdin, starter.stdout):
                assert pipe is not None
                pipe.close()


async def test_why_it_cannot_start_is_told(after: Paths) -> None:
    after.database.mkdir()
    with pytest.raises(SandboxGatewayError) as caught:
        await ensure_keeper(after)
    assert caught.value.code == "data_directory" and str(after.database) in caught.value.message
    assert keeper_pid(after) is None and list(after.runtime.iterdir()) == []


@pytest.fixture
def full(paths: Paths) -> Iterator[Paths]:
    """An installation on a disk without room."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "none", str(paths.home)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode()}")
    try:
        with open(paths.home / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield paths
    finally:
        subprocess.run(["umount", "-l", str(paths.home)], check=True)


async def test_a_full_disk_is_told_as_such_and_nothing_is_left(full: Paths) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        await ensure_keeper(full)
    assert caught.value.code == "disk_full", caught.value
    assert keeper_pid(full) is None
    (full.home / "filling").unlink()
    await ensure_keeper(full)
    await end_keeper(full)


async def test_one_whose_directory_is_removed_is_found_again(after: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    await ensure_keeper(after)
    first = keeper_pid(after)
    assert first is not None
    shutil.rmtree(after.runtime / "owners")
    assert keeper_pid(after) is None
    await ensure_keeper(after)
    second = keeper_pid(after)
    assert second not in (None, first), "another one answers at once"
    os.kill(first, signal.SIGTERM)
    await ended(first)
    assert keeper_pid(after) == second, "the end of the first does not harm it"
    assert await ask_keeper(after, "ping") == {"sandboxes": 0}


async def test_a_crash_at_its_start_is_told_by_its_logs_last_line(
    after: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "sandbox_gateway"
    (broken / "keeper").mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "keeper" / "__init__.py").write_text("")
    (broken / "keeper" / "__main__.py").write_text("raise RuntimeError('the sky fell')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SandboxGatewayError, match="RuntimeError: the sky fell") as caught:
        await ensure_keeper(after)
    assert caught.value.code == "owner_unreachable" and str(keeper_log(after)) in caught.value.hint


async def test_one_that_hangs_at_its_start_is_given_up(
    after: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "sandbox_gateway"
    (slow / "keeper").mkdir(parents=True)
    (slow / "__init__.py").write_text("")
    (slow / "keeper" / "__init__.py").write_text("")
    (slow / "keeper" / "__main__.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(start, "START_TIMEOUT", 1.0)
    begun = time.monotonic()
    with pytest.raises(SandboxGatewayError, match="did not start"):
        await ensure_keeper(after)
    assert time.monotonic() - begun < 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")
async def test_an_installation_of_another_user_gets_no_keeper_of_ours(after: Paths) -> None:
    os.chown(after.home, 12345, 12345)
    with pytest.raises(SandboxGatewayError, match="not a directory of this user") as caught:
        await ensure_keeper(after)
    assert caught.value.code == "data_directory"
    os.chown(after.home, 0, 0)


async def test_its_log_is_bounded(after: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    after.logs.mkdir()
    keeper_log(after).write_bytes(b"x" * 5000)
    monkeypatch.setattr(start, "LOG_LIMIT", 4096)
    await ensure_keeper(after)
    assert keeper_log(after).stat().st_size < 4096


def test_it_can_be_started_from_any_thread_without_a_loop_of_its_own(paths: Paths) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            asyncio.run(ensure_keeper(paths))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(end_keeper(paths))
    assert failures == []
