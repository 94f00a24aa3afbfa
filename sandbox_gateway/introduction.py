"""What a kernel is asked before it is saved as a template or stands in a pool: what it is, and to run nothing, once;
and what another has imported, so that a template's can import the same with fewer files.

A page that is opened asks every kernel for its ``kernel_info`` (Jupyter's messaging protocol, kernel info). A clone
that was suspended before it was ever asked would be woken by that, so the answer goes with the template. And the first
cell of a kernel takes longer than those that follow: what that loads and makes is in the template too, and what it
touches is in the memory's first reach of a kernel that stands in a pool.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sandbox_gateway import messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

MAX_MODULES: Final = 16 * 1024 * 1024
"""Bytes of the file of modules at most; a template whose kernel tells more is made without."""
PATIENCE: Final = 10.0
"""Seconds that a kernel is given for its answers; a template that gave none is no worse than one never asked."""
_NOTHING: Final[Mapping[str, Any]] = {
    "code": "pass",
    # Counted nowhere, in no history, and `_` stays what it is.
    "silent": True,
    "store_history": False,
    "user_expressions": {"result": "6 * 7"},
    "allow_stdin": False,
    "stop_on_error": False,
}


_TELL: Final[Mapping[str, Any]] = {
    **_NOTHING,
    "code": "get_ipython().kernel.parent.tell_modules()",
    "user_expressions": {},
}
"""For a kernel that nobody will use (:mod:`sandbox_gateway.agent.kernel_modules`)."""
_MODULES: Final = b'"sandbox_modules"'


async def introduce(channels: KernelChannels, key: bytes) -> Mapping[str, Any]:
    """The facts that a kernel has told of itself, for :func:`inherited`; ``channels`` are connected to it."""
    await rehearse(channels, key)
    return inherited(channels.facts())


async def rehearse(channels: KernelChannels, key: bytes) -> bool:
    """Ask it what it is, and to run nothing; whether it has answered all and is idle again."""
    identity, session = secrets.token_bytes(8), secrets.token_hex(8)
    questions: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("kernel_info_request", {}),
        ("execute_request", _NOTHING),
    )
    answers = 0
    done = asyncio.Event()

    def deliver(channel: int, parts: Sequence[Buffer]) -> None:
        nonlocal answers
        answers += channel == Channel.SHELL
        if answers == len(questions) and channels.running is None:  # the last reply comes before "idle"
            done.set()

    subscription = channels.subscribe(deliver, identity=identity)
    try:
        for msg_type, content in questions:
            asked = messages.compose(key, [identity], msg_type, json.dumps(content).encode(), session=session)
            channels.request(Channel.SHELL, asked)
        async with asyncio.timeout(PATIENCE):
            await done.wait()
    except TimeoutError:
        return False
    finally:
        subscription.close()
    return True


async def imported(channels: KernelChannels, key: bytes) -> bytes | None:
    """The file with the code of all modules that a template's kernel has imported; None if it does not tell.

    Bytes from a sandbox: to be given to another one of the same image, and not to be looked into.
    """
    identity = secrets.token_bytes(8)
    told: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def deliver(channel: int, parts: Sequence[Buffer]) -> None:
        at = messages.delimiter_index(parts)
        if told.done() or at is None:
            return
        if channel == Channel.IOPUB and len(parts) == at + 7 and _MODULES in bytes(parts[at + 2]):
            told.set_result(bytes(parts[-1]) if len(parts[-1]) <= MAX_MODULES else None)
        elif channel == Channel.SHELL:
            told.set_result(None)

    subscription = channels.subscribe(deliver, identity=identity)
    try:
        asked = messages.compose(key, [identity], "execute_request", json.dumps(_TELL).encode(), session=identity.hex())
        channels.request(Channel.SHELL, asked)
        async with asyncio.timeout(PATIENCE):
            return await told
    except TimeoutError:
        return None
    finally:
        subscription.close()


def inherited(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of what was known of a kernel, that which is true of its clones too: what it is, not what it runs."""
    return {"kernel_info": facts.get("kernel_info")}
