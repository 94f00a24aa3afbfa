"""The agent's end of the pipe on which our ipykernel application writes IOPub messages and replies on shell.

Whoever holds the other end is hostile: each length is checked before anything is kept, and memory is bounded by one
message. A frame is ``magic, total, count`` (network order), then ``count`` lengths, then the parts; ``total`` counts
what follows the first eight bytes, ``magic`` tells the channel. :mod:`sandbox_gateway.agent.ipykernel_app` is the
writer.
"""

from __future__ import annotations

import struct
from typing import Final

CHANNELS: Final = {b"SGio": "iopub", b"SGsh": "shell"}
"""The channel of a frame by its magic."""
MAX_MESSAGE: Final = 512 * 1024 * 1024
"""Bytes of one message, all parts together."""
MAX_PARTS: Final = 1024
LONG: Final = 256 * 1024
LONGEST: Final = 32 * 1024 * 1024
"""Bytes of a message from which on, and up to which, it is read where it stays. Its place is made when its first bytes
have come: whoever only claims a length gets no more than this."""
Part = bytes | memoryview
_HEAD = struct.Struct("!4sI")
_COUNT = struct.Struct("!I")


class PipeError(ValueError):
    """The pipe carried something that is not one of our frames."""


class PipeReader:
    """Cuts a byte sequence into messages.

    A long message of which a part is still to come is read where it stays: as long as :meth:`room` names a place, what
    comes belongs there. Copies are dear inside a sandbox, where each fresh page is the sentry's work.
    """

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._have = 0
        self._need = _HEAD.size
        self._channel = ""
        self._long: memoryview | None = None
        self._room: memoryview | None = None

    @property
    def waiting(self) -> bool:
        """Whether a message is only partly here."""
        return self._have > 0 or self._long is not None

    def room(self) -> memoryview | None:
        """Where the rest of a long message belongs, for ``readv``; None: read anywhere, and :meth:`feed`."""
        return self._room

    def filled(self, size: int) -> list[tuple[str, list[Part]]]:
        """``size`` bytes were read into :meth:`room`; returns what :meth:`feed` does."""
        assert self._room is not None and self._long is not None
        self._room = self._room[size:]
        if self._room:
            return []
        whole, self._long, self._room = self._long, None, None
        return [(self._channel, _parts(whole, 0, len(whole)))]

    def feed(self, data: bytes) -> list[tuple[str, list[Part]]]:
        """Add bytes; returns the channel and the parts of each message they complete, in order.

        Raises :class:`PipeError`; the pipe is then useless.
        """
        assert self._room is None
        self._pieces.append(data)
        self._have += len(data)
        if self._have < self._need:
            return []
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        messages: list[tuple[str, list[Part]]] = []
        at, end = 0, len(whole)
        need = _HEAD.size
        channel: str | None = None
        while end - at >= _HEAD.size:
            magic, total = _HEAD.unpack_from(whole, at)
            channel = CHANNELS.get(magic)
            if channel is None or not _COUNT.size <= total <= self._limit:
                raise PipeError("a frame on the output pipe has no valid header")
            if end - at < _HEAD.size + total:
                need = _HEAD.size + total
                break
            at += _HEAD.size
            messages.append((channel, _parts(whole, at, total)))
            at += total
        if channel is not None and LONG < need <= LONGEST:
            self._begin_long(channel, whole[at + _HEAD.size :], need - _HEAD.size)
            at, need = end, _HEAD.size
        rest = whole[at:]
        self._pieces = [rest] if rest else []
        self._have = len(rest)
        self._need = need
        return messages

    def _begin_long(self, channel: str, start: bytes, total: int) -> None:
        self._channel = channel
        self._long = memoryview(bytearray(total))
        self._long[: len(start)] = start
        self._room = self._long[len(start) :]


def _parts(whole: bytes | memoryview, at: int, total: int) -> list[Part]:
    (count,) = _COUNT.unpack_from(whole, at)
    table = _COUNT.size * (count + 1)
    if count > MAX_PARTS or table > total:
        raise PipeError("a frame on the output pipe has too many parts")
    lengths = struct.unpack_from(f"!{count}I", whole, at + _COUNT.size)
    if table + sum(lengths) != total:
        raise PipeError("the lengths of a frame on the output pipe do not add up")
    position = at + table
    parts: list[Part] = []
    for length in lengths:
        parts.append(whole[position : position + length])
        position += length
    return parts
