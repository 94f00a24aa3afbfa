"""``/api/events`` and ``/api/events/subscribe`` in place of jupyter_server's, which tell everything to everybody."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from jupyter_core.utils import ensure_async
from jupyter_events import EventLogger
from jupyter_server.auth.decorator import authorized
from jupyter_server.services.events.handlers import EventHandler, SubscribeWebsocket
from tornado import web
from tornado.websocket import WebSocketClosedError

from sandbox_gateway.server.callers import Caller
from sandbox_gateway.server.events import KERNEL_ACTIONS, OURS, may_see
from sandbox_gateway.server.identity import REVOKED, Revocation, caller_of, still_welcome

MAX_WAITING: Final = 2000
"""Events that a subscriber may have been sent and not taken yet, before he is cut off."""
TOO_SLOW: Final = 1013
"""Close code "try again later"."""


class OwnEventsSocket(SubscribeWebsocket):
    """The caller's own events; for administrators, all.

    Settings: ``sandbox_events`` is the :class:`~sandbox_gateway.server.events.EventBridge`.
    """

    caller: Caller
    _revocation: Revocation | None = None
    _waiting = 0

    async def prepare(self, **options: Any) -> Any:
        """Authenticate; a stranger gets 403, as a login page is no use of a WebSocket."""
        return await super().prepare(_redirect_to_login=False)

    def open(self, *args: Any, **options: Any) -> None:
        """Begin to listen; called when the WebSocket is up, after authentication and authorisation."""
        self.caller = caller_of(self.current_user)
        super().open()
        self._revocation = Revocation(self, self._revoked)

    def on_close(self) -> None:
        """The WebSocket has ended."""
        if self._revocation is not None:
            self._revocation.close()
        super().on_close()

    def _revoked(self) -> None:
        self.close(REVOKED, "the token was revoked")
        self.on_close()

    async def event_listener(self, logger: EventLogger, schema_id: str, data: dict[str, Any]) -> None:
        """Called by the event bus with each event."""
        if not may_see(self.caller, schema_id, data, self._owner_of()):
            return
        if not still_welcome(self):
            self._revoked()
            return
        if self._waiting >= MAX_WAITING:
            # The events are in the store: who comes back reads there what he missed.
            self.close(TOO_SLOW, "too slow")
            self.on_close()
            return
        try:
            sent = self.write_message(json.dumps({"schema_id": schema_id, **data}))
        except WebSocketClosedError:
            self.on_close()
            return
        self._waiting += 1
        try:
            await sent
        except WebSocketClosedError:
            self.on_close()
        finally:
            self._waiting -= 1

    def _owner_of(self) -> Callable[[str], str | None]:
        bridge = self.settings.get("sandbox_events")
        return bridge.owner_of if bridge is not None else lambda kernel_id: None


class OwnEventsHandler(EventHandler):
    """Events of applications: administrators' only, and nobody's where the event is this server's word."""

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Emit an event."""
        if not caller_of(self.current_user).admin:
            raise web.HTTPError(403, "only administrators put events on the bus")
        try:
            payload = self.get_json_body()
        except (UnicodeDecodeError, RecursionError):
            payload = None
        if not isinstance(payload, dict) or not isinstance(payload.get("data"), dict):
            raise web.HTTPError(400, "the body is no JSON object with schema_id, version and data")
        schema = payload.get("schema_id")
        if not isinstance(schema, str):
            raise web.HTTPError(400, "schema_id is no text")
        if schema in OURS or schema == KERNEL_ACTIONS:
            raise web.HTTPError(403, "events of this schema are the server's own")
        await ensure_async(super().post())


def event_handlers() -> list[tuple[str, type[web.RequestHandler]]]:
    """The routes, below the server's base URL."""
    return [(r"/api/events", OwnEventsHandler), (r"/api/events/subscribe", OwnEventsSocket)]
