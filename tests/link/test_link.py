"""The host's end over pipes and FIFOs: attaching, order, calls, streams, bounds, and what a hostile agent may send."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from peer import Peer, fifos, open_both

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link import Link
from sandbox_gateway.wire.events import Attached, Detached
from sandbox_gateway.wire.frames import FLAG_FIRST, FLAG_LAST, Frame, Kind, WireError, encode
from sandbox_gateway.wire.messages import pack
from sandbox_gateway.wire.reliable import Outbox


class Host:
    """A link and what it reported."""

    def __init__(self, read_fd: int, write_fd: int, **options: Any) -> None:
        self.messages: list[tuple[int, list[bytes]]] = []
        self.gaps: list[tuple[int, int, int]] = []
        self.events: list[dict[str, Any]] = []
        self.lost: list[Exception] = []
        self._changed = asyncio.Event()
        self.link = Link(
            read_fd,
            write_fd,
            on_message=self._message,
            on_gap=lambda *gap: self._note(self.gaps, gap),
            on_event=lambda event: self._note(self.events, event),
            on_lost=lambda error: self._note(self.lost, error),
            **options,
        )

    def _message(self, channel: int, parts: list[bytes | memoryview]) -> None:
        self._note(self.messages, (channel, [bytes(part) for part in parts]))

    def _note(self, where: list[Any], what: Any) -> None:
        where.append(what)
        self._changed.set()

    async def until(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Return when ``condition`` holds; looked at after each report."""
        async with asyncio.timeout(timeout):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def pair(*, echo: bool = False, outbox: Outbox | None = None, **options: Any) -> AsyncIterator[tuple[Host, Peer]]:
    """A host and a peer over two pipes, attached."""
    host_read, peer_write = os.pipe()
    peer_read, host_write = os.pipe()
    peer = Peer(peer_read, peer_write, echo=echo, outbox=outbox)
    host = Host(host_read, host_write, **options)
    try:
        await host.link.attach(owner="test", timeout=10)
        yield host, peer
    finally:
        await host.link.close(detach=False)
        peer.close()


def raw(*frames: Frame) -> bytes:
    return b"".join(b"".join(encode(frame)) for frame in frames)


# -- ordinary use


async def test_attach_returns_what_the_agent_says_about_itself() -> None:
    host_read, peer_write = os.pipe()
    peer_read, host_write = os.pipe()
    peer = Peer(peer_read, peer_write)
    host = Host(host_read, host_write, epoch=5)
    hello = await host.link.attach(owner="me", timeout=5)
    assert (hello.agent, hello.epoch, host.link.attached) == ({"peer": True}, 5, True)
    (event,) = peer.events
    assert isinstance(event, Attached) and event.attach is not None and event.attach.owner == "me"
    await host.link.close()
    await peer.until(lambda: peer.count(Detached) == 1)
    peer.close()


async def test_an_agent_that_comes_later_finds_the_question() -> None:
    """It is asked before it runs, once; what it says before anybody waits for it is kept."""
    with fifos() as (into, out):
        host = Host(open_both(out), open_both(into))
        host.link.reach({}, owner="early")
        asked = host.link.unread
        peer = Peer(open_both(into), open_both(out))
        await peer.until(lambda: peer.count(Attached) == 1)
        assert host.link._hello is not None
        await asyncio.wait_for(asyncio.shield(host.link._hello), 10)
        hello = await host.link.attach({}, owner="early", timeout=5)
        assert (hello.agent, asked > 0, peer.count(Attached)) == ({"peer": True}, True, 1)
        assert (await host.link.call("echo", value=1))["value"] == 1
        await host.link.close()
        peer.close()


