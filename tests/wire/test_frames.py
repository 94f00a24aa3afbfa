"""The frame codec: what goes in comes out, however it is cut; what is broken is found; memory stays bounded."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_gateway.wire.frames import (
    HEADER_SIZE,
    MAX_HANDSHAKE,
    MAX_PAYLOAD,
    Decoder,
    Frame,
    Kind,
    WireError,
    encode,
    padding,
)

frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    channel=st.integers(0, 0xFFFF),
    epoch=st.integers(0, 2**32 - 1),
    seq=st.integers(0, 2**64 - 1),
    flags=st.integers(0, 255),
    payload=st.binary(max_size=300),
)


def raw(frame: Frame) -> bytes:
    return b"".join(encode(frame))


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    pos = 0
    for size in sizes:
        pieces.append(data[pos : pos + size])
        pos += size
    return [*pieces, data[pos:]]


def same(left: Frame, right: Frame) -> bool:
    fields = ("kind", "channel", "epoch", "seq", "flags")
    return bytes(left.payload) == bytes(right.payload) and all(getattr(left, f) == getattr(right, f) for f in fields)


@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 400), max_size=20))
def test_frames_survive_any_cutting_of_the_stream(sent: list[Frame], sizes: list[int]) -> None:
    decoder = Decoder()
    got = [frame for piece in cut(b"".join(map(raw, sent)), sizes) for frame in decoder.feed(piece)]
    assert len(got) == len(sent)
    assert all(map(same, got, sent))
    assert decoder.held == 0


@given(frames, st.data())
def test_any_changed_bit_is_noticed(frame: Frame, data: st.DataObject) -> None:
    broken = bytearray(raw(frame))
    at = data.draw(st.integers(0, len(broken) - 1))
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    decoder = Decoder()
    try:
        got = decoder.feed(bytes(broken))
    except WireError:
        return
    assert got == []  # a longer length: the decoder waits for the rest


@given(st.lists(st.binary(max_size=200), max_size=10), st.booleans())
def test_garbage_raises_nothing_but_the_codecs_error(pieces: list[bytes], hunting: bool) -> None:
    decoder = Decoder()
    if hunting:
        decoder.hunt(Kind.ATTACH)
    for piece in pieces:
        try:
            decoder.feed(piece)
        except WireError:
            decoder.hunt(Kind.ATTACH)


def test_frames_before_a_corrupt_one_are_returned_first() -> None:
    decoder = Decoder()
    good = Frame(Kind.PING, payload=b"1")
    assert len(decoder.feed(raw(good) + b"garbage" * 10)) == 1
    assert decoder.error is not None
    with pytest.raises(WireError):
        decoder.feed(b"")
    with pytest.raises(WireError):
        decoder.feed(raw(good))


def test_a_giant_length_is_refused_at_the_header() -> None:
    header = struct.pack("!2sBBHHIQII", b"SG", Kind.MESSAGE, 3, 1, 0, 1, 1, 0xFFFFFFFF, 0)
    with pytest.raises(WireError, match="longer"):
        Decoder().feed(header)
    with pytest.raises(WireError, match="longer"):
        encode(Frame(Kind.DATA, payload=bytes(MAX_PAYLOAD + 1)))


def test_unknown_kinds_and_reserved_bits_are_refused() -> None:
    for kind, reserved in ((0, 0), (99, 0), (1, 7)):
        with pytest.raises(WireError):
            Decoder().feed(struct.pack("!2sBBHHIQII", b"SG", kind, 0, 0, reserved, 1, 0, 0, 0))


def test_a_torn_frame_is_flushed_by_padding_and_what_it_swallowed_is_found() -> None:
    whole = raw(Frame(Kind.MESSAGE, 1, 1, 1, 3, bytes(200_000)))
    attach = raw(Frame(Kind.ATTACH, payload=b"{nonce}"))
    for torn in (1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, 150_000, len(whole) - 1):
        decoder = Decoder()
        try:
            got = decoder.feed(whole[:torn] + attach)
            got += decoder.feed(padding())
        except WireError:
            decoder.hunt(Kind.ATTACH, b"nonce")
            got = decoder.feed(b"")
        assert [frame.kind for frame in got] == [Kind.ATTACH], torn


@settings(deadline=None)
@given(st.binary(max_size=500), st.lists(st.integers(1, 60), max_size=30), frames)
def test_a_hunt_finds_its_frame_behind_any_garbage(garbage: bytes, sizes: list[int], after: Frame) -> None:
    decoder = Decoder()
    decoder.hunt(Kind.HELLO, b"the-nonce")
    hello = Frame(Kind.HELLO, payload=b"...the-nonce...")
    other = Frame(Kind.HELLO, payload=b"another-nonce")
    stream = garbage + raw(other) + raw(hello) + raw(after)
    got = [frame for piece in cut(stream, sizes) for frame in decoder.feed(piece)]
    assert len(got) == 2
    assert same(got[0], hello) and same(got[1], after)


def test_an_incomplete_candidate_does_not_hide_a_complete_one_behind_it() -> None:
    decoder = Decoder()
    decoder.hunt(Kind.HELLO, b"nonce")
    bait = raw(Frame(Kind.HELLO, payload=b"nonce" + bytes(MAX_HANDSHAKE - 5)))[:-1000]
    got = decoder.feed(bait[:100] + raw(Frame(Kind.HELLO, payload=b"nonce")))
    assert [bytes(frame.payload) for frame in got] == [b"nonce"]


def test_a_hunt_keeps_no_more_than_one_handshake() -> None:
    decoder = Decoder()
    decoder.hunt(Kind.HELLO, b"nonce")
    bait = struct.pack("!2sBBHHIQII", b"SG", Kind.HELLO, 0, 0, 0, 1, 0, MAX_HANDSHAKE, 0)
    for _ in range(200):
        decoder.feed(bait * 100)
        assert decoder.held <= MAX_HANDSHAKE + HEADER_SIZE


def test_a_frame_that_comes_byte_by_byte_costs_linear_work() -> None:
    decoder = Decoder()
    data = raw(Frame(Kind.DATA, 16, payload=bytes(MAX_PAYLOAD)))
    tracemalloc.start()
    got = [frame for pos in range(len(data)) for frame in decoder.feed(data[pos : pos + 1])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(got) == 1
    assert peak < 3 * MAX_PAYLOAD


def test_mutated_streams_never_hang_or_grow() -> None:
    source = random.Random(7)
    stream = b"".join(raw(Frame(Kind.MESSAGE, 1, 1, seq, 3, source.randbytes(seq * 20))) for seq in range(1, 60))
    for _ in range(60):
        broken = bytearray(stream)
        for _ in range(source.randrange(1, 20)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        decoder = Decoder()
        try:
            decoder.feed(bytes(broken))
        except WireError:
            pass
        assert decoder.held <= len(broken)
