"""The kernel WebSocket, ``/api/kernels/<id>/channels``: jupyter_server's handler over our sessions.

Authentication, origins and sub-protocols are jupyter_server's. The connection class of the server
(``ServerApp.kernel_websocket_connection_class``) decides by the kernel: one of ours has a hub, every other one gets the
stock connection. Nothing is rate limited: what a client is too slow for is left out, and told
(:mod:`sandbox_gateway.server.outlet`).
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import MutableSet, Sequence
from typing import Any, ClassVar, Final

from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from tornado import web
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.server import ws_protocol
from sandbox_gateway.server.hub import RESTART_CODE, Hub, TooManySessions
from sandbox_gateway.server.identity import REVOKED, Revocation, caller_of, still_welcome
from sandbox_gateway.server.inlet import HEADER, Arriving
from sandbox_gateway.server.outlet import ConnectionLost, Outlet
from sandbox_gateway.server.ws_protocol import Malformed

SESSION_HEADER: Final = "Sandbox-Session"
"""Of the handshake: ``resumed`` where the session of the URL goes on, ``new`` where one begins."""
TOO_LARGE: Final = 1009
"""Close code of a client that was sent a message beyond its bound."""
LARGE: Final = 32 << 10
"""Bytes of a frame that is written without being copied together with others."""
CLOSING: Final = 1.0
"""Seconds that :meth:`SandboxWebSocketConnection.close_all` waits for the clients' answers."""


class TornadoWriter:
    """A :class:`~sandbox_gateway.server.outlet.Writer` for one of tornado's WebSockets.

    tornado makes a task and a system call for each message. Frames are ready to be written, and go straight to its
    stream, many at once, unless compression was agreed on.
    """

    def __init__(self, handler: WebSocketHandler) -> None:
        connection = handler.ws_connection
        assert connection is not None
        self.v1 = connection.selected_subprotocol == ws_protocol.V1
        self._handler = handler
        self._stream = connection.stream
        self._compressed = handler.get_compression_options() is not None

    def write(self, frames: Sequence[bytes]) -> asyncio.Future[None] | None:
        """Write whole frames."""
        connection, stream = self._handler.ws_connection, self._stream
        if connection is None or stream is None or connection.is_closing():
            raise ConnectionLost
        try:
            if self._compressed:
                return self._write_messages(frames)
            if len(frames) == 1:
                leaving = stream.write(frames[0])
            else:
                small: list[bytes] = []
                for frame in frames:
                    if len(frame) < LARGE:
                        small.append(frame)
                        continue
                    if small:
                        stream.write(b"".join(small))
                        small = []
                    leaving = stream.write(frame)
                if small:
                    leaving = stream.write(b"".join(small))
        except (StreamClosedError, WebSocketClosedError) as error:
            raise ConnectionLost from error
        return None if leaving.done() else leaving

    def _write_messages(self, frames: Sequence[bytes]) -> asyncio.Future[None]:
        for frame in frames:
            message = bytes(ws_protocol.payload(frame))
            leaving = self._handler.write_message(message, binary=frame[0] == ws_protocol.BINARY)
        return leaving

    def ping(self, data: bytes) -> None:
        """Send a ping."""
        try:
            self._handler.ping(data)
        except (StreamClosedError, WebSocketClosedError) as error:
            raise ConnectionLost from error

    def close(self, code: int, reason: str) -> None:
        """Close the connection."""
        with contextlib.suppress(StreamClosedError, WebSocketClosedError):
            self._handler.close(code, reason)


class SandboxWebSocketHandler(KernelWebsocketHandler):
    """jupyter_server's handler; pongs confirm what was sent."""

    def on_pong(self, data: bytes) -> None:
        """A client answered a ping."""
        super().on_pong(data)
        connection = getattr(self, "connection", None)
        if isinstance(connection, SandboxWebSocketConnection):
            connection.pong(data)


