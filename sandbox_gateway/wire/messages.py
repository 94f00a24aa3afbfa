"""Multipart messages: packed into one run of bytes, cut into frames, and put together again.

A packed message is ``u32 count``, ``count`` times ``u32 length``, then the parts themselves. It is cut into frames of
at most :data:`~sandbox_gateway.wire.frames.MAX_PAYLOAD` bytes that carry the message's number and the flags FIRST and
LAST. Fragments of messages of *different* channels may be interleaved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct

from sandbox_gateway.wire.frames import (
    CHANNELS,
    FLAG_FIRST,
    FLAG_LAST,
    MAX_PAYLOAD,
    MAX_SEQ,
    Buffer,
    Frame,
    Kind,
    WireError,
)

MAX_PARTS = 1024
MAX_MESSAGE = 512 * 1024 * 1024
"""Default bound, in bytes, of all messages that an :class:`Assembler` has in progress together."""

_HEADS = tuple(Struct(f"!{count + 1}I") for count in range(MAX_PARTS + 1))
_COUNT = Struct("!I")


def pack(parts: Sequence[Buffer]) -> list[Buffer]:
    """The message as buffers: a small head, then the parts as they are (not copied)."""
    if len(parts) > MAX_PARTS:
        raise WireError(f"a message of {len(parts)} parts; at most {MAX_PARTS} are allowed")
    flat = [_flat(part) if isinstance(part, memoryview) else part for part in parts]
    lengths = [len(part) for part in flat]
    if lengths and max(lengths) > 0xFFFFFFFF:
        raise WireError("a part of 4 GiB or more")
    return [_HEADS[len(flat)].pack(len(flat), *lengths), *flat]


def unpack(buffer: Buffer) -> list[bytes | memoryview]:
    """The parts of a packed message; raises :class:`WireError` unless every byte is accounted for.

    Parts of up to ``MAX_PAYLOAD`` bytes are copied (a view would keep the whole read buffer alive for as long as the
    part is kept); longer ones, which only a message put together from fragments has, are views of ``buffer``.
    """
    size = len(buffer)
    if size < 4:
        raise WireError("a message without a head")
    (count,) = _COUNT.unpack_from(buffer)
    if count > MAX_PARTS:
        raise WireError(f"a message of {count} parts; at most {MAX_PARTS} are allowed")
    pos = 4 + 4 * count
    if size < pos:
        raise WireError("a message shorter than its head")
    lengths = _HEADS[count].unpack_from(buffer)
    if sum(lengths) - count != size - pos:
        raise WireError("a message whose parts do not add up")
    view = memoryview(buffer)
    parts: list[bytes | memoryview] = []
    for length in lengths[1:]:
        stop = pos + length
        piece = view[pos:stop]
        parts.append(bytes(piece) if length <= MAX_PAYLOAD else piece.toreadonly())
        pos = stop
    return parts


def fragments(channel: int, epoch: int, seq: int, parts: Sequence[Buffer]) -> Iterator[Frame]:
    """The frames of one message. Long parts are cut as views; only what is small is copied together."""
    buffers = pack(parts)
    total = sum(map(len, buffers))
    if total <= MAX_PAYLOAD:
        yield Frame(Kind.MESSAGE, channel, epoch, seq, FLAG_FIRST | FLAG_LAST, b"".join(buffers))
        return
    flags = FLAG_FIRST
    pieces: list[Buffer] = []
    room = MAX_PAYLOAD
    for buffer in buffers:
        view = memoryview(buffer)
        pos = 0
        while pos < len(view):
            piece = view[pos : pos + room]
            pos += len(piece)
            room -= len(piece)
            pieces.append(piece)
            if room:
                continue
            total -= MAX_PAYLOAD
            if not total:
                flags |= FLAG_LAST
            yield Frame(Kind.MESSAGE, channel, epoch, seq, flags, pieces[0] if len(pieces) == 1 else b"".join(pieces))
            flags = 0
            pieces = []
            room = MAX_PAYLOAD
    if pieces:
        yield Frame(Kind.MESSAGE, channel, epoch, seq, flags | FLAG_LAST, b"".join(pieces))


class Assembler:
    """Puts fragments together. All messages in progress together stay below ``max_message`` bytes."""

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self._max = max_message
        self._partial: dict[int, tuple[int, bytearray]] = {}
        self.held = 0
        """Bytes of the messages in progress."""

    def reset(self) -> None:
        """Forget what is incomplete: the other side begins its unfinished messages again."""
        self._partial.clear()
        self.held = 0

    def add(self, frame: Frame) -> tuple[int, int, list[bytes | memoryview]] | None:
        """Take one MESSAGE frame; return ``(channel, seq, parts)`` when it completes a message."""
        channel, seq, flags = frame.channel, frame.seq, frame.flags
        if channel >= CHANNELS:
            raise WireError(f"a message on channel {channel}, which does not exist")
        if not 0 < seq <= MAX_SEQ or flags > 3:
            raise WireError("a message with a bad number or flags")
        partial = self._partial.get(channel) if self._partial else None
        if flags & FLAG_FIRST:
            if partial is not None:
                raise WireError("a message begins inside another one of its channel")
            if flags & FLAG_LAST:
                return channel, seq, unpack(frame.payload)
            partial = self._partial[channel] = seq, bytearray()
        elif partial is None:
            raise WireError("a fragment of a message that has not begun")
        if partial[0] != seq:
            raise WireError("a fragment of another message")
        size = len(frame.payload)
        if not size:
            raise WireError("an empty fragment")
        if self.held + size > self._max:
            raise WireError(f"a message longer than {self._max} bytes")
        joined = partial[1]
        joined += frame.payload
        self.held += size
        if not flags & FLAG_LAST:
            return None
        del self._partial[channel]
        self.held -= len(joined)
        return channel, seq, unpack(joined)


def _flat(view: memoryview) -> memoryview:
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
