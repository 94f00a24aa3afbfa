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
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.httputil import url_concat
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect
from traitlets import default

RELAY: Final = "sandbox_gateway_relay"
"""The web application's setting with the :class:`~sandbox_gateway.server.passing.Relay`."""
MAX_MESSAGE: Final = 256 << 20
"""Bytes of one message at most, in both directions."""
AGAIN: Final = (None, 1001, 1006, 1012)
"""Ways in which a connection ends that another one can go on from: the gateway is lost, or restarted."""
PING: Final = 30.0
"""Seconds between two looks whether the gateway is still there."""


class RelayedConnection(GatewayWebSocketConnection):
    """Passes messages on as they are, both ways, and connects again to a gateway that was away."""

    _passing: asyncio.Task[None] | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._to_send: deque[str | bytes] = deque()
        self._more = asyncio.Event()

    @property
    def _ours(self) -> bool:
        relay = self.websocket_handler.settings.get(RELAY)
        return relay is not None and relay.ours is True

    @default("kernel_ws_protocol")
    def _protocol(self) -> str | None:
        """With a gateway of ours the page's choice (None), else the older one (empty), as Jupyter has it."""
        return None if self._ours else ""

    async def connect(self) -> None:
        """Begin to pass on."""
        if self._ours:
            self._passing = asyncio.create_task(self._pass())
        else:
            await super().connect()

    def disconnect(self) -> None:  # type: ignore[override]
        """The page is gone."""
        if self._passing is None:
            super().disconnect()
        else:
            self._passing.cancel()

    def handle_incoming_message(self, message: str | bytes) -> None:
        """One of the page's; it waits for a gateway that is away."""
        if self._passing is None:
            super().handle_incoming_message(message)  # type: ignore[arg-type]
        else:
            self._to_send.append(message)
            self._more.set()

    async def _pass(self) -> None:
        client = GatewayClient.instance()
        attempts, replay = 0, self.websocket_handler.get_argument("replay", "")
        code: int | None = 1012  # JupyterLab comes again
        while attempts <= client.gateway_retry_max:
            try:
                gateway = await self._connected(replay)
            except HTTPClientError as error:
                if 400 <= error.code < 500:
                    self.log.warning("the gateway refuses a connection to kernel %s: %s", self.kernel_id, error)
                    break
                attempts += 1
            except OSError as error:
                self.log.debug("the gateway does not answer: %s", error)
                attempts += 1
            else:
                # Who comes again under his id gets what he has missed, and not all of it once more.
                attempts, replay = 0, ""
                await self._exchange(gateway)
                if gateway.close_code not in AGAIN:
                    code = gateway.close_code
                    break
            longest = client.gateway_retry_interval_max
            await asyncio.sleep(min(client.gateway_retry_interval * 2 ** max(attempts - 1, 0), longest))
        self.websocket_handler.close(code)

    async def _connected(self, replay: str) -> WebSocketClientConnection:
        client = GatewayClient.instance()
        address = url_path_join(str(client.ws_url), str(client.kernels_endpoint), self.kernel_id, "channels")
        query = {"session_id": self.session_id, **({"replay": replay} if replay else {})}
        chosen = self.websocket_handler.selected_subprotocol
        return await websocket_connect(
            HTTPRequest(url_concat(address, query), **client.load_connection_args()),
            subprotocols=[chosen] if chosen else None,
            ping_interval=PING,
            max_message_size=MAX_MESSAGE,
        )

    async def _exchange(self, gateway: WebSocketClientConnection) -> None:
        """Return when the gateway has ended the connection."""
        sending = asyncio.create_task(self._send(gateway))
        try:
            while (message := await gateway.read_message()) is not None:
                # Until it has left, so that nothing piles up here.
                await self.websocket_handler.write_message(message, binary=isinstance(message, bytes))
        except WebSocketClosedError:
            pass  # the page's; we are told of that by disconnect
        finally:
            gateway.close()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send(self, gateway: WebSocketClientConnection) -> None:
        while True:
            while self._to_send:
                message = self._to_send[0]
                try:
                    await gateway.write_message(message, binary=isinstance(message, bytes))
                except WebSocketClosedError:
                    return  # it is sent by the next connection
                self._to_send.popleft()
            self._more.clear()
            await self._more.wait()
