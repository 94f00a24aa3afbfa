"""A page's WebSocket that is passed on to a gateway: what it does when the gateway is away, refuses, or is not itself.

With a real page and a real gateway: tests/lab/test_remote.py. Here the gateway says what a test wants of it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from cut_proxy import CutProxy
from jupyter_server.gateway.gateway_client import GatewayClient
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.testing import bind_unused_port
from tornado.web import Application
from tornado.websocket import WebSocketClientConnection, WebSocketHandler, websocket_connect
from traitlets.config import LoggingConfigurable

from sandbox_gateway.server import relaying
from sandbox_gateway.server.passing import Relay
from sandbox_gateway.server.relaying import RELAY, RelayedConnection

pytestmark = pytest.mark.timeout(60)
V1 = "v1.kernel.websocket.jupyter.org"


class Kernel(LoggingConfigurable):
    """The kernel that a page wants."""

    kernel_id = "some-kernel"


class OurGateway(Relay):
    """What is known of the gateway: it is one of ours."""

    def __init__(self) -> None:
        self.ours = True


class Page(WebSocketHandler):
    """The server's end of the page's connection, as jupyter_server has it."""

    present = 0

    def select_subprotocol(self, offered: list[str]) -> str | None:
        return V1 if V1 in offered else None

    async def open(self) -> None:
        Page.present += 1
        self.relayed = RelayedConnection(parent=Kernel(), websocket_handler=self)
        await self.relayed.connect()

    def on_message(self, message: str | bytes) -> None:
        self.relayed.handle_incoming_message(message)

    def on_close(self) -> None:
        self.relayed.disconnect()
        Page.present -= 1


class Far:
    """A gateway, which may be away."""

    def __init__(self) -> None:
        socket, self.port = bind_unused_port()
        socket.close()
        self.protocol: str | None = V1
        self.breaks = False
        """Whether each connection breaks, without a goodbye, when a long message begins to come."""
        self.connected = 0
        self.got: asyncio.Queue[str | bytes] = asyncio.Queue()
        self._server: HTTPServer | None = None

    def start(self) -> None:
        """Be there from now on."""
        routes: Any = [(r"/api/kernels/some-kernel/channels", FarSocket, {"far": self})]
        self._server = HTTPServer(Application(routes, websocket_max_message_size=1 << 20))
        self._server.add_sockets(bind_sockets(self.port, "127.0.0.1"))

    async def stop(self) -> None:
        """Be gone."""
        if self._server is not None:
            self._server.stop()
            await self._server.close_all_connections()


class Abrupt:
    """A gateway that takes some messages, and then says so and ends in one breath; afterwards it stays."""

    def __init__(self, port: int, takes: int) -> None:
        self.port = port
        self.connections = self.present = 0
        self.got: list[bytes] = []
        self._takes = takes

    async def serve(self) -> asyncio.Server:
        """Be there."""
        return await asyncio.start_server(self._served, "127.0.0.1", self.port)

    async def _served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.present += 1
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        key = next(line.split(": ")[1] for line in request.splitlines() if line.lower().startswith("sec-websocket-key"))
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            *("Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {accept}"),
            *(f"Sec-WebSocket-Protocol: {V1}", f"Sandbox-Received: {len(self.got)}", "", ""),
        ]
        writer.write("\r\n".join(lines).encode())
        ping = b""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while (head := await reader.readexactly(2))[0] & 0xF != 8:
                mask, data = await reader.readexactly(4), await reader.readexactly(head[1] & 0x7F)
                data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
                if head[0] & 0xF == 9:
                    ping = data
                elif head[0] & 0xF == 2:
                    self.got.append(data)
                if self.connections == 1 and ping and len(self.got) == self._takes:
                    pong = b"\x8a" + bytes([len(ping)]) + ping
                    writer.write(pong + b"\x88\x02" + struct.pack("!H", 1012))
                    break
        writer.close()
        self.present -= 1


class FarSocket(WebSocketHandler):
    """One connection from the server."""

    def initialize(self, far: Far) -> None:
        self.far = far

    def select_subprotocol(self, offered: list[str]) -> str | None:
        return self.far.protocol

    def open(self) -> None:
        self.far.connected += 1
        if self.far.breaks:
            self.ws_connection.close = lambda *_: None  # type: ignore[union-attr, method-assign]

    def on_message(self, message: str | bytes) -> None:
        self.far.got.put_nowait(message)
        self.write_message(b"heard", binary=True)


@pytest.fixture
async def far() -> AsyncIterator[Far]:
    GatewayClient.clear_instance()
    found = Far()
    client = GatewayClient.instance()
    client.url = f"http://127.0.0.1:{found.port}"
    client.gateway_retry_interval, client.gateway_retry_interval_max = 0.005, 0.02
    yield found
    await found.stop()
    GatewayClient.clear_instance()


@pytest.fixture
def line(far: Far) -> Iterator[CutProxy]:
    """The network before the gateway; ask for it before the page."""
    with contextlib.closing(CutProxy(far.port)) as found:
        GatewayClient.instance().ws_url = found.url.replace("http", "ws", 1)
        yield found


@pytest.fixture
async def page(far: Far) -> AsyncIterator[WebSocketClientConnection]:
    """A page that is connected to a server whose gateway is ``far``."""
    socket, port = bind_unused_port()
    settings: dict[str, Any] = {RELAY: OurGateway(), "websocket_max_message_size": 64 << 20}
    near = HTTPServer(Application([(r"/channels", Page)], **settings))
    near.add_socket(socket)
    connected = await websocket_connect(f"ws://127.0.0.1:{port}/channels", subprotocols=[V1])
    yield connected
    ended = connected.close_code is not None
    connected.close()
    while not ended:
        ended = await connected.read_message() is None
    await until(lambda: not Page.present)
    near.stop()
    await near.close_all_connections()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_gateway_may_be_away_for_longer_than_jupyters_own_connection_tries(
    far: Far, page: WebSocketClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0

    def counted(*what: Any, **how: Any) -> Any:
        nonlocal attempts
        attempts += 1
        return websocket_connect(*what, **how)

    monkeypatch.setattr(relaying, "websocket_connect", counted)
    await page.write_message(b"run it", binary=True)
    await until(lambda: attempts > 4 * GatewayClient.instance().gateway_retry_max)
    far.start()
    async with asyncio.timeout(20):
        assert await far.got.get() == b"run it"
        assert await page.read_message() == b"heard"


async def test_a_page_that_says_too_much_to_a_gateway_that_is_away_is_told_to_come_again(
    far: Far, page: WebSocketClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "MAX_WAITING", 1000)
    await page.write_message(b"a" * 600, binary=True)
    await page.write_message(b"b" * 600, binary=True)
    async with asyncio.timeout(20):
        assert await page.read_message() is None
    assert page.close_code == relaying.TOO_MUCH


async def test_a_message_at_which_connections_break_is_given_up_and_the_page_told(
    far: Far, page: WebSocketClientConnection
) -> None:
    far.breaks = True
    far.start()
    await page.write_message(b"x" * (30 << 20), binary=True)
    async with asyncio.timeout(30):
        assert await page.read_message() is None
    assert page.close_code == relaying.TOO_BIG
    assert far.connected == relaying.STUMBLES + 1  # over the last one it is not tried again


async def test_a_gateway_that_ends_with_its_answer_is_come_back_to(far: Far, page: WebSocketClientConnection) -> None:
    """Its pong and its end come at once, when more was written than the pong confirms: to ask again would fail."""
    gateway = Abrupt(far.port, takes=2)
    async with await gateway.serve():
        for number in range(2):
            await page.write_message(b"%d" % number, binary=True)
        await until(lambda: gateway.connections == 2)
        await page.write_message(b"2", binary=True)
        await until(lambda: len(gateway.got) == 3)
        assert gateway.got == [b"0", b"1", b"2"]
        page.close()
        await until(lambda: not gateway.present)


async def test_a_line_that_brings_nothing_is_given_up(
    far: Far, line: CutProxy, page: WebSocketClientConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This gateway does not count, so that nothing may be sent again."""
    monkeypatch.setattr(relaying, "SILENCE", 0.2)
    far.start()
    await page.write_message(b"run it", binary=True)
    await until(lambda: far.got.qsize() == 1)
    before = line.connections
    line.swallow()
    await page.write_message(b"and this", binary=True)
    await until(lambda: line.connections > before)
    line.swallow(False)
    line.cut()  # what was swallowed of the new one's handshake does not come any more
    await page.write_message(b"at last", binary=True)
    await until(lambda: far.got.qsize() == 2)
    assert [far.got.get_nowait() for _ in range(2)] == [b"run it", b"at last"]


async def test_nothing_is_passed_on_in_a_protocol_that_the_page_does_not_speak(
    far: Far, page: WebSocketClientConnection
) -> None:
    far.protocol = None  # as a proxy in front of it has it, which drops the header
    far.start()
    await page.write_message(b"run it", binary=True)
    await until(lambda: far.connected > 3)
    assert far.got.empty()
    far.protocol = V1
    async with asyncio.timeout(20):
        assert await far.got.get() == b"run it"
        assert await page.read_message() == b"heard"
