"""The gateway: Jupyter's kernel protocol over HTTP for sandboxed kernels, inside jupyter_server or headless.

jupyter_server calls the two functions of this module; what they need is imported then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp


def _link_jupyter_server_extension(serverapp: ServerApp) -> None:
    """Before the server makes its managers."""
    from sandbox_gateway.server.extension import link

    link(serverapp)


def _load_jupyter_server_extension(serverapp: ServerApp) -> None:
    """When they are made."""
    from sandbox_gateway.server.extension import load

    load(serverapp)
