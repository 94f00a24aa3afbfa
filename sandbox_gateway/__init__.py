"""Jupyter kernels in sandboxes: gVisor isolation behind Jupyter's own protocols."""

from __future__ import annotations

from sandbox_gateway.errors import SandboxGatewayError

__version__ = "0.1.0"

__all__ = ["SandboxGatewayError", "__version__"]
