"""Frames: what travels on the link, and the decoder that finds them again in a stream of bytes.

A frame is a header of 28 bytes and a payload of at most :data:`MAX_PAYLOAD` bytes. All integers are big-endian:

======== ====== =====================================================================
field    type   meaning
======== ====== =====================================================================
magic    2s     ``SG``
kind     u8     :class:`Kind`
flags    u8     :data:`FLAG_FIRST`, :data:`FLAG_LAST` (fragments of a message)
channel  u16    :class:`Channel`, or the number of a byte stream (16 and above)
reserved u16    0
epoch    u32    given by the host at each (re)store; frames of another epoch are dropped
seq      u64    number of the message in its channel, 1 and above; 0 where unused
length   u32    bytes of payload
crc32    u32    over the 24 bytes before it and the payload
======== ====== =====================================================================

The checksum is no defence against an enemy (who can compute it too); it finds *torn* frames: a writer killed in the
middle leaves a piece of a frame in the pipe, and what its successor writes then looks like that frame's payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from zlib import crc32

Buffer = bytes | bytearray | memoryview

MAX_PAYLOAD = 256 * 1024
"""Bytes of payload in one frame at most: a decoder never holds more than one such frame."""
MAX_HANDSHAKE = 4 * 1024
"""Bytes of payload in an ATTACH or HELLO at most: bounds the work of searching for one in garbage."""
MAX_SEQ = 2**63 - 1

FLAG_FIRST = 1
FLAG_LAST = 2

MAGIC = b"SG"
HEADER = Struct("!2sBBHHIQII")
HEADER_SIZE = HEADER.size
_HEAD = Struct("!2sBBHHIQI")
_CHECKED = _HEAD.size
_CRC = Struct("!I")


class WireError(ValueError):
    """What came over the link breaks the protocol. The only exception this package raises for bad input."""


class Kind(IntEnum):
    """What a frame is."""

    ATTACH = 1
    """host to agent: here I am, with a nonce (:class:`~sandbox_gateway.wire.handshake.Attach`)"""
    HELLO = 2
    """agent to host: the answer, with the same nonce"""
    MESSAGE = 3
    """a fragment of a numbered multipart message"""
    ACK = 4
    """numbers up to which the channels have been received"""
    GAP = 5
    """stands in for messages that were dropped"""
    PING = 6
    PONG = 7
    OPEN = 8
    """opens a byte stream"""
    DATA = 9
    CREDIT = 10
    """allows the other side of a byte stream to send more"""
    CLOSE = 11
    DETACH = 12
    """host to agent: stop sending; agent to host: I have lost the thread, attach again"""


class Channel(IntEnum):
    """The numbered, reliable channels of multipart messages."""

    AGENT = 0
    SHELL = 1
    CONTROL = 2
    STDIN = 3
    IOPUB = 4


CHANNELS = len(Channel)
_KINDS: tuple[Kind | None, ...] = tuple(Kind(n) if n in Kind._value2member_map_ else None for n in range(256))


@dataclass(slots=True)
class Frame:
    """One frame. ``payload`` of a decoded frame is a view of the buffer that was fed."""

    kind: Kind
    channel: int = 0
    epoch: int = 0
    seq: int = 0
    flags: int = 0
    payload: Buffer = b""


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers for ``writev``: the header, and the payload as it is (not copied)."""
    payload = frame.payload
    length = len(payload)
    if length > MAX_PAYLOAD:
        raise WireError(f"a payload of {length} bytes is longer than {MAX_PAYLOAD}")
    head = _HEAD.pack(MAGIC, frame.kind, frame.flags, frame.channel, 0, frame.epoch, frame.seq, length)
    if not length:
        return [head + _CRC.pack(crc32(head))]
    return [head + _CRC.pack(crc32(payload, crc32(head))), payload]


def padding() -> bytes:
    """Bytes that complete whatever frame was torn on the way to the other side's decoder, which then sees a bad one."""
    return bytes(MAX_PAYLOAD + HEADER_SIZE)


