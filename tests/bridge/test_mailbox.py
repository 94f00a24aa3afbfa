"""Replies for clients that are away: kept for a while, in order, bounded, and for nobody else."""

from __future__ import annotations

import asyncio

import pytest
from bridging import Connect, Requests
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway import mailbox, messages
from sandbox_gateway.bridge_queue import OVERHEAD, Message
from sandbox_gateway.mailbox import Mailbox
from sandbox_gateway.wire.frames import Channel
from sandbox_gateway.zmq_bridge import ZmqBridge

BODY = [messages.DELIMITER, b"sig", b"{}", b"{}", b"{}", b"{}"]
NAMES = st.sampled_from([b"a", b"b", b"c"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), NAMES, st.integers(0, 3000)),
        st.tuples(st.just("take"), NAMES, st.just(0)),
        st.tuples(st.just("wait"), st.just(b""), st.integers(0, 40)),
    ),
    max_size=60,
)


@given(STEPS)
def test_what_is_taken_is_what_was_put_unless_too_old_or_too_much(steps: list[tuple[str, bytes, int]]):
    kept = Mailbox(seconds=60.0, limit=10_000)
    model: list[tuple[float, bytes, Message]] = []
    now = 0.0
    for what, name, number in steps:
        if what == "wait":
            now += number
        elif what == "put":
            message = Message([bytes(number)])
            kept.put(name, message, now)
            model.append((now + 60.0, name, message))
            while sum(m.size + OVERHEAD for _, _, m in model) > 10_000 and len(model) > 1:
                del model[0]
        else:
            model = [entry for entry in model if entry[0] > now]
            assert kept.take(name, now) == [m for _, owner, m in model if owner == name]
            model = [entry for entry in model if entry[1] != name]
    assert kept.due == (model[0][0] if model else None)


def test_an_identity_that_no_client_can_have_takes_no_room():
    kept = Mailbox()
    kept.put(b"x" * 256, Message([b""]), 0.0)
    assert kept.due is None


async def test_replies_wait_for_a_client_that_was_not_there_yet(bridge: ZmqBridge, requests: Requests, client: Connect):
    for n in range(3):
        bridge.deliver(Channel.SHELL, [b"me", *BODY, b"%d" % n])
        bridge.deliver(Channel.SHELL, [b"other", *BODY, b"other"])
    bridge.deliver(Channel.STDIN, [b"me", *BODY, b"input"])
    assert not bridge.settled, "they may come yet: the next owner would have to send it again"
    shell, stdin = client("shell", b"me"), client("stdin", b"me")
    for n in range(3):
        assert (await asyncio.wait_for(shell.recv_multipart(), 20))[-1] == b"%d" % n
    assert (await asyncio.wait_for(stdin.recv_multipart(), 20))[-1] == b"input"
    bridge.deliver(Channel.SHELL, [b"me", *BODY, b"after"])
    assert (await asyncio.wait_for(shell.recv_multipart(), 20))[-1] == b"after"


async def test_a_client_that_hung_up_is_not_waited_for(bridge: ZmqBridge, requests: Requests, client: Connect):
    gone = client("shell", b"me", reconnect_ivl=-1)
    await gone.send_multipart(BODY)
    async with asyncio.timeout(20):
        while not requests:
            await asyncio.sleep(0.002)
        gone.close()
        while bridge._endpoints[Channel.SHELL].peers:
            await asyncio.sleep(0.002)
    bridge.deliver(Channel.SHELL, [b"me", *BODY, b"late"])
    assert bridge.settled
    again = client("shell", b"me")
    assert (await asyncio.wait_for(again.recv_multipart(), 20))[-1] == b"late", "it finds its reply all the same"


async def test_they_are_forgotten_in_time_also_when_nothing_happens(
    bridge: ZmqBridge, client: Connect, monkeypatch: pytest.MonkeyPatch
):
    endpoint = bridge._endpoints[Channel.SHELL]
    monkeypatch.setattr(endpoint, "_mailbox", Mailbox(seconds=0.05))
    bridge.deliver(Channel.SHELL, [b"me", *BODY])
    assert endpoint._mailbox.due is not None
    async with asyncio.timeout(20):
        while endpoint._mailbox.due is not None:
            await asyncio.sleep(0.01)


async def test_answers_to_invented_clients_do_not_grow_beyond_the_bound(bridge: ZmqBridge):
    for n in range(2000):
        bridge.deliver(Channel.SHELL, [b"%d" % n, *BODY, bytes(100_000)])
    kept = bridge._endpoints[Channel.SHELL]._mailbox
    assert sum(message.size for _, _, message in kept._kept) <= mailbox.LIMIT
