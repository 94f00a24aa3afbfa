"""One owner at a time: the socket on which the holder of a sandbox's lock answers, and asking it.

Each owning process answers on one socket, ``<runtime>/owners/<pid>-<tag>.sock`` (mode 0600, the peer's uid checked),
for all of its sandboxes (DESIGN 4.8). One connection carries one request, as lines of JSON::

    -> {"op": "stop", "id": "<sandbox>", "params": {...}}
    <- {"progress": {...}}                  any number of these; an empty one is a sign of life
    <- {"ok": {...}}  or  {"error": {"code": ..., "message": ..., "hint": ...}}
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import json
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.owner_lock import LOCK_NAME, OWNERS, OwnerLock, default_socket, find_holder, holder, renew_held

log = logging.getLogger(__name__)

__all__ = [
    "LOCK_NAME",
    "OWNERS",
    "NoOwner",
    "OwnerLock",
    "OwnerServer",
    "ask",
    "ask_holder",
    "default_socket",
    "holder",
    "progress_to",
    "report_progress",
    "sweep",
]

MAX_REQUEST: Final = 1 << 20
"""Bytes of one request line."""
MAX_ANSWER: Final = 8 << 20
"""Bytes of one line that an owner answers."""
WATCH_INTERVAL = 10.0
"""Seconds between an owner's looks whether its socket's file is still there."""
SIGN_OF_LIFE: Final = 5.0
"""Seconds between an owner's words to who waits for something that takes long."""
_REQUEST_TIMEOUT = 10.0
_PEERCRED = struct.Struct("3i")

