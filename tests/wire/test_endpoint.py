"""Two endpoints against each other: exactly once through every tear, hostile input, streams, bounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation

from sandbox_gateway.wire.credit import INITIAL_CREDIT
from sandbox_gateway.wire.endpoint import AgentEndpoint, HostEndpoint
from sandbox_gateway.wire.events import (
    Detached,
    Dropped,
    Lost,
    Message,
    Pinged,
    Ponged,
    StreamClosed,
    StreamData,
    StreamEnded,
    StreamOpened,
    StreamWritable,
)
from sandbox_gateway.wire.frames import CHANNELS, FLAG_FIRST, FLAG_LAST, Frame, Kind, encode
from sandbox_gateway.wire.handshake import Attach, Hello
from sandbox_gateway.wire.messages import pack
from sandbox_gateway.wire.reliable import Gap, Outbox, encode_gap
from sandbox_gateway.wire.streams import MAX_STREAMS


def attached() -> Simulation:
    simulation = Simulation()
    simulation.attach()
    simulation.settle()
    assert simulation.host.attached
    simulation.host_events.clear()
    simulation.agent_events.clear()
    return simulation


def to_host(simulation: Simulation, frame: Frame) -> None:
    frame.epoch = frame.epoch or simulation.host.epoch
    simulation.host_events += simulation.host.feed(b"".join(encode(frame)))


def message(channel: int, seq: int, *parts: bytes) -> Frame:
    return Frame(Kind.MESSAGE, channel, 0, seq, FLAG_FIRST | FLAG_LAST, b"".join(pack(parts)))


# -- ordinary use


def test_messages_go_both_ways_in_order() -> None:
    simulation = attached()
    for number in range(300):
        simulation.host.send(1, [b"%d" % number])
        simulation.agent.send(4, [b"%d" % number, bytes(number * 10)])
    simulation.settle()
    assert simulation.agent_got(1) == simulation.got(4) == [b"%d" % number for number in range(300)]
    assert simulation.host.outbox.backlog == simulation.agent.outbox.backlog == 0


def test_what_was_queued_before_anybody_attached_is_delivered() -> None:
    simulation = Simulation()
    simulation.agent.send(0, [b"early"])
    assert not simulation.agent.wants_write
    simulation.recover()
    assert simulation.got(0) == [b"early"]


def test_a_ping_is_answered_and_seen() -> None:
    simulation = attached()
    simulation.host.ping(b"token")
    simulation.settle()
    assert simulation.count(Ponged) == 1
    assert any(isinstance(event, Pinged) for event in simulation.agent_events)


def test_after_detach_the_agent_is_silent_and_keeps_everything() -> None:
    simulation = attached()
    simulation.agent.send(4, [b"one"])
    simulation.settle()
    simulation.host.detach()
    simulation.settle()
    assert isinstance(simulation.agent_events[-1], Detached)
    simulation.agent.send(4, [b"two"])
    assert not simulation.agent.wants_write
    simulation.kill_host()
    simulation.recover()
    assert simulation.got(4) == [b"one", b"two"]


def test_the_output_is_the_same_until_it_was_written_and_partial_writes_lose_nothing() -> None:
    simulation = attached()
    parts = [random.Random(1).randbytes(1_000_000), b"tail"]
    simulation.agent.send(4, parts)
    assert simulation.agent.output() == simulation.agent.output()
    while simulation.write_agent(7777):
        simulation.read_host(5000)
    while simulation.read_host(5000):
        pass
    (event,) = [event for event in simulation.host_events if isinstance(event, Message)]
    assert [bytes(part) for part in event.parts] == parts


def test_a_long_message_leaves_room_for_pings_between_its_fragments() -> None:
    simulation = attached()
    simulation.agent.send(4, [bytes(8_000_000)])
    simulation.write_agent()
    simulation.host.ping(b"now")
    simulation.write_host()
    simulation.read_agent()
    simulation.write_agent()
    simulation.read_host()
    assert simulation.count(Ponged) == 1
    assert simulation.got(4) == []


# -- tears


@pytest.mark.parametrize("size", [10, 500, 200_000, 600_000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_a_host_killed_while_writing_is_succeeded(size: int, share: float) -> None:
    simulation = attached()
    simulation.host.send(1, [b"torn", bytes(size)])
    wanted = sum(map(len, simulation.host.output()))
    simulation.kill_host(cut=int(wanted * share))
    simulation.read_agent()
    simulation.agent.send(4, [b"output"])
    simulation.recover()
    assert simulation.got(4) == [b"output"]
    simulation.host.send(1, [b"next"])
    simulation.settle()
    assert simulation.agent_got(1)[-1] == b"next"
    assert len(simulation.agent_got(1)) <= 2


@pytest.mark.parametrize("read", [0, 1, 27, 28, 29, 100_000, 300_000, 999_999])
def test_a_host_killed_while_reading_is_succeeded(read: int) -> None:
    simulation = attached()
    for number in range(5):
        simulation.agent.send(4, [b"%d" % number, bytes(200_000)])
    simulation.write_agent()
    simulation.read_host(read)
    simulation.kill_host()
    simulation.recover()
    assert simulation.got(4) == [b"%d" % number for number in range(5)]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("agent sends"), st.sampled_from([1, 2, 4]), st.sampled_from([1, 40, 3000, 300_000])),
        st.tuples(st.just("host sends"), st.sampled_from([1, 2, 3]), st.sampled_from([1, 40, 3000, 300_000])),
        st.tuples(st.just("write host"), st.integers(1, 5000), st.integers(0, 1)),
        st.tuples(st.just("write agent"), st.integers(1, 400_000), st.integers(0, 1)),
        st.tuples(st.just("read host"), st.integers(1, 400_000), st.integers(0, 1)),
        st.tuples(st.just("read agent"), st.integers(1, 400_000), st.integers(0, 1)),
        st.tuples(st.just("kill"), st.integers(0, 300_000), st.integers(0, 1)),
        st.tuples(st.just("attach"), st.integers(0, 1), st.integers(0, 1)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(operations)
def test_exactly_once_through_any_number_of_killed_hosts(steps: list[tuple[str, int, int]]) -> None:
    """The invariant: all hosts together get every message of the agent once and in order; the agent gets each request
    of a host at most once and in order."""
    simulation = Simulation()
    simulation.recover()
    sent: dict[int, list[bytes]] = {1: [], 2: [], 4: []}
    requests: dict[int, list[bytes]] = {1: [], 2: [], 3: []}
    for serial, (name, first, second) in enumerate(steps):
        label = b"%d" % serial
        if name == "agent sends":
            simulation.agent.send(first, [label, bytes(second)])
            sent[first].append(label)
        elif name == "host sends":
            if simulation.host.attached:
                simulation.host.send(first, [label, bytes(second)])
                requests[first].append(label)
        elif name == "write host":
            simulation.write_host(first)
        elif name == "write agent":
            simulation.write_agent(first)
        elif name == "read host":
            simulation.read_host(first)
        elif name == "read agent":
            simulation.read_agent(first)
        elif name == "kill":
            simulation.kill_host(cut=first)
            simulation.attach()
        else:
            simulation.attach(pad=bool(first))
    simulation.recover()
    for channel, labels in sent.items():
        assert simulation.got(channel) == labels
    for channel, labels in requests.items():
        got = simulation.agent_got(channel)
        assert got == [label for label in labels if label in got]
    last = b"last"
    simulation.host.send(1, [last])
    simulation.settle()
    assert simulation.agent_got(1)[-1] == last


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=200), st.booleans())
def test_garbage_on_the_way_to_the_agent_is_survived_with_nothing_lost(garbage: bytes, partly: bool) -> None:
    simulation = attached()
    simulation.agent.send(4, [b"a"])
    simulation.to_agent += garbage
    simulation.host.send(1, [b"request"])
    simulation.settle()
    simulation.recover()
    simulation.agent.send(4, [b"b"])
    simulation.settle()
    assert simulation.got(4) == [b"a", b"b"]
    assert simulation.agent_got(1) == [b"request"]


def test_garbage_on_the_way_to_the_host_is_reported_once_and_survived() -> None:
    simulation = attached()
    simulation.to_host += b"garbage" * 100
    simulation.agent.send(4, [b"a"])
    simulation.settle()
    simulation.host.feed(b"more")
    assert simulation.count(Lost) == 1
    assert not simulation.host.attached
    simulation.recover()
    assert simulation.got(4) == [b"a"]


def test_a_host_that_names_nothing_gets_what_was_not_acknowledged() -> None:
    simulation = attached()
    simulation.agent.send(4, [b"old"])
    simulation.settle()
    simulation.agent.send(4, [b"new"])
    simulation.kill_host()
    simulation.attach(named=False)
    simulation.settle()
    assert simulation.got(4) == [b"old", b"new"]
    assert simulation.host.inbox.received()[4] == 2


def test_a_host_that_names_an_older_number_gets_what_was_kept() -> None:
    simulation = attached()
    for number in range(4):
        simulation.agent.send(4, [b"%d" % number])
    simulation.settle()
    simulation.kill_host()
    simulation.delivered = {4: 2}
    simulation.host_events.clear()
    simulation.recover()
    assert simulation.got(4) == [b"2", b"3"]


def test_what_is_gone_is_reported_as_dropped() -> None:
    simulation = Simulation(Outbox())
    simulation.recover()
    for number in range(4):
        simulation.agent.send(4, [b"%d" % number])
    simulation.settle()
    simulation.kill_host()
    simulation.delivered = {4: 1}
    simulation.recover()
    assert [(event.first, event.last) for event in simulation.host_events if isinstance(event, Dropped)] == [(2, 4)]


def test_a_slow_host_gets_a_gap_in_the_right_place() -> None:
    def droppable(channel: int, parts: object) -> bool:
        assert isinstance(parts, list)
        return channel == 4 and parts[0].startswith(b"stream")

    simulation = Simulation(Outbox(20_000, 40_000, droppable, keep_acked=True))
    simulation.recover()
    simulation.host_events.clear()
    simulation.agent.send(4, [b"busy"])
    for number in range(100):
        simulation.agent.send(4, [b"stream %d" % number, bytes(1000)])
    simulation.agent.send(4, [b"idle"])
    simulation.settle()
    kinds = [type(event) for event in simulation.host_events]
    assert kinds[:2] == [Message, Dropped]
    (dropped,) = [event for event in simulation.host_events if isinstance(event, Dropped)]
    assert simulation.got(4)[0] == b"busy" and simulation.got(4)[-1] == b"idle"
    assert dropped.count + len(simulation.got(4)) == 102


# -- epochs and versions


def test_frames_of_another_epoch_are_dropped_by_the_host() -> None:
    simulation = attached()
    stale = message(4, 1, b"stale")
    stale.epoch = 99
    to_host(simulation, stale)
    assert simulation.host_events == []
    assert simulation.host.stale_frames == 1
    simulation.agent.send(4, [b"fresh"])
    simulation.settle()
    assert simulation.got(4) == [b"fresh"]


def test_the_agent_adopts_the_epoch_of_each_attach() -> None:
    simulation = attached()
    simulation.agent.send(4, [b"before"])
    simulation.write_agent()
    simulation.host = HostEndpoint(Outbox(), epoch=7)
    simulation.recover()
    assert simulation.agent.epoch == 7
    assert simulation.got(4) == [b"before"]


def test_a_sandbox_that_went_back_in_time_goes_on_with_its_own_numbers() -> None:
    simulation = Simulation()
    simulation.delivered = {4: 100}
    simulation.agent.send(4, [b"first"])
    simulation.recover()
    simulation.agent.send(4, [b"second"])
    simulation.settle()
    assert simulation.got(4) == [b"second"]


def test_no_common_version_is_told_with_both_lists() -> None:
    simulation = Simulation()
    simulation.agent = AgentEndpoint(Outbox(), versions=(8, 9))
    simulation.attach()
    simulation.settle()
    (lost,) = [event for event in simulation.host_events if isinstance(event, Lost)]
    assert "1" in str(lost.error) and "[8, 9]" in str(lost.error)


# -- hostile agents


@pytest.mark.parametrize(
    "frame",
    [
        message(4, 2, b"hole"),
        message(7, 1, b"no such channel"),
        Frame(Kind.MESSAGE, 4, 0, 1, FLAG_FIRST | FLAG_LAST, b"\xff" * 8),
        Frame(Kind.ATTACH, payload=Attach("0" * 16).to_payload()),
        Frame(Kind.HELLO, payload=Hello("0" * 16).to_payload()),
        Frame(Kind.ACK, payload=b"\0\1" + b"\0" * 7 + b"\1"),
        Frame(Kind.ACK, payload=b"x"),
        Frame(Kind.GAP, 4, 0, 5, payload=encode_gap(Gap(4, 5, 9, 5, 1))),
        Frame(Kind.GAP, 4, 0, 1, payload=b"short"),
        Frame(Kind.PING, payload=bytes(65)),
        Frame(Kind.OPEN, 17, payload=b"[]"),
        Frame(Kind.OPEN, 16, payload=b'{"kind":"x","params":{}}'),
        Frame(Kind.OPEN, 3, payload=b'{"kind":"x","params":{}}'),
        Frame(Kind.OPEN, 17, payload=b'{"kind":1,"params":{}}'),
        Frame(Kind.DETACH, payload=b"\xff lost"),
    ],
)
def test_a_broken_rule_loses_the_link_and_attaching_again_repairs_it(frame: Frame) -> None:
    simulation = attached()
    to_host(simulation, frame)
    assert [type(event) for event in simulation.host_events] == [Lost]
    to_host(simulation, message(4, 1, b"ignored"))
    assert len(simulation.host_events) == 1
    simulation.recover()
    assert simulation.host.attached


def test_a_hello_flood_is_one_loss() -> None:
    simulation = attached()
    flood = b"".join(encode(Frame(Kind.HELLO, epoch=1, payload=Hello("0" * 16).to_payload()))) * 1000
    simulation.host_events += simulation.host.feed(flood)
    assert [type(event) for event in simulation.host_events] == [Lost]


def test_a_hello_that_lies_about_numbers_is_refused() -> None:
    simulation = attached()
    simulation.host.send(1, [b"x"])
    simulation.settle()
    simulation.host.attach("a" * 16)
    simulation.write_host()
    lie = Hello("a" * 16, received={1: 50})
    to_host(simulation, Frame(Kind.HELLO, payload=lie.to_payload()))
    assert isinstance(simulation.host_events[-1], Lost)


def test_an_agent_that_skips_numbers_in_its_hello_is_reported_as_dropping() -> None:
    simulation = Simulation()
    simulation.host.attach("a" * 16, {4: 10})
    to_host(simulation, Frame(Kind.HELLO, payload=Hello("a" * 16, resumes={4: 25}).to_payload()))
    (dropped,) = [event for event in simulation.host_events if isinstance(event, Dropped)]
    assert (dropped.channel, dropped.count) == (4, 15)


def test_a_ping_flood_by_one_who_does_not_read_grows_nothing() -> None:
    simulation = attached()
    flood = b"".join(encode(Frame(Kind.PING, epoch=1, payload=b"x" * 64))) * 20_000
    simulation.host.feed(flood)
    assert sum(map(len, simulation.host.output())) < 5_000


def test_a_stream_flood_by_one_who_does_not_read_ends_in_a_loss() -> None:
    simulation = attached()
    lost = False
    for number in range(60_000):
        stream = 17 + 2 * (number % 30_000)
        events = simulation.host.feed(
            b"".join(encode(Frame(Kind.OPEN, stream, 1, payload=b'{"kind":"x","params":{}}')))
        )
        for event in events:
            lost = lost or isinstance(event, Lost)
            if isinstance(event, StreamOpened):
                simulation.host.stream_abort(event.stream, "no")
        if lost:
            break
    assert lost


def test_more_streams_than_allowed_are_refused() -> None:
    simulation = attached()
    for number in range(MAX_STREAMS + 1):
        to_host(simulation, Frame(Kind.OPEN, 17 + 2 * number, payload=b'{"kind":"x","params":{}}'))
    assert isinstance(simulation.host_events[-1], Lost)


def test_endless_fragments_are_stopped_at_the_bound() -> None:
    simulation = Simulation(max_message=1)
    simulation.host = HostEndpoint(Outbox(), max_message=1_000_000)
    simulation.recover()
    simulation.host_events.clear()
    to_host(simulation, Frame(Kind.MESSAGE, 4, 0, 1, FLAG_FIRST, bytes(200_000)))
    for _ in range(10):
        to_host(simulation, Frame(Kind.MESSAGE, 4, 0, 1, 0, bytes(200_000)))
    assert [type(event) for event in simulation.host_events] == [Lost]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.builds(
            Frame,
            kind=st.sampled_from(Kind),
            channel=st.one_of(st.integers(0, 5), st.integers(15, 20)),
            epoch=st.sampled_from([1, 1, 1, 2]),
            seq=st.integers(0, 4),
            flags=st.integers(0, 4),
            payload=st.one_of(
                st.binary(max_size=40),
                st.just(b"".join(pack([b"{}"]))),
                st.just(b'{"kind":"x","params":{}}'),
                st.just(Hello("0" * 16).to_payload()),
                st.just(Attach("0" * 16).to_payload()),
            ),
        ),
        max_size=40,
    )
)
def test_no_sequence_of_valid_frames_makes_either_side_raise(frames: list[Frame]) -> None:
    simulation = attached()
    data = b"".join(b"".join(encode(frame)) for frame in frames)
    for endpoint in (simulation.host, simulation.agent):
        endpoint.feed(data)
        endpoint.output()
    simulation.to_agent.clear()
    simulation.to_host.clear()
    simulation.delivered = dict.fromkeys(range(CHANNELS), 0)
    simulation.kill_host()
    simulation.recover()


# -- streams


def test_a_stream_carries_bytes_both_ways_and_ends() -> None:
    simulation = attached()
    stream = simulation.host.open_stream("echo", {"x": 1})
    assert simulation.host.stream_write(stream, b"question") == 8
    simulation.host.stream_end(stream)
    simulation.settle()
    assert simulation.agent_events == [
        StreamOpened(stream, "echo", {"x": 1}),
        StreamData(stream, b"question"),
        StreamEnded(stream),
    ]
    simulation.agent.stream_write(stream, b"answer")
    assert simulation.agent.stream_end(stream)
    simulation.settle()
    assert simulation.host_events == [StreamData(stream, b"answer"), StreamEnded(stream), StreamClosed(stream)]


def test_a_stream_stops_at_its_window_and_stops_nothing_else() -> None:
    simulation = attached()
    stream = simulation.host.open_stream("source", {})
    simulation.settle()
    assert simulation.agent.stream_write(stream, bytes(INITIAL_CREDIT + 1000)) == INITIAL_CREDIT
    simulation.agent.send(4, [b"message"])
    simulation.settle()
    assert simulation.got(4) == [b"message"]
    got = sum(len(event.data) for event in simulation.host_events if isinstance(event, StreamData))
    assert got == INITIAL_CREDIT
    simulation.host.stream_consumed(stream, got)
    simulation.settle()
    assert simulation.agent_events[-1] == StreamWritable(stream)
    assert simulation.agent.stream_write(stream, bytes(1000)) == 1000


def test_more_bytes_than_the_credit_allows_lose_the_link() -> None:
    simulation = attached()
    stream = simulation.host.open_stream("source", {})
    for _ in range(2):
        to_host(simulation, Frame(Kind.DATA, stream, payload=bytes(INITIAL_CREDIT)))
    assert isinstance(simulation.host_events[-1], Lost)


def test_an_aborted_stream_is_gone_at_both_ends_and_late_frames_meet_nothing() -> None:
    simulation = attached()
    stream = simulation.host.open_stream("source", {})
    simulation.settle()
    simulation.agent.stream_write(stream, b"late")
    simulation.write_agent()
    simulation.host.stream_abort(stream, "enough")
    simulation.settle()
    assert simulation.host_events == []
    assert simulation.agent_events[-1] == StreamClosed(stream, "enough")
    with pytest.raises(ValueError, match="not open"):
        simulation.agent.stream_write(stream, b"x")


def test_attaching_anew_closes_all_streams_on_both_sides() -> None:
    simulation = attached()
    stream = simulation.host.open_stream("source", {})
    simulation.settle()
    simulation.recover()
    assert any(isinstance(event, StreamClosed) and event.stream == stream for event in simulation.host_events)
    assert any(isinstance(event, StreamClosed) and event.stream == stream for event in simulation.agent_events)


def test_numbers_of_streams_are_reused_late() -> None:
    simulation = attached()
    first = simulation.host.open_stream("x", {})
    simulation.host.stream_abort(first, "no")
    assert simulation.host.open_stream("x", {}) == first + 2


def test_a_nonce_that_could_not_be_searched_for_is_refused() -> None:
    for nonce in ("short", 'with "quotes"', "é" * 10):
        with pytest.raises(ValueError, match="nonce"):
            HostEndpoint(Outbox()).attach(nonce)
