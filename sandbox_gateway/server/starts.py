"""What is told of a kernel that Jupyter's own routes start: the events of one that ``/api/sandboxes`` starts."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.service import Progress
from sandbox_gateway.server.events import EventBridge
from sandbox_gateway.server.operations import TELL_INTERVAL


@contextmanager
def telling(bridge: EventBridge | None, owner: str, sandbox: str, name: str) -> Iterator[Callable[[Progress], None]]:
    """Tell the event bus of the start in this block, and of why it failed; yields what takes its progress, from any
    thread.

    ``name`` is the sandbox's label: who waits for a notebook's kernel does not know its id yet.
    """
    if bridge is None:
        yield lambda step: None
        return
    start = _Start(bridge, owner, sandbox, name)
    start.tell("started")
    try:
        yield start.progress
    except SandboxGatewayError as error:
        start.tell("failed", error=error)
        raise
    except BaseException as error:
        why = SandboxGatewayError("internal", f"{type(error).__name__} in the server")
        start.tell("failed", error=why)
        raise
    start.tell("succeeded")


class _Start:
    def __init__(self, bridge: EventBridge, owner: str, sandbox: str, name: str) -> None:
        self._bridge, self._owner, self._sandbox, self._name = bridge, owner, sandbox, name
        self._operation = uuid.uuid4().hex
        self._loop = asyncio.get_running_loop()
        self._told = ("", 0.0)
        self._ended = False

    def tell(
        self,
        phase: str,
        text: str = "",
        done: int | None = None,
        total: int | None = None,
        error: SandboxGatewayError | None = None,
    ) -> None:
        self._ended = phase in ("succeeded", "failed")
        self._bridge.operation(
            self._operation,
            "create",
            phase,
            self._owner,
            sandbox=self._sandbox,
            name=self._name,
            text=text,
            done=done,
            total=total,
            error=error,
        )

    def progress(self, step: Progress) -> None:
        with suppress(RuntimeError):  # the server may have ended while a thread of ours still works
            self._loop.call_soon_threadsafe(self._progress, step)

    def _progress(self, step: Progress) -> None:
        text, now = said(step), time.monotonic()
        if self._ended or (text == self._told[0] and now - self._told[1] < TELL_INTERVAL):
            return
        self._told = (text, now)
        self.tell("progress", text, step.done_bytes or None, step.total_bytes or None)


def said(step: Progress) -> str:
    """What goes on, for people who are not to know where things are on this machine."""
    part = step.what.partition(" ")[0]
    return step.message.replace(step.what, part) or f"building {part}"
