"""The owner's socket: asking the process that owns a sandbox, and noticing when it is not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway import owner
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.owner import NoOwner, OwnerLock, OwnerServer, ask, report_progress


@pytest.fixture
def places():
    with tempfile.TemporaryDirectory(prefix="sg-") as home:
        paths = Paths(Path(home), Path(home) / "run").ensure()
        yield paths
        assert sorted(path.name for path in paths.runtime.glob("owners/*")) == [], "a socket was left"


async def echo(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"op": op, "id": sandbox_id, **params}


@contextlib.asynccontextmanager
async def owning(paths: Paths, handler: owner.Handler, sandbox_id: str = "s1"):
    server = OwnerServer(paths, handler)
    await server.start()
    lock = OwnerLock(paths.sandbox(sandbox_id))
    lock.acquire()
    try:
        yield server
    finally:
        lock.release(remove=True)
        await server.stop()


async def test_the_owner_answers(places: Paths):
    async with owning(places, echo):
        assert await ask(places, "s1", "stop", grace=2.0) == {"op": "stop", "id": "s1", "grace": 2.0}
        answers = await asyncio.gather(*(ask(places, "s1", "x", n=n) for n in range(100)))
        assert [answer["n"] for answer in answers] == list(range(100))


async def test_the_owners_own_error_comes_back(places: Paths):
    async def refuse(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        raise SandboxGatewayError("illegal_transition", "not now", "later")

    async with owning(places, refuse):
        with pytest.raises(SandboxGatewayError) as caught:
            await ask(places, "s1", "pause")
    assert caught.value.as_dict() == {"code": "illegal_transition", "message": "not now", "hint": "later"}


async def test_a_bug_in_the_handler_is_an_internal_error(places: Paths):
    async def fail(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        return {"x": 1 / 0}

    async with owning(places, fail):
        with pytest.raises(SandboxGatewayError, match="ZeroDivisionError") as caught:
            await ask(places, "s1", "x")
        assert caught.value.code == "internal"


async def test_progress_comes_before_the_result(places: Paths):
    async def slow(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        for n in range(3):
            assert report_progress({"done": n})
        return {}

    seen: list[Mapping[str, Any]] = []
    async with owning(places, slow):
        assert await ask(places, "s1", "x", on_progress=seen.append) == {}
    assert seen == [{"done": 0}, {"done": 1}, {"done": 2}]
    assert not report_progress({}), "nobody asked"


async def test_nobody_owns_it(places: Paths):
    with pytest.raises(NoOwner):
        await ask(places, "s1", "stop")
    async with owning(places, echo):
        with pytest.raises(NoOwner):
            await ask(places, "another", "stop")
    with pytest.raises(NoOwner):
        await ask(places, "s1", "stop")


OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.owner import OwnerLock, OwnerServer
paths = Paths(Path(sys.argv[1]), Path(sys.argv[1]) / "run")
async def handler(op, sandbox_id, params):
    if op == "die": os.kill(os.getpid(), signal.SIGKILL)
    return {"pid": os.getpid()}
async def main():
    if "mute" not in sys.argv: await OwnerServer(paths, handler).start()
    lock = OwnerLock(paths.sandbox("s1")); lock.acquire()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@contextlib.contextmanager
def owning_process(paths: Paths, *arguments: str):
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(paths.home), *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        owner.sweep(paths.runtime / "owners")


async def test_an_owner_in_another_process_answers_and_its_death_is_told_apart(places: Paths):
    with owning_process(places) as process:
        assert await ask(places, "s1", "x") == {"pid": process.pid}
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(places.runtime.glob("owners/*.sock")), "its socket is stale"
        with pytest.raises(NoOwner):
            await ask(places, "s1", "x")


async def test_an_owner_that_dies_over_a_request_is_no_owner(places: Paths):
    with owning_process(places), pytest.raises(NoOwner):
        await ask(places, "s1", "die")


async def test_an_owner_that_is_stopped_is_unreachable(places: Paths):
    with owning_process(places) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(SandboxGatewayError, match=str(process.pid)) as caught:
            await ask(places, "s1", "x", timeout=0.2)
        assert caught.value.code == "owner_unreachable" and not isinstance(caught.value, NoOwner)


async def test_an_owner_without_a_socket_is_unreachable(places: Paths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner, "_APPEARANCE", 0.1)
    with owning_process(places, "mute") as process:
        with pytest.raises(SandboxGatewayError, match=str(process.pid)) as caught:
            await ask(places, "s1", "x")
        assert caught.value.code == "owner_unreachable" and not isinstance(caught.value, NoOwner)


async def test_an_owner_whose_socket_comes_late_is_waited_for(places: Paths):
    lock = OwnerLock(places.sandbox("s1"))
    lock.acquire()
    server = OwnerServer(places, echo)
    asking = asyncio.ensure_future(ask(places, "s1", "x"))
    await asyncio.sleep(0)
    await server.start()
    assert (await asking)["op"] == "x"
    await server.stop()
    lock.release(remove=True)


async def test_start_sweeps_the_sockets_of_the_dead_and_no_others(places: Paths):
    dead = places.runtime / "owners" / "1-dead.sock"
    dead.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
    with owning_process(places) as process:
        assert not dead.exists()
        async with owning(places, echo, "s2"):
            assert await ask(places, "s1", "x") == {"pid": process.pid}
            assert (await ask(places, "s2", "x"))["id"] == "s2"


async def test_the_socket_is_private_and_goes_with_the_server(places: Paths):
    async with owning(places, echo) as server:
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(server.path.parent.stat().st_mode) == 0o700
        assert len(os.fsencode(server.path)) <= 107
    assert not server.path.parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
async def test_another_user_is_refused_even_where_the_modes_let_it_in(places: Paths):
    program = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(10); os.setgroups([])\n"
        "os.setgid(65534); os.setuid(65534); s.connect(sys.argv[1])\n"
        's.sendall(b\'{"op": "x", "id": "s1"}\\n\'); data = s.recv(100)\n'
        "sys.exit(0 if data == b'' else 1)\n"
    )
    async with owning(places, echo) as server:
        for directory in (places.home, places.runtime, server.path.parent):
            directory.chmod(0o711)
        server.path.chmod(0o666)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(server.path), stderr=-1)
        _, stderr = await process.communicate()
        assert process.returncode == 0 or b"ConnectionResetError" in stderr or b"BrokenPipe" in stderr, stderr


@pytest.mark.parametrize(
    "request_line",
    [b"\n", b"[]\n", b"nonsense\n", b'{"op": 1, "id": "s"}\n', b'{"op": "x", "id": "s", "params": 3}\n',
     b"[" * 100_000 + b"\n", b"\xff\n", b"x" * (owner.MAX_REQUEST + 10) + b"\n"],
    ids=["empty", "list", "text", "op", "params", "deep", "binary", "long"],
)  # fmt: skip
async def test_nonsense_gets_an_error_and_the_owner_goes_on(places: Paths, request_line: bytes):
    async with owning(places, echo) as server:
        reader, writer = await asyncio.open_unix_connection(str(server.path))
        with contextlib.suppress(ConnectionError):
            writer.write(request_line)
            answer = json.loads(await reader.readline())
            assert answer["error"]["code"] == "invalid_request"
        writer.close()
        assert (await ask(places, "s1", "x"))["op"] == "x"


async def test_a_request_goes_on_when_its_asker_leaves(places: Paths):
    begun, leave, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        begun.set()
        await leave.wait()
        done.set()
        return {}

    async with owning(places, slow):
        asking = asyncio.ensure_future(ask(places, "s1", "x"))
        await begun.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        leave.set()
        await asyncio.wait_for(done.wait(), 10)


async def test_stopping_the_server_answers_who_still_waits(places: Paths):
    begun = asyncio.Event()

    async def forever(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        return {}

    async with owning(places, forever) as server:
        asking = asyncio.ensure_future(ask(places, "s1", "x"))
        await begun.wait()
        await server.stop()
        with pytest.raises(SandboxGatewayError) as caught:
            await asking
        assert caught.value.code == "owner_unreachable"


async def test_an_answer_beyond_the_bound_is_an_error(places: Paths):
    async def huge(op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        return {"x": "y" * params["size"]}

    async with owning(places, huge):
        assert len((await ask(places, "s1", "x", size=owner.MAX_ANSWER - 1000))["x"]) == owner.MAX_ANSWER - 1000
        with pytest.raises(SandboxGatewayError, match="too long"):
            await ask(places, "s1", "x", size=owner.MAX_ANSWER)
