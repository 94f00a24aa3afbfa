"""Giving a session a kernel of the gateway's (``--gateway-url``) that this server has not started itself.

jupyter_server's own handler knows the kernels that it has asked for by name, and refuses others: a sandbox with chosen
resources, one that is gone on with, one that starts from a snapshot. A *new* session may have any of them, by its id.
"""

from __future__ import annotations

import re
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.gateway.managers import GatewayMappingKernelManager
from jupyter_server.services.kernels.handlers import _kernel_id_regex
from jupyter_server.services.sessions.handlers import SessionHandler, _session_id_regex
from tornado import web


class AttachingSessionHandler(SessionHandler):
    """One session."""

    @web.authenticated
    @authorized
    async def patch(self, session_id: str) -> None:
        """Rename it, or give it another kernel; 404 for one that the gateway does not have, or not for this user."""
        body = self.get_json_body()
        kernel = body.get("kernel") if isinstance(body, dict) else None
        kernel_id = kernel.get("id") if isinstance(kernel, dict) else None
        if isinstance(kernel_id, str) and re.fullmatch(_kernel_id_regex, kernel_id) is not None:
            await self.session_manager.get_session(session_id=session_id)  # 404 where there is none
            await self._know(kernel_id)
        done = super().patch(session_id)
        if done is not None:
            await done

    async def _know(self, kernel_id: str) -> None:
        manager = self.kernel_manager
        if kernel_id in manager or not isinstance(manager, GatewayMappingKernelManager):
            return
        await manager.start_kernel(kernel_id=kernel_id)  # "using existing kernel": it is only asked for
        if not manager.get_kernel(kernel_id).has_kernel:
            manager.remove_kernel(kernel_id)
            raise web.HTTPError(404, f"Kernel does not exist: {kernel_id}")


def attaching_handlers() -> list[tuple[str, Any]]:
    """The routes."""
    return [(rf"/api/sessions/{_session_id_regex}", AttachingSessionHandler)]
