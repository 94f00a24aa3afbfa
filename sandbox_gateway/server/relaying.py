"""A page's WebSocket of a server whose kernels are on a gateway of ours (``--gateway-url``): all of it is passed on.

jupyter_server's own connection ends at a message of 10 MiB, breaks at one with binary buffers, drops what the page
sends while the gateway is away, and does not ask for the replay. Towards other gateways it is used as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any, Final

from jupyter_server.gateway.connections import GatewayWebSocketConnection
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.httputil import url_concat
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect
from traitlets import default

from sandbox_gateway.server.passing import PROMPT, Relay, request

RELAY: Final = "sandbox_gateway_relay"
"""The web application's setting with the :class:`~sandbox_gateway.server.passing.Relay`."""
MAX_MESSAGE: Final = 256 << 20
"""Bytes of one message at most, in both directions."""
MAX_WAITING: Final = 2 * MAX_MESSAGE
"""Bytes of a page's messages that wait for a gateway that is away."""
STUMBLES: Final = 3
"""Connections that break at the same message of the page's until it is given up."""
PING: Final = 300.0
"""Seconds between two looks whether the gateway is still there. A pong comes behind what is on its way, which takes a
while where that is large and the line is slow."""
REFUSALS: Final = (401, 403, 404, 410)
"""Answers that will be the same when asked again."""
RESTARTS: Final = (1001, 1012)
"""Codes by which a gateway that will come back ends a connection."""
TOO_BIG, COME_AGAIN, TOO_MUCH = 1009, 1012, 1013
"""Codes of RFC 6455 and its registry with which a page's connection is ended; JupyterLab connects again after each."""


