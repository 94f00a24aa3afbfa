"""ATTACH and HELLO: exact round trips, strict reading, choosing a version."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.wire.frames import MAX_HANDSHAKE, MAX_SEQ, WireError
from sandbox_gateway.wire.handshake import Attach, Hello, choose_version, load_object

numbers = st.dictionaries(st.integers(0, 4), st.integers(0, MAX_SEQ))
nonces = st.text("0123456789abcdef", min_size=8, max_size=64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(nonces, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 2**32 - 1), numbers, st.text())
def test_attach_round_trip(nonce: str, versions: list[int], epoch: int, received: dict[int, int], owner: str) -> None:
    attach = Attach(nonce, tuple(versions), epoch, received, owner[:200])
    assert Attach.from_payload(attach.to_payload()) == attach


@given(nonces, st.integers(0, 9), st.integers(0, 2**32 - 1), numbers, numbers, numbers)
def test_hello_round_trip(
    nonce: str, version: int, epoch: int, received: dict[int, int], sent: dict[int, int], resumes: dict[int, int]
) -> None:
    hello = Hello(nonce, version, epoch, received, sent, {"python": "3.11"}, resumes)
    assert Hello.from_payload(hello.to_payload()) == hello


@given(
    st.sampled_from(["nonce", "versions", "epoch", "received", "owner", "version", "sent", "agent", "resumes"]),
    json_values,
)
def test_a_field_of_a_wrong_type_raises_only_the_codecs_error(key: str, value: Any) -> None:
    for good, parse in ((Attach("0" * 8), Attach.from_payload), (Hello("0" * 8), Hello.from_payload)):
        data = json.loads(good.to_payload())
        data[key] = value
        try:
            parse(json.dumps(data).encode())
        except WireError:
            pass


@pytest.mark.parametrize("key", ["nonce", "versions", "epoch", "received", "owner"])
def test_a_missing_field_is_refused(key: str) -> None:
    data = json.loads(Attach("0" * 8).to_payload())
    del data[key]
    with pytest.raises(WireError):
        Attach.from_payload(json.dumps(data).encode())


@pytest.mark.parametrize(
    "received", [{"5": 1}, {"-1": 1}, {"00": 1}, {"0": -1}, {"0": 2**63}, {"0": True}, {"0": 1.0}, {"": 1}]
)
def test_cursors_are_read_strictly(received: dict[str, Any]) -> None:
    data = json.loads(Attach("0" * 8).to_payload()) | {"received": received}
    with pytest.raises(WireError):
        Attach.from_payload(json.dumps(data).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"1",
        b"\xff",
        b"{",
        b'{"a":NaN}',
        b"[" * 10_000,
        b'{"a":' * 3_000,
        b"1" * 5_000,
        b" " * (MAX_HANDSHAKE + 1),
    ],
)
def test_anything_but_one_small_json_object_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        load_object(payload, MAX_HANDSHAKE)


def test_the_newest_common_version_is_chosen() -> None:
    assert choose_version((1, 2, 3), (2, 3, 4)) == 3


def test_no_common_version_names_both_lists() -> None:
    with pytest.raises(WireError, match=r"speaks 3, 4, the other 1, 2"):
        choose_version((1, 2), (3, 4))
