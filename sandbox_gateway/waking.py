"""The one rule of waking (DESIGN 4.10): what a client's message does to a kernel that sleeps. Decides, does no I/O.

What a person or a program does to the kernel wakes it; what a front end asks by itself, on loading a page or at
intervals, does not. Message types: the Jupyter messaging protocol 5.4 and its kernel subshells.
"""

from __future__ import annotations

from enum import StrEnum

from sandbox_gateway.wire.frames import Channel


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


def effect(channel: int, msg_type: str) -> Effect:
    """What a message of this type on this channel does. A type that is not known here waits.

    Kernels take all of these types on the control channel as well as on shell, and so does the rule.
    """
    if channel == Channel.STDIN:
        return Effect.WAKE if msg_type == "input_reply" else Effect.WAIT
    return _REQUESTS.get(msg_type, Effect.WAIT)