async def test_an_agent_that_breaks_the_protocol_before_anybody_waits_for_it_is_not_attached_to() -> None:
    """It answered, and then it was not to be trusted: whoever comes to wait is told, and not left with a dead link."""
    with fifos() as (into, out):
        host = Host(open_both(out), open_both(into))
        host.link.reach({}, owner="early")
        peer = Peer(open_both(into), open_both(out))
        assert host.link._hello is not None
        await asyncio.wait_for(asyncio.shield(host.link._hello), 10)
        lost = asyncio.Event()
        losing = host.link._lost

        def seen(error: WireError) -> None:
            losing(error)
            lost.set()

        host.link._lost = seen  # type: ignore[method-assign]
        os.write(peer.write_fd, b"\xff" * 64)
        await asyncio.wait_for(lost.wait(), 10)
        with pytest.raises(SandboxGatewayError, match="breaks the protocol"):
            await host.link.attach({}, owner="early", timeout=5)
        await host.link.close(detach=False)
        peer.close()


async def test_a_question_that_nobody_waits_for_is_given_up_in_silence() -> None:
    """What was to be made has failed."""
    with fifos() as (into, out):
        host = Host(open_both(out), open_both(into))
        host.link.reach({}, owner="early")
        await host.link.close(detach=False)
        assert (host.link.closed, host.lost) == (True, [])
        with pytest.raises(SandboxGatewayError, match="the link is closed"):
            host.link.reach({}, owner="early")


async def test_messages_of_all_sizes_come_back_in_order() -> None:
    async with pair(echo=True) as (host, _):
        sent = [[b"%d" % number, os.urandom(number**3)] for number in range(0, 130, 3)]
        for parts in sent:
            host.link.send(1, parts)
        await host.until(lambda: len(host.messages) == len(sent))
        assert [parts for _, parts in host.messages] == sent
        assert host.link.received() == {1: len(sent)}
        await asyncio.wait_for(host.link.drain(), 5)
        assert host.link.backlog == 0


async def test_an_answer_and_an_error_of_the_agent_reach_their_callers() -> None:
    async with pair() as (host, _):
        first, second = await asyncio.gather(host.link.call("echo", x=1), host.link.call("echo", x=2))
        assert (first, second) == ({"x": 1}, {"x": 2})
        with pytest.raises(SandboxGatewayError) as caught:
            await host.link.call("fail")
        assert (caught.value.code, caught.value.message) == ("kernel_failed", "it went wrong")
        with pytest.raises(SandboxGatewayError) as caught:
            await host.link.call("fail", code="made_up")
        assert caught.value.code == "link_failed"
        with pytest.raises(SandboxGatewayError) as caught:
            await host.link.call("silent", timeout=0.05)
        assert caught.value.code == "timeout"


async def test_a_ping_tells_the_delay_or_the_silence() -> None:
    async with pair() as (host, peer):
        assert 0 < await host.link.ping(5) < 5
        peer.pause()
        with pytest.raises(SandboxGatewayError) as caught:
            await host.link.ping(0.05)
        assert caught.value.code == "timeout"


async def test_events_of_the_agent_are_reported() -> None:
    async with pair() as (host, peer):
        peer.event("kernel_exit", code=3)
        await host.until(lambda: bool(host.events))
        assert host.events == [{"event": "kernel_exit", "code": 3}]


async def test_a_failing_callback_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as (host, peer):
        host.link._on_message = lambda channel, parts: 1 / 0  # type: ignore[func-returns-value]
        peer.send(4, [b"x"])
        peer.event("after")
        await host.until(lambda: bool(host.events))
        assert "callback" in caplog.text


async def test_nothing_is_sent_before_the_first_attach() -> None:
    host_read, peer_write = os.pipe()
    host = Host(host_read, peer_write)
    with pytest.raises(SandboxGatewayError, match="not attached"):
        host.link.send(1, [b""])
    await host.link.close()
    with pytest.raises(SandboxGatewayError, match="closed"):
        host.link.send(1, [b""])


async def test_attach_gives_up_after_its_time() -> None:
    host_read, peer_write = os.pipe()
    peer_read, host_write = os.pipe()
    host = Host(host_read, host_write)
    with pytest.raises(SandboxGatewayError, match=r"did not answer within 0\.4 s"):
        await host.link.attach(owner="test", timeout=0.4)
    await host.link.close()
    os.close(peer_read)
    os.close(peer_write)


