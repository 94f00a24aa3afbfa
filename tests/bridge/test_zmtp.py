"""The ZMTP codec: what it encodes it decodes, however it is cut, and nothing but its own error comes out of garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway import zmtp

sizes = st.one_of(st.integers(0, 300), st.sampled_from([255, 256, zmtp.INLINE, zmtp.INLINE + 1, 100_000]))
messages = st.lists(st.lists(sizes, min_size=1, max_size=8), max_size=5)


def fed(decoder: zmtp.Decoder, data: bytes, cut: int) -> list[list[bytes] | zmtp.Command]:
    return [found for at in range(0, len(data), cut) for found in decoder.feed(data[at : at + cut])]


@given(messages, st.integers(1, 100_000))
def test_messages_come_back_however_the_stream_is_cut(shapes: list[list[int]], cut: int):
    sent = [[bytes([n % 251]) * size for n, size in enumerate(shape)] for shape in shapes]
    data = zmtp.GREETING + b"".join(b"".join(zmtp.encode(parts)) for parts in sent)
    assert fed(zmtp.Decoder(), data, max(cut, len(data) // 50)) == sent


def test_byte_by_byte():
    data = (
        zmtp.GREETING + zmtp.ready(b"ROUTER") + zmtp.command(b"PING", b"\0\1abc") + b"".join(zmtp.encode([b"x", b""]))
    )
    ready, ping, message = fed(zmtp.Decoder(), data, 1)
    assert isinstance(ready, zmtp.Command) and ready.name == b"READY"
    assert zmtp.properties(ready.body) == {"socket-type": b"ROUTER", "identity": b""}
    assert ping == zmtp.Command(b"PING", b"\0\1abc")
    assert message == [b"x", b""]


def test_large_parts_are_not_copied():
    large = bytes(zmtp.INLINE + 1)
    assert any(buffer is large for buffer in zmtp.encode([b"a", large, b"b"]))


@given(st.binary(max_size=300), st.integers(1, 300), st.booleans())
def test_garbage_raises_only_the_codecs_own_error(data: bytes, cut: int, greeted: bool):
    try:
        for found in fed(zmtp.Decoder(1000, greeted=greeted), data, cut):
            if isinstance(found, zmtp.Command):
                zmtp.properties(found.body)
    except zmtp.ZmtpError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\xff" + bytes(8) + b"\x7e",
        b"\xff" + bytes(8) + b"\x7f\x01",
        zmtp.GREETING.replace(b"NULL\0", b"PLAIN"),
        zmtp.GREETING + b"\x08\x01x",
        zmtp.GREETING + b"\x04\x00",
        zmtp.GREETING + b"\x05\x05\x04PING",
        zmtp.GREETING + b"\x04\x02\x09P",
        zmtp.GREETING + b"\x02" + b"\xff" * 8,
        zmtp.GREETING + b"\x01\x00" * (zmtp.MAX_FRAMES + 1),
    ],
    ids=["http", "signature", "version", "mechanism", "flags", "empty", "more", "short", "huge", "frames"],
)
def test_a_peer_that_speaks_wrongly_is_refused_at_once(data: bytes):
    with pytest.raises(zmtp.ZmtpError):
        fed(zmtp.Decoder(), data, 7)


@pytest.mark.parametrize("body", [b"\x05ab", b"\x01a\0\0\0\x05x", b"\x01a\0\0"])
def test_cut_properties_are_refused(body: bytes):
    with pytest.raises(zmtp.ZmtpError):
        zmtp.properties(body)
