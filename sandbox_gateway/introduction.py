"""Asking a kernel what it is before anybody else does, so that its clones can answer that while they sleep.

A page that is opened asks every kernel for its ``kernel_info`` (Jupyter's messaging protocol, kernel info). A clone
that was suspended before it was ever asked would be woken by that.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sandbox_gateway import messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

PATIENCE: Final = 10.0
"""Seconds that a kernel is given to answer; one that does not is no worse than one that was never asked."""


async def introduce(channels: KernelChannels, key: bytes) -> Mapping[str, Any]:
    """The facts that a kernel has told of itself, for :func:`inherited`; ``channels`` are connected to it."""
    identity = secrets.token_bytes(8)
    answered = asyncio.Event()

    def deliver(channel: int, parts: Sequence[Buffer]) -> None:
        if channel == Channel.SHELL:
            answered.set()

    subscription = channels.subscribe(deliver, identity=identity)
    try:
        question = messages.compose(key, [identity], "kernel_info_request", b"{}", session=secrets.token_hex(8))
        channels.request(Channel.SHELL, question)
        async with asyncio.timeout(PATIENCE):
            await answered.wait()
    except TimeoutError:
        pass
    finally:
        subscription.close()
    return inherited(channels.facts())


def inherited(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of what was known of a kernel, that which is true of its clones too: what it is, not what it runs."""
    return {"kernel_info": facts.get("kernel_info")}
