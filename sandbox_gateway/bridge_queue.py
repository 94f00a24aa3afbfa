"""What waits for a client that does not read fast enough, or that is not there yet, bounded in bytes.

Above one mark small stream messages are joined; at the bound the oldest streams and displays go, replaced by a notice
that tells how much is missing.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

from sandbox_gateway import messages, stream_runs, zmtp
from sandbox_gateway.messages import Buffer
from sandbox_gateway.stream_runs import StreamRun

OVERHEAD: Final = 256
"""Bytes that a queued message costs us beside its content, about."""
JOIN_ABOVE: Final = 4 << 20
"""Bytes that wait for one client from where on adjacent stream messages are joined."""
_DROPPABLE = frozenset({"stream", "display_data", "update_display_data"})
_HEADER_LIMIT = 16 << 10
"""Bytes of a header that are looked at, or kept in place of its message; real ones have some hundred."""


class Entry(Protocol):
    """What may wait in a queue beside notices."""

    @property
    def size(self) -> int:
        """Bytes of its content."""
        ...

    @property
    def count(self) -> int:
        """Messages that it stands for."""
        ...

    @property
    def head(self) -> tuple[bool, bytes]:
        """Whether it may be left out, and the raw header of the request it belongs to."""
        ...


def head_of(parts: Sequence[Buffer]) -> tuple[bool, bytes]:
    """Whether a message may be left out (it is output that the kernel can make as much of as it likes), and its raw
    parent header."""
    at = messages.delimiter_index(parts)
    if at is None or len(parts[at + 2]) > _HEADER_LIMIT:
        return False, b""
    parent = bytes(parts[at + 3]) if len(parts[at + 3]) <= _HEADER_LIMIT else b""
    try:
        header = json.loads(bytes(parts[at + 2]))
    except (ValueError, RecursionError):
        return False, b""
    # A type that is no text would not hash.
    kind = header.get("msg_type") if isinstance(header, dict) else None
    return isinstance(kind, str) and kind in _DROPPABLE, parent


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
        return head_of(frames) if isinstance(frames, list) else (False, b"")


class Notice:
    """Stands in a queue for messages of one request that were left out of it."""

    __slots__ = ("cost", "count", "parent", "size")

    def __init__(self, parent: bytes) -> None:
        self.parent = parent
        self.count = 0
        self.size = 0
        self.cost = OVERHEAD + len(parent)
        """Bytes that it takes up itself: a kernel may name another parent with each message."""

    def parts(self, key: bytes, reason: str) -> list[Buffer]:
        """What the client reads in their place: how many and how much, under the request they belonged to."""
        text = f"[sandbox] {self.count} messages of output ({self.size} bytes) were left out: {reason}\n"
        return messages.stderr_notice(key, text, parent=self.parent or messages.EMPTY)


class OutputQueue:
    """Entries in order, bounded in bytes as far as they may be left out.

    ``limit`` bytes of output wait at most; the rest, which may not be left out, can push :attr:`pending` above it:
    when :meth:`add` says that the queue is overfull, it is for its owner to act.
    """

    __slots__ = ("_trim_at", "entries", "limit", "pending")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: deque[Entry | Notice] = deque()
        self.pending = 0
        """Bytes that wait, with what they cost beside their content."""
        self._trim_at = limit

    def add(self, entry: Entry, parts: Sequence[Buffer] | None) -> bool:
        """Append ``entry``. With ``parts``, which are its own, it may be joined with others when many wait.

        Returns whether twice the limit is used, although all that may be left out is gone.
        """
        if parts is None or self.pending <= JOIN_ABOVE or not self._join(parts):
            self.entries.append(entry)
            self.pending += entry.size + OVERHEAD
        if self.pending <= self._trim_at or len(self.entries) < 2:
            return False
        self._trim()
        return self.pending > 2 * self.limit

    def take(self) -> Entry | Notice:
        """Remove and return the first; IndexError when there is none."""
        entry = self.entries.popleft()
        self.pending -= entry.cost if isinstance(entry, Notice) else entry.size + OVERHEAD
        return entry

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self.pending = 0

    def make_room(self) -> None:
        """Leave out the oldest, whatever it is, down to the limit; a notice says how much."""
        notice = Notice(b"")
        while self.pending > self.limit and len(self.entries) > 1:
            entry = self.take()
            notice.count += entry.count
            notice.size += entry.size
        self.entries.appendleft(notice)
        self.pending += notice.cost
        self._trim_at = self.limit

    def _join(self, parts: Sequence[Buffer]) -> bool:
        """Add a stream message to the one that waits last, or begin a new run with it; False: it is something else."""
        found = stream_runs.read(parts)
        if found is None:
            return False
        last: Any = self.entries[-1] if self.entries else None
        if isinstance(last, StreamRun) and last.takes(found):
            last.add(found)
            self.pending += found.size
        else:
            run = StreamRun(found)
            self.entries.append(run)
            self.pending += run.size + OVERHEAD
        return True

    def _trim(self) -> None:
        """Leave out the oldest output until three quarters of the limit are used, and say so in its place."""
        goal = self.limit * 3 // 4
        kept: deque[Entry | Notice] = deque()
        notice: Notice | None = None
        for entry in self.entries:
            if isinstance(entry, Notice):
                if notice is not None and notice.parent == entry.parent:
                    notice.count += entry.count
                    notice.size += entry.size
                    self.pending -= entry.cost
                else:
                    notice = entry
                    kept.append(entry)
                continue
            droppable, parent = entry.head if self.pending > goal else (False, b"")
            if not droppable:
                kept.append(entry)
                continue
            if notice is None or notice.parent != parent:
                notice = Notice(parent)
                kept.append(notice)
                self.pending += notice.cost
            notice.count += entry.count
            notice.size += entry.size
            self.pending -= entry.size + OVERHEAD
        self.entries = kept
        # What may not be left out is not looked at again with each message.
        self._trim_at = max(self.limit, self.pending + self.limit // 4)
