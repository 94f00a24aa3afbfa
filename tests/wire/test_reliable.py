"""Outbox and Inbox: numbers, acknowledgements, what goes first at the bound, and that nothing goes silently."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_gateway.wire.frames import WireError
from sandbox_gateway.wire.reliable import (
    ACK_MESSAGES,
    MESSAGE_COST,
    PART_COST,
    Entry,
    Gap,
    Inbox,
    Outbox,
    decode_ack,
    decode_gap,
    encode_ack,
    encode_gap,
)

COST = MESSAGE_COST + PART_COST


def drained(outbox: Outbox) -> list[Entry | Gap]:
    found = []
    while (item := outbox.next_ready()) is not None:
        found.append(item)
    return found


def numbers(items: list[Entry | Gap]) -> list[object]:
    return [(item.first, item.last) if isinstance(item, Gap) else item.seq for item in items]


def streams(channel: int, parts: object) -> bool:
    assert isinstance(parts, list)
    return bool(parts[0] == b"stream")


def test_messages_leave_in_order_of_arrival_with_numbers_of_their_channel() -> None:
    outbox = Outbox()
    assert [outbox.append(channel, [b""]) for channel in (4, 1, 4, 2)] == [1, 1, 2, 1]
    assert [(item.channel, item.seq) for item in drained(outbox) if isinstance(item, Entry)] == [
        (4, 1),
        (1, 1),
        (4, 2),
        (2, 1),
    ]
    assert outbox.last() == {1: 1, 2: 1, 4: 2}


def test_an_acknowledged_message_is_forgotten() -> None:
    outbox = Outbox()
    for _ in range(3):
        outbox.append(1, [b"x" * 100])
    drained(outbox)
    outbox.ack(1, 2)
    assert outbox.backlog == outbox.bytes == COST + 100
    outbox.ack(1, 1)
    assert outbox.backlog == COST + 100


@pytest.mark.parametrize(("channel", "seq"), [(1, 4), (2, 1), (9, 1), (-1, 0), (1, -1)])
def test_an_acknowledgement_of_what_was_never_sent_is_refused(channel: int, seq: int) -> None:
    outbox = Outbox()
    for _ in range(3):
        outbox.append(1, [b""])
    with pytest.raises(WireError):
        outbox.ack(channel, seq)


def test_after_rewinding_what_follows_is_sent_again() -> None:
    outbox = Outbox()
    for _ in range(4):
        outbox.append(1, [b""])
        outbox.append(4, [b""])
    drained(outbox)
    assert outbox.rewind({1: 3, 4: 1}) == {1: 3, 4: 1}
    assert [(item.channel, item.seq) for item in drained(outbox) if isinstance(item, Entry)] == [
        (4, 2),
        (4, 3),
        (1, 4),
        (4, 4),
    ]


def test_a_channel_that_is_not_named_goes_on_after_what_was_acknowledged() -> None:
    outbox = Outbox(keep_acked=True)
    for _ in range(4):
        outbox.append(4, [b""])
    drained(outbox)
    outbox.ack(4, 2)
    assert outbox.rewind({}) == {4: 2}
    assert numbers(drained(outbox)) == [3, 4]


def test_kept_messages_are_sent_again_to_one_who_names_an_older_number() -> None:
    outbox = Outbox(keep_acked=True)
    for _ in range(4):
        outbox.append(4, [b""])
    drained(outbox)
    outbox.ack(4, 4)
    outbox.rewind({4: 1})
    assert numbers(drained(outbox)) == [2, 3, 4]
    outbox.ack(4, 4)
    assert outbox.backlog == 0


def test_what_is_not_kept_any_more_is_announced_as_a_gap() -> None:
    outbox = Outbox()
    for _ in range(4):
        outbox.append(4, [b""])
    drained(outbox)
    outbox.ack(4, 3)
    outbox.rewind({4: 0})
    assert numbers(drained(outbox)) == [(1, 3), 4]
    outbox.ack(4, 4)
    outbox.rewind({4: 0})
    assert numbers(drained(outbox)) == [(1, 4)]


def test_numbers_beyond_the_last_one_count_as_that_one() -> None:
    outbox = Outbox()
    outbox.append(4, [b""])
    assert outbox.rewind({4: 50}) == {4: 1}
    assert numbers(drained(outbox)) == []
    outbox.append(4, [b""])
    assert numbers(drained(outbox)) == [2]


def test_at_the_bound_acknowledged_messages_go_first() -> None:
    limit = 10 * (COST + len(b"stream"))
    outbox = Outbox(limit, 2 * limit, streams, keep_acked=True)
    for _ in range(10):
        outbox.append(4, [b"stream"])
    drained(outbox)
    outbox.ack(4, 5)
    for _ in range(4):
        outbox.append(4, [b"stream"])
    assert outbox.dropped_messages == 0
    assert outbox.bytes <= limit


def test_at_the_bound_droppable_messages_go_oldest_first_and_leave_one_merged_gap() -> None:
    outbox = Outbox(10 * COST, 100 * COST, streams)
    outbox.append(4, [b"status"])
    for _ in range(50):
        outbox.append(4, [b"stream"])
    items = drained(outbox)
    assert numbers(items)[0] == 1
    gap = items[1]
    assert isinstance(gap, Gap)
    assert (gap.first, gap.count) == (2, gap.last - 1)
    assert gap.bytes == gap.count * (PART_COST + 6)
    assert numbers(items[2:]) == list(range(gap.last + 1, 52))
    assert outbox.dropped_messages == gap.count


def test_messages_that_must_not_be_dropped_are_kept_and_full_says_so() -> None:
    outbox = Outbox(5 * COST, 10 * COST, streams)
    for _ in range(20):
        outbox.append(4, [b"status"])
    assert outbox.full
    assert numbers(drained(outbox)) == list(range(1, 21))
    outbox.ack(4, 20)
    assert not outbox.full


def test_a_single_message_longer_than_the_limit_is_not_dropped_at_once() -> None:
    outbox = Outbox(1000, 10_000, streams)
    outbox.append(4, [b"stream", bytes(5000)])
    assert numbers(drained(outbox)) == [1]
    outbox.append(4, [b"stream", bytes(50_000)])
    assert numbers(drained(outbox)) == [(2, 2)]


@pytest.mark.parametrize("kind", [b"stream", b"result"])
@pytest.mark.parametrize("length", [5 * COST, 5000])
def test_a_long_message_goes_for_no_other_below_the_hard_limit_and_no_other_for_it(kind: bytes, length: int) -> None:
    """Nor does it count for the limit: what is usual has all of that for itself."""
    outbox = Outbox(10 * COST, 10_000, streams)
    outbox.append(4, [kind, bytes(length)])
    for _ in range(3):
        outbox.append(4, [b"status"])
        outbox.append(4, [b"stream"])
    assert numbers(drained(outbox)) == list(range(1, 8))
    for _ in range(20):
        outbox.append(4, [b"stream"])
    assert outbox.bytes <= 10 * COST + length + 2 * COST
    outbox.rewind({4: 0})
    items = drained(outbox)
    assert numbers(items)[0] == 1 and numbers(items)[-1] == 27
    outbox.ack(4, 27)
    assert outbox.bytes == 0


def test_a_message_longer_than_the_hard_limit_takes_no_other_with_it() -> None:
    outbox = Outbox(1000, 10_000, streams)
    outbox.append(4, [b"stream"])
    outbox.append(4, [b"stream", bytes(20_000)])
    outbox.append(4, [b"stream"])
    assert numbers(drained(outbox)) == [1, (2, 2), 3]


def test_beyond_the_hard_limit_what_is_acknowledged_goes_first() -> None:
    outbox = Outbox(1000, 10_000, streams, keep_acked=True, keep_bytes=10_000)
    for _ in range(3):
        outbox.append(4, [b"stream", bytes(2500)])
    drained(outbox)
    outbox.ack(4, 2)
    outbox.append(4, [b"stream", bytes(6000)])
    assert numbers(drained(outbox)) == [4]
    assert outbox.dropped_messages == 0 and outbox.bytes <= 10_000


def test_beyond_the_hard_limit_the_oldest_go_however_long() -> None:
    outbox = Outbox(1000, 10_000, streams)
    outbox.append(4, [b"stream", bytes(5000)])
    outbox.append(4, [b"status"])
    outbox.append(4, [b"stream", bytes(4900)])
    outbox.append(4, [b"stream"])
    assert numbers(drained(outbox)) == [(1, 1), 2, 3, 4]
    assert outbox.bytes <= 10_000


def test_a_gap_that_was_sent_does_not_grow_over_a_message_that_was_not() -> None:
    outbox = Outbox(4 * COST, 100 * COST, streams)
    for _ in range(6):
        outbox.append(4, [b"stream"])
    first = outbox.next_ready()
    assert isinstance(first, Gap)
    for _ in range(6):
        outbox.append(4, [b"stream"])
    rest = drained(outbox)
    assert isinstance(rest[0], Gap)
    assert rest[0].first == first.last + 1


def test_a_flood_without_a_receiver_stays_within_the_bound_and_few_objects() -> None:
    outbox = Outbox(200 * COST, 400 * COST, streams, keep_acked=True)
    for number in range(20_000):
        outbox.append(4, [b"stream"])
        if number % 500 == 0:
            outbox.append(4, [b"status"])
            outbox.append(1, [b"reply"])
    assert outbox.bytes <= 210 * COST
    items = drained(outbox)
    assert len(items) < 400
    assert sum(isinstance(item, Entry) and item.parts[0] != b"stream" for item in items) == 80
    seen = sum(item.count if isinstance(item, Gap) else 1 for item in items)
    assert seen == 20_000 + 80


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.sampled_from([1, 4]), st.booleans()),
            st.tuples(st.just("send"), st.integers(1, 5), st.booleans()),
            st.tuples(st.just("ack"), st.sampled_from([1, 4]), st.integers(0, 5)),
            st.tuples(st.just("rewind"), st.integers(0, 3), st.integers(0, 3)),
        ),
        max_size=80,
    ),
    st.booleans(),
    st.integers(2, 20),
)
def test_whatever_happens_the_receiver_learns_of_every_number_once(
    operations: list[tuple[str, int, int]], keep: bool, limit: int
) -> None:
    """Model test: an Inbox accepts all that an Outbox gives out, without holes, and ends with every number."""
    outbox = Outbox(limit * COST, 1000 * COST, streams, keep_acked=keep)
    inbox = Inbox()
    kept: set[tuple[int, int]] = set()
    must: set[tuple[int, int]] = set()

    def take() -> None:
        item = outbox.next_ready()
        if isinstance(item, Gap):
            inbox.gap(item.channel, item.first, item.last)
        elif item is not None and inbox.accept(item.channel, item.seq):
            kept.add((item.channel, item.seq))

    for name, first, second in operations:
        if name == "append":
            seq = outbox.append(first, [b"stream" if second else b"status"])
            if not second:
                must.add((first, seq))
        elif name == "send":
            for _ in range(first):
                take()
        elif name == "ack":
            outbox.ack(first, max(inbox.received().get(first, 0) - second, 0))
        else:
            back = {1: inbox.received().get(1, 0) - first, 4: inbox.received().get(4, 0) - second}
            start = outbox.rewind({channel: max(number, 0) for channel, number in back.items()})
            inbox.resume(start)
    while outbox.ready:
        take()
    assert inbox.received() == outbox.last()
    assert must <= kept
    for channel, seq in outbox.last().items():
        outbox.ack(channel, seq)
    assert outbox.backlog == 0


def test_duplicates_are_recognised_and_holes_refused() -> None:
    inbox = Inbox()
    assert inbox.accept(1, 1)
    assert not inbox.accept(1, 1)
    with pytest.raises(WireError):
        inbox.accept(1, 3)
    assert inbox.accept(1, 2)
    assert inbox.received() == {1: 2}


def test_a_gap_that_overlaps_what_has_come_counts_only_the_news() -> None:
    inbox = Inbox()
    for seq in range(1, 4):
        inbox.accept(4, seq)
    assert inbox.gap(4, 2, 6) == 3
    assert inbox.gap(4, 2, 6) == 0
    with pytest.raises(WireError):
        inbox.gap(4, 8, 9)


def test_acknowledgements_come_after_enough_messages_or_when_asked_for() -> None:
    inbox = Inbox()
    assert inbox.take_ack() is None
    inbox.accept(1, 1)
    assert inbox.ack_pending and inbox.take_ack() is None
    inbox.request_ack()
    assert inbox.take_ack() == {1: 1}
    assert inbox.take_ack() is None
    for seq in range(2, 2 + ACK_MESSAGES):
        inbox.accept(1, seq)
    assert inbox.take_ack() == {1: 1 + ACK_MESSAGES}


def test_a_new_process_goes_on_after_its_predecessors_numbers() -> None:
    outbox = Outbox()
    outbox.number_after({1: 57})
    assert outbox.append(1, [b""]) == 58
    with pytest.raises(WireError):
        outbox.number_after({1: 59})


@given(st.binary(max_size=60), st.integers(0, 0xFFFF), st.integers(0, 2**64 - 1))
def test_malformed_acks_and_gaps_raise_only_the_codecs_error(payload: bytes, channel: int, seq: int) -> None:
    for parse in (lambda: decode_ack(payload), lambda: decode_gap(channel, seq, payload)):
        try:
            parse()
        except WireError:
            pass


def test_acks_and_gaps_round_trip() -> None:
    assert decode_ack(encode_ack({1: 5, 4: 2**40})) == {1: 5, 4: 2**40}
    gap = Gap(4, 3, 9, 7, 1234)
    assert decode_gap(4, 3, encode_gap(gap)) == gap
