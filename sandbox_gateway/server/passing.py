"""A JupyterLab whose kernels are on a gateway of ours (``--gateway-url``): our routes and events are passed on.

Jupyter passes on ``/api/kernels`` and what belongs to it, under the credentials of its :class:`GatewayClient`. This
does the same with our routes, so that the page has the same interface. Whoever may use this server uses the gateway as
it does: there is one user here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any, Final
from urllib.parse import unquote

from jupyter_events import EventLogger
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError
from tornado.websocket import websocket_connect

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.server.api_handler import ProblemHandler
from sandbox_gateway.server.events import OURS, SCHEMAS, schema_id
from sandbox_gateway.server.upstream import Broken, Exchange

log = logging.getLogger(__name__)

PATIENCE: Final = 3700.0
"""Seconds until an answer begins; ``wait`` is an hour at most."""
PROMPT: Final = 20.0
"""Seconds for an answer that somebody waits for and that can be done without."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds between two attempts to reach a gateway that is away."""
ASKED: Final = ("If-None-Match",)
"""Headers of a request that are passed on: a list of hundreds that did not change is not sent again."""
PASSED: Final = ("Location", "Retry-After", "Cache-Control", "ETag")
"""Headers of an answer that are passed on."""
KINDS: Final = (
    "application/json",
    "application/problem+json",
    "application/x-ndjson",
    "application/yaml",
    "text/plain",
)
"""What an answer may be. Nothing else is shown as what it says it is: this page's origin holds the user's login."""


class PassedHandler(ProblemHandler):
    """One request of the page, asked of the gateway; the answer goes on as it comes."""

    _exchange: Exchange | None = None
    _left = False
    """Whether who asked is gone."""

    @web.authenticated
    @authorized
    async def get(self, path: str) -> None:
        """Pass it on."""
        await self._pass()

    @web.authenticated
    @authorized
    async def post(self, path: str) -> None:
        """Pass it on."""
        await self._pass()

    @web.authenticated
    @authorized
    async def patch(self, path: str) -> None:
        """Pass it on."""
        await self._pass()

    @web.authenticated
    @authorized
    async def delete(self, path: str) -> None:
        """Pass it on."""
        await self._pass()

    async def _pass(self) -> None:
        method = str(self.request.method)
        below = "/" + self.request.path[len(self.base_url) :]
        if any(part in (".", "..") or "\\" in part for part in unquote(below).split("/")):
            raise web.HTTPError(404)  # what stands before the gateway might make another of our routes of it
        query = "&".join(part for part in self.request.query.split("&") if part and not part.startswith("token="))
        body = self.request.body if method not in ("GET", "DELETE") else b""
        headers = {name: self.request.headers[name] for name in ASKED if name in self.request.headers}
        if body:
            headers["Content-Type"] = "application/json"
        asked = request(below + (f"?{query}" if query else ""), method=method, body=body or None, headers=headers)
        exchange = self._exchange = Exchange(asked)
        begun = False
        try:
            status, found = await exchange.begin()
            self._show(status, found)
            begun = True
            await exchange.take(self._hand_on)
        except Broken as error:
            if not begun and not self._left:
                raise SandboxGatewayError("gateway_unreachable", f"the gateway does not answer: {error}") from None
            # What came of the answer must not look like all of it.
            self.request.connection.close()  # type: ignore[union-attr]
            return
        finally:
            exchange.close()
        self.finish()

    def _show(self, status: int, headers: HTTPHeaders) -> None:
        if status == 401:
            # The user is signed in here: to tell him to sign in again would be wrong.
            raise SandboxGatewayError("gateway_refused", "the gateway does not accept this server's token")
        if 300 <= status < 400 and status != 304:
            text = f"the gateway sends its callers elsewhere: {headers.get('Location', '')[:200]}"
            raise SandboxGatewayError("gateway_unreachable", text, "Give its new address by --gateway-url.")
        self.set_status(status)
        for name in PASSED:
            if name in headers:
                self.set_header(name, headers[name])
        kind = headers.get("Content-Type", "").partition(";")[0].strip()
        self.set_header("Content-Type", kind if kind in KINDS else "text/plain; charset=UTF-8")

    async def _hand_on(self, chunk: bytes) -> None:
        self.write(chunk)
        with contextlib.suppress(StreamClosedError):
            await self.flush()  # until the page has taken it, so that nothing piles up here

    def on_connection_close(self) -> None:
        """Whoever asked is gone: the gateway hears of it, and interrupts the cell that he had run."""
        super().on_connection_close()
        self._left = True
        if self._exchange is not None:
            self._exchange.close()

    def finish(self, *args: Any, set_content_type: str | None = None, **_: Any) -> asyncio.Future[Any]:
        """Jupyter's own would call all of it JSON."""
        if set_content_type is not None:
            self.set_header("Content-Type", set_content_type)
        self.update_api_activity()
        return super(APIHandler, self).finish(*args)


def request(path: str, **options: Any) -> HTTPRequest:
    """A request to the gateway, with the address, credentials and certificates that the user configured for it."""
    client = GatewayClient.instance()
    arguments = client.load_connection_args(**options)
    arguments["request_timeout"] = PATIENCE
    return HTTPRequest(url_path_join(str(client.url), path), allow_nonstandard_methods=True, **arguments)


class Relay:
    """Brings the gateway's events to this server's bus while it runs, and knows whether the gateway is one of ours."""

    def __init__(self, event_logger: EventLogger) -> None:
        self._logger = event_logger
        self.ours: bool | None = None
        """Whether the gateway is one of ours; None while it has not answered yet."""
        for path in sorted(SCHEMAS.glob("*.yaml")):
            if schema_id(path) not in event_logger.schemas:
                event_logger.register_event_schema(path)

    async def ask(self) -> None:
        """Find out now whether the gateway is one of ours, unless that is known; it is not of one that is away."""
        if self.ours is None:
            with contextlib.suppress(OSError, HTTPClientError):
                async with asyncio.timeout(PROMPT):
                    self.ours = await self._is_ours()

    async def run(self) -> None:
        """Connect, and again when the connection is lost; a gateway that is not ours ends it."""
        pause = FIRST_PAUSE
        while True:
            try:
                if self.ours is None:
                    self.ours = await self._is_ours()
                if not self.ours:
                    return
                await self._listen()
                pause = FIRST_PAUSE
            except Exception as error:
                # Away, or not reachable yet; the page's own poll tells its user.
                log.debug("the gateway's events cannot be heard: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _is_ours(self) -> bool:
        answer = await AsyncHTTPClient().fetch(request("/api/sandboxes/openapi.json"), raise_error=False)
        if answer.code in (200, 404):
            return answer.code == 200
        raise OSError(f"it answered {answer.code}")

    async def _listen(self) -> None:
        client = GatewayClient.instance()
        arguments = client.load_connection_args()
        address = url_path_join(str(client.ws_url), "/api/events/subscribe")
        socket = await websocket_connect(HTTPRequest(address, **arguments), ping_interval=30)
        try:
            while (message := await socket.read_message()) is not None:
                self._tell(message)
        finally:
            socket.close()

    def _tell(self, message: str | bytes) -> None:
        try:
            told = json.loads(message)
            schema = told.pop("schema_id")
            if schema in OURS:
                self._logger.emit(schema_id=schema, data={k: v for k, v in told.items() if not k.startswith("__")})
        except Exception as error:  # a gateway may be wrong; this server goes on
            log.debug("an event of the gateway was not understood: %s", error)