class SandboxWebSocketConnection(BaseKernelWebsocketConnection):
    """Connects a WebSocket with the hub of its kernel; for a kernel without one it is jupyter_server's own class."""

    _open: ClassVar[MutableSet[SandboxWebSocketConnection]] = weakref.WeakSet()
    _outlet: Outlet | None = None
    _writer: TornadoWriter | None = None
    _hub: Hub | None = None
    _revocation: Revocation | None = None
    _counted = False
    _arriving: Arriving
    """What comes over this connection, once it is connected."""
    _told: int | None = None
    """What the handshake said of the messages that had arrived."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The connection for ``parent``, the kernel manager."""
        parent = kwargs.get("parent")
        if parent is not None and not hasattr(type(parent), "hub"):
            return ZMQChannelsWebsocketConnection(*args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    @classmethod
    async def close_all(cls) -> None:
        """Close all WebSockets so that clients connect again; called by ``ServerApp`` when it ends."""
        for connection in list(cls._open):
            if connection._outlet is not None:
                # So that nothing comes twice when its client comes back.
                connection._outlet.last_ping()
            connection.websocket_handler.close(RESTART_CODE, "service restart")
        deadline = asyncio.get_running_loop().time() + CLOSING
        while cls._open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        await ZMQChannelsWebsocketConnection.close_all()

    async def prepare(self) -> None:
        """Before the handshake is answered: who reconnects learns whether the session is still there."""
        handler = self.websocket_handler
        try:
            await self.kernel_manager.here()
        except SandboxGatewayError as error:
            raise web.HTTPError(error.status, error.message) from error
        session_id = handler.get_argument("session_id", None) or None
        hub, name = self.kernel_manager.hub, caller_of(handler.current_user).name
        handler.set_header(SESSION_HEADER, "resumed" if hub.knows(name, session_id) else "new")
        self._told = hub.inlet(name, session_id, self._sender).told(self._sender)
        if self._told is not None:
            handler.set_header(HEADER, str(self._told))

    @property
    def _sender(self) -> str:
        return str(self.websocket_handler.get_argument("sender", ""))

    async def connect(self) -> None:
        """The WebSocket is open: go on with its session, or begin one."""
        handler = self.websocket_handler
        if handler.ws_connection is None:
            return
        handler.set_nodelay(True)
        self.multi_kernel_manager.notify_connect(self.kernel_id)
        self._counted = True
        try:
            hub: Hub = self.kernel_manager.hub
        except Exception:
            self.log.exception("kernel %s has no sessions", self.kernel_id)
            handler.close(1011, "the kernel is not there")
            return
        writer = TornadoWriter(handler)
        session_id = handler.get_argument("session_id", None) or None
        replay = handler.get_argument("replay", "") in ("1", "true")
        name = caller_of(handler.current_user).name
        try:
            outlet = hub.attach(name, session_id, writer, replay=replay)
        except TooManySessions as error:
            self.log.warning("kernel %s has too many sessions: %s", self.kernel_id, error)
            handler.close(1013, "too many sessions")
            return
        self._hub, self._writer, self._outlet = hub, writer, outlet
        self._arriving = hub.inlet(name, session_id, self._sender).open(self._sender, self._told)
        self._revocation = Revocation(handler, self._revoked)
        self._open.add(self)

    def disconnect(self) -> None:  # type: ignore[override]
        """The WebSocket is closed; also where it was never connected."""
        self._open.discard(self)
        if self._counted:
            self._counted = False
            self.multi_kernel_manager.notify_disconnect(self.kernel_id)
        if self._revocation is not None:
            self._revocation.close()
        hub, outlet, writer = self._hub, self._outlet, self._writer
        self._hub = self._outlet = self._writer = self._revocation = None
        if hub is not None and outlet is not None and writer is not None:
            hub.detach(outlet, writer, refused=self.websocket_handler.close_code == TOO_LARGE)

    def _revoked(self) -> None:
        self.websocket_handler.close(REVOKED, "the token was revoked")
        self.disconnect()

    def pong(self, data: bytes) -> None:
        """The client answered a ping."""
        if self._outlet is not None and self._outlet.writer is self._writer:
            self._outlet.pong(data)

    def handle_incoming_message(self, incoming_msg: str | bytes) -> None:
        """Pass a client's message on to its kernel."""
        hub, outlet, writer = self._hub, self._outlet, self._writer
        if hub is None or outlet is None or writer is None or outlet.writer is not writer:
            return
        if not self._arriving.take():
            return
        if not still_welcome(self.websocket_handler):
            self._revoked()
            return
        try:
            message = ws_protocol.decode(incoming_msg, v1=writer.v1)
        except Malformed as error:
            hub.reject(error)
            return
        allowed = self.multi_kernel_manager.allowed_message_types
        if allowed and message.msg_type not in allowed:
            hub.reject(Malformed("a type that is not allowed here"))
            return
        try:
            hub.request(outlet, message)
        except Exception:
            # A WebSocket that ends at each message helps nobody.
            self.log.exception("a message for kernel %s was not passed on", self.kernel_id)