class RelayedConnection(GatewayWebSocketConnection):
    """Passes messages on as they are, both ways, and connects again to a gateway that was away."""

    _passing: asyncio.Task[None] | None = None
    _chosen: str | None = None
    """The protocol that page and server speak, and server and gateway too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._to_send: deque[str | bytes] = deque()
        self._waiting = 0
        self._more = asyncio.Event()
        self._stumbles = 0

    @property
    def _relay(self) -> Relay | None:
        found = self.websocket_handler.settings.get(RELAY)
        return found if isinstance(found, Relay) else None

    @property
    def _ours(self) -> bool:
        return self._relay is not None and self._relay.ours is True

    @default("kernel_ws_protocol")
    def _protocol(self) -> str | None:
        """With a gateway of ours the page's choice (None), else the older one (empty), as Jupyter has it."""
        return None if self._ours else ""

    async def prepare(self) -> None:
        """Refuse what the gateway refuses, while the page can still be refused: later it would ask again at once."""
        if self._relay is not None:
            await self._relay.ask()
        if not self._ours:
            return
        try:
            async with asyncio.timeout(PROMPT):
                answer = await AsyncHTTPClient().fetch(request(f"/api/kernels/{self.kernel_id}"), raise_error=False)
        except (OSError, HTTPClientError):
            return  # it is away, and will come back
        if answer.code in REFUSALS:
            why = "it has ended, or is not yours: choose another" if answer.code in (404, 410) else "check the token"
            raise web.HTTPError(answer.code, f"the gateway refuses kernel {self.kernel_id}; {why}")

    async def connect(self) -> None:
        """Begin to pass on."""
        if self._ours:
            self._chosen = self.websocket_handler.selected_subprotocol
            self._passing = asyncio.create_task(self._pass())
        else:
            await super().connect()

    def disconnect(self) -> None:  # type: ignore[override]
        """The page is gone."""
        if self._passing is None:
            super().disconnect()
        else:
            # Not before it has begun: a page may come, say all it has to say and go, all at once.
            asyncio.get_running_loop().call_soon(self._passing.cancel)

    def handle_incoming_message(self, message: str | bytes) -> None:
        """One of the page's; it waits for a gateway that is away."""
        if self._passing is None:
            super().handle_incoming_message(message)  # type: ignore[arg-type]
            return
        self._waiting += len(message)
        if self._waiting > MAX_WAITING:
            self.log.warning(
                "more than %s bytes of a page wait for the gateway: run them again when it is back", MAX_WAITING
            )
            self.websocket_handler.close(TOO_MUCH, "too much waits for the gateway")
            return
        self._to_send.append(message)
        self._more.set()

    async def _pass(self) -> None:
        """Until the page goes, the gateway refuses, or ends the connection for good."""
        client = GatewayClient.instance()
        attempts, replay = 0, self.websocket_handler.get_argument("replay", "")
        while True:
            try:
                gateway = await self._connected(replay)
            except Exception as error:
                if isinstance(error, HTTPClientError) and error.code in REFUSALS:
                    self.log.warning("the gateway refuses a connection to kernel %s: %s", self.kernel_id, error)
                    return self.websocket_handler.close(COME_AGAIN)
                self.log.debug("no connection to the gateway: %s", error)
            else:
                # Who comes again under his id gets what he has missed, and not all of it once more.
                replay = ""
                if await self._exchange(gateway):
                    attempts = 0
                if gateway.close_code in RESTARTS:
                    self._stumbles = 0
                if gateway.close_code is not None and _is_final(gateway):
                    return self.websocket_handler.close(gateway.close_code, gateway.close_reason)
                if self._stumbles >= STUMBLES:
                    return self.websocket_handler.close(TOO_BIG, "the gateway does not take this message")
            if self.websocket_handler.ws_connection is None:
                return
            await asyncio.sleep(
                min(client.gateway_retry_interval * 2 ** min(attempts, 16), client.gateway_retry_interval_max)
            )
            attempts += 1

    async def _connected(self, replay: str) -> WebSocketClientConnection:
        client = GatewayClient.instance()
        address = url_path_join(str(client.ws_url), str(client.kernels_endpoint), self.kernel_id, "channels")
        query = {"session_id": self.session_id, **({"replay": replay} if replay else {})}
        connecting = asyncio.ensure_future(
            websocket_connect(
                HTTPRequest(url_concat(address, query), **client.load_connection_args()),
                subprotocols=[self._chosen] if self._chosen else None,
                ping_interval=PING,
                max_message_size=MAX_MESSAGE,
            )
        )
        try:
            gateway = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(self._hang_up)  # nobody would ever read it
            raise
        if gateway.selected_subprotocol != self._chosen:
            _drain(gateway)
            raise OSError(f"something before the gateway has changed the protocol to {gateway.selected_subprotocol}")
        return gateway

    async def _exchange(self, gateway: WebSocketClientConnection) -> bool:
        """Pass on until one side has ended; whether anything came."""
        came = False
        sending = asyncio.create_task(self._send(gateway))
        try:
            while (message := await gateway.read_message()) is not None:
                came = True
                # Until it has left, so that nothing piles up here.
                await self.websocket_handler.write_message(message, binary=isinstance(message, bytes))
        except WebSocketClosedError:
            pass  # the page's
        finally:
            sending.cancel()
            if gateway.close_code is None:
                self._send_rest(gateway)
            _drain(gateway)
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        return came

    async def _send(self, gateway: WebSocketClientConnection) -> None:
        while True:
            while self._to_send:
                message = self._to_send[0]
                try:
                    written = _written(gateway, message)
                except WebSocketClosedError:
                    return
                self._to_send.popleft()
                try:
                    await written
                except BaseException as error:
                    # Not all of it has left: it is sent by the next connection. Who reads may see the end first.
                    self._to_send.appendleft(message)
                    self._stumbles += 1
                    if not isinstance(error, WebSocketClosedError):
                        raise
                    return
                self._waiting -= len(message)
                self._stumbles = 0
            self._more.clear()
            await self._more.wait()

    def _hang_up(self, connecting: asyncio.Future[WebSocketClientConnection]) -> None:
        if not connecting.cancelled() and connecting.exception() is None:
            self._send_rest(connecting.result())
            _drain(connecting.result())

    def _send_rest(self, gateway: WebSocketClientConnection) -> None:
        """What a page had said before it went, or the connection began to end."""
        if self.websocket_handler.ws_connection is not None:
            return
        with contextlib.suppress(WebSocketClosedError):
            while self._to_send:
                _written(gateway, self._to_send.popleft()).add_done_callback(_heard)


def _written(gateway: WebSocketClientConnection, message: str | bytes) -> asyncio.Future[None]:
    """Raises WebSocketClosedError also while the connection is ending, when nothing is read any more."""
    if gateway.protocol is None or gateway.protocol.is_closing():
        raise WebSocketClosedError
    return gateway.write_message(message, binary=isinstance(message, bytes))


def _is_final(gateway: WebSocketClientConnection) -> bool:
    """Whether the gateway has ended the connection for good: neither lost (1006), nor restarted (1001, 1012), nor for
    want of an answer to a ping (1000, without a reason)."""
    return gateway.close_code not in (1006, *RESTARTS) and (gateway.close_code != 1000 or bool(gateway.close_reason))


_draining: set[asyncio.Task[None]] = set()


def _drain(gateway: WebSocketClientConnection) -> None:
    """Close it, and take what still comes of it: tornado waits for somebody to do so."""

    async def drain() -> None:
        with contextlib.suppress(Exception):
            while await gateway.read_message() is not None:
                pass

    gateway.close()
    task = asyncio.create_task(drain())
    _draining.add(task)
    task.add_done_callback(_draining.discard)


def _heard(written: asyncio.Future[None]) -> None:
    """An exception that nobody minds."""
    if not written.cancelled():
        written.exception()
