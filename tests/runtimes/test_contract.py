"""Every runtime passes the contract of :mod:`sandbox_gateway.testing.contract`."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from bundles import make_fake, make_gvisor

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.agent_layer import AGENT_PYTHON
from sandbox_gateway.model import Image, Limits
from sandbox_gateway.testing.contract import RuntimeContract, Subject
from sandbox_gateway.testing.contract_snapshots import SnapshotContract


class TestFake(RuntimeContract, SnapshotContract):
    """The fake runtime, which is what the other tests stand on."""

    @pytest.fixture
    def subject(self, paths: Paths) -> Subject:
        """The agent as a plain process."""
        return Subject(paths, make_fake, Image("none", ()), copies=False)


class TestGvisor(RuntimeContract, SnapshotContract):
    """gVisor as the user who runs the tests: with control groups as root, in a user namespace otherwise."""

    @pytest.fixture
    def subject(self, paths: Paths, runsc_binary: Path, agent_image: Image) -> Subject:
        """The agent in an empty root."""
        limits = Limits(cpu=1, memory=256 << 20, disk=16 << 20, processes=64)
        return Subject(paths, functools.partial(make_gvisor, runsc_binary), agent_image, limits, AGENT_PYTHON)
