"""Output for which nobody listens yet: every message once, in order, or counted in a notice; and bounded."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence

import pytest
import zmq.asyncio
from bridging import KEY, Connect
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway import bridge_queue, channels, messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.messages import Buffer
from sandbox_gateway.retention import Retention
from sandbox_gateway.wire.frames import Channel
from sandbox_gateway.zmq_bridge import ZmqBridge

DROPPABLE = ("stream", "display_data")
LEFT_OUT = re.compile(r"^\[sandbox\] (\d+) messages of output \((\d+) bytes\) were left out: (.*)\n$")


def message(kind: str, n: int, size: int = 0, parent: str = "cell") -> list[Buffer]:
    text = f"{n}:{'x' * size}\n"
    content = {"name": "stdout", "text": text} if kind == "stream" else {"text": text}
    header = json.dumps({"msg_id": parent}).encode()
    made = messages.build(KEY, kind, content, topic=kind.encode(), parent=header)
    return [memoryview(bytes(part)) for part in made]


class Listener:
    """Reads what is delivered, as a client would: signatures checked, joined streams taken apart."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []
        """Kind, number and parent of each message."""
        self.missing = 0

    def __call__(self, channel: int, parts: Sequence[Buffer]) -> None:
        assert channel == Channel.IOPUB
        self.take(parts)

    def take(self, parts: Sequence[Buffer]) -> None:
        at = messages.delimiter_index(parts)
        assert at == 1
        assert bytes(parts[2]) == messages.sign(KEY, parts[3:7])
        kind = json.loads(bytes(parts[3]))["msg_type"]
        parent = json.loads(bytes(parts[4])).get("msg_id", "")
        text = json.loads(bytes(parts[6]))["text"]
        notice = LEFT_OUT.match(text)
        if notice:
            self.missing += int(notice[1])
            return
        for line in text.splitlines():
            self.seen.append((kind, int(line.split(":")[0]), parent))


messages_of = st.lists(
    st.tuples(
        st.sampled_from(["stream", "stream", "stream", "display_data", "status", "error"]),
        st.sampled_from([0, 10, 1000, 20_000, 200_000]),
        st.sampled_from(["a", "b", "c"]),
    ),
    max_size=80,
)


@given(messages_of, st.sampled_from([10_000, 100_000, 1 << 30]), st.sampled_from([0, 5_000, 1 << 30]))
def test_every_message_comes_once_and_in_order_or_is_counted(
    published: list[tuple[str, int, str]], limit: int, join_above: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge_queue, "JOIN_ABOVE", join_above)
        kept = Retention(KEY, limit=limit)
        sent = []
        largest = 0
        for n, (kind, size, parent) in enumerate(published):
            kept.add(message(kind, n, size, parent))
            sent.append((kind, n, parent))
            largest = max(largest, size)
            assert kept.size <= 2.25 * limit + largest + 2000
        listener = Listener()
        kept.replay(listener.take)
    numbers = [n for _, n, _ in listener.seen]
    assert numbers == sorted(set(numbers)), "once, and in order"
    assert set(listener.seen) <= set(sent), "each under its own request"
    assert len(numbers) + listener.missing == len(sent), "what is missing is counted"
    if sum(size + 1500 for _, size, _ in published) < limit:
        assert not listener.missing, "nothing is left out below the bound"
    needed = sum(size + 1500 for kind, size, _ in published if kind not in DROPPABLE)
    if needed < limit:
        gone = {n for _, n, _ in sent} - set(numbers)
        assert all(published[n][0] in DROPPABLE for n in gone), "output goes first"


def test_a_kernel_that_publishes_nothing_but_errors_is_bounded_too():
    kept = Retention(KEY, limit=100_000)
    count = 1000
    for n in range(count):
        kept.add(message("error", n, 1000))
        assert kept.size < 240_000
    listener = Listener()
    kept.replay(listener.take)
    assert listener.missing + len(listener.seen) == count
    assert listener.seen[-1][1] == count - 1, "the newest are kept"


def test_invented_parents_do_not_grow_beyond_the_bound():
    kept = Retention(KEY, limit=100_000)
    for n in range(2000):
        kept.add(message("stream", n, 10, parent=f"{n}".ljust(5000, "x")))
        assert kept.size < 240_000
    listener = Listener()
    kept.replay(listener.take)
    assert listener.missing + len(listener.seen) == 2000


