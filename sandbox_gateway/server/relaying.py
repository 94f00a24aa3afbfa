"""A page's WebSocket of a server whose kernels are on a gateway of ours (``--gateway-url``): all of it is passed on.

jupyter_server's own connection ends at a message of 10 MiB, breaks at one with binary buffers, drops what the page
sends while the gateway is away, and does not ask for the replay. Towards other gateways it is used as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any, Final

from jupyter_server.gateway.connections import GatewayWebSocketConnection
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.httputil import url_concat
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect
from traitlets import default

from sandbox_gateway.server.inlet import HEADER
from sandbox_gateway.server.outgoing import Outgoing
from sandbox_gateway.server.passing import PROMPT, Relay, request

RELAY: Final = "sandbox_gateway_relay"
"""The web application's setting with the :class:`~sandbox_gateway.server.passing.Relay`."""
MAX_MESSAGE: Final = 256 << 20
"""Bytes of one message at most, in both directions."""
MAX_WAITING: Final = 2 * MAX_MESSAGE
"""Bytes of a page's messages that wait for a gateway that is away."""
STUMBLES: Final = 3
"""Connections that break at the same large message of the page's until it is given up."""
LARGE: Final = 64 << 10
"""Bytes of a message from which on something on the way may break the connection because of it."""
PING: Final = 300.0
"""Seconds between two looks whether the gateway is still there. A pong comes behind what is on its way, which takes a
while where that is large and the line is slow."""
SILENCE: Final = 60.0
"""Seconds without a sign of the gateway, which is to say what has arrived, until the connection is given up: a network
that takes everything and brings nothing is tried for a quarter of an hour by the system itself."""
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
        self._to_send = Outgoing()
        self._sender = uuid.uuid4().hex
        self._leaving: asyncio.Future[None] | None = None
        """The last message's leaving this machine."""
        self._more = asyncio.Event()
        self._stumbles = (0, 0)
        """Connections that broke at the same message of the page's in a row, and its number."""
        self._handing_on = False
        """Whether the page is given a message: meanwhile nothing of the gateway is read."""
        self._heard = 0.0

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
            self._passing.add_done_callback(self._passed)
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
        if self._to_send.size + len(message) > MAX_WAITING:
            self.log.warning(
                "more than %s bytes of a page wait for the gateway: run them again when it is back", MAX_WAITING
            )
            self.websocket_handler.close(TOO_MUCH, "too much waits for the gateway")
            return
        self._to_send.add(message)
        self._more.set()

    def _passed(self, passing: asyncio.Task[None]) -> None:
        if not passing.cancelled() and (error := passing.exception()) is not None:
            self.log.error("messages of kernel %s are not passed on any more", self.kernel_id, exc_info=error)
            self.websocket_handler.close(COME_AGAIN)

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
                self._resume(gateway)
                if self._stumbles[0] >= STUMBLES:
                    _drain(gateway)
                    return self.websocket_handler.close(TOO_BIG, "the gateway does not take this message")
                if await self._exchange(gateway):
                    attempts = 0
                if gateway.close_code in RESTARTS:
                    self._stumbles = (0, 0)
                if gateway.close_code is not None and _is_final(gateway):
                    return self.websocket_handler.close(gateway.close_code, gateway.close_reason)
            if self.websocket_handler.ws_connection is None:
                return
            await asyncio.sleep(
                min(client.gateway_retry_interval * 2 ** min(attempts, 16), client.gateway_retry_interval_max)
            )
            attempts += 1

    async def _connected(self, replay: str) -> WebSocketClientConnection:
        client = GatewayClient.instance()
        address = url_path_join(str(client.ws_url), str(client.kernels_endpoint), self.kernel_id, "channels")
        query = {"session_id": self.session_id, "sender": self._sender, **({"replay": replay} if replay else {})}
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
        sending, listening = asyncio.create_task(self._send(gateway)), asyncio.create_task(self._listen(gateway))
        try:
            while (message := await gateway.read_message()) is not None:
                came = True
                # Until it has left, so that nothing piles up here.
                self._handing_on = True
                await self.websocket_handler.write_message(message, binary=isinstance(message, bytes))
                self._handing_on = False
                self._hear()
        except WebSocketClosedError:
            pass  # the page's
        finally:
            self._handing_on = False
            listening.cancel()
            sending.cancel()
            if gateway.close_code is None:
                self._send_rest(gateway)
            _drain(gateway)
            await asyncio.gather(sending, listening, return_exceptions=True)
        return came

    def _resume(self, gateway: WebSocketClientConnection) -> None:
        """What the gateway has not got goes out again, over a new connection."""
        leaving, self._leaving = self._leaving, None
        left = leaving is None or (leaving.done() and not leaving.cancelled() and leaving.exception() is None)
        resumed = self._to_send.resume(_received(gateway), left=left)
        if resumed.given_up:
            self.log.warning(
                "what became of %d messages for kernel %s is not known: look, and run them again if need be",
                resumed.given_up,
                self.kernel_id,
            )
        if resumed.size and (resumed.size >= LARGE or not left):
            times, number = self._stumbles
            self._stumbles = (times + 1 if number == resumed.number else 1, resumed.number)
        gateway.on_pong = self._pong  # type: ignore[method-assign]  # tornado makes connections of its own class only

    def _hear(self) -> None:
        self._heard = asyncio.get_running_loop().time()

    def _pong(self, data: bytes) -> None:
        self._hear()
        if self._to_send.answer(data):
            self._stumbles = (0, 0)
            self._more.set()

    async def _listen(self, gateway: WebSocketClientConnection) -> None:
        """Hang up when nothing comes of a gateway that was asked."""
        self._hear()
        while True:
            await asyncio.sleep(SILENCE / 4)
            leaving = self._leaving is not None and not self._leaving.done()
            if leaving or self._handing_on or not self._to_send.asking:
                self._hear()
            elif asyncio.get_running_loop().time() - self._heard > SILENCE:
                self.log.info("no sign of the gateway for %s seconds: connecting again", SILENCE)
                return gateway.close()

    async def _send(self, gateway: WebSocketClientConnection) -> None:
        try:
            while True:
                while self._to_send:
                    self._leaving = _written(gateway, self._to_send.take())
                    # Whether it has left decides what becomes of it, also where nobody waits for that any more.
                    await asyncio.shield(self._leaving)
                    self._ask(gateway)
                self._more.clear()
                self._ask(gateway)
                await self._more.wait()
        except WebSocketClosedError:
            pass
        except Exception:
            self.log.exception("a connection to the gateway is given up")
            gateway.close()

    def _ask(self, gateway: WebSocketClientConnection) -> None:
        """Ask what has arrived; tornado's own ping fails in another way where the stream is closed already."""
        if gateway.protocol is None or gateway.protocol.is_closing():
            raise WebSocketClosedError
        question = self._to_send.question()
        if question is not None:
            gateway.ping(question)

    def _hang_up(self, connecting: asyncio.Future[WebSocketClientConnection]) -> None:
        if not connecting.cancelled() and connecting.exception() is None:
            gateway = connecting.result()
            self._resume(gateway)
            self._send_rest(gateway)
            _drain(gateway)

    def _send_rest(self, gateway: WebSocketClientConnection) -> None:
        """What a page had said before it went, or the connection began to end."""
        if self.websocket_handler.ws_connection is None:
            while self._to_send:
                _written(gateway, self._to_send.take())


def _written(gateway: WebSocketClientConnection, message: str | bytes) -> asyncio.Future[None]:
    """The message's leaving this machine; it fails also where the connection is ending and nothing is read any more."""
    try:
        if gateway.protocol is None or gateway.protocol.is_closing():
            raise WebSocketClosedError
        leaving = gateway.write_message(message, binary=isinstance(message, bytes))
    except WebSocketClosedError as error:
        leaving = asyncio.get_running_loop().create_future()
        leaving.set_exception(error)
    leaving.add_done_callback(_heard)
    return leaving


def _received(gateway: WebSocketClientConnection) -> int | None:
    """How many messages of this page the gateway says it has."""
    told = gateway.headers.get(HEADER, "") if gateway.headers is not None else ""
    return int(told) if told.isascii() and told.isdigit() and len(told) < 20 else None


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
