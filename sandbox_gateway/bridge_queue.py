"""What waits in a bridge's queue for one client: encoded messages, and notices in the place of those left out."""

from __future__ import annotations

import json
from typing import Final

from sandbox_gateway import messages, zmtp
from sandbox_gateway.messages import Buffer

OVERHEAD: Final = 256
"""Bytes that a queued message costs us beside its content, about."""
_DROPPABLE = frozenset({"stream", "display_data", "update_display_data"})
_HEADER_LIMIT = 16 << 10
"""Bytes of a header that are looked at, or kept in place of its message; real ones have some hundred."""


class Message:
    """An encoded message, shared by the queues it waits in. Its head is read only where a queue overflows."""

    __slots__ = ("_head", "buffers", "size")
    count = 1

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = buffers
        self.size = sum(map(len, buffers))
        self._head: tuple[bool, bytes] | None = None

    @property
    def head(self) -> tuple[bool, bytes]:
        """Whether it may be left out, and the raw header of the request it belongs to."""
        if self._head is None:
            self._head = self._read()
        return self._head

    def _read(self) -> tuple[bool, bytes]:
        decoder = zmtp.Decoder(greeted=True)
        frames = next(found for buffer in self.buffers for found in decoder.feed(buffer))
        at = messages.delimiter_index(frames) if isinstance(frames, list) else None
        if at is None or not isinstance(frames, list):
            return False, b""
        if len(frames[at + 2]) > _HEADER_LIMIT:
            return False, b""
        try:
            header = json.loads(frames[at + 2])
            parent = frames[at + 3] if len(frames[at + 3]) <= _HEADER_LIMIT else b""
            return isinstance(header, dict) and header.get("msg_type") in _DROPPABLE, parent
        except (ValueError, RecursionError):
            return False, b""


class Notice:
    """Stands in a queue for messages of one request that were left out of it."""

    __slots__ = ("cost", "count", "parent", "size")

    def __init__(self, parent: bytes) -> None:
        self.parent = parent
        self.count = 0
        self.size = 0
        self.cost = OVERHEAD + len(parent)
        """Bytes that it takes up itself: a kernel may name another parent with each message."""

    def message(self, key: bytes) -> Message:
        """What the client reads in their place: how many and how much, under the request they belonged to."""
        text = (
            f"[sandbox] {self.count} messages of output ({self.size} bytes) were left out: "
            "this client reads more slowly than the kernel prints\n"
        )
        return Message(zmtp.encode(messages.stderr_notice(key, text, parent=self.parent or messages.EMPTY)))
