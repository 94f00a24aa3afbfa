"""The fixtures of the snapshots' tests."""

from __future__ import annotations

import pytest

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.snapshots import SnapshotStore


@pytest.fixture
def store(paths: Paths) -> SnapshotStore:
    """The snapshots of an installation of the test's own."""
    return SnapshotStore(paths)
