"""Of the gateway, what events and metrics need: a lifecycle's log of events, records, and kernels with counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventLog
from sandbox_gateway.model import SandboxRecord, State


class Records:
    """As the store: records, and events with numbers."""

    def __init__(self) -> None:
        self.records: dict[str, SandboxRecord] = {}
        self._last = 0

    def add_events(self, events: Sequence[Event]) -> tuple[Event, ...]:
        written = []
        for event in events:
            self._last += 1
            written.append(replace(event, id=self._last))
        return tuple(written)

    def get(self, sandbox_id: str) -> SandboxRecord:
        if sandbox_id not in self.records:
            raise SandboxGatewayError("unknown_sandbox", sandbox_id)
        return self.records[sandbox_id]

    def list(self, states: object = None) -> tuple[SandboxRecord, ...]:
        return tuple(self.records.values())


@dataclass(frozen=True)
class Stats:
    """As ``HubStats``."""

    messages: int = 0
    size: int = 0
    sent: int = 0
    left_out: int = 0
    malformed: int = 0
    rejected: int = 0
    sessions: int = 0
    connected: int = 0
    pending: int = 0


class Hub:
    def __init__(self) -> None:
        self.stats = Stats()


class Kernel:
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.hub = Hub()


class Live:
    def __init__(self, record: SandboxRecord) -> None:
        self.record = record


class SmallLifecycle:
    def __init__(self) -> None:
        self.store = Records()
        self.events = EventLog(self.store)
        self.live: dict[str, Live] = {}


class SmallGateway:
    """Sandboxes that are only on record."""

    def __init__(self) -> None:
        self.lifecycle = SmallLifecycle()
        self.kernels: dict[str, Kernel] = {}
        self._listeners: list[Callable[[Any, bool], None]] = []

    def on_kernel(self, listener: Callable[[Any, bool], None]) -> None:
        self._listeners.append(listener)

    def owner_of(self, sandbox_id: str) -> str | None:
        kernel = self.kernels.get(sandbox_id)
        return None if kernel is None else kernel.owner

    def add(self, sandbox_id: str, owner: str, state: State = State.RUNNING, **changes: Any) -> SandboxRecord:
        """A sandbox of this gateway; the log hears nothing of it."""
        now = time.time()
        record = SandboxRecord(sandbox_id, state, "python3-gvisor", "fake", now, now, "boot", owner=owner, **changes)
        self.lifecycle.store.records[sandbox_id] = record
        if owner:
            self.kernels[sandbox_id] = Kernel(owner)
            for listener in self._listeners:
                listener(self.kernels[sandbox_id], True)
        return record

    def remove(self, sandbox_id: str) -> None:
        """It and its record are gone."""
        del self.lifecycle.store.records[sandbox_id]
        kernel = self.kernels.pop(sandbox_id)
        for listener in self._listeners:
            listener(kernel, False)