@pytest.mark.parametrize(
    "parts",
    [
        [b"stream", messages.DELIMITER, b"", b"[" * 9999, b"", b"", b""],
        [b"stream", messages.DELIMITER, b"", b'{"msg_type": ["stream"]}', b"", b"", b""],
        [b"stream", messages.DELIMITER, b"", b'{"msg_type": "stream"}', b"\xff", b"", b"[" * 9999],
        [b"", messages.DELIMITER, b"", b"x" * 20_000, b"x" * 20_000, b"x" * 20_000, b"x" * 20_000],
    ],
)
def test_malformed_messages_are_kept_as_they_are(parts: list[Buffer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bridge_queue, "JOIN_ABOVE", 0)
    kept = Retention(KEY, limit=100_000)
    for _ in range(50):
        kept.add(parts)
    seen: list[Sequence[Buffer]] = []
    kept.replay(seen.append)
    assert seen and seen[-1] == parts
    assert kept.size < 400_000


# As part of a kernel's channels


def publish(kernel: KernelChannels, numbers: range) -> None:
    for n in numbers:
        kernel.received(Channel.IOPUB, message("status" if n % 7 == 3 else "stream", n))


def numbers(listener: Listener) -> list[int]:
    return [n for _, n, _ in listener.seen]


async def test_the_first_listener_gets_what_was_kept_before_anything_newer():
    kernel = KernelChannels(KEY)
    kernel.retain()
    publish(kernel, range(20))
    kernel.notice("[sandbox] 0 messages of output (0 bytes) were left out: host\n")
    assert kernel.retained and not kernel.settled
    listener = Listener()
    kernel.subscribe(listener)
    assert numbers(listener) == list(range(20))
    publish(kernel, range(20, 30))
    assert numbers(listener) == list(range(30))
    assert not kernel.retained and kernel.settled


async def test_a_subscriber_that_stands_for_others_gets_nothing_until_one_of_them_comes():
    kernel = KernelChannels(KEY)
    kernel.retain()
    clients: list[Listener] = []

    def deliver(channel: int, parts: Sequence[Buffer]) -> None:
        for client in clients:
            client(channel, parts)

    bridge = kernel.subscribe(deliver, listening=lambda: bool(clients))
    publish(kernel, range(5))
    one, two = Listener(), Listener()
    bridge.listen(one)
    clients.append(one)
    publish(kernel, range(5, 8))
    bridge.listen(two)
    clients.append(two)
    publish(kernel, range(8, 10))
    assert numbers(one) == list(range(10))
    assert numbers(two) == list(range(10)), "who comes soon after the first gets all of it, too"


async def test_who_comes_later_gets_what_is_new(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channels, "GRACE", 0.01)
    kernel = KernelChannels(KEY)
    kernel.retain()
    publish(kernel, range(5))
    first, later = Listener(), Listener()
    kernel.subscribe(first)
    await asyncio.sleep(0.05)
    kernel.subscribe(later)
    publish(kernel, range(5, 9))
    assert numbers(first) == list(range(9)) and numbers(later) == list(range(5, 9))


async def test_nothing_is_kept_where_somebody_listens():
    kernel = KernelChannels(KEY)
    listener = Listener()
    subscription = kernel.subscribe(listener)
    kernel.retain()
    publish(kernel, range(5))
    assert numbers(listener) == list(range(5)) and not kernel.retained
    subscription.close()
    kernel.retain()
    publish(kernel, range(5, 10))
    assert kernel.retained
    subscription.listen()
    assert kernel.retained, "who has gone does not listen"
    other = Listener()
    kernel.subscribe(other)
    assert numbers(other) == list(range(5, 10))


async def test_it_is_kept_again_although_the_grace_of_an_earlier_time_is_not_over():
    kernel = KernelChannels(KEY)
    kernel.retain()
    publish(kernel, range(3))
    first = Listener()
    gone = kernel.subscribe(first)
    gone.close()
    kernel.retain()
    kernel.retain()
    publish(kernel, range(3, 6))
    second = Listener()
    kernel.subscribe(second)
    assert numbers(first) == [0, 1, 2] and numbers(second) == [3, 4, 5]


async def test_a_death_is_told_to_who_comes_afterwards():
    kernel = KernelChannels(KEY)
    kernel.retain()
    kernel.kernel_died("[sandbox] 1 messages of output (1 bytes) were left out: it died\n")
    seen: list[Sequence[Buffer]] = []
    kernel.subscribe(lambda channel, parts: seen.append(parts))
    assert b'"execution_state":"dead"' in bytes(seen[-1][-1]) and len(seen) == 2


def test_without_an_event_loop_there_is_no_grace():
    kernel = KernelChannels(KEY)
    kernel.retain()
    publish(kernel, range(3))
    one, two = Listener(), Listener()
    kernel.subscribe(one)
    kernel.subscribe(two)
    assert numbers(one) == [0, 1, 2] and numbers(two) == []


def test_what_is_kept_does_not_hold_on_to_the_buffers_it_came_in():
    buffer = bytearray(b"stream")
    kernel = KernelChannels(KEY)
    kernel.retain()
    kernel.received(Channel.IOPUB, [memoryview(buffer), *message("stream", 1)[1:]])
    buffer += b"can be resized only while nobody has a view of it"


# Behind a bridge


async def read(sock: zmq.asyncio.Socket, listener: Listener, last: int) -> None:
    while not listener.seen or listener.seen[-1][1] != last:
        parts = await asyncio.wait_for(sock.recv_multipart(), 20)
        listener.take(parts)


async def test_a_client_is_welcomed_and_then_gets_what_was_kept(
    bridge: ZmqBridge, client: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channels, "GRACE", 60.0)
    kernel = KernelChannels(KEY)
    bridge.follow(kernel)
    kernel.retain()
    publish(kernel, range(50))
    assert kernel.retained
    for _ in range(2):
        sock = client("iopub")
        sock.subscribe(b"")
        assert b"iopub_welcome" in b"".join(await asyncio.wait_for(sock.recv_multipart(), 20))
        listener = Listener()
        await read(sock, listener, 49)
        assert numbers(listener) == list(range(50))
    assert not kernel.retained
    kernel.retain()
    publish(kernel, range(50, 60))
    await read(sock, listener, 59)
    assert numbers(listener) == list(range(60)), "clients listen: nothing is kept back"
    assert await kernel.settle(20)


async def test_a_connection_alone_is_no_listener(bridge: ZmqBridge, client: Connect):
    kernel = KernelChannels(KEY)
    bridge.follow(kernel)
    kernel.retain()
    publish(kernel, range(3))
    shell, iopub = client("shell", b"me"), client("iopub")
    await shell.send_multipart([b"x"])
    async with asyncio.timeout(20):
        while len(bridge._endpoints[Channel.IOPUB].peers) < 1:
            await asyncio.sleep(0.002)
    assert kernel.retained
    iopub.subscribe(b"")
    await asyncio.wait_for(iopub.recv_multipart(), 20)
    listener = Listener()
    await read(iopub, listener, 2)
    assert numbers(listener) == [0, 1, 2]


async def test_a_client_of_several_topics_gets_of_each_once(
    bridge: ZmqBridge, client: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channels, "GRACE", 60.0)
    kernel = KernelChannels(KEY)
    bridge.follow(kernel)
    kernel.retain()
    publish(kernel, range(30))
    sock = client("iopub")
    for topic in (b"stream", b"status", b"stream", b""):
        sock.subscribe(topic)
    got: list[int] = []
    while len(got) < 31:
        parts = await asyncio.wait_for(sock.recv_multipart(), 20)
        if b"iopub_welcome" in b"".join(parts):
            continue
        listener = Listener()
        listener.take(parts)
        got += numbers(listener)
        if len(got) == 30:
            publish(kernel, range(30, 31))
    assert sorted(got) == list(range(31)) and got[-1] == 30


async def test_output_that_fills_the_bound_reaches_a_slow_client_with_its_notices(
    bridge: ZmqBridge, client: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channels, "Retention", lambda key: Retention(key, limit=200_000))
    kernel = KernelChannels(KEY)
    bridge.follow(kernel)
    kernel.retain()
    count = 2000
    for n in range(count):
        kernel.received(Channel.IOPUB, message("stream", n, 5000))
    kernel.received(Channel.IOPUB, message("error", count))
    sock = client("iopub", rcvhwm=1, rcvbuf=4096)
    sock.subscribe(b"")
    await asyncio.wait_for(sock.recv_multipart(), 20)
    listener = Listener()
    await read(sock, listener, count)
    assert listener.missing + len(listener.seen) == count + 1
    assert listener.missing
