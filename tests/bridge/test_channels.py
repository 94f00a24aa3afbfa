"""One kernel's channels on the host: what a hostile kernel cannot make them do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest
from bridging import KEY
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway import channels, messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel


def test_malformed_messages_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    kernel = KernelChannels(KEY)
    with caplog.at_level(logging.DEBUG):
        for _ in range(1000):
            kernel.received(Channel.IOPUB, [b"nothing of the kind"])
    assert 0 < len(caplog.records) <= channels.MAX_LOGGED


def test_a_subscriber_that_fails_with_each_message_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    kernel = KernelChannels(KEY)

    def fails(channel: int, parts: Sequence[Buffer]) -> None:
        raise ValueError("again")

    kernel.subscribe(fails)
    for _ in range(1000):
        kernel.received(Channel.SHELL, [b"x"])
    assert 0 < len(caplog.records) <= channels.MAX_LOGGED


def test_a_parent_of_any_length_is_not_kept_for_the_notices() -> None:
    kernel = KernelChannels(KEY)
    seen: list[Sequence[Buffer]] = []
    kernel.subscribe(lambda channel, parts: seen.append(parts))
    kernel.received(
        Channel.IOPUB, [b"stream", messages.DELIMITER, b"", b"{}", b'"' + b"x" * (1 << 20) + b'"', b"{}", b"{}"]
    )
    kernel.notice("something")
    assert sum(map(len, seen[-1])) < 1000


def test_replies_to_a_subscriber_with_an_identity_go_to_it_alone() -> None:
    kernel = KernelChannels(KEY)
    seen: dict[str, list[object]] = {"bridge": [], "mine": []}
    kernel.subscribe(lambda channel, parts: seen["bridge"].append((channel, parts)))
    mine = kernel.subscribe(lambda channel, parts: seen["mine"].append((channel, parts)), identity=b"mine")
    to_me, to_other, output = [memoryview(b"mine"), b"x"], [b"other", b"x"], messages.build(KEY, "status", {})
    for channel in (Channel.SHELL, Channel.CONTROL, Channel.STDIN):
        kernel.received(channel, to_me)
        kernel.received(channel, to_other)
    kernel.received(Channel.IOPUB, output)
    kernel.received(Channel.SHELL, [])
    both = (Channel.SHELL, Channel.CONTROL, Channel.STDIN)
    assert seen["mine"] == [*((channel, to_me) for channel in both), (Channel.IOPUB, output)]
    assert seen["bridge"] == [*((channel, to_other) for channel in both), (Channel.IOPUB, output), (Channel.SHELL, [])]
    mine.close()
    mine.close()
    kernel.received(Channel.SHELL, to_me)
    assert seen["bridge"][-1] == (Channel.SHELL, to_me)


def test_a_subscriber_may_go_while_a_message_is_delivered() -> None:
    kernel = KernelChannels(KEY)
    seen: list[str] = []
    subscription = kernel.subscribe(lambda channel, parts: subscription.close() or seen.append("first"))
    kernel.subscribe(lambda channel, parts: seen.append("second"))
    for _ in range(2):
        kernel.received(Channel.IOPUB, messages.build(KEY, "status", {}))
    assert seen == ["first", "second", "second"]


async def test_settled_is_said_when_all_subscribers_say_so() -> None:
    kernel = KernelChannels(KEY)
    assert kernel.settled
    done = [False, True]
    kernel.subscribe(lambda channel, parts: None, settled=lambda: done[0])
    kernel.subscribe(lambda channel, parts: None, settled=lambda: done[1])
    assert not await kernel.settle(0.01)
    waiting = asyncio.create_task(kernel.settle(20))
    await asyncio.sleep(0)
    done[0] = True
    assert await waiting


FRAMES = st.one_of(
    st.sampled_from(
        [
            messages.DELIMITER,
            b"status",
            b"{}",
            b'{"msg_type":"stream"}',
            b'{"msg_type":"kernel_info_reply"}',
            b'{"msg_type":"execute_request"}',
            b'{"execution_state":"busy"}',
            b'{"name":"stdout","text":"x"}',
        ]
    ),
    st.binary(max_size=20),
)


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(FRAMES, max_size=9), st.booleans()), max_size=40))
def test_no_message_from_either_side_raises_whatever_state_the_kernel_is_in(
    traffic: list[tuple[int, list[bytes], bool]],
) -> None:
    """A client may be careless, a kernel hostile; a key that is empty lets everything through to the parsers."""

    class Link:
        def send(self, channel: int, parts: Sequence[Buffer]) -> int:
            return 1

    kernel = KernelChannels(b"")
    states = (
        lambda: kernel.sleep(lambda: None),
        lambda: kernel.asleep_again("no"),
        kernel.disconnect,
        kernel.retain,
        lambda: kernel.connect(Link()),
        lambda: kernel.subscribe(lambda channel, parts: None),
    )
    for n, (channel, parts, inward) in enumerate(traffic):
        if n % 5 == 0:
            states[(channel + n) % len(states)]()
        if inward:
            kernel.request(channel, parts)
        else:
            kernel.received(channel, parts)
    kernel.recall(kernel.facts())
