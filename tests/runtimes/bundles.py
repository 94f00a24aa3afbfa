"""Runtimes as picklable factories."""

from __future__ import annotations

from pathlib import Path

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.runtimes.base import Runtime
from sandbox_gateway.runtimes.gvisor import GvisorRuntime
from sandbox_gateway.testing.fake import FakeRuntime


def make_fake(paths: Paths) -> Runtime:
    """The fake runtime."""
    return FakeRuntime(paths)


def make_gvisor(binary: Path, paths: Paths) -> Runtime:
    """gVisor with this binary."""
    return GvisorRuntime(paths, binary)
