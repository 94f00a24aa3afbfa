"""An image that holds nothing but the agent."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.images import agent_layer
from sandbox_gateway.images.store import LayerStore
from sandbox_gateway.model import Image, Layer


@pytest.fixture(scope="session")
def agent_image() -> Iterator[Image]:
    """The agent's layer over an empty root: all that a runtime needs."""
    home = Path(tempfile.mkdtemp(prefix="sg-"))
    try:
        empty = home / "empty"
        (empty / "home").mkdir(parents=True)
        paths = discover({"SANDBOX_GATEWAY_HOME": str(home)}).ensure()
        try:
            stored = LayerStore(paths).ensure("agent", agent_layer.fingerprint(), agent_layer.build, what="agent")
        except SandboxGatewayError as error:
            pytest.skip(f"no agent layer: {error}")
        agent = Layer(str(stored.path), agent_layer.DESTINATION, digest=stored.digest)
        yield Image("agent", (Layer(str(empty), "/", "bind"),), agent=agent)
    finally:
        shutil.rmtree(home, ignore_errors=True)
