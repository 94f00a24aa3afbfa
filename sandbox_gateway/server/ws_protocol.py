"""Kernel messages on a WebSocket, both ways: pure functions over bytes.

Two protocols. ``v1.kernel.websocket.jupyter.org``: a binary frame of 64-bit little-endian offsets, the channel's name
and the raw parts. The legacy one: a JSON text, or, for messages with binary buffers, a binary frame of 32-bit
big-endian offsets, the JSON and the buffers.

What goes out is spliced from the kernel's raw parts, and those are hostile. Into a JSON text nothing goes that is not
exactly one well-formed JSON object, else a crafted part could say what the envelope says (``"}, "channel": ...``). What
comes in is only careless: clients leave things out (``reference`` of quirks: no channel means shell, buffers may be a
dict, a date may be missing or empty).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

V1: Final = "v1.kernel.websocket.jupyter.org"
"""The name of the newer protocol, as clients ask for it."""
TEXT: Final = 0x81
"""First byte of a WebSocket frame that is a whole text message."""
BINARY: Final = 0x82
"""First byte of a WebSocket frame that is a whole binary message."""
MAX_BUFFERS: Final = 4096
"""Binary buffers in one message of a client at most."""
MAX_COMMAS: Final = 4 << 20
MAX_BRACKETS: Final = 1 << 20
"""Commas, and opening brackets, in one JSON text at most: what they stand for is made, for a moment, to check it. A
kernel could otherwise hold up the whole server for seconds, and fill its memory, with one message."""
NAMES: Final = {int(channel): channel.name.lower().encode() for channel in Channel if channel is not Channel.AGENT}
"""The channels' names by their numbers."""
_NUMBERS = {name.decode(): number for number, name in NAMES.items() if number != Channel.IOPUB}
_SMALL = 256 << 10
_CACHED = 2 << 10
_PLAIN = Struct("<7Q")
_U64 = Struct("<Q")
_SHORT = Struct("!BBH")
_LONG = Struct("!BBQ")


class Malformed(ValueError):
    """A message, from either side, that is not what the protocol says."""


def _no_constant(name: str) -> None:
    raise Malformed(f"{name} is not JSON")


# Numbers are not needed, and may have a million digits.
_header_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_int=len, parse_float=len)
# Nor are objects: their keys' count will do.
_checker = json.JSONDecoder(parse_constant=_no_constant, parse_int=len, parse_float=len, object_pairs_hook=len)
# As JavaScript has it, NaN becomes null.
_client_decoder = json.JSONDecoder(parse_constant=lambda name: None)


def json_object(raw: Buffer) -> dict[str, Any]:
    """A header, parsed; its numbers are replaced by others. Raises :class:`Malformed`."""
    if len(raw) > _SMALL:
        raise Malformed(f"a header of {len(raw)} bytes")
    found = _decoded(_header_decoder, raw)
    if not isinstance(found, dict):
        raise Malformed("a header that is no JSON object")
    return found


def check_object(raw: Buffer) -> None:
    """Raises :class:`Malformed` unless ``raw`` is exactly one JSON object in UTF-8, as every parser takes it."""
    if len(raw) > _SMALL:
        flat = bytes(raw)
        brackets = flat.count(b"{") + flat.count(b"[")
        if brackets > MAX_BRACKETS or flat.count(b",") > MAX_COMMAS:
            raise Malformed("JSON of more pieces than can be checked")
    first = bytes(raw[:1])
    _decoded(_checker, raw)
    if first != b"{" and bytes(raw).lstrip(b" \t\r\n")[:1] != b"{":
        raise Malformed("a part that is no JSON object")


@functools.lru_cache(maxsize=256)
def _checked(raw: bytes) -> None:
    check_object(raw)


def _decoded(decoder: json.JSONDecoder, raw: Buffer) -> Any:
    try:
        text = str(raw, "utf-8")
        if text[:1] == "{":
            found, end = decoder.raw_decode(text)
            if end == len(text) or not text[end:].strip(" \t\r\n"):
                return found
            raise Malformed("something follows a JSON object")
        return decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, Malformed) else Malformed(str(error)) from None


# The way out


def frame_head(kind: int, length: int) -> bytes:
    """The head of an unmasked WebSocket frame with ``length`` bytes behind it; ``kind``: :data:`TEXT` or
    :data:`BINARY`."""
    if length < 126:
        return bytes((kind, length))
    if length < 1 << 16:
        return _SHORT.pack(kind, 126, length)
    return _LONG.pack(kind, 127, length)


def payload(frame: bytes) -> memoryview:
    """What is in a frame that :func:`frame_v1` or :func:`frame_legacy` made."""
    length = frame[1]
    return memoryview(frame)[2 if length < 126 else 4 if length == 126 else 10 :]


def frame_v1(channel: bytes, parts: Sequence[Buffer]) -> bytes:
    """A whole WebSocket frame with ``parts`` (header, parent, metadata, content, buffers...) in the protocol v1.

    Header and parent have to be checked before.
    """
    if len(parts) == 4:
        header, parent, metadata, content = parts
        a = 56 + len(channel)
        b = a + len(header)
        c = b + len(parent)
        d = c + len(metadata)
        end = d + len(content)
        head = _PLAIN.pack(6, 56, a, b, c, d, end)
        return b"".join((frame_head(BINARY, end), head, channel, header, parent, metadata, content))
    count = len(parts) + 2
    offsets = [8 * (1 + count)]
    offsets.append(offsets[0] + len(channel))
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    head = Struct(f"<{1 + count}Q").pack(count, *offsets)
    return b"".join((frame_head(BINARY, offsets[-1]), head, channel, *parts))