class Decoder:
    """Turns bytes into frames; holds at most one incomplete frame.

    After a corrupt frame the decoder is *lost*: every :meth:`feed` raises, until :meth:`hunt` makes it search for
    one particular frame, from which on it reads normally again. The search begins *inside* the corrupt frame,
    because that may have swallowed what was sent after a tear.
    """

    __slots__ = ("_buffer", "_hunted", "_max", "_need", "_open", "_scanned", "_token", "_token_at", "error")

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._max = max_payload
        self._buffer = bytearray()
        self._need = HEADER_SIZE
        self.error: WireError | None = None
        """Why the decoder is lost, or None."""
        self._hunted: Kind | None = None
        self._token: bytes | None = None
        self._token_at = -1
        self._scanned = 0
        self._open: list[int] = []

    @property
    def hunting(self) -> bool:
        """Whether the decoder is skipping everything until the hunted frame."""
        return self._hunted is not None

    @property
    def held(self) -> int:
        """Bytes held of incomplete frames: never more than one frame, or what one call brought."""
        return len(self._buffer)

    padding = staticmethod(padding)

    def feed(self, data: Buffer) -> list[Frame]:
        """All frames that ``data`` completes.

        ``data`` must not be changed as long as the frames are in use: their payloads are views of it.
        Raises :class:`WireError` at a corrupt frame. Whole frames in front of it are returned first: then
        :attr:`error` is set and the *next* call raises. Data fed to a lost decoder is thrown away.
        """
        if self.error is not None:
            raise self.error
        frames: list[Frame] = []
        try:
            if self._hunted is not None:
                data = self._search(data, frames)
                if self._hunted is not None:
                    return frames
            self._decode(memoryview(data), frames)
        except WireError as error:
            self.error = error
            if not frames:
                raise
        return frames

    def hunt(self, kind: Kind, token: bytes | None = None) -> None:
        """Skip everything up to a whole valid frame of ``kind`` whose payload contains ``token``.

        Also from a decoder that is not lost. Bytes already held are searched by the next :meth:`feed` (``b""`` will
        do). The frame's payload may have :data:`MAX_HANDSHAKE` bytes at most.
        """
        self.error = None
        self._hunted = kind
        self._token = token
        self._scanned = 0
        self._open = []

    # -- normal reading

    def _decode(self, view: memoryview, frames: list[Frame]) -> None:
        pos = self._complete(view, frames) if self._buffer else 0
        end = len(view)
        maximum = self._max
        unpack_from = HEADER.unpack_from
        while end - pos >= HEADER_SIZE:
            magic, number, flags, channel, reserved, epoch, seq, length, crc = unpack_from(view, pos)
            kind = _KINDS[number]
            if magic != MAGIC or kind is None or reserved or length > maximum:
                self._buffer = bytearray(view[pos:])
                raise _bad_header(magic, number, reserved, length, maximum)
            body = pos + HEADER_SIZE
            stop = body + length
            if stop > end:
                self._need = HEADER_SIZE + length
                self._buffer = bytearray(view[pos:])
                return
            payload = view[body:stop]
            if crc32(payload, crc32(view[pos : pos + _CHECKED])) != crc:
                self._buffer = bytearray(view[pos:])
                raise WireError("checksum mismatch")
            frames.append(Frame(kind, channel, epoch, seq, flags, payload))
            pos = stop
        if pos < end:
            self._need = HEADER_SIZE
            self._buffer = bytearray(view[pos:])

    def _complete(self, view: memoryview, frames: list[Frame]) -> int:
        """Complete the held frame from ``view``; return how much of that was used."""
        buffer = self._buffer
        pos = 0
        while True:
            take = self._need - len(buffer)
            if len(view) - pos < take:
                buffer += view[pos:]
                return len(view)
            buffer += view[pos : pos + take]
            pos += take
            magic, number, flags, channel, reserved, epoch, seq, length, crc = HEADER.unpack_from(buffer)
            kind = _KINDS[number]
            if magic != MAGIC or kind is None or reserved or length > self._max:
                buffer += view[pos:]
                raise _bad_header(magic, number, reserved, length, self._max)
            if len(buffer) < HEADER_SIZE + length:
                self._need = HEADER_SIZE + length
                continue
            whole = memoryview(buffer)
            payload = whole[HEADER_SIZE:]
            if crc32(payload, crc32(whole[:_CHECKED])) != crc:
                payload.release()
                whole.release()
                buffer += view[pos:]
                raise WireError("checksum mismatch")
            frames.append(Frame(kind, channel, epoch, seq, flags, payload))
            self._buffer = bytearray()
            self._need = HEADER_SIZE
            return pos

    # -- hunting

    def _search(self, data: Buffer, frames: list[Frame]) -> Buffer:
        """Look for the hunted frame; return what follows it (nothing while it is not found).

        Incomplete candidates are remembered and looked at again when their last byte has come, so that each one
        costs one checksum however the bytes are cut; and they do not hide a complete one behind them.
        """
        buffer = self._buffer
        buffer += data
        end = len(buffer)
        self._token_at = -1
        still_open: list[int] = []
        for pos in self._open:
            if self._candidate(pos, end, frames, still_open):
                return self._found(frames)
        pos = self._scanned
        while True:
            pos = buffer.find(MAGIC, pos)
            if pos < 0:
                pos = end - 1 if end and buffer[-1] == MAGIC[0] else end
                break
            if end - pos < HEADER_SIZE:
                break
            if self._candidate(pos, end, frames, still_open):
                return self._found(frames)
            pos += 1
        keep = min(pos, still_open[0]) if still_open else pos
        del buffer[:keep]
        self._scanned = pos - keep
        self._open = [start - keep for start in still_open]
        return b""

    def _candidate(self, pos: int, end: int, frames: list[Frame], still_open: list[int]) -> bool:
        buffer = self._buffer
        magic, number, flags, channel, reserved, epoch, seq, length, crc = HEADER.unpack_from(buffer, pos)
        if magic != MAGIC or number != self._hunted or reserved or length > MAX_HANDSHAKE:
            return False
        stop = pos + HEADER_SIZE + length
        if stop > end:
            still_open.append(pos)
            return False
        if self._token is not None:
            if self._token_at < pos:
                # One search serves all candidates up to the next occurrence: bait costs nothing while there is none.
                self._token_at = buffer.find(self._token, pos)
                if self._token_at < 0:
                    self._token_at = end
            if self._token_at + len(self._token) > stop:
                return False
        payload = bytes(buffer[pos + HEADER_SIZE : stop])
        if crc32(payload, crc32(buffer[pos : pos + _CHECKED])) != crc:
            return False
        frames.append(Frame(Kind(number), channel, epoch, seq, flags, payload))
        del buffer[:stop]
        return True

    def _found(self, frames: list[Frame]) -> bytes:
        rest = bytes(self._buffer)
        self._buffer = bytearray()
        self._need = HEADER_SIZE
        self._hunted = None
        self._open = []
        return rest


def _bad_header(magic: bytes, kind: int, reserved: int, length: int, maximum: int) -> WireError:
    if magic != MAGIC:
        return WireError("no frame begins here")
    if length > maximum:
        return WireError(f"a frame of {length} bytes is longer than {maximum}")
    return WireError(f"unknown kind of frame {kind}" if not reserved else "reserved bits are set")
