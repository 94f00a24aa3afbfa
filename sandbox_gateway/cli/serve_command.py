"""``jupyter sandbox serve``: the headless gateway. Its options are jupyter_server's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any


def add(commands: Any) -> None:
    """Say that there is the command; :func:`serve` takes its options before the parser sees them."""
    commands.add_parser(
        "serve",
        help="the gateway: kernels over HTTP, nothing else (options of jupyter_server; --help-all lists them)",
        add_help=False,
    ).set_defaults(run=lambda options: serve([]))


def serve(arguments: Sequence[str]) -> int:
    """Serve until the process is told to end; returns the exit status."""
    from sandbox_gateway.server.app import GatewayApp

    logger = logging.getLogger("sandbox_gateway")
    logger.handlers = [found for found in logger.handlers if not isinstance(found, logging.NullHandler)]
    try:
        GatewayApp.launch_instance(argv=list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