async def test_an_agent_that_starts_late_is_found() -> None:
    host_read, peer_write = os.pipe()
    peer_read, host_write = os.pipe()
    host = Host(host_read, host_write)
    attaching = asyncio.create_task(host.link.attach(owner="test", timeout=10))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(attaching), 0.5)  # by now a second ATTACH with padding fills the pipe
    peer = Peer(peer_read, peer_write)
    await attaching
    assert await host.link.call("echo", x=1) == {"x": 1}
    await host.link.close()
    peer.close()


# -- streams


async def test_a_stream_carries_more_than_its_window_in_both_directions() -> None:
    async with pair() as (host, _):
        stream = await host.link.open_stream("echo")
        data = os.urandom(3_000_000)

        async def write() -> None:
            await stream.write(data)
            await stream.end()

        writing = asyncio.create_task(write())
        got = b""
        while chunk := await asyncio.wait_for(stream.read(), 10):
            got += chunk
        await writing
        assert got == data


async def test_a_stream_nobody_reads_stops_only_itself() -> None:
    async with pair() as (host, _):
        stream = await host.link.open_stream("source", {"size": 2_000_000})
        assert await host.link.call("echo", x=1) == {"x": 1}
        assert sum(map(len, stream._chunks)) <= 256 * 1024
        size = 0
        while chunk := await asyncio.wait_for(stream.read(), 10):
            size += len(chunk)
        assert size == 2_000_000


async def test_a_refused_stream_says_why() -> None:
    async with pair() as (host, _):
        stream = await host.link.open_stream("refuse")
        with pytest.raises(SandboxGatewayError, match="no such stream"):
            await stream.read()
        with pytest.raises(SandboxGatewayError):
            await stream.write(b"x")
        await stream.close()


async def test_a_lost_link_ends_calls_streams_and_drains() -> None:
    async with pair() as (host, peer):
        stream = await host.link.open_stream("echo")
        call = asyncio.create_task(host.link.call("silent"))
        reading = asyncio.create_task(stream.read())
        await peer.until(lambda: len(peer.events) >= 3)
        peer.pause()
        host.link.send(1, [bytes(1000)])
        drain = asyncio.create_task(host.link.drain())
        peer.close()
        await host.until(lambda: bool(host.lost))
        for task in (call, reading, drain):
            with pytest.raises(SandboxGatewayError):
                await task
        assert len(host.lost) == 1


# -- bounds


async def test_a_sandbox_that_does_not_read_is_waited_for_up_to_a_bound() -> None:
    async with pair(limit_bytes=4_000_000) as (host, peer):
        peer.pause()
        with pytest.raises(SandboxGatewayError, match="does not read"):
            for _ in range(100):
                host.link.send(1, [bytes(500_000)])
        assert host.link.backlog < 5_000_000
        drain = asyncio.create_task(host.link.drain(1_000_000))
        peer.resume()
        await asyncio.wait_for(drain, 10)
        assert host.link.backlog <= 1_000_000


async def test_a_host_that_was_slow_is_told_what_was_dropped() -> None:
    def droppable(channel: int, parts: object) -> bool:
        return channel == 4

    async with pair(outbox=Outbox(500_000, 1_000_000, droppable, keep_acked=True)) as (host, peer):
        for number in range(3000):
            peer.send(4, [b"%d" % number, bytes(1000)])
        peer.send(1, [b"reply"])
        await host.until(lambda: any(channel == 1 for channel, _ in host.messages))
        assert host.gaps
        assert sum(count for _, count, _ in host.gaps) + sum(channel == 4 for channel, _ in host.messages) == 3000


# -- tears and hostility


