"""Replies for clients that are not connected at the moment, kept for a short time and in few bytes.

After its kernel's owner was killed, a client reconnects to the next one under the same identity; what the kernel
answered meanwhile waits here. Anybody else's identity is one that never comes.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from sandbox_gateway.bridge_queue import OVERHEAD, Message

SECONDS: Final = 60.0
"""How long a reply waits for its client."""
LIMIT: Final = 16 << 20
"""Bytes that wait at most; then the oldest go. One larger message still waits, alone."""
_LONGEST_IDENTITY = 255


class Mailbox:
    """Messages by identity, in order. Times are of one monotonic clock, in seconds."""

    def __init__(self, *, seconds: float = SECONDS, limit: int = LIMIT) -> None:
        self._seconds = seconds
        self._limit = limit
        self._kept: deque[tuple[float, bytes, Message]] = deque()
        self._size = 0

    @property
    def due(self) -> float | None:
        """When the oldest message expires; None when there is none."""
        return self._kept[0][0] if self._kept else None

    def put(self, identity: bytes, message: Message, now: float) -> None:
        """Keep a message. An identity that no client can have is passed over."""
        if len(identity) > _LONGEST_IDENTITY:
            return
        self._kept.append((now + self._seconds, identity, message))
        self._size += message.size + OVERHEAD
        while self._size > self._limit and len(self._kept) > 1:
            self._forget()

    def take(self, identity: bytes, now: float) -> list[Message]:
        """Remove and return what waits for ``identity``."""
        self.expire(now)
        found = [message for _, owner, message in self._kept if owner == identity]
        if found:
            self._kept = deque(entry for entry in self._kept if entry[1] != identity)
            self._size -= sum(message.size + OVERHEAD for message in found)
        return found

    def expire(self, now: float) -> None:
        """Forget what is too old."""
        while self._kept and self._kept[0][0] <= now:
            self._forget()

    def _forget(self) -> None:
        _, _, message = self._kept.popleft()
        self._size -= message.size + OVERHEAD
