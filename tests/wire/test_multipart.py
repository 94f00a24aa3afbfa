"""Multipart messages: packing, cutting, assembling, and what is refused."""

from __future__ import annotations

import array
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.wire.frames import FLAG_FIRST, FLAG_LAST, MAX_PAYLOAD, Frame, Kind, WireError
from sandbox_gateway.wire.messages import MAX_PARTS, Assembler, fragments, pack, unpack

sizes = st.one_of(st.integers(0, 200), st.sampled_from([MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 700_000]))


@given(st.lists(st.binary(max_size=50), max_size=40))
def test_packed_parts_come_back(parts: list[bytes]) -> None:
    assert unpack(b"".join(pack(parts))) == parts


@given(st.lists(sizes, max_size=6))
def test_a_message_of_any_size_survives_its_fragments(lengths: list[int]) -> None:
    parts = [bytes([number + 1]) * length for number, length in enumerate(lengths)]
    assembler = Assembler()
    results = []
    for frame in fragments(4, 1, 9, parts):
        assert len(frame.payload) <= MAX_PAYLOAD
        results.append(assembler.add(frame))
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1] is not None
    assert results[-1][:2] == (4, 9)
    assert [bytes(part) for part in results[-1][2]] == parts
    assert assembler.held == 0


def test_long_parts_are_cut_without_copying() -> None:
    part = bytes(4 * MAX_PAYLOAD)
    views = [frame.payload for frame in fragments(4, 1, 1, [b"head", part]) if isinstance(frame.payload, memoryview)]
    assert len(views) >= 3
    assert all(view.obj is part for view in views)


def test_small_parts_do_not_keep_the_read_buffer_alive() -> None:
    packed = b"".join(pack([b"a", b"b"]))
    assert all(type(part) is bytes for part in unpack(memoryview(packed)))


def test_views_of_other_formats_are_sent_as_their_bytes() -> None:
    numbers = array.array("d", [1.0, 2.0])
    assert unpack(b"".join(pack([memoryview(numbers)]))) == [numbers.tobytes()]


@given(st.binary(max_size=200))
def test_unpacking_garbage_raises_only_the_codecs_error(garbage: bytes) -> None:
    try:
        parts = unpack(garbage)
    except WireError:
        return
    assert b"".join(pack(parts)) == garbage


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0",
        struct.pack("!I", MAX_PARTS + 1),
        struct.pack("!I", 0xFFFFFFFF),
        struct.pack("!II", 1, 0xFFFFFFFF),
        struct.pack("!II", 1, 3) + b"ab",
        struct.pack("!II", 1, 1) + b"ab",
        struct.pack("!I", 3) + b"xx",
    ],
)
def test_a_malformed_message_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        unpack(payload)


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(WireError):
        pack([b""] * (MAX_PARTS + 1))


def test_endless_fragments_stop_at_the_bound() -> None:
    assembler = Assembler(max_message=10 * MAX_PAYLOAD)
    assembler.add(Frame(Kind.MESSAGE, 1, 1, 1, FLAG_FIRST, bytes(MAX_PAYLOAD)))
    with pytest.raises(WireError, match="longer"):
        for _ in range(20):
            assembler.add(Frame(Kind.MESSAGE, 1, 1, 1, 0, bytes(MAX_PAYLOAD)))
    assert assembler.held <= 10 * MAX_PAYLOAD


def test_the_bound_is_shared_by_the_channels() -> None:
    assembler = Assembler(max_message=3 * MAX_PAYLOAD)
    for channel in range(3):
        assembler.add(Frame(Kind.MESSAGE, channel, 1, 1, FLAG_FIRST, bytes(MAX_PAYLOAD)))
    with pytest.raises(WireError):
        assembler.add(Frame(Kind.MESSAGE, 3, 1, 1, FLAG_FIRST, b"x"))


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.MESSAGE, 1, 1, 2, 0, b"x"),
        Frame(Kind.MESSAGE, 1, 1, 1, FLAG_FIRST, b"x"),
        Frame(Kind.MESSAGE, 1, 1, 1, 0, b""),
        Frame(Kind.MESSAGE, 2, 1, 1, 0, b"x"),
        Frame(Kind.MESSAGE, 5, 1, 1, FLAG_FIRST | FLAG_LAST, b"x"),
        Frame(Kind.MESSAGE, 2, 1, 0, FLAG_FIRST | FLAG_LAST, b"\0\0\0\0"),
        Frame(Kind.MESSAGE, 2, 1, 2**63, FLAG_FIRST | FLAG_LAST, b"\0\0\0\0"),
        Frame(Kind.MESSAGE, 2, 1, 1, 4, b"\0\0\0\0"),
    ],
)
def test_fragments_out_of_order_are_refused(frame: Frame) -> None:
    assembler = Assembler()
    assembler.add(Frame(Kind.MESSAGE, 1, 1, 1, FLAG_FIRST, b"begun"))
    with pytest.raises(WireError):
        assembler.add(frame)
