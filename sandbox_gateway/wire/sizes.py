"""How much to read from a pipe at once."""

from __future__ import annotations

from typing import Final

SMALL: Final = 64 * 1024
"""Bytes whose buffer comes from the heap."""
LARGE: Final = 1024 * 1024
"""Bytes that one read takes at most; their buffer is mapped for the read and unmapped again."""
PATIENCE: Final = 16
"""Reads in a row that would have fitted the small buffer, after which that is used again."""


class ReadSize:
    """Little while little comes, much as soon as a read was filled, and for a while after.

    A buffer of 1 MiB costs three system calls and fresh pages, for messages of some hundred bytes each; most of all
    inside a sandbox, where that is the sentry's work.
    """

    __slots__ = ("_little", "next")

    def __init__(self) -> None:
        self.next = SMALL
        """Bytes to ask for."""
        self._little = 0

    def filled(self, size: int) -> bool:
        """Note that a read took ``size`` bytes; returns whether that was all it asked for, so that more may wait."""
        full = size >= self.next
        if full:
            self.next = LARGE
        self._little = 0 if size >= SMALL else self._little + 1
        if self._little >= PATIENCE:
            self.next = SMALL
        return full
