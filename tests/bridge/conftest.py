"""A bridge in a short private directory, and ZMQ clients that behave as jupyter_client's do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from bridging import KEY, Requests

from sandbox_gateway.zmq_bridge import ZmqBridge


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sg-"))
    yield made
    left = sorted(path.name for path in made.iterdir())
    shutil.rmtree(made)
    assert left == [], "a closed bridge leaves no file"


@pytest.fixture
async def requests() -> Requests:
    return Requests()


@pytest.fixture
async def bridge(directory: Path, requests: Requests):
    made = ZmqBridge(directory, KEY, requests, queue_limit=1 << 20)
    yield made
    made.close()


@pytest.fixture
async def client(bridge: ZmqBridge):
    """A :data:`bridging.Connect`."""
    context = zmq.asyncio.Context()
    sockets: list[zmq.asyncio.Socket] = []

    def connect(channel: str, identity: bytes = b"", **options: Any) -> zmq.asyncio.Socket:
        kind = {"iopub": zmq.SUB, "hb": zmq.REQ}.get(channel, zmq.DEALER)
        made = context.socket(kind)
        sockets.append(made)
        made.linger = 0
        if identity:
            made.identity = identity
        for name, value in options.items():
            setattr(made, name, value)
        info = bridge.connection_info
        made.connect(f"{info['transport']}://{info['ip']}-{info[f'{channel}_port']}")
        return made

    yield connect
    for made in sockets:
        made.close(linger=0)
    context.term()
