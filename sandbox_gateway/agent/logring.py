"""The kernel's raw stdout and stderr, kept in a bounded ring."""

from __future__ import annotations

from collections import deque

DEFAULT_SIZE = 1024 * 1024
"""Bytes of log that are kept."""


class LogRing:
    """The last ``size`` bytes of a byte sequence, addressed by their offset since the beginning."""

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        self._size = size
        self._chunks: deque[bytes] = deque()
        self._start = 0
        self._end = 0

    @property
    def start(self) -> int:
        """Offset of the oldest byte that is kept."""
        return self._start

    @property
    def end(self) -> int:
        """Offset after the newest byte; also the number of bytes ever written."""
        return self._end

    def write(self, data: bytes) -> None:
        """Append ``data``; the oldest bytes go."""
        if not data:
            return
        self._end += len(data)
        if self._chunks and len(self._chunks[-1]) + len(data) <= 4096:
            self._chunks[-1] += data  # many tiny writes must not become many tiny objects
        else:
            self._chunks.append(data)
        excess = self._end - self._start - self._size
        while excess > 0:
            first = self._chunks[0]
            if len(first) <= excess:
                self._chunks.popleft()
                self._start += len(first)
                excess -= len(first)
            else:
                self._chunks[0] = first[excess:]
                self._start += excess
                excess = 0

    def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """At most ``limit`` bytes from ``offset`` on, and the offset after them.

        An offset older than what is kept is moved to the oldest byte: a slow reader loses bytes, never blocks.
        """
        position = max(offset, self._start)
        if position >= self._end or limit <= 0:
            return position, b""
        at = self._start
        taken: list[bytes] = []
        room = limit
        for chunk in self._chunks:
            following = at + len(chunk)
            if following > position:
                piece = chunk[max(position - at, 0) :][:room]
                taken.append(piece)
                room -= len(piece)
                if not room:
                    break
            at = following
        data = b"".join(taken)
        return position + len(data), data


def tail(data: bytes, lines: int = 20, limit: int = 4096) -> str:
    """The last ``lines`` lines of ``data``, at most ``limit`` bytes, as text."""
    text = data[-limit:].decode("utf-8", "replace")
    return "\n".join(text.rstrip("\n").split("\n")[-lines:])
