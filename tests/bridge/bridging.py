"""What the bridge's tests share."""

from __future__ import annotations

from collections.abc import Callable

import zmq.asyncio

KEY = b"the key"
Connect = Callable[..., zmq.asyncio.Socket]
"""Makes a connected socket: ``connect("shell", identity, **options)``."""


class Requests(list[tuple[int, list[bytes]]]):
    """What clients asked."""

    def __call__(self, channel: int, parts: list[bytes]) -> None:
        self.append((channel, parts))
