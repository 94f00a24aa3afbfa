"""A JupyterLab whose kernels are on a gateway of ours (``--gateway-url``): our routes and events are passed on.

Jupyter passes on ``/api/kernels`` and what belongs to it, under the credentials of its :class:`GatewayClient`. This
does the same with our routes, so that the page has the same interface. Whoever may use this server uses the gateway as
it does: there is one user here.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, Final

from jupyter_events import EventLogger
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from sandbox_gateway.server.events import OURS, SCHEMAS, schema_id

log = logging.getLogger(__name__)

PATIENCE: Final = 3700.0
"""Seconds that an answer may take; ``wait`` is an hour at most."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds between two attempts to reach a gateway that is away."""
PASSED: Final = ("Location", "Retry-After", "Cache-Control")
"""Headers of an answer that are passed on."""
KINDS: Final = (
    "application/json",
    "application/problem+json",
    "application/x-ndjson",
    "application/yaml",
    "text/plain",
)
"""What an answer may be. Nothing else is shown as what it says it is: this page's origin holds the user's login."""


class PassedHandler(APIHandler):
    """One request of the page, asked of the gateway."""

    auth_resource = "sandboxes"

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
        query = "&".join(part for part in self.request.query.split("&") if part and not part.startswith("token="))
        body = None if method in ("GET", "DELETE") else self.request.body
        try:
            answer = await AsyncHTTPClient().fetch(
                request(
                    below + (f"?{query}" if query else ""),
                    method=method,
                    body=body,
                    headers={"Content-Type": "application/json"} if body else {},
                ),
                raise_error=False,
            )
        except (OSError, HTTPClientError) as error:
            raise web.HTTPError(502, f"the gateway does not answer: {error}") from None
        if answer.code == 599:
            raise web.HTTPError(502, f"the gateway does not answer: {answer.error}")
        self.set_status(answer.code)
        for name in PASSED:
            if name in answer.headers:
                self.set_header(name, answer.headers[name])
        kind = answer.headers.get("Content-Type", "").split(";")[0].strip()
        # With a body only: tornado refuses a type for a 204.
        if answer.code == 204:
            self.finish()
        else:
            self.finish(answer.body, set_content_type=kind if kind in KINDS else "text/plain; charset=UTF-8")


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
        self.ours = False
        """Whether the gateway was found to be one of ours."""
        for path in sorted(SCHEMAS.glob("*.yaml")):
            if schema_id(path) not in event_logger.schemas:
                event_logger.register_event_schema(path)

    async def run(self) -> None:
        """Connect, and again when the connection is lost; a gateway that is not ours ends it."""
        pause = FIRST_PAUSE
        while True:
            try:
                if not self.ours and not await self._is_ours():
                    return
                self.ours = True
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
