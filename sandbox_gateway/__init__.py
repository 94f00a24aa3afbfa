"""Jupyter kernels in sandboxes: gVisor isolation behind Jupyter's own protocols.

:class:`Sandbox` is the way in for programs; it and what belongs to it are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.execution import Execution
    from sandbox_gateway.results import (
        ClearOutput,
        DisplayData,
        Done,
        Error,
        ExecuteResult,
        InputRequest,
        Message,
        Result,
        Stream,
        UpdateDisplayData,
    )
    from sandbox_gateway.sandbox import Sandbox

__version__ = "0.1.0"


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    """Where jupyter_server finds the gateway; called when it looks for its extensions."""
    return [{"module": "sandbox_gateway.server"}]


__all__ = [
    "ClearOutput",
    "DisplayData",
    "Done",
    "Error",
    "ExecuteResult",
    "Execution",
    "InputRequest",
    "Message",
    "Result",
    "Sandbox",
    "SandboxGatewayError",
    "Stream",
    "UpdateDisplayData",
    "__version__",
]

_ELSEWHERE = {"Sandbox": "sandbox_gateway.sandbox", "Execution": "sandbox_gateway.execution"}


def __getattr__(name: str) -> Any:
    """Import what this module only names; a cheap ``import sandbox_gateway`` is worth much to commands."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_ELSEWHERE.get(name, "sandbox_gateway.results")), name)
    globals()[name] = found
    return found
