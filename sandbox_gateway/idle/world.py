"""What the driver of the idle policy works on: sandboxes, the store, clocks, the machine."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sandbox_gateway.events import EventKind, EventLog
from sandbox_gateway.host.pressure import MemoryPressure, memory_pressure
from sandbox_gateway.model import Activity, SandboxRecord, State
from sandbox_gateway.policy import Action, Decision, Facts, Policy, span
from sandbox_gateway.runtimes.base import Stats


@dataclass(frozen=True, slots=True)
class Reading:
    """What a running kernel does."""

    busy_for: float | None = None
    """Seconds that the request which runs has been running; None when none runs or it waits for ``input()``."""
    since_use: float | None = None
    """Seconds since the last message that would have woken it, or the end of what that had begun; None when that is not
    told."""
    cpu_seconds: float | None = None
    """Processor time of all its processes and threads."""
    waiting: bool = False
    """Whether the request which runs waits for ``input()``."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Reading:
        """Read the answer to the agent's ``activity``, which comes from inside: nonsense counts as not told."""
        cpu_seconds = _seconds(told.get("cpu_seconds"))
        if told.get("input") is True:
            return cls(None, None, cpu_seconds, True)
        busy = (_seconds(told.get("busy_for")) or 0.0) if told.get("busy") is True else None
        return cls(busy, _seconds(told.get("since_use")), cpu_seconds)


class Watched(Protocol):
    """What is needed of a sandbox that this process owns: :class:`~sandbox_gateway.live.LiveSandbox`."""

    @property
    def record(self) -> SandboxRecord:
        """Its record now."""

    async def activity(self) -> Reading:
        """What its kernel does; only while it is running."""

    async def stats(self) -> Stats:
        """Its use of memory."""

    async def pause(self, reason: str = "") -> None:
        """Freeze it."""

    async def suspend(self, reason: str = "") -> None:
        """Save it to disk."""

    async def interrupt(self) -> None:
        """Interrupt what runs."""

    async def expire(self, reason: str) -> None:
        """End it for good, snapshot included, and keep a tombstone that says why."""


class ActivityStore(Protocol):
    """Where the last use of sandboxes is kept: :class:`~sandbox_gateway.store.Store`."""

    def list(self, states: frozenset[State] | None = None) -> Iterable[SandboxRecord]:
        """All records in ``states``."""

    def activity(self, sandbox_id: str) -> Activity | None:
        """What was kept."""

    def put_activity(self, sandbox_id: str, activity: Activity) -> None:
        """Keep it."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a runtime can do for idle sandboxes."""

    pause: bool = True
    suspend: bool = True


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


@dataclass(frozen=True, slots=True)
class World:
    """All of it; what has a default is for tests."""

    live: Mapping[str, Watched]
    """The sandboxes that this process owns."""
    store: ActivityStore
    events: EventLog
    policy: Callable[[SandboxRecord], Policy]
    """The policy of a sandbox; may read a file."""
    abilities: Callable[[str], Abilities]
    """What the runtime of this name can do."""
    reserve: Callable[[], int | None] = lambda: None
    """Bytes of the machine's memory that should stay free; may read a file."""
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    wait: Callable[[asyncio.Event, float | None], Awaitable[None]] = _wait
    """Waits for the event, or for as many seconds."""
    pressure: Callable[[], MemoryPressure] = memory_pressure

    def facts(self, record: SandboxRecord, activity: Activity) -> Facts:
        """What the records say about a sandbox now."""
        return Facts(self.clock(), record.state, record.changed, record.created, activity)

    def announce(self, sandbox_id: str, activity: Activity, decision: Decision) -> Activity:
        """Tell of an end to come; returns ``activity`` with the note that this was done."""
        now = self.clock()
        due = decision.due if decision.due is not None else now
        ahead = span(max(0.0, due - now))
        if decision.action is Action.ANNOUNCE_EXPIRY:
            text = f"it expires in {ahead} unless it is used: {decision.reason}"
            activity = replace(activity, expiry_announced=now)
        else:
            text = f"it ends in {ahead}: {decision.reason}"
            activity = replace(activity, end_announced=now)
        self.events.note(sandbox_id, EventKind.WARNED, text, due=due, idle=decision.action is Action.ANNOUNCE_EXPIRY)
        return activity


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return float(value)
