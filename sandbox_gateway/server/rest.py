"""The REST routes of the gateway, for :mod:`sandbox_gateway.server.extension`."""

from __future__ import annotations

import re

from sandbox_gateway.server import openapi
from sandbox_gateway.server.api_handler import RestHandler
from sandbox_gateway.server.execute_handler import ExecuteHandler, InputHandler
from sandbox_gateway.server.other_handlers import (
    JsonHandler,
    NowhereHandler,
    OperationHandler,
    OperationsHandler,
    ProfileHandler,
    ProfilesHandler,
    QuotaHandler,
    YamlHandler,
)
from sandbox_gateway.server.sandbox_handlers import (
    EventsHandler,
    ForkHandler,
    InterruptHandler,
    LogsHandler,
    PauseHandler,
    RestartHandler,
    ResumeHandler,
    SandboxesHandler,
    SandboxHandler,
    StatsHandler,
    SuspendHandler,
)
from sandbox_gateway.server.snapshot_handlers import (
    SandboxSnapshotsHandler,
    SnapshotHandler,
    SnapshotsHandler,
    StartHandler,
)

HANDLERS: tuple[type[RestHandler], ...] = (
    YamlHandler,
    JsonHandler,
    SandboxesHandler,
    SandboxHandler,
    SuspendHandler,
    ResumeHandler,
    PauseHandler,
    InterruptHandler,
    RestartHandler,
    ForkHandler,
    SandboxSnapshotsHandler,
    LogsHandler,
    StatsHandler,
    EventsHandler,
    ExecuteHandler,
    InputHandler,
    SnapshotsHandler,
    SnapshotHandler,
    StartHandler,
    ProfilesHandler,
    ProfileHandler,
    QuotaHandler,
    OperationsHandler,
    OperationHandler,
)
"""One for each path of the description; those with a name come before those that match any."""
ROOTS = ("sandboxes", "snapshots", "profiles", "operations", "quota")
"""The first parts of our addresses, behind ``/api/``."""


def rest_handlers() -> list[tuple[str, type]]:
    """Patterns, without the server's base URL, and handlers, in the order in which they count."""
    openapi.description()  # read now, and not while the first caller waits
    routes: list[tuple[str, type]] = [(_pattern(handler.path), handler) for handler in HANDLERS]
    return [*routes, (rf"/api/(?:{'|'.join(ROOTS)})(?:/.*)?", NowhereHandler)]


def _pattern(path: str) -> str:
    return re.sub(r"\\\{[a-z]+\\\}", "([^/]+)", re.escape(path))
