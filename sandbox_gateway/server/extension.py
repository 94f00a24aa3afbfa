"""How the gateway gets into a Jupyter server: its managers before the server makes them, its routes after.

A server whose kernels are on another gateway (``--gateway-url``), or that was configured to have managers of its own,
is left as it is, and says so in its log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.handlers import _kernel_id_regex
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server.services.sessions.sessionmanager import SessionManager
from jupyter_server.utils import url_path_join

from sandbox_gateway.server import logs
from sandbox_gateway.server.attaching import attaching_handlers
from sandbox_gateway.server.event_handlers import event_handlers
from sandbox_gateway.server.events import EventBridge
from sandbox_gateway.server.kernel_handlers import kernel_handlers
from sandbox_gateway.server.kernels import SandboxMappingKernelManager
from sandbox_gateway.server.metrics import Metrics, MetricsHandler
from sandbox_gateway.server.operations import operations_of
from sandbox_gateway.server.passing import PassedHandler, Relay
from sandbox_gateway.server.relaying import MAX_MESSAGE, RELAY, RelayedConnection
from sandbox_gateway.server.rest import ROOTS, rest_handlers
from sandbox_gateway.server.session_handlers import session_handlers
from sandbox_gateway.server.sessions import SandboxSessionManager
from sandbox_gateway.server.websocket import SandboxWebSocketConnection, SandboxWebSocketHandler


def link(serverapp: ServerApp) -> None:
    """Have the server make our managers; called while it initialises, before it makes any."""
    gateway = GatewayClient.instance(parent=serverapp)
    if gateway.gateway_enabled:
        serverapp.log.info("sandbox_gateway: kernels are on %s", gateway.url)
        if not serverapp.trait_has_value("kernel_websocket_connection_class"):
            serverapp.kernel_websocket_connection_class = RelayedConnection
            serverapp.tornado_settings.setdefault("websocket_max_message_size", MAX_MESSAGE)
        return
    ours = {
        "kernel_manager_class": (AsyncMappingKernelManager, SandboxMappingKernelManager),
        "kernel_websocket_connection_class": (ZMQChannelsWebsocketConnection, SandboxWebSocketConnection),
        "session_manager_class": (SessionManager, SandboxSessionManager),
    }
    for name, stock_and_mine in ours.items():
        if serverapp.trait_has_value(name) and getattr(serverapp, name) not in stock_and_mine:
            serverapp.log.warning("sandbox_gateway: ServerApp.%s is set; sandboxes run as other kernels do", name)
            return
    for name, (_, mine) in ours.items():
        setattr(serverapp, name, mine)
    serverapp.tornado_settings.setdefault("websocket_max_message_size", MAX_MESSAGE)


def load(serverapp: ServerApp) -> None:
    """Add our routes, and take over what an earlier server left; where the kernels are on a gateway, pass them on."""
    if GatewayClient.instance().gateway_enabled:
        _pass_on(serverapp)
        return
    manager = serverapp.kernel_manager
    if not isinstance(manager, SandboxMappingKernelManager):
        return
    gateway = manager.gateway
    logs.warn_of_arguments(serverapp.log)
    logs.quiet_pings()
    assert serverapp.event_logger is not None
    bridge = manager.bridge = EventBridge(gateway, serverapp.event_logger)
    serverapp.web_app.settings |= {
        "sandbox_gateway": gateway,
        "sandbox_events": bridge,
        "sandbox_metrics": Metrics(gateway, bridge),
    }
    gateway.on_close(bridge.close)
    gateway.before_close.append(operations_of(serverapp.web_app.settings).close)
    if gateway.settings.headless or manager.config_of_gateway.log_json:
        # A JupyterLab of one's own goes on telling its address as it always did.
        logs.install(serverapp.log, serverapp.identity_provider, as_json=manager.config_of_gateway.log_json)
    add_routes(serverapp, [*rest_handlers(), *event_handlers(), (r"/metrics", MetricsHandler)])
    _tell_pages(serverapp, lambda: "here")
    channels = rf"/api/kernels/{_kernel_id_regex}/channels"
    add_routes(serverapp, [(channels, SandboxWebSocketHandler), *kernel_handlers(), *session_handlers()])
    _begin(serverapp, manager)


def _pass_on(serverapp: ServerApp) -> None:
    assert serverapp.event_logger is not None
    relay = serverapp.web_app.settings[RELAY] = Relay(serverapp.event_logger)
    add_routes(serverapp, [(rf"/api/(?:{'|'.join(ROOTS)})((?:/.*)?)", PassedHandler), *attaching_handlers()])
    # One that has not answered yet may be: the page then shows that it is away, and goes on when it is there.
    _tell_pages(serverapp, lambda: "" if relay.ours is False else "remote")

    async def run() -> None:
        serverapp._sandbox_gateway_relay = asyncio.create_task(relay.run())  # type: ignore[attr-defined]

    serverapp.io_loop.add_callback(run)


def _tell_pages(serverapp: ServerApp, where: Callable[[], str]) -> None:
    """Have the pages of JupyterLab and Notebook know ``where`` our routes lead, so that none asks in vain.

    That is ``here``, to a gateway (``remote``), or nowhere (empty).
    """
    settings = serverapp.web_app.settings
    earlier = settings.get("page_config_hook")

    def hook(handler: Any, page_config: dict[str, Any]) -> dict[str, Any]:
        if earlier is not None:
            page_config = earlier(handler, page_config)
        place = where()
        return {**page_config, "sandboxGateway": place} if place else page_config

    settings["page_config_hook"] = hook


def add_routes(serverapp: ServerApp, handlers: list[Any]) -> None:
    """Serve ``handlers`` below the server's base URL, before its own."""
    base = serverapp.web_app.settings["base_url"]
    routes = [(url_path_join(base, pattern), *rest) for pattern, *rest in handlers]
    serverapp.web_app.add_handlers(".*$", routes)


def _begin(serverapp: ServerApp, manager: SandboxMappingKernelManager) -> None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        # Before anybody is served: who asks first finds every kernel that there is.
        serverapp.io_loop.run_sync(manager.gateway.start)
    else:
        serverapp._sandbox_gateway_start = loop.create_task(manager.gateway.start())  # type: ignore[attr-defined]
