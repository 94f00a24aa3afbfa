"""A tiny web server with the kernel WebSocket, and kernels whose messages are fed by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jupyter_server.auth import AllowAllAuthorizer
from jupyter_server.auth.identity import IdentityProvider, User
from jupyter_server.services.kernels.connection.base import serialize_binary_message
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketClientConnection, websocket_connect
from traitlets.config import Config, Configurable

from sandbox_gateway import messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.messages import Buffer
from sandbox_gateway.server.hub import Hub, HubSettings
from sandbox_gateway.server.websocket import SandboxWebSocketConnection, SandboxWebSocketHandler
from sandbox_gateway.server.ws_protocol import V1
from sandbox_gateway.wire.frames import Channel

KEY = b"the key"
KERNEL_ID = "01234567-89ab-cdef-0123-456789abcdef"
IOPUB, SHELL, CONTROL, STDIN = int(Channel.IOPUB), int(Channel.SHELL), int(Channel.CONTROL), int(Channel.STDIN)


class FakeSeat:
    """The part of a seat that a hub uses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = KEY
        self.channels = KernelChannels(KEY)
        self.closers: list[Any] = []

    def on_release(self, closer: Any) -> None:
        self.closers.append(closer)

    def release(self, *, remove: bool = True) -> None:
        for closer in self.closers:
            closer(remove)


class FakeKernel:
    """A kernel: what it was asked, and what it says, numbered as on a link."""

    def __init__(self, directory: Path, settings: HubSettings | None = None) -> None:
        self.seat = FakeSeat(directory)
        self.channels = self.seat.channels
        self.hub = Hub(self.seat, settings=settings)  # type: ignore[arg-type]
        self.asked: list[tuple[int, list[bytes]]] = []
        self.numbers = dict.fromkeys((IOPUB, SHELL, CONTROL, STDIN), 0)
        self.log: list[tuple[int, Sequence[Buffer], int]] = []
        self.channels.connect(self)

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        self.asked.append((channel, [bytes(part) for part in parts]))
        return len(self.asked)

    def say(self, channel: int, parts: Sequence[Buffer]) -> int:
        """Send a message with the next number; returns that."""
        self.numbers[channel] += 1
        number = self.numbers[channel]
        self.log.append((channel, parts, number))
        self.channels.received(channel, parts, number)
        return number

    def publish(self, msg_type: str, content: Any, *, parent: Buffer = b"{}", buffers: Sequence[bytes] = ()) -> int:
        parts = messages.build(KEY, msg_type, content, topic=msg_type.encode(), parent=parent)
        return self.say(IOPUB, [*parts, *buffers])

    def print(self, text: str, *, parent: Buffer = b"{}") -> int:
        return self.publish("stream", {"name": "stdout", "text": text}, parent=parent)

    def reply(self, index: int = -1, msg_type: str = "execute_reply", **content: Any) -> int:
        """Answer a request."""
        channel, asked = self.asked[index]
        at = asked.index(messages.DELIMITER)
        return self.say(
            channel, messages.compose(KEY, asked[:at], msg_type, json.dumps(content).encode(), parent=asked[at + 2])
        )


class OneUser(IdentityProvider):
    """Everybody is the same user."""

    async def get_user(self, handler: Any) -> User:
        return User("somebody")


class FakeKernelManager(Configurable):
    """A kernel manager of ours."""

    kernel_id = KERNEL_ID

    def __init__(self, kernel: FakeKernel, parent: FakeMultiKernelManager) -> None:
        super().__init__(parent=parent)
        self.kernel = kernel

    @property
    def hub(self) -> Hub:
        return self.kernel.hub

    async def here(self) -> None:
        """It is never anywhere else."""


class FakeMultiKernelManager(Configurable):
    allowed_message_types: ClassVar[list[str]] = []
    kernel_info_timeout = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Any] = {}
        self.connections = 0
        self.made = 0

    def get_kernel(self, kernel_id: str) -> Any:
        return self.kernels[kernel_id]

    def notify_connect(self, kernel_id: str) -> None:
        self.connections += 1
        self.made += 1

    def notify_disconnect(self, kernel_id: str) -> None:
        self.connections -= 1


