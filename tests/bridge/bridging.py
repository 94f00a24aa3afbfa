"""What the bridge's tests share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import zmq.asyncio
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.client import KernelClient

KEY = b"the key"
PATIENCE = 60.0
"""Seconds after which a test that waits has failed."""
Connect = Callable[..., zmq.asyncio.Socket]
"""Makes a connected socket: ``connect("shell", identity, **options)``."""


class Requests(list[tuple[int, list[bytes]]]):
    """What clients asked."""

    def __call__(self, channel: int, parts: list[bytes]) -> None:
        self.append((channel, parts))


def ready(client: BlockingKernelClient) -> None:
    """Wait until a client is served, and nothing of what it asked for that is under way any more.

    ``wait_for_ready`` gives up after a second without a heartbeat, and may have asked several times before it returns.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            client.wait_for_ready(timeout=PATIENCE)
            break
    client.kernel_info(reply=True, timeout=PATIENCE)


def until_it_beats(client: KernelClient) -> None:
    """Wait until the heartbeat is answered: a second of a busy machine may pass in between."""
    deadline = time.monotonic() + PATIENCE
    while not client.hb_channel.is_beating():
        assert time.monotonic() < deadline, "the heartbeat is not answered"
        time.sleep(0.01)
