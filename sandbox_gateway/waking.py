"""The one rule of waking (DESIGN 4.10): what a client's message does to a kernel that sleeps. Decides, does no I/O.

What a person or a program does to the kernel wakes it; what a front end asks by itself, on loading a page or at
intervals, does not. Message types: the Jupyter messaging protocol 5.4 and its kernel subshells.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Final

from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

_MAX_QUESTION: Final = 4 << 10


class Effect(StrEnum):
    """What is done with a message while the kernel sleeps."""

    WAKE = "wake"
    """It waits, and the kernel is woken for it."""
    WAIT = "wait"
    """It waits until something else wakes the kernel."""
    CACHED = "cached"
    """It is answered from what the kernel said last; without that it wakes."""
    UNAVAILABLE = "unavailable"
    """It is answered as not available now."""


_REQUESTS = {
    "execute_request": Effect.WAKE,
    "complete_request": Effect.WAKE,
    "inspect_request": Effect.WAKE,
    # Consoles ask it at each Enter, and pages never by themselves: what follows is an execution.
    "is_complete_request": Effect.WAKE,
    "comm_open": Effect.WAKE,
    "comm_msg": Effect.WAKE,
    "comm_close": Effect.WAKE,
    "interrupt_request": Effect.WAKE,
    "shutdown_request": Effect.WAKE,
    "kernel_info_request": Effect.CACHED,
    "debug_request": Effect.UNAVAILABLE,
    "usage_request": Effect.UNAVAILABLE,
    "comm_info_request": Effect.WAIT,
    "history_request": Effect.WAIT,
    "connect_request": Effect.WAIT,
    "create_subshell_request": Effect.WAIT,
    "delete_subshell_request": Effect.WAIT,
    "list_subshell_request": Effect.WAIT,
}


def effect(channel: int, msg_type: str, content: Buffer = b"") -> Effect:
    """What a message of this type on this channel does. A type that is not known here waits.

    Kernels take all of these types on the control channel as well as on shell, and so does the rule. Of comm messages
    the ``content`` matters.
    """
    if channel == Channel.STDIN:
        return Effect.WAKE if msg_type == "input_reply" else Effect.WAIT
    if msg_type in ("comm_open", "comm_msg") and _asks_for_widgets(content):
        return Effect.WAIT
    return _REQUESTS.get(msg_type, Effect.WAIT)


def _asks_for_widgets(content: Buffer) -> bool:
    """Whether a page wants to know what widgets there are, as ipywidgets' part of it does whenever it is loaded.

    It opens a comm for that and sends one message over it; some seconds later it asks by ``comm_info_request``.
    """
    if len(content) > _MAX_QUESTION:
        return False
    try:
        found = json.loads(bytes(content))
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    return found.get("target_name") == "jupyter.widget.control" or found.get("data") == {"method": "request_states"}
