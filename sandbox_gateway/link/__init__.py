"""The host's side of the link: see :mod:`sandbox_gateway.link.host`."""

from __future__ import annotations

from sandbox_gateway.link.host import Link
from sandbox_gateway.link.stream import LinkStream

__all__ = ["Link", "LinkStream"]