Handler = Callable[[str, str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Carries out ``(op, sandbox id, params)``; may raise :class:`SandboxGatewayError` and :func:`report_progress`."""


class NoOwner(SandboxGatewayError):
    """Nobody owns the sandbox: take the lock and adopt it.

    ``died``: there was an owner, and it ended over the request, which may have been carried out in part.
    """

    def __init__(self, sandbox_id: str, *, died: bool = False) -> None:
        super().__init__("owner_unreachable", f"no process owns sandbox {sandbox_id}")
        self.died = died


# The owner's side of the socket

_asker: contextvars.ContextVar[_Hears | None] = contextvars.ContextVar("sandbox_gateway_asker", default=None)


def report_progress(progress: Mapping[str, Any]) -> bool:
    """From within a handler: tell the asker how far it is. False when nobody listens (any more)."""
    asker = _asker.get()
    return asker is not None and asker.send({"progress": dict(progress)})


@contextlib.contextmanager
def progress_to(listener: Callable[[Mapping[str, Any]], None] | None) -> Iterator[None]:
    """What is reported by :func:`report_progress` inside goes to ``listener``: for who does without an owner."""
    token = _asker.set(None if listener is None else _Listener(listener))
    try:
        yield
    finally:
        _asker.reset(token)


class _Hears(Protocol):
    def send(self, message: Mapping[str, Any]) -> bool: ...


class _Listener:
    def __init__(self, listener: Callable[[Mapping[str, Any]], None]) -> None:
        self._listener = listener

    def send(self, message: Mapping[str, Any]) -> bool:
        self._listener(message["progress"])
        return True


class _Asker:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def send(self, message: Mapping[str, Any]) -> bool:
        transport = self._writer.transport
        # An asker that does not read is not waited for: what it asked for is done all the same.
        if transport.is_closing() or transport.get_write_buffer_size() > 2 * MAX_ANSWER:
            return False
        line = _line(message)
        if len(line) > MAX_ANSWER:
            line = _line(
                {"error": SandboxGatewayError("internal", f"an answer of {len(line)} bytes is too long").as_dict()}
            )
        self._writer.write(line)
        return True


class OwnerServer:
    """Answers for the sandboxes that this process owns.

    A request is carried out to its end even when the asker goes away.
    """

    def __init__(self, paths: Paths, handler: Handler, *, socket_path: Path | None = None) -> None:
        self.path = socket_path if socket_path is not None else default_socket(paths.runtime)
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._inode: tuple[int, int] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether a request is being carried out."""
        return bool(self._tasks)

    async def start(self) -> None:
        """Listen on :attr:`path`, on the running loop. Raises ``data_directory`` when that cannot be."""
        self._server = await self._listen()
        self._watching = asyncio.create_task(self._watch())

    async def _listen(self) -> asyncio.Server:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(listening)
            found = os.stat(self.path, follow_symlinks=False)
            self._inode = (found.st_dev, found.st_ino)
        except OSError as error:
            listening.close()
            raise storage_error(error, f"cannot listen on {self.path}") from error
        listening.setblocking(False)
        # Made and started in two steps: one that is cancelled half-way would leave a server that nobody can close.
        server = await asyncio.start_unix_server(
            self._connected, sock=listening, limit=MAX_REQUEST, start_serving=False
        )
        try:
            await server.start_serving()
        except BaseException:
            server.close()
            raise
        return server

    def _bind(self, listening: socket.socket) -> None:
        directory = self.path.parent
        fresh = self.path.with_suffix(".new")
        for attempt in range(5):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep(directory)
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            try:
                listening.bind(os.fspath(fresh))
                break
            except FileNotFoundError:
                # Another process ended, and took the empty directory with it, between our two steps.
                if attempt == 4:
                    raise
        os.chmod(fresh, 0o600)
        listening.listen(64)
        # Under its own name only when it answers: whoever finds a name that refuses knows that its owner is dead.
        os.rename(fresh, self.path)

    def _in_place(self) -> bool:
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    async def _watch(self) -> None:
        """Listen again where somebody removed the socket's file (a cleaner of temporary directories); the locks too."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            renew_held()
            if not self._in_place():
                log.warning("%s was removed: it is made again", self.path)
                try:
                    fresh = await self._listen()
                except SandboxGatewayError as error:
                    log.error("%s", error)
                    continue
                old, self._server = self._server, fresh
                if old is not None:
                    old.close()

    async def stop(self) -> None:
        """Stop listening, cancel what is under way, and leave no file."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._in_place():
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        server.close()
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            uid = _peer_uid(writer.get_extra_info("socket"))
            if uid not in (os.geteuid(), 0):
                log.warning("uid %d was refused on the owner's socket", uid)
                return
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            # CancelledError is stop() at work; Python before 3.12 would log it as an unhandled error of the server's.
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asker = _Asker(writer)
        _asker.set(asker)
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                line = await reader.readline()
            if not line:
                return
            op, sandbox_id, params = _parse_request(line)
            async with _alive(asker):
                answer: dict[str, Any] = {"ok": dict(await self._handler(op, sandbox_id, params))}
        except SandboxGatewayError as error:
            answer = {"error": error.as_dict()}
        except ValueError as error:
            answer = {"error": SandboxGatewayError("invalid_request", f"not a request: {error}").as_dict()}
        except asyncio.CancelledError:
            asker.send({"error": SandboxGatewayError("owner_unreachable", "the owner is ending").as_dict()})
            raise
        except (OSError, TimeoutError):
            raise
        except Exception as error:
            log.exception("a request to the owner failed")
            answer = {"error": SandboxGatewayError("internal", f"{type(error).__name__}: {error}").as_dict()}
        asker.send(answer)
        await writer.drain()


@contextlib.asynccontextmanager
async def _alive(asker: _Asker) -> AsyncIterator[None]:
    """Give the asker a sign of life now and then: what takes long is not what is stuck."""

    async def beat() -> None:
        await asyncio.sleep(SIGN_OF_LIFE)
        while asker.send({"progress": {}}):
            await asyncio.sleep(SIGN_OF_LIFE)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


def sweep(directory: Path) -> None:
    """Remove the sockets that dead owners left in ``<runtime>/owners``."""
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.setblocking(False)
            if probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED:
                path.unlink()
    for path in directory.glob("*.new"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60.0:
                path.unlink()


def _peer_uid(connected: Any) -> int:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    uid: int = _PEERCRED.unpack(credentials)[1]
    return uid


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _parse_request(line: bytes) -> tuple[str, str, Mapping[str, Any]]:
    try:
        request = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(request, dict):
        raise ValueError("an object is expected")
    op, sandbox_id, params = request.get("op"), request.get("id"), request.get("params", {})
    if not (isinstance(op, str) and isinstance(sandbox_id, str) and isinstance(params, dict)):
        raise ValueError("op and id are texts, params is an object")
    return op, sandbox_id, params


# The asker's side

_APPEARANCE = 2.0
"""Seconds that an owner may take between taking a lock and answering on its socket."""


async def ask(
    paths: Paths,
    sandbox_id: str,
    op: str,
    timeout: float = 30.0,
    *,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    **params: Any,
) -> dict[str, Any]:
    """Ask the owner of a sandbox to do something; returns what its handler did.

    ``timeout`` is in seconds without a word from the owner. Raises :class:`NoOwner` when nobody owns the sandbox (also
    when the owner dies over it), ``owner_unreachable`` when the owner does not answer, or the owner's own error.
    """
    return await ask_holder(paths.sandbox(sandbox_id), sandbox_id, op, timeout, on_progress=on_progress, params=params)


async def ask_holder(
    directory: Path,
    sandbox_id: str,
    op: str,
    timeout: float = 30.0,
    *,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As :func:`ask`, of whoever holds the lock of ``directory``."""
    pid, connected = await _reach(directory)
    reader, writer = await asyncio.open_unix_connection(sock=connected, limit=MAX_ANSWER)
    try:
        writer.write(_line({"op": op, "id": sandbox_id, "params": dict(params or {})}))
        while True:
            async with asyncio.timeout(timeout):
                line = await reader.readline()
            if not line.endswith(b"\n"):
                raise ConnectionResetError("the connection was closed")
            answer = json.loads(line)
            if "ok" in answer:
                return dict(answer["ok"])
            if "error" in answer:
                raise SandboxGatewayError.from_dict(answer["error"])
            progress = answer.get("progress")
            if on_progress is not None and isinstance(progress, dict) and progress:
                on_progress(progress)
    except TimeoutError as error:
        raise SandboxGatewayError("owner_unreachable", f"process {pid} did not answer in {timeout:g} s") from error
    except OSError as error:
        if await _gone(directory, pid):
            raise NoOwner(sandbox_id, died=True) from error
        raise SandboxGatewayError("owner_unreachable", f"process {pid} hung up: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise SandboxGatewayError("owner_unreachable", f"process {pid} answered nonsense: {error}") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _reach(directory: Path) -> tuple[int, socket.socket]:
    deadline = time.monotonic() + _APPEARANCE
    while True:
        found = find_holder(directory)
        if found is None:
            raise NoOwner(directory.name)
        pid, path = found
        problem: object = "it has not said where it answers"
        if path is not None:
            connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connecting.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connecting, os.fspath(path))
                if _peer_uid(connecting) not in (os.geteuid(), 0):
                    raise PermissionError(errno.EPERM, "somebody else answers in its place")
                return pid, connecting
            except OSError as error:
                connecting.close()
                problem = error
            except BaseException:
                connecting.close()
                raise
        if time.monotonic() > deadline:
            raise SandboxGatewayError("owner_unreachable", f"process {pid} does not answer: {problem}")
        await asyncio.sleep(0.05)


async def _gone(directory: Path, pid: int) -> bool:
    # A dying process's descriptors are closed one after the other: its connection may end before its locks do.
    # Another holder is as good: somebody else was quicker to adopt.
    for _ in range(10):
        if holder(directory) not in (pid, 0):
            return True
        await asyncio.sleep(0.05)
    return False
