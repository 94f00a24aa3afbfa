"""A kernel's output for which nobody listens yet, kept until somebody does (DESIGN, invariant 1).

A fork's child, a kernel that the command line resumed, one whose owner was killed: each prints before its first client
is there. What it prints is kept in order, bounded in bytes: streams and displays go first, and at twice the bound
whatever is oldest; a notice stands in the place of what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from sandbox_gateway.bridge_queue import Notice, OutputQueue, head_of
from sandbox_gateway.messages import Buffer
from sandbox_gateway.stream_runs import StreamRun

LIMIT: Final = 64 << 20
"""Bytes of output that are kept."""
REASON: Final = "nobody listened while the kernel printed"


class Kept:
    """A message by its parts."""

    __slots__ = ("_head", "parts", "size")
    count = 1

    def __init__(self, parts: Sequence[Buffer]) -> None:
        # Copies: a view would hold on to the whole buffer that was read with it.
        self.parts = [bytes(part) for part in parts]
        self.size = sum(map(len, self.parts))
        self._head: tuple[bool, bytes] | None = None

    @property
    def head(self) -> tuple[bool, bytes]:
        """Whether it may be left out, and the raw header of the request it belongs to."""
        if self._head is None:
            self._head = head_of(self.parts)
        return self._head


class Retention:
    """Output in order. ``key`` signs what stands in for messages that were joined or left out."""

    def __init__(self, key: bytes, *, limit: int = LIMIT) -> None:
        self._key = key
        self._queue = OutputQueue(limit)

    @property
    def size(self) -> int:
        """Bytes that are kept, with what they cost beside their content."""
        return self._queue.pending

    def add(self, parts: Sequence[Buffer]) -> None:
        """Keep one message."""
        if self._queue.add(Kept(parts), parts):
            # A kernel can publish nothing but errors for ever.
            self._queue.make_room()

    def replay(self, deliver: Callable[[Sequence[Buffer]], None]) -> None:
        """Hand everything to ``deliver``, oldest first; it stays here as well."""
        for entry in tuple(self._queue.entries):
            if isinstance(entry, Kept):
                deliver(entry.parts)
            elif isinstance(entry, Notice):
                deliver(entry.parts(self._key, REASON))
            elif isinstance(entry, StreamRun):
                deliver(entry.parts(self._key))
