"""``/api/sessions``, ``/api/me`` and the actions of ``/api/kernels`` as Jupyter defines them, with errors that say why.

jupyter_server's own handlers answer whatever goes wrong while a kernel starts with 500 or 501: a user who is over his
quota is told so here. Bodies are checked before anything is done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.multikernelmanager import DuplicateKernelError
from jupyter_server.auth.decorator import authorized
from jupyter_server.services.api.handlers import IdentityHandler
from jupyter_server.services.kernels.handlers import KernelActionHandler, _kernel_action_regex, _kernel_id_regex
from jupyter_server.services.sessions.handlers import SessionHandler, SessionRootHandler, _session_id_regex
from tornado import web

from sandbox_gateway.server.kernel_handlers import json_object

MAX_TEXT = 4096
"""Characters of a path or a name."""


class GatewayKernelActionHandler(KernelActionHandler):
    """Interrupt and restart."""

    @web.authenticated
    @authorized
    async def post(self, kernel_id: str, action: str) -> None:
        """Do it."""
        await _with_cause(super().post(kernel_id, action))


class GatewaySessionRootHandler(SessionRootHandler):
    """The sessions of who asks, and a new one."""

    _body: dict[str, Any] | None = None

    def get_json_body(self) -> dict[str, Any] | None:
        """The body, checked."""
        return self._body

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Begin one, with a kernel."""
        self._body = _checked(super().get_json_body)
        await _with_cause(super().post())


class GatewaySessionHandler(SessionHandler):
    """One session."""

    _body: dict[str, Any] | None = None

    def get_json_body(self) -> dict[str, Any] | None:
        """The body, checked."""
        return self._body

    @web.authenticated
    @authorized
    async def patch(self, session_id: str) -> None:
        """Rename it, or give it another kernel."""
        self._body = _checked(super().get_json_body)
        kernel = (self._body or {}).get("kernel") or {}
        if kernel.get("name") is not None and kernel.get("id") is None:
            manager = self.session_manager
            before = await manager.get_session(session_id=session_id)
            try:
                started = await manager.start_kernel_for_session(
                    session_id, before["path"], before["name"], before["type"], kernel["name"]
                )
            except NoSuchKernel:
                raise web.HTTPError(404, f"there is no kernelspec {kernel['name']!r}") from None
            kernel["id"] = started
        await _with_cause(super().patch(session_id))


class GatewayIdentityHandler(IdentityHandler):
    """Who is logged in."""

    def get_json_body(self) -> dict[str, Any] | None:
        """The body, checked."""
        return json_object(super().get_json_body)


async def _with_cause(answering: Awaitable[None] | None) -> None:
    """Where an HTTP error is hidden in a 500, be that error."""
    assert answering is not None  # jupyter_server's methods are coroutines; their types leave it open
    try:
        await answering
    except web.HTTPError as error:
        if error.status_code == 500 and isinstance(error.__cause__, web.HTTPError):
            raise error.__cause__ from None
        if error.status_code == 500 and isinstance(error.__cause__, DuplicateKernelError):
            raise web.HTTPError(409, str(error.__cause__)) from None
        raise


def _checked(read: Callable[[], Any]) -> dict[str, Any] | None:
    """What ``read`` finds in a body: nothing, or an object with the types that the handlers take for granted."""
    body = json_object(read)
    if body is None:
        return None
    if "path" in body and body["path"] is None:
        raise web.HTTPError(400, "path is no text")
    for where in ("", "kernel", "notebook"):
        part = body.get(where) if where else body
        if part is None:
            body.pop(where, None)
            continue
        if not isinstance(part, dict):
            raise web.HTTPError(400, f"{where} is no JSON object")
        for key in ("path", "name", "type", "id"):
            value = part.get(key)
            if value is not None and not (isinstance(value, str) and len(value) <= MAX_TEXT and _plain(value)):
                raise web.HTTPError(400, f"{key} is no text of at most {MAX_TEXT} characters")
    return body


def _plain(text: str) -> bool:
    try:
        return "\0" not in text and bool(text.encode() or True)
    except UnicodeEncodeError:  # half of a surrogate pair, which no file name and no database takes
        return False


def session_handlers() -> list[tuple[str, type[web.RequestHandler]]]:
    """What takes the place of jupyter_server's own."""
    return [
        (rf"/api/kernels/{_kernel_id_regex}/{_kernel_action_regex}", GatewayKernelActionHandler),
        (r"/api/me", GatewayIdentityHandler),
        (r"/api/sessions", GatewaySessionRootHandler),
        (rf"/api/sessions/{_session_id_regex}", GatewaySessionHandler),
    ]
