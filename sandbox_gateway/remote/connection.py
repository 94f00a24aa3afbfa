"""One WebSocket to a kernel of a gateway: opened, watched, closed. It does not reconnect.

A connection counts as broken when nothing at all comes for :data:`SILENCE` seconds although it was asked by pings, or
when the machine slept: what a network does to connections meanwhile is found out by trying. Bytes of a large message
count as life.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect

from sandbox_gateway.remote.client import GatewayClient
from sandbox_gateway.remote.frames import SUBPROTOCOL

log = logging.getLogger(__name__)

MAX_MESSAGE: Final = 512 << 20
"""Bytes of one message at most."""
TICK: Final = 5.0
"""Seconds between two looks, and between two pings."""
SILENCE: Final = 30.0
"""Seconds without any sign of the gateway after which a connection is given up."""
JUMP: Final = 20.0
"""Seconds that the clock on the wall may run ahead between two looks before the machine is taken to have slept."""
HANDSHAKE: Final = 20.0
"""Seconds that the gateway may take to accept a connection."""
CLOSING: Final = 1.0
"""Seconds that a gateway may take to close its side."""


class ConnectionLost(Exception):
    """The WebSocket is closed; says why."""


class Connection:
    """One open WebSocket; make it by :func:`connect`."""

    def __init__(self, on_message: Callable[[bytes], None]) -> None:
        self._on_message = on_message
        self._socket: WebSocketClientConnection | None = None
        self._closed = asyncio.Event()
        self._signs = 0
        self._reason = ""
        self.opened = time.monotonic()
        self.last_sign = time.time()
        """When the gateway was heard last, on the wall's clock: it goes on while the machine sleeps."""

    def received(self, message: str | bytes | None) -> None:
        """tornado's callback: a message, or None at the end."""
        self._signs += 1
        if message is None:
            self._closed.set()
        elif isinstance(message, bytes):
            try:
                self._on_message(message)
            except Exception:
                log.exception("a message of a gateway could not be taken; the connection goes on")

    def adopt(self, connected: WebSocketClientConnection) -> None:
        """Go on with what tornado has connected."""
        self._socket = connected
        # Any sign of life counts; tornado's own pings take a message that is long under way for silence.
        setattr(connected, "on_pong", self._pong)  # noqa: B010 - it is no attribute to type checkers
        stream = getattr(connected.protocol, "stream", None)
        if stream is not None:
            # Its bound is for one frame too, and lower than what a message may have.
            stream.max_buffer_size = MAX_MESSAGE + (1 << 20)
            # tornado takes it back with the end of the handshake: each request would wait 40 ms for an acknowledgement.
            stream.set_nodelay(True)

    def _pong(self, data: bytes) -> None:
        self._signs += 1

    @property
    def header(self) -> Callable[[str], str]:
        """The gateway's answer to the handshake, by the names of its headers."""
        headers = self._socket.headers if self._socket is not None else None
        return lambda name: (headers.get(name) or "") if headers is not None else ""

    @property
    def open(self) -> bool:
        """Whether messages can be written."""
        return self._socket is not None and not self._closed.is_set()

    async def write(self, frame: bytes) -> None:
        """Send one message; returns when the system has taken it. Raises :class:`ConnectionLost`."""
        if self._socket is None or self._closed.is_set():
            raise ConnectionLost(self._why())
        try:
            writing = asyncio.ensure_future(self._socket.write_message(frame, binary=True))
            ending = asyncio.ensure_future(self._closed.wait())
            try:
                await asyncio.wait((writing, ending), return_when=asyncio.FIRST_COMPLETED)
                if not writing.done():
                    raise ConnectionLost(self._why())
                writing.result()
            finally:
                ending.cancel()
                writing.cancel()
        except (WebSocketClosedError, OSError) as error:
            raise ConnectionLost(self._why()) from error

    async def watch(self) -> str:
        """Return when the connection is broken, with the reason."""
        silent_since, seen, wall = time.monotonic(), self._activity(), time.time()
        while not self._closed.is_set():
            try:
                async with asyncio.timeout(TICK):
                    await self._closed.wait()
            except TimeoutError:
                pass
            now, before, wall = time.time(), wall, time.time()
            if now - before > TICK + JUMP:
                return "this machine has slept"
            if (activity := self._activity()) != seen:
                seen, silent_since, self.last_sign = activity, time.monotonic(), now
            elif time.monotonic() - silent_since > SILENCE:
                return f"nothing was heard for {SILENCE:.0f} s"
            if self._socket is not None and not self._closed.is_set():
                try:
                    self._socket.ping(b"")
                except WebSocketClosedError:
                    break
        return self._why()

    def _activity(self) -> tuple[int, Any]:
        protocol = self._socket.protocol if self._socket is not None else None
        # How much of a long message has come is nowhere public.
        return self._signs, getattr(getattr(protocol, "stream", None), "_read_buffer_size", 0)

    def _why(self) -> str:
        if self._socket is None or self._socket.close_code is None:
            return "the connection broke"
        return f"the gateway closed it ({self._socket.close_code} {self._socket.close_reason or ''}".rstrip() + ")"

    async def close(self) -> None:
        """Close it, politely if the gateway still answers."""
        connected, self._socket = self._socket, None
        if connected is None:
            return
        stream = connected.protocol.stream if connected.protocol is not None else None
        connected.close()
        try:
            async with asyncio.timeout(CLOSING):
                await self._closed.wait()
        except TimeoutError:
            pass
        finally:
            if stream is not None:
                stream.close()


async def connect(
    client: GatewayClient, path: str, query: dict[str, str], on_message: Callable[[bytes], None]
) -> Connection:
    """Open a WebSocket. Raises what :meth:`GatewayClient.explained` makes of a refusal."""
    made = Connection(on_message)
    try:
        connected = await websocket_connect(
            client.request(client.address.websocket(path, query), request_timeout=HANDSHAKE),
            on_message_callback=made.received,
            max_message_size=MAX_MESSAGE,
            subprotocols=[SUBPROTOCOL],
        )
    except Exception as error:
        raise client.explained(error) from error
    made.adopt(connected)
    if connected.selected_subprotocol != SUBPROTOCOL:
        await made.close()
        raise client.explained(ValueError(f"it does not speak {SUBPROTOCOL}"))
    return made