class Client:
    """A WebSocket client that reads what it is told to."""

    def __init__(self, connection: WebSocketClientConnection, v1: bool) -> None:
        self.connection = connection
        assert connection.protocol is not None and connection.protocol.stream is not None
        self.stream = connection.protocol.stream
        self.v1 = v1

    async def read(self, timeout: float = 20.0) -> dict[str, Any] | None:
        """The next message; None when the connection is closed."""
        data = await asyncio.wait_for(self.connection.read_message(), timeout)
        return None if data is None else parse(data, v1=self.v1)

    async def texts(self, count: int) -> list[str]:
        """The texts of the next ``count`` stream messages, others passed over."""
        found: list[str] = []
        while len(found) < count:
            message = await self.read()
            assert message is not None
            if message["header"]["msg_type"] == "stream":
                found.append(message["content"]["text"])
        return found

    async def quiet(self, seconds: float = 0.15) -> bool:
        """Whether nothing comes for a while."""
        try:
            await self.read(seconds)
        except TimeoutError:
            return True
        return False

    async def ask(self, msg_type: str = "execute_request", channel: str = "shell", **content: Any) -> None:
        await self.send(msg_type, channel, **content)

    async def send(
        self, msg_type: str, channel: str = "shell", *, buffers: Sequence[bytes] = (), **content: Any
    ) -> None:
        header = {"msg_id": "m-1", "msg_type": msg_type, "username": "u", "session": "s", "date": "", "version": "5.3"}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
        if self.v1:
            parts = [json.dumps(part, ensure_ascii=False).encode() for part in message.values()]
            await self.connection.write_message(v1(channel, [*parts, *buffers]), binary=True)
        elif buffers:
            data = serialize_binary_message({**message, "channel": channel, "buffers": buffers})
            await self.connection.write_message(data, binary=True)
        else:
            await self.connection.write_message(json.dumps({**message, "channel": channel}, ensure_ascii=False))

    def close(self) -> None:
        self.connection.close()

    def cut(self) -> None:
        """The network breaks."""
        self.stream.close()


def v1(channel: str, parts: Sequence[bytes]) -> bytes:
    """As JupyterLab writes it."""
    offsets = [8 * (len(parts) + 3)]
    for part in (channel.encode(), *parts):
        offsets.append(offsets[-1] + len(part))
    return b"".join([struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets), channel.encode(), *parts])


def parse(data: str | bytes, *, v1: bool) -> dict[str, Any]:
    """A message as clients read it."""
    if isinstance(data, str):
        return json.loads(data)
    if v1:
        count = int.from_bytes(data[:8], "little")
        offsets = struct.unpack(f"<{count}Q", data[8 : 8 * (count + 1)])
        pieces = [data[a:b] for a, b in itertools.pairwise(offsets)]
        names = ("header", "parent_header", "metadata", "content")
        found = {name: json.loads(piece) for name, piece in zip(names, pieces[1:5], strict=True)}
        return {**found, "channel": pieces[0].decode(), "buffers": pieces[5:]}
    count = int.from_bytes(data[:4], "big")
    offsets = (*struct.unpack(f"!{count}I", data[4 : 4 * (count + 1)]), len(data))
    pieces = [data[a:b] for a, b in itertools.pairwise(offsets)]
    return {**json.loads(pieces[0]), "buffers": pieces[1:]}


class Gateway:
    """The server; :meth:`connect` makes clients."""

    def __init__(self, directory: Path, settings: HubSettings | None = None, **tornado: Any) -> None:
        self.directory = directory
        self.manager = FakeMultiKernelManager()
        self.settings = settings
        self.kernel = self.adopt()
        provider = OneUser()
        app = Application(
            [(r"/api/kernels/(?P<kernel_id>[\w-]+)/channels", SandboxWebSocketHandler)],
            kernel_manager=self.manager,
            kernel_websocket_connection_class=SandboxWebSocketConnection,
            identity_provider=provider,
            authorizer=AllowAllAuthorizer(identity_provider=provider),
            base_url="/",
            cookie_secret=b"x",
            config=Config(),
            serverapp=None,
            websocket_max_message_size=256 << 20,
            **tornado,
        )
        self.server = HTTPServer(app, max_buffer_size=512 << 20)  # jupyter_server's default
        sockets = bind_sockets(0, "127.0.0.1")
        self.server.add_sockets(sockets)
        self.port = sockets[0].getsockname()[1]
        self.clients: list[Client] = []

    def adopt(self) -> FakeKernel:
        """A new process on the same directory."""
        self.kernel = FakeKernel(self.directory, self.settings)
        self.manager.kernels[KERNEL_ID] = FakeKernelManager(self.kernel, self.manager)
        return self.kernel

    async def connect(self, session: str = "", *, v1: bool = True, query: str = "", **options: Any) -> Client:
        url = f"ws://127.0.0.1:{self.port}/api/kernels/{KERNEL_ID}/channels?session_id={session}{query}"
        before = self.manager.made
        connection = await websocket_connect(
            url, subprotocols=[V1] if v1 else None, max_message_size=256 << 20, **options
        )
        client = Client(connection, v1)
        self.clients.append(client)
        while self.manager.made == before:
            await asyncio.sleep(0.001)
        return client

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        await SandboxWebSocketConnection.close_all()
        self.server.stop()
        await self.server.close_all_connections()
        for client in self.clients:
            client.cut()
        self.kernel.hub.close(True)


@contextlib.asynccontextmanager
async def gateway(settings: HubSettings | None = None, **tornado: Any) -> AsyncIterator[Gateway]:
    directory = Path(tempfile.mkdtemp(prefix="sg-"))
    made = Gateway(directory, settings, **tornado)
    try:
        yield made
    finally:
        await made.close()
        left = [path.name for path in directory.iterdir()]
        shutil.rmtree(directory)
        assert left == []