def parts_of_v1(frame: bytes) -> list[memoryview]:
    """The parts that :func:`frame_v1` was given, as views."""
    view = payload(frame)
    (count,) = _U64.unpack_from(view)
    offsets = Struct(f"<{count}Q").unpack_from(view, 8)
    return [view[offsets[n] : offsets[n + 1]] for n in range(1, count - 1)]


def frame_legacy(channel: bytes, parts: Sequence[Buffer]) -> bytes:
    """A whole WebSocket frame with ``parts`` as for :func:`frame_v1`, in the legacy protocol.

    Text, or binary where there are buffers. Raises :class:`Malformed` when one of the first four parts is not exactly
    one JSON object, or when the message is longer than 32-bit offsets can tell.
    """
    header, parent, metadata, content, *buffers = parts
    known = json_object(header)
    msg_id, msg_type = known.get("msg_id"), known.get("msg_type")
    if not isinstance(msg_id, str) or not isinstance(msg_type, str):
        raise Malformed("a header without msg_id or msg_type")
    # The same for all messages of a cell.
    if len(parent) <= _CACHED:
        _checked(bytes(parent))
    else:
        check_object(parent)
    if metadata != b"{}":
        check_object(metadata)
    check_object(content)
    pieces: list[Buffer] = [
        b'{"header": ',
        header,
        b', "msg_id": ',
        json.dumps(msg_id).encode(),
        b', "msg_type": ',
        json.dumps(msg_type).encode(),
        b', "parent_header": ',
        parent,
        b', "metadata": ',
        metadata,
        b', "content": ',
        content,
        b', "channel": "' if buffers else b', "buffers": [], "channel": "',
        channel,
        b'"}',
    ]
    length = sum(map(len, pieces))
    if not buffers:
        return b"".join((frame_head(TEXT, length), *pieces))
    offsets = [4 * (len(buffers) + 2)]
    offsets.append(offsets[0] + length)
    for buffer in buffers:
        offsets.append(offsets[-1] + len(buffer))
    if offsets[-1] >= 1 << 32:
        raise Malformed("a message longer than 32-bit offsets can tell")
    head = Struct(f"!{len(buffers) + 2}I").pack(len(buffers) + 1, *offsets[:-1])
    return b"".join((frame_head(BINARY, offsets[-1]), head, *pieces, *buffers))


# The way in


@dataclass(frozen=True, slots=True)
class Incoming:
    """A client's message."""

    channel: int
    """Shell, control or stdin."""
    parts: list[Buffer]
    """Header, parent, metadata, content, and the buffers."""
    msg_type: str


def decode(message: str | bytes, *, v1: bool) -> Incoming:
    """A WebSocket message of a client; ``v1``: what was agreed on for binary ones. Raises :class:`Malformed`."""
    if isinstance(message, str):
        return _from_json(message, [])
    return _from_v1(message) if v1 else _from_binary(message)


def _from_v1(data: bytes) -> Incoming:
    if len(data) < 8:
        raise Malformed("a message of a few bytes")
    (count,) = _U64.unpack_from(data)
    if not 6 <= count <= MAX_BUFFERS + 6 or len(data) < 8 * (1 + count):
        raise Malformed(f"a message of {len(data)} bytes with {count} offsets")
    offsets = Struct(f"<{count}Q").unpack_from(data, 8)
    last = 8 * (1 + count)
    for offset in offsets:
        if offset < last:
            raise Malformed("offsets that go back")
        last = offset
    if last > len(data):
        raise Malformed("offsets beyond the end")
    view = memoryview(data)
    channel = _number(str(view[offsets[0] : offsets[1]], "utf-8", "replace"))
    parts: list[Buffer] = []
    for n in range(1, count - 1):
        piece = view[offsets[n] : offsets[n + 1]]
        parts.append(piece if len(piece) > _SMALL else bytes(piece))
    return Incoming(channel, parts, _type_of(json_object(parts[0])))


def _from_binary(data: bytes) -> Incoming:
    count = int.from_bytes(data[:4], "big")
    if not 1 <= count <= MAX_BUFFERS + 1 or len(data) < 4 * (1 + count):
        raise Malformed(f"a message of {len(data)} bytes with {count} offsets")
    offsets = [*Struct(f"!{count}I").unpack_from(data, 4), len(data)]
    if offsets[0] < 4 * (1 + count) or any(a > b for a, b in itertools.pairwise(offsets)):
        raise Malformed("offsets that go back, or beyond the end")
    view = memoryview(data)
    pieces = [view[a:b] for a, b in itertools.pairwise(offsets)]
    try:
        text = str(pieces[0], "utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(str(error)) from None
    return _from_json(text, [piece if len(piece) > _SMALL else bytes(piece) for piece in pieces[1:]])


def _from_json(text: str, buffers: list[bytes | memoryview]) -> Incoming:
    try:
        found = _client_decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None
    if not isinstance(found, dict):
        raise Malformed("a message that is no JSON object")
    channel = found.get("channel")
    header = found.get("header")
    if not isinstance(header, dict):
        raise Malformed("a message without a header")
    parts: list[Buffer] = [_dumps(header)]
    for name in ("parent_header", "metadata", "content"):
        part = found.get(name)
        if part is not None and not isinstance(part, dict):
            raise Malformed(f"{name} is no object")
        parts.append(_dumps(part) if part else b"{}")
    return Incoming(int(Channel.SHELL) if channel is None else _number(channel), [*parts, *buffers], _type_of(header))


def _number(channel: Any) -> int:
    number = _NUMBERS.get(channel) if isinstance(channel, str) else None
    if number is None:
        raise Malformed("no such channel")
    return number


def _type_of(header: dict[str, Any]) -> str:
    msg_type = header.get("msg_type")
    if not isinstance(msg_type, str):
        raise Malformed("a header without msg_type")
    return msg_type


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None
