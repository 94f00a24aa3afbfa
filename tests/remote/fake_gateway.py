"""A small gateway in this process: the REST subset and the v1 WebSocket of the real one, before plain ipykernels.

It runs on a loop and a thread of its own. It isolates nothing, and knows tricks that a real one does not do on demand.
"""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import struct
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import Session
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

T = TypeVar("T")
V1 = "v1.kernel.websocket.jupyter.org"
LARGE = 256 << 20
PROFILE = {
    "name": "python3-fake",
    "display_name": "Python 3 (fake)",
    "description": "A plain kernel.",
    "language": "python",
    "runtime": "fake",
    "isolated": False,
    "client_environment": ["TZ", "AWS_*"],
}


@dataclass
class Peer:
    """One client session of one kernel: what it has not confirmed is sent again."""

    unconfirmed: deque[tuple[int, bytes]] = field(default_factory=deque)
    count: int = 0
    socket: Channels | None = None


class Kernel:
    """One sandbox."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.id = wanted.get("id") or str(uuid.uuid4())
        self.profile = wanted["profile"]
        self.name = wanted.get("name", "")
        self.environment = wanted.get("env", {})
        self.state = "creating"
        self.death: dict[str, Any] | None = None
        # Not TCP: a port that was free when it was chosen may be somebody else's when the kernel binds it.
        self.sockets = tempfile.TemporaryDirectory(prefix="sg-")
        self.manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{self.sockets.name}/k")
        self.client: AsyncKernelClient | None = None
        self.peers: dict[str, Peer] = {}
        self.readers: list[asyncio.Task[None]] = []
        self.routes: dict[str, str] = {}
        self.dropped: list[str] = []
        """The requests whose replies found nobody."""
        self.restarts = 0

    async def start(self) -> None:
        import os

        await self.manager.start_kernel(env={**os.environ, **self.environment})
        self.connect()
        assert self.client is not None
        self.state = "running"

    def connect(self) -> None:
        self.client = self.manager.client()
        self.client.session = Session(key=self.manager.session.key)
        self.client.start_channels(hb=False)
        for name in ("shell", "control", "stdin", "iopub"):
            self.readers.append(asyncio.create_task(self._read(name)))
        self.readers.append(asyncio.create_task(self._watch()))

    async def _read(self, name: str) -> None:
        assert self.client is not None
        socket = getattr(self.client, f"{name}_channel").socket
        while True:
            parts = await socket.recv_multipart()
            at = parts.index(b"<IDS|MSG>")
            body = parts[at + 2 :]
            if b"iopub_welcome" in body[0]:
                continue
            frame = encode(name, body)
            if name == "iopub":
                sessions = list(self.peers)
            else:
                parent = json.loads(body[1]).get("msg_id", "")
                sessions = [self.routes[parent]] if parent in self.routes else []
            for session in sessions:
                if session in self.peers:
                    self.send(self.peers[session], frame)
                elif name == "shell":
                    self.dropped.append(parent)

    async def _watch(self) -> None:
        while await self.manager.is_alive():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        code = getattr(self.manager.provisioner, "process", None)
        returned = code.poll() if code is not None else None
        self.state = "failed"
        self.death = {"kind": "exited", "reason": "the kernel ended by itself", "exit_code": returned, "signal": None}
        self.publish("status", {"execution_state": "dead"})

    def publish(self, kind: str, content: dict[str, Any]) -> None:
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": "", "username": "", "version": "5.3"}
        frame = encode("iopub", [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()])
        for peer in self.peers.values():
            self.send(peer, frame)

    def send(self, peer: Peer, frame: bytes) -> None:
        peer.count += 1
        peer.unconfirmed.append((peer.count, frame))
        if peer.socket is not None:
            peer.socket.send(peer.count, frame)

    async def stop_reading(self) -> None:
        for reader in self.readers:
            reader.cancel()
        await asyncio.gather(*self.readers, return_exceptions=True)
        self.readers.clear()
        if self.client is not None:
            self.client.stop_channels()
            self.client = None

    async def restart(self) -> None:
        self.restarts += 1
        self.publish("status", {"execution_state": "restarting"})
        await self.stop_reading()
        if self.state == "failed":
            await self.manager.cleanup_resources(restart=True)
            await self.start()
        else:
            await self.manager.restart_kernel(now=True)
            self.connect()
        self.state, self.death = "running", None

    async def end(self) -> None:
        await self.stop_reading()
        for peer in self.peers.values():
            if peer.socket is not None:
                peer.socket.close(1000, "the kernel is gone")
        if self.manager.has_kernel:
            await self.manager.shutdown_kernel(now=True)
        if self.manager.context is not None:
            self.manager.context.destroy(linger=0)
        self.sockets.cleanup()

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "state": self.state,
            "profile": self.profile,
            "owner": "default",
            "name": self.name,
            "death": self.death,
        }


class FakeGateway:
    """Listens on a port of 127.0.0.1 from :meth:`start` to :meth:`stop`."""

    def __init__(self, token: str, certificate: Path | None = None) -> None:
        self.token = token
        self._certificate = certificate
        self.kernels: dict[str, Kernel] = {}
        self.port = 0
        self.confirming = True
        """Whether clients' pongs count; else everything comes again after a reconnect."""
        self.forgetting = False
        """Whether a session is forgotten with its connection."""
        self.in_its_place = 0
        """The status that a tunnel on the way answers everything with; 0: it lets everything through."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, daemon=True)

    @property
    def url(self) -> str:
        return f"http{'s' if self._certificate else ''}://127.0.0.1:{self.port}"

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the gateway's loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def start(self) -> None:
        self._thread.start()
        self.call(self._listen())

    def stop(self) -> None:
        self.call(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def clear(self) -> None:
        """End every sandbox."""
        self.call(self._clear())

    def _turn(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _listen(self) -> None:
        routes: list[tuple[str, Any]] = [
            (r"/api/status", Status),
            (r"/api/profiles", Profiles),
            (r"/api/sandboxes", Sandboxes),
            (r"/api/sandboxes/([^/]+)", Sandbox),
            (r"/api/sandboxes/([^/]+)/(\w+)", Doing),
            (r"/api/kernels/([^/]+)/channels", Channels),
        ]
        application = Application(routes, websocket_max_message_size=LARGE, gateway=self)
        tls = None
        if self._certificate is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._certificate)
        self._server = HTTPServer(application, max_buffer_size=LARGE, ssl_options=tls)
        sockets = bind_sockets(0, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self._server.add_sockets(sockets)

    async def _clear(self) -> None:
        for kernel in tuple(self.kernels.values()):
            await kernel.end()
        self.kernels.clear()

    async def _end(self) -> None:
        await self._clear()
        self._server.stop()
        await self._server.close_all_connections()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Base(RequestHandler):
    @property
    def gateway(self) -> FakeGateway:
        found: FakeGateway = self.settings["gateway"]
        return found

    def prepare(self) -> None:
        if self.gateway.in_its_place:
            self.set_status(self.gateway.in_its_place, "Somebody Else")
            self.finish("<html>error code: 1033</html>")
            return
        if self.request.headers.get("Authorization") != f"token {self.gateway.token}":
            raise HTTPError(403, "Forbidden")

    def check_xsrf_cookie(self) -> None:
        pass

    def kernel(self, kernel_id: str) -> Kernel:
        found = self.gateway.kernels.get(kernel_id)
        if found is None:
            raise HTTPError(404, "unknown_sandbox")
        return found

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        code = {404: "unknown_sandbox", 409: "id_taken", 400: "invalid_request"}.get(status_code)
        self.finish({"message": "no", **({"code": code, "hint": ""} if code else {})})

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.request.body or b"{}")
        return found


class Status(Base):
    def get(self) -> None:
        self.finish({})


class Profiles(Base):
    def get(self) -> None:
        self.finish({"profiles": [PROFILE]})


class Sandboxes(Base):
    def get(self) -> None:
        self.finish({"sandboxes": [kernel.as_dict() for kernel in self.gateway.kernels.values()], "next": None})

    async def post(self) -> None:
        wanted = self.body()
        if set(wanted) - {"profile", "env", "id", "name"} or wanted.get("profile") != PROFILE["name"]:
            raise HTTPError(400)
        if wanted.get("id") in self.gateway.kernels:
            raise HTTPError(409)
        kernel = Kernel(wanted)
        self.gateway.kernels[kernel.id] = kernel
        await kernel.start()
        self.set_status(201)
        self.finish(kernel.as_dict())


class Sandbox(Base):
    def get(self, kernel_id: str) -> None:
        self.finish(self.kernel(kernel_id).as_dict())

    async def delete(self, kernel_id: str) -> None:
        kernel = self.kernel(kernel_id)
        del self.gateway.kernels[kernel_id]
        await kernel.end()
        self.set_status(204)
        self.finish()


class Doing(Base):
    async def post(self, kernel_id: str, what: str) -> None:
        kernel = self.kernel(kernel_id)
        if what == "interrupt":
            await kernel.manager.interrupt_kernel()
        elif what == "restart":
            await kernel.restart()
        elif what in ("suspend", "pause"):
            await kernel.manager.signal_kernel(signal.SIGSTOP)
            kernel.state = "suspended" if what == "suspend" else "paused"
        elif what == "resume":
            await kernel.manager.signal_kernel(signal.SIGCONT)
            kernel.state = "running"
        else:
            raise HTTPError(404)
        self.finish(kernel.as_dict())


class Channels(Base, WebSocketHandler):
    """One WebSocket."""

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return V1 if V1 in subprotocols else None

    async def get(self, kernel_id: str) -> None:
        self._kernel = self.kernel(kernel_id)
        self.set_header("Sandbox-Session", "resumed" if self._known else "new")
        await super().get(kernel_id)

    @property
    def _known(self) -> bool:
        return self.get_argument("session_id") in self._kernel.peers

    def open(self, kernel_id: str) -> None:
        self.set_nodelay(True)
        session = self.get_argument("session_id")
        self._session = session
        self._peer = self._kernel.peers.setdefault(session, Peer())
        if self._peer.socket is not None:
            self._peer.socket.close(1012, "another connection")
        self._peer.socket = self
        for number, frame in self._peer.unconfirmed:
            self.send(number, frame)

    def send(self, number: int, frame: bytes) -> None:
        try:
            future = self.write_message(frame, binary=True)
            self.ping(str(number).encode())
        except WebSocketClosedError:
            return
        future.add_done_callback(lambda done: done.exception())

    def on_pong(self, data: bytes) -> None:
        if self.gateway.confirming:
            while self._peer.unconfirmed and self._peer.unconfirmed[0][0] <= int(data):
                self._peer.unconfirmed.popleft()

    def on_message(self, message: str | bytes) -> None:
        assert isinstance(message, bytes)
        name, body = decode(message)
        client = self._kernel.client
        if client is None:
            return
        self._kernel.routes[json.loads(body[0])["msg_id"]] = self._session
        signature = client.session.sign(body[:4])
        getattr(client, f"{name}_channel").socket.send_multipart([b"<IDS|MSG>", signature, *body])

    def on_close(self) -> None:
        if hasattr(self, "_peer") and self._peer.socket is self:
            self._peer.socket = None
            if self.gateway.forgetting:
                self._kernel.peers.pop(self._session, None)


def encode(channel: str, body: list[bytes]) -> bytes:
    """A v1 frame."""
    pieces = [channel.encode(), *body]
    offsets = [8 * (len(pieces) + 2)]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return b"".join((struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets), *pieces))


def decode(frame: bytes) -> tuple[str, list[bytes]]:
    """The channel and the parts of a v1 frame."""
    (count,) = struct.unpack_from("<Q", frame)
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    pieces = [frame[begin:end] for begin, end in pairwise(offsets)]
    return pieces[0].decode(), pieces[1:]
