"""Credit of byte streams: never more on the way than the window, never a grant beyond the bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.wire.credit import (
    MAX_CREDIT,
    ReceiveCredit,
    SendCredit,
    decode_grant,
    encode_grant,
)
from sandbox_gateway.wire.frames import WireError


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=50))
def test_sender_and_receiver_agree_and_never_exceed_the_window(steps: list[tuple[int, int]]) -> None:
    send, receive = SendCredit(1000), ReceiveCredit(1000)
    unread = 0
    for wanted, read in steps:
        sent = send.spend(wanted)
        receive.received(sent)
        unread += sent
        assert unread <= 1000
        taken = min(read, unread)
        unread -= taken
        receive.consume(taken)
        if grant := receive.take_grant():
            send.grant(decode_grant(encode_grant(grant)))
    assert send.available + unread <= 1000


def test_bytes_that_were_not_allowed_are_refused() -> None:
    with pytest.raises(WireError):
        ReceiveCredit(10).received(11)


def test_consuming_more_than_came_grants_nothing() -> None:
    credit = ReceiveCredit(10)
    credit.received(2)
    credit.consume(1000)
    assert credit.take_grant() == 0


@pytest.mark.parametrize("amount", [0, MAX_CREDIT, 2**32 - 1])
def test_a_grant_of_nothing_or_too_much_is_refused(amount: int) -> None:
    with pytest.raises(WireError):
        SendCredit(1).grant(amount)


@given(st.binary(max_size=8).filter(lambda data: len(data) != 4))
def test_a_malformed_grant_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode_grant(payload)
