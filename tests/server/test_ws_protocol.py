"""The two WebSocket protocols: what a hostile kernel or a careless client cannot make of them."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)
from ws_harness import parse, v1

from sandbox_gateway.server import ws_protocol
from sandbox_gateway.server.ws_protocol import Malformed
from sandbox_gateway.wire.frames import Channel

HEADER = {"msg_id": "a", "msg_type": "stream", "session": "s", "username": "u", "date": "x", "version": "5.3"}
PARTS = [json.dumps(part).encode() for part in (HEADER, {}, {}, {"name": "stdout", "text": "é"})]
BAD = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"1",
    b'"x"',
    b"{",
    b"{}{}",
    b"{} x",
    b"{},",
    b'{}, "channel": "shell", "x": {}',
    b'{"a": 1}, "channel": "shell"',
    b'{"a": "',
    b'{"a": "\n"}',
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": [-Infinity]}',
    b'{"a": 01}',
    b'{"a": .5}',
    b"{'a': 1}",
    b'{"a": 1,}',
    b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}',
    b"\xef\xbb\xbf{}",
    b'{"a": "\\x"}',
    b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b"{}\x00",
    b'{/**/"a": 1}',
    '{"a":\u00a01}'.encode(),
    '{"a": \u0661}'.encode(),
]
GOOD = [
    b"{}",
    b' {"a": 1}\n',
    b'{"a": 1, "a": 2}',
    b'{"a": "\\ud800"}',
    b'{"a": ' + b"9" * 10_000 + b"}",
    b'{"a": -1.5e300, "b": [true, false, null]}',
    json.dumps({"a": '}, "channel": "shell", "b": {'}).encode(),
]


def payload(frame: bytes) -> Any:
    data = bytes(ws_protocol.payload(frame))
    return data.decode() if frame[0] == ws_protocol.TEXT else data


@pytest.mark.parametrize("part", BAD, ids=lambda part: repr(part[:20]))
@pytest.mark.parametrize("place", range(4))
def test_what_is_no_json_object_is_never_spliced_into_a_text(part: bytes, place: int) -> None:
    parts = list(PARTS)
    parts[place] = part
    with pytest.raises(Malformed):
        ws_protocol.frame_legacy(b"iopub", parts)
    if place < 2:
        with pytest.raises(Malformed):
            ws_protocol.json_object(part)


@pytest.mark.parametrize("part", GOOD, ids=lambda part: repr(part[:20]))
@pytest.mark.parametrize("place", range(1, 4))
def test_what_is_a_json_object_goes_through_as_it_is(part: bytes, place: int) -> None:
    parts = list(PARTS)
    parts[place] = part
    frame = ws_protocol.frame_legacy(b"iopub", parts)
    assert part in frame
    found = payload(frame)
    # Python refuses to read 10,000 digits, JavaScript does not.
    assert json.loads(found, parse_int=float)["channel"] == "iopub"


@pytest.mark.parametrize(
    "header",
    [
        {"msg_type": "stream"},
        {"msg_id": "a"},
        {"msg_id": 1, "msg_type": "stream"},
        {"msg_id": "a", "msg_type": ["stream"]},
        {},
    ],
)
def test_a_header_has_to_name_itself_in_the_legacy_protocol(header: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        ws_protocol.frame_legacy(b"iopub", [json.dumps(header).encode(), *PARTS[1:]])


def test_names_in_a_header_cannot_end_the_text_around_them() -> None:
    header = {**HEADER, "msg_id": '", "channel": "shell', "msg_type": '\ud800"}'}
    parts = [json.dumps(header).encode(), *PARTS[1:]]
    found = json.loads(payload(ws_protocol.frame_legacy(b"iopub", parts)))
    assert found["channel"] == "iopub" and found["msg_id"] == header["msg_id"]
    assert found["msg_type"] == header["msg_type"] and found["header"] == header


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode) | OBJECTS.map(lambda o: json.dumps(o).encode()))
@example(b'{"a":1}')
def test_a_part_is_taken_only_if_a_strict_parser_takes_it_as_an_object(part: bytes) -> None:
    def strict(name: str) -> None:
        raise ValueError(name)

    try:
        is_object = isinstance(json.loads(part.decode(), parse_constant=strict), dict)
    except (ValueError, RecursionError):
        is_object = False
    try:
        ws_protocol.check_object(part)
    except Malformed:
        assert not is_object
    else:
        assert is_object


@given(
    st.sampled_from(["shell", "control", "stdin", "iopub"]),
    OBJECTS,
    OBJECTS,
    OBJECTS,
    st.lists(st.binary(), max_size=4),
)
def test_both_protocols_say_what_jupyter_server_reads(
    channel: str, parent: dict[str, Any], metadata: dict[str, Any], content: dict[str, Any], buffers: list[bytes]
) -> None:
    parts = [json.dumps(part).encode() for part in (HEADER, parent, metadata, content)]
    frame = ws_protocol.frame_v1(channel.encode(), [*parts, *buffers])
    assert frame[0] == ws_protocol.BINARY
    assert payload(frame) == serialize_msg_to_ws_v1([*parts, *buffers], channel)
    assert deserialize_msg_from_ws_v1(payload(frame)) == (channel, [*parts, *buffers])
    assert [bytes(part) for part in ws_protocol.parts_of_v1(frame)] == [*parts, *buffers]
    frame = ws_protocol.frame_legacy(channel.encode(), [*parts, *buffers])
    expected = {
        "header": HEADER,
        "msg_id": "a",
        "msg_type": "stream",
        "parent_header": parent,
        "metadata": metadata,
        "content": content,
        "buffers": buffers,
        "channel": channel,
    }
    assert (frame[0] == ws_protocol.BINARY) == bool(buffers)
    assert parse(payload(frame), v1=False) == expected
    if buffers and not any("date" in part or "header" in part for part in (parent,)):
        assert deserialize_binary_message(payload(frame))["buffers"] == buffers


@pytest.mark.parametrize("length", [0, 1, 125, 126, 65535, 65536])
def test_the_frame_s_head_tells_its_length(length: int) -> None:
    head = ws_protocol.frame_head(ws_protocol.BINARY, length)
    assert len(ws_protocol.payload(head + bytes(length))) == length
    assert len(head) == (2 if length < 126 else 4 if length < 65536 else 10)


def test_json_of_very_many_pieces_is_refused_before_it_is_made() -> None:
    """Else a kernel could hold up the server, and fill its memory, with one message."""
    for piece in (b"[],", b"{},", b"1,", b'"",'):
        content = b'{"a":[' + piece * (6 << 20) + b"1]}"
        began = time.monotonic()
        with pytest.raises(Malformed):
            ws_protocol.check_object(content)
        assert time.monotonic() - began < 2


def test_a_large_image_is_checked() -> None:
    content = b'{"data": {"image/png": "' + b"A" * (50 << 20) + b'"}}'
    ws_protocol.check_object(content)
    with pytest.raises(Malformed):
        ws_protocol.check_object(content + b"}")


# The way in


@given(st.binary(max_size=200) | st.text(max_size=100), st.booleans())
def test_no_message_of_a_client_raises_anything_else(message: str | bytes, v1: bool) -> None:
    try:
        ws_protocol.decode(message, v1=v1)
    except Malformed:
        pass


@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 120), max_size=12),
    st.integers(0, 2**64 - 1) | st.integers(0, 12),
    st.binary(max_size=60),
    st.booleans(),
)
def test_garbage_offsets_are_malformed_or_lead_inside(
    offsets: Sequence[int], count: int, tail: bytes, v1: bool
) -> None:
    if v1:
        data = struct.pack(f"<{len(offsets) + 1}Q", count, *offsets) + tail
    else:
        data = struct.pack(f"!{len(offsets) + 1}I", *(n & 0xFFFFFFFF for n in (count, *offsets))) + tail
    try:
        found = ws_protocol.decode(data, v1=v1)
    except Malformed:
        return
    assert sum(map(len, found.parts)) <= len(data)


@given(st.data())
def test_a_message_with_any_byte_changed_raises_nothing_else(data: st.DataObject) -> None:
    message = bytearray(v1("shell", [*PARTS, b"buffer"]))
    for _ in range(3):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        ws_protocol.decode(bytes(message), v1=True)
    except Malformed:
        pass


def test_a_client_s_message_is_read_in_each_form() -> None:
    message = {"header": HEADER, "parent_header": {}, "metadata": {}, "content": {"a": "ü"}, "channel": "control"}
    for data, is_v1, buffers in (
        (v1("control", [*(json.dumps(message[n]).encode() for n in list(message)[:4]), b"x", b""]), True, [b"x", b""]),
        (json.dumps(message), True, []),
        (json.dumps(message), False, []),
        (serialize_binary_message({**message, "buffers": [b"x", b""]}), False, [b"x", b""]),
    ):
        found = ws_protocol.decode(data, v1=is_v1)
        assert found.channel == Channel.CONTROL and found.msg_type == "stream"
        assert [json.loads(bytes(part)) for part in found.parts[:4]] == [HEADER, {}, {}, {"a": "ü"}]
        assert found.parts[4:] == buffers


@pytest.mark.parametrize(
    "change",
    [
        {"channel": None},
        {"parent_header": None, "metadata": None, "content": None},
        {"buffers": {}},
        {"buffers": []},
        {"header": {"msg_id": "a", "msg_type": "execute_request", "date": ""}},
        {"header": {"msg_id": "a", "msg_type": "execute_request"}},
        {"parent_header": {}, "extra": [1]},
    ],
)
def test_what_clients_leave_out_is_made_good(change: dict[str, Any]) -> None:
    message = {"header": HEADER, "parent_header": {}, "metadata": {}, "content": {"code": "1"}, "channel": "shell"}
    message = {name: value for name, value in {**message, **change}.items() if value is not None}
    found = ws_protocol.decode(json.dumps(message), v1=False)
    assert found.channel == Channel.SHELL and len(found.parts) == 4
    assert all(isinstance(json.loads(bytes(part)), dict) for part in found.parts)


def test_what_a_client_cannot_say_in_json_is_null_or_escaped() -> None:
    text = '{"header": {"msg_type": "x"}, "content": {"a": NaN, "b": "\\ud800"}}'
    assert json.loads(bytes(ws_protocol.decode(text, v1=False).parts[3])) == {"a": None, "b": "\ud800"}


@pytest.mark.parametrize(
    "message",
    [
        "",
        "[]",
        "{}",
        '{"header": []}',
        '{"header": {}}',
        '{"header": {"msg_type": 1}}',
        '{"header": {"msg_type": "x"}, "channel": "iopub"}',
        '{"header": {"msg_type": "x"}, "channel": []}',
        '{"header": {"msg_type": "x"}, "channel": "agent"}',
        '{"header": {"msg_type": "x"}, "content": []}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda message: message[:30],
)
def test_what_makes_no_sense_is_malformed(message: str) -> None:
    with pytest.raises(Malformed):
        ws_protocol.decode(message, v1=False)
