"""ZMTP 3.0, the protocol of ZeroMQ sockets on a byte stream, as far as the listening side of a kernel needs it.

No I/O. Specification: https://rfc.zeromq.org/spec/23/ (and 37 for the commands that 3.1 peers may send). Security
mechanism NULL: the stream is a unix socket in a private directory, and messages are signed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

Buffer = bytes | memoryview

GREETING: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""What we send first: version 3.0 (so that peers subscribe by messages), mechanism NULL."""
MAX_MESSAGE: Final = 512 << 20
"""Bytes of one message from a peer, all frames together."""
MAX_FRAMES: Final = 1024
INLINE: Final = 32 << 10
"""Frames up to this size are copied together; larger ones are passed on by reference."""

_MORE, _LONG, _COMMAND = 1, 2, 4
_LONG_HEADER = struct.Struct("!BQ")


class ZmtpError(ValueError):
    """The peer does not speak ZMTP as it should; the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command frame: READY, PING, SUBSCRIBE..."""

    name: bytes
    body: bytes


def ready(socket_type: bytes) -> bytes:
    """Our READY command."""
    body = b"\x05READY" + _property(b"Socket-Type", socket_type) + _property(b"Identity", b"")
    return bytes((_COMMAND, len(body))) + body


def command(name: bytes, body: bytes) -> bytes:
    """A short command frame."""
    whole = bytes((len(name),)) + name + body
    return bytes((_COMMAND, len(whole))) + whole


def properties(body: bytes) -> dict[str, bytes]:
    """What a READY command says; names in lower case. Raises :class:`ZmtpError`."""
    found = {}
    at = 0
    while at < len(body):
        name_end = at + 1 + body[at]
        value = name_end + 4
        if value > len(body):
            raise ZmtpError("a property is cut short")
        end = value + int.from_bytes(body[name_end:value], "big")
        if end > len(body):
            raise ZmtpError("a property is cut short")
        found[body[at + 1 : name_end].decode("latin-1").lower()] = body[value:end]
        at = end
    return found


def encode(parts: Sequence[Buffer]) -> list[Buffer]:
    """A message as buffers to be written one after the other; large parts are not copied."""
    buffers: list[Buffer] = []
    small = bytearray()
    last = len(parts) - 1
    for index, part in enumerate(parts):
        size = len(part)
        more = _MORE if index < last else 0
        if size < 256:
            small += bytes((more, size))
            small += part
            continue
        small += _LONG_HEADER.pack(more | _LONG, size)
        if size <= INLINE:
            small += part
        else:
            buffers += (bytes(small), part)
            small = bytearray()
    if small:
        buffers.append(bytes(small))
    return buffers


class Decoder:
    """From a peer's bytes to its messages and commands.

    A message comes out as a list of frames, a command as :class:`Command`. Memory is bounded by ``max_message``.
    ``greeted``: the stream begins behind the greeting.
    """

    def __init__(self, max_message: int = MAX_MESSAGE, *, greeted: bool = False) -> None:
        self._buffer = bytearray()
        self._max = max_message
        self._greeted = greeted
        self._frames: list[bytes] = []
        self._size = 0

    def feed(self, data: Buffer) -> Iterator[list[bytes] | Command]:
        """Take bytes and yield what is complete. Raises :class:`ZmtpError`; the decoder is of no more use then."""
        self._buffer += data
        at = 0
        try:
            if not self._greeted:
                if not self._greeting():
                    return
                at = len(GREETING)
            while (found := self._frame(at)) is not None:
                flags, start, end = found
                body = bytes(memoryview(self._buffer)[start:end])
                at = end
                if flags & _COMMAND:
                    yield _parse_command(flags, body)
                    continue
                self._frames.append(body)
                self._size += len(body)
                if not flags & _MORE:
                    frames, self._frames, self._size = self._frames, [], 0
                    yield frames
        finally:
            del self._buffer[:at]

    def _greeting(self) -> bool:
        have = self._buffer
        if (have and have[0] != 0xFF) or (len(have) > 9 and not have[9] & 1) or (len(have) > 10 and have[10] < 3):
            raise ZmtpError("not a ZMTP 3 greeting")
        if len(have) < len(GREETING):
            return False
        if have[12:32].rstrip(b"\0") != b"NULL":
            raise ZmtpError("only the NULL mechanism is spoken here")
        self._greeted = True
        return True

    def _frame(self, at: int) -> tuple[int, int, int] | None:
        have = self._buffer
        if len(have) < at + 2:
            return None
        flags = have[at]
        if flags & ~(_MORE | _LONG | _COMMAND):
            raise ZmtpError("unknown flags")
        if flags & _LONG:
            start = at + 9
            if len(have) < start:
                return None
            size = int.from_bytes(have[at + 1 : start], "big")
        else:
            start = at + 2
            size = have[at + 1]
        if self._size + size > self._max or len(self._frames) >= MAX_FRAMES:
            raise ZmtpError("a message is too large")
        return (flags, start, start + size) if len(have) >= start + size else None


def _parse_command(flags: int, body: bytes) -> Command:
    if flags & _MORE or not body or len(body) < 1 + body[0]:
        raise ZmtpError("a malformed command")
    end = 1 + body[0]
    return Command(body[1:end], body[end:])


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value
