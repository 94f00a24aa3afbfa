"""A sandbox's record, written down with each change; a change of state is an event too."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from sandbox_gateway.events import EventLog
from sandbox_gateway.model import Launch, SandboxRecord, State
from sandbox_gateway.store import Store


class Ledger:
    """The record of one sandbox, for the process that owns it."""

    def __init__(self, record: SandboxRecord, store: Store, events: EventLog) -> None:
        self.record = record
        self.why = ""
        """For people: the reason of the next change of state."""
        self._store = store
        self._events = events

    def check(self, state: State) -> None:
        """Raise ``illegal_transition`` unless it may become ``state``."""
        self.record.moved(state, 0.0)

    async def move(self, state: State, **changes: Any) -> None:
        """Become ``state``, if it is not that already."""
        before = self.record
        if state is not before.state:
            self.record = before.moved(state, time.time(), **changes)
            await asyncio.to_thread(self._store.put, self.record)
            if not before.blank:
                self._events.moved(before, self.record, self.why)
            self.why = ""

    async def save(self, **changes: Any) -> None:
        """Change anything but the state."""
        self.record = replace(self.record, **changes)
        await asyncio.to_thread(self._store.put, self.record)

    async def save_launch(self, launch: Launch) -> None:
        """Write down what the next owner needs."""
        await asyncio.to_thread(self._store.put_launch, self.record.id, launch)

    async def delete(self) -> None:
        """Forget the sandbox."""
        await asyncio.to_thread(self._store.delete, self.record.id)
