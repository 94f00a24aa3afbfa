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
_HEAD = struct.Struct("!4sI")
_COUNT = struct.Struct("!I")


class PipeError(ValueError):
    """The pipe carried something that is not one of our frames."""


class PipeReader:
    """Cuts a byte sequence into messages."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._have = 0
        self._need = _HEAD.size

    @property
    def waiting(self) -> bool:
        """Whether a message is only partly here."""
        return self._have > 0

    def feed(self, data: bytes) -> list[tuple[str, list[bytes]]]:
        """Add bytes; returns the channel and the parts of each message they complete, in order.

        Raises :class:`PipeError`; the pipe is then useless.
        """
        self._pieces.append(data)
        self._have += len(data)
        if self._have < self._need:
            return []
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        messages: list[tuple[str, list[bytes]]] = []
        at, end = 0, len(whole)
        need = _HEAD.size
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
        rest = whole[at:]
        self._pieces = [rest] if rest else []
        self._have = len(rest)
        self._need = need
        return messages


def _parts(whole: bytes, at: int, total: int) -> list[bytes]:
    (count,) = _COUNT.unpack_from(whole, at)
    table = _COUNT.size * (count + 1)
    if count > MAX_PARTS or table > total:
        raise PipeError("a frame on the output pipe has too many parts")
    lengths = struct.unpack_from(f"!{count}I", whole, at + _COUNT.size)
    if table + sum(lengths) != total:
        raise PipeError("the lengths of a frame on the output pipe do not add up")
    position = at + table
    parts: list[bytes] = []
    for length in lengths:
        parts.append(whole[position : position + length])
        position += length
    return parts
