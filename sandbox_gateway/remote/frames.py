"""``v1.kernel.websocket.jupyter.org``: a kernel's message as one binary WebSocket frame. Pure.

``count, offset 0 ... offset count-1`` as little-endian u64, then the channel's name, header, parent header, metadata,
content and buffers; the offsets are where each of these begins, and the last one is the end.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

SUBPROTOCOL: Final = "v1.kernel.websocket.jupyter.org"
MAX_PARTS: Final = 4096
"""Parts of one message at most; a message with more is malformed."""
_NAMES: Final = {
    int(Channel.SHELL): b"shell",
    int(Channel.CONTROL): b"control",
    int(Channel.STDIN): b"stdin",
    int(Channel.IOPUB): b"iopub",
}
_NUMBERS: Final = {name: number for number, name in _NAMES.items()}


class FrameError(ValueError):
    """Not a message of this protocol."""


def encode(channel: int, body: Sequence[Buffer]) -> bytes:
    """The frame of a message; ``body`` is header, parent header, metadata, content and buffers."""
    name = _NAMES[channel]
    at = 8 * (len(body) + 3)
    offsets = [at, at := at + len(name)]
    for part in body:
        offsets.append(at := at + len(part))
    return b"".join((struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets), name, *body))


def decode(frame: bytes) -> tuple[int, list[memoryview]]:
    """The channel's number and the parts, not copied; at least four. Raises :class:`FrameError`."""
    if len(frame) < 8:
        raise FrameError("no offsets")
    (count,) = struct.unpack_from("<Q", frame)
    if not 6 <= count <= MAX_PARTS + 2 or len(frame) < 8 * (count + 1):
        raise FrameError("a wrong number of offsets")
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    if offsets[0] < 8 * (count + 1) or offsets[-1] > len(frame):
        raise FrameError("offsets out of bounds")
    if any(begin > end for begin, end in pairwise(offsets)):
        raise FrameError("offsets out of order")
    channel = _NUMBERS.get(frame[offsets[0] : offsets[1]])
    if channel is None:
        raise FrameError("an unknown channel")
    whole = memoryview(frame)
    return channel, [whole[begin:end] for begin, end in pairwise(offsets[1:])]
