"""One kernel's channels on the host: what a hostile kernel cannot make them do."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
from bridging import KEY

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
