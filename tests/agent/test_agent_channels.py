"""The order in which a kernel's channels are handed on, with a pipe of the test's and nobody behind it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from struct import pack
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sandbox_gateway.agent.channels import ChannelHooks, KernelChannels
from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.agent.outpipe import LONGEST, PipeReader
from sandbox_gateway.agent.sockets import MUCH, KernelSockets
from sandbox_gateway.agent.sources import Source

LONG = 700_000


def frame(text: bytes) -> bytes:
    """One IOPub message of one part."""
    return pack("!4sIII", b"SGio", 4 + 4 + len(text), 1, len(text)) + text


class Watched:
    """Channels over a pipe, and what they handed on."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.told: list[tuple[str, int]] = []
        reading, self.writing = os.pipe()
        os.set_blocking(reading, False)
        hooks = ChannelHooks(self._message, lambda: None, self._broken, lambda parts: None, lambda: True)
        self.channels = KernelChannels(self.loop, hooks, reading, None)

    def _message(self, channel: str, parts: Sequence[bytes | memoryview]) -> None:
        self.told.append((channel, sum(map(len, parts))))

    def _broken(self, reason: str) -> None:
        self.told.append(("broken", 0))

    def say(self, data: bytes) -> None:
        """As the kernel does; it fits the pipe."""
        assert os.write(self.writing, data) == len(data)


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.channels.close()
    os.close(made.writing)
    made.loop.close()


def test_what_was_printed_behind_a_long_display_comes_before_the_request_for_input(watched: Watched) -> None:
    watched.say(frame(b"x" * LONG) + frame(b"short"))
    waiting: list[list[bytes]] = [[b"input?"]]

    def receive(socket: Any, limit: int) -> tuple[list[list[bytes]], bool]:
        found, waiting[:] = list(waiting) if socket == "stdin" else [], [] if socket == "stdin" else waiting
        return found, False

    sockets: Any = SimpleNamespace(requests={"stdin": "stdin"}, heartbeat="hb", receive=receive)
    sockets.all, sockets.close = list, lambda: None
    watched.channels._sockets = sockets
    watched.channels._service()
    assert watched.told == [("iopub", LONG), ("iopub", 5), ("stdin", 6)]


def test_all_that_was_published_comes_before_the_reply_also_from_sockets(watched: Watched) -> None:
    """However many looks that takes: one ends when it has brought much."""
    published = [[b"x" * LONG] for _ in range(20)]
    waiting: list[list[bytes]] = [[b"reply"]]

    def receive(socket: Any, limit: int) -> tuple[list[list[bytes]], bool]:
        if socket == "shell":
            found, waiting[:] = list(waiting), []
            return found, False
        if socket == "iopub" and published:
            return [published.pop(0)], True
        return [], False

    sockets: Any = SimpleNamespace(requests={"shell": "shell"}, heartbeat="hb", iopub="iopub", receive=receive)
    sockets.all, sockets.close, sockets.subscribe = list, lambda: None, lambda: None
    sockets.descriptor = lambda _: silent
    silent, loud = os.pipe()
    os.set_blocking(silent, False)
    watched.channels._close_pipe()
    watched.channels._sockets = sockets
    watched.channels._output = Source(watched.loop, silent, watched.channels._look_at_iopub)
    watched.channels._service()
    assert watched.told == [("iopub", LONG)] * 20 + [("shell", 5)]
    watched.channels.close()
    os.close(silent)
    os.close(loud)


def test_a_batch_from_a_socket_ends_when_it_is_large() -> None:
    """The link gets its turn before more is taken."""
    context = zmq.Context()
    sending, receiving = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    try:
        receiving.bind("inproc://much")
        sending.connect("inproc://much")
        for number in range(20):
            sending.send_multipart([b"%d" % number, b"x" * (MUCH // 4)])
        first, more = KernelSockets.receive(receiving, 512)
        assert (len(first), more) == (4, True)
        found = [*first]
        while more:
            taken, more = KernelSockets.receive(receiving, 512)
            found += taken
        assert [message[0] for message in found] == [b"%d" % number for number in range(20)]
    finally:
        context.destroy(linger=0)


def test_a_kernel_that_ends_in_the_middle_of_a_long_message_has_said_nothing(watched: Watched) -> None:
    watched.say(frame(b"first") + frame(b"x" * LONG)[:-1])
    watched.channels.look()
    os.close(watched.writing)
    assert watched.channels.last_words()
    assert watched.told == [("iopub", 5)]
    watched.writing = os.open(os.devnull, os.O_WRONLY)


def test_a_length_that_is_only_claimed_costs_little() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = PipeReader()
    assert reader.feed(pack("!4sIII", b"SGio", 500 << 20, 1, 5)) == []
    assert reader.room() is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LONGEST // 1024
