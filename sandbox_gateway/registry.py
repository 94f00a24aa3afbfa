"""The runtimes by name. ``fake`` is made only when it is asked for by that name (DESIGN 4.12)."""

from __future__ import annotations

import os

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.runtimes.base import Runtime

NAMES = ("gvisor", "fake")


def make_runtime(name: str, paths: Paths) -> Runtime:
    """A runtime for this installation. Raises ``invalid_profile`` for an unknown name; probing is the caller's."""
    if name == "gvisor":
        from sandbox_gateway.host.setup import find_runsc
        from sandbox_gateway.runtimes.gvisor import GvisorRuntime

        return GvisorRuntime(paths, find_runsc(paths, os.environ))
    if name == "fake":
        from sandbox_gateway.testing.fake import FakeRuntime

        return FakeRuntime(paths)
    raise SandboxGatewayError("invalid_profile", f"unknown runtime {name!r}", f"Known ones: {', '.join(NAMES)}.")