@pytest.mark.parametrize("torn", [3, 28, 5_000, 40_000])
async def test_a_new_link_continues_over_the_same_fifos(torn: int) -> None:
    """The old owner was killed while it wrote one frame and read another."""
    with fifos() as (into, out):
        peer = Peer(open_both(into), open_both(out))
        first = Host(open_both(out), open_both(into))
        await first.link.attach(owner="first", timeout=5)
        peer.send(4, [b"one"])
        await first.until(lambda: len(first.messages) == 1)
        cursors = first.link.received()
        await first.link.close(detach=False)
        os.write(write := open_both(into), raw(Frame(Kind.MESSAGE, 1, 1, 1, 3, bytes(50_000)))[:torn])
        for number in range(20):
            peer.send(4, [b"%d" % number, bytes(30_000)])
        os.read(read := open_both(out), 12_345)
        os.close(read)
        os.close(write)
        second = Host(open_both(out), open_both(into))
        await second.link.attach(cursors, owner="second", timeout=10)
        await second.until(lambda: len(second.messages) == 20)
        assert [parts[0] for _, parts in second.messages] == [b"%d" % number for number in range(20)]
        assert await second.link.call("echo", x=1) == {"x": 1}
        await second.link.close()
        peer.close()


async def test_garbage_from_the_agent_is_repaired_three_times_a_minute_and_then_final() -> None:
    async with pair() as (host, peer):
        for number in range(3):
            os.write(peer.write_fd, b"garbage" * 10)
            await peer.until(lambda number=number: peer.count(Attached) == number + 2)
            peer.send(4, [b"%d" % number])
            await host.until(lambda number=number: len(host.messages) == number + 1)
        assert [parts for _, parts in host.messages] == [[b"0"], [b"1"], [b"2"]]
        assert host.lost == []
        os.write(peer.write_fd, b"garbage" * 10)
        await host.until(lambda: bool(host.lost))
        assert host.link.closed


async def test_garbage_to_the_agent_is_repaired_and_calls_go_on() -> None:
    with fifos() as (into, out):
        peer = Peer(open_both(into), open_both(out))
        host = Host(open_both(out), open_both(into))
        await host.link.attach(owner="test", timeout=5)
        intruder = open_both(into)
        os.write(intruder, b"garbage")
        assert await host.link.call("echo", x=1, timeout=10) == {"x": 1}
        assert peer.count(Attached) >= 2
        os.close(intruder)
        await host.link.close()
        peer.close()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"event":1}',
        b'{"id":"1","ok":{}}',
        b'{"id":true,"ok":{}}',
        b'{"id":1}',
        b"[" * 100_000,
        b"\xff",
    ],
)
async def test_a_malformed_message_of_the_agents_harms_nobody(text: bytes) -> None:
    async with pair() as (host, peer):
        call = asyncio.create_task(host.link.call("silent", timeout=5))
        await peer.until(lambda: len(peer.events) == 2)
        peer.send(0, [text])
        peer.event("after")
        await host.until(lambda: bool(host.events))
        assert host.events == [{"event": "after"}]
        assert host.lost == []
        call.cancel()


async def test_floods_of_events_and_pings_do_not_keep_the_loop_from_others() -> None:
    async with pair() as (host, peer):
        flood = raw(*(Frame(Kind.PING, epoch=1, payload=b"x" * 64) for _ in range(5000)))
        parts = pack([json.dumps({"event": "flood"}).encode()])
        events = raw(
            *(Frame(Kind.MESSAGE, 0, 1, seq, FLAG_FIRST | FLAG_LAST, b"".join(parts)) for seq in range(1, 5001))
        )
        peer.pause()
        view = memoryview(flood + events)
        longest = 0.0
        while view:
            began = time.thread_time()
            try:
                view = view[os.write(peer.write_fd, view) :]
            except BlockingIOError:
                pass
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)
        await host.until(lambda: len(host.events) == 5000)
        assert longest < 1.0


async def test_a_stream_that_the_agent_opens_is_refused() -> None:
    async with pair() as (host, peer):
        number = peer.endpoint.open_stream("surprise", {})
        peer.flush()
        await peer.until(lambda: any(getattr(event, "stream", 0) == number for event in peer.events))
        assert host.lost == []


async def test_the_end_of_the_pipe_is_the_end_of_the_link() -> None:
    async with pair() as (host, peer):
        peer.close()
        await host.until(lambda: bool(host.lost))
        assert isinstance(host.lost[0], SandboxGatewayError)
        with pytest.raises(SandboxGatewayError):
            await host.link.call("echo")
