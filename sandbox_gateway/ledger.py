"""A sandbox's record, written down with each change; a change of state is an event too."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventLog
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.model import Launch, SandboxRecord, State
from sandbox_gateway.store import Store

log = logging.getLogger(__name__)


def new_record(sandbox_id: str, **of_it: Any) -> SandboxRecord:
    """The record of a sandbox of this process's that is to be made now; ``of_it`` are its other fields."""
    now = time.time()
    return SandboxRecord(
        id=sandbox_id,
        state=State.CREATING,
        created=now,
        changed=now,
        boot_id=boot_id(),
        owner_pid=os.getpid(),
        **of_it,
    )


class Ledger:
    """The record of one sandbox, for the process that owns it."""

    def __init__(self, record: SandboxRecord, store: Store, events: EventLog) -> None:
        self.record = record
        self.why = ""
        """For people: the reason of the next change of state."""
        self.quiet = False
        """Whether changes of state are nobody's news."""
        self._store = store
        self._events = events

    def check(self, state: State) -> None:
        """Raise ``illegal_transition`` unless it may become ``state``."""
        self.record.moved(state, 0.0)

    async def move(self, state: State, **changes: Any) -> None:
        """Become ``state``, if it is not that already. What cannot be written down does not happen: raises
        ``store_failed`` or ``disk_full``, and all is as before."""
        before = self.record
        if state is not before.state:
            moved = before.moved(state, time.time(), **changes)
            await asyncio.to_thread(self._store.put, moved)
            self._moved(before, moved)

    async def insist(self, state: State, **changes: Any) -> bool:
        """Become ``state`` also where that cannot be written down: it is so. The next change writes it. Whether it was
        written."""
        before, written = self.record, True
        if state is not before.state:
            moved = before.moved(state, time.time(), **changes)
            try:
                await asyncio.to_thread(self._store.put, moved)
            except SandboxGatewayError as error:
                log.error("sandbox %s is %s, which could not be written down: %s", moved.id, state, error.message)
                written = False
            self._moved(before, moved)
        return written

    def _moved(self, before: SandboxRecord, moved: SandboxRecord) -> None:
        self.record = moved
        if not before.blank and not self.quiet:
            self._events.moved(before, moved, self.why)
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
