"""What owners that are gone have left: brought to an end, or to where somebody else can go on.

The store is the index, the lock is the truth: nothing here touches a sandbox without its lock (DESIGN 4.8).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventLog
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import BLANK, LIVE, STANDBY, Death, DeathKind, SandboxRecord, State
from sandbox_gateway.owner import LOCK_NAME, OWNERS, OwnerLock, holder
from sandbox_gateway.owner import sweep as sweep_sockets
from sandbox_gateway.registry import NAMES, make_runtime
from sandbox_gateway.runtimes.base import Handle, Runtime
from sandbox_gateway.snapshots import Kind, SnapshotStore
from sandbox_gateway.store import Store

log = logging.getLogger(__name__)

KEPT_TOMBSTONES = 100
"""Records of ended sandboxes kept for `ps --all`, newest first."""
_OTHER_DIRECTORIES = frozenset({OWNERS, "empty", "runsc"})
_ENDED = frozenset({State.TERMINATED, State.FAILED, State.EXPIRED})
_TRIAL = "trial-"
"""How the directories of a runtime's probes begin: whoever probes removes them, unless he is killed over it."""


class Unowned:
    """Sandboxes of one installation that nobody owns. ``mine`` are the ids that this process owns."""

    def __init__(
        self,
        paths: Paths,
        store: Store,
        snapshots: SnapshotStore,
        runtime: Callable[[str], Runtime],
        mine: Collection[str],
        events: EventLog,
    ) -> None:
        self._paths = paths
        self._store = store
        self._snapshots = snapshots
        self._runtime = runtime
        self._mine = mine
        self._events = events

    async def sweep(self) -> list[str]:
        """Remove what cannot go on; returns the ids of sandboxes that were ended.

        What can go on without an owner is left alone: its agent ends it when its grace time is over.
        """
        swept = []
        for record in await asyncio.to_thread(self._store.list, LIVE):
            unowned = record.id not in self._mine and holder(self._paths.sandbox(record.id)) is None
            if not unowned or await self.death_of(record) is None:
                continue
            try:
                if await self.end(record.id):
                    swept.append(record.id)
            except SandboxGatewayError as error:
                if error.code != "unknown_sandbox":  # it was removed since we looked
                    raise
        await self._remove_strays()
        await asyncio.to_thread(sweep_sockets, self._paths.runtime / OWNERS)
        await asyncio.to_thread(self._trim_tombstones)
        return swept

    async def death_of(self, record: SandboxRecord) -> Death | None:
        """Why an unowned record is to be brought to an end (or back to its snapshot); None when it can go on."""
        if record.state not in LIVE:
            return None
        if record.boot_id != boot_id():
            return Death(DeathKind.MACHINE_RESTARTED)
        if record.state in {State.CREATING, State.TERMINATING, State.RESUMING}:
            return Death(DeathKind.OWNER_GONE, "its owner ended half-way")
        handle = Handle.of(record.handle)
        if handle is None or not await self._runtime(record.runtime).alive(handle):
            return Death(DeathKind.OWNER_GONE)
        return None

    async def settled(self, record: SandboxRecord) -> SandboxRecord:
        """A record whose lock is held by us, in a state from which it can go on.

        Raises ``expired`` or ``illegal_transition`` where it cannot, with what became of it.
        """
        death = await self.death_of(record)
        if death is not None:
            await self.finish(record, death)
            record = await asyncio.to_thread(self._store.get, record.id)
        if record.state not in LIVE and record.state is not State.SUSPENDED:
            raise record.over()
        return record

    async def end(self, sandbox_id: str, death: Death | None = None) -> bool:
        """Take the lock and bring a sandbox to its end; False when somebody else has it.

        Without a ``death`` only if it has died, and False if it can go on.
        """
        lock = OwnerLock(self._paths.sandbox(sandbox_id))
        if not lock.try_acquire():
            return False
        stays = False
        try:
            # What it is may have changed until the lock was ours: another one may have brought it back to its snapshot.
            record = await asyncio.to_thread(self._store.get, sandbox_id)
            death = death or await self.death_of(record)
            if death is None:
                stays = True
                return False
            stays = await self.finish(record, death) is State.SUSPENDED
        finally:
            if not stays:
                _empty_directory(lock.directory)
            lock.release(remove=not stays)
        return True

    async def finish(self, record: SandboxRecord, death: Death) -> State:
        """Remove what is there of a sandbox and write down what became of it, which is returned; its lock is held."""
        before, handle = record, Handle.of(record.handle)
        if handle is not None:
            await self._runtime(record.runtime).destroy(handle)
            if handle.directory != self._paths.sandbox(record.id):  # it stood ready under another id
                with contextlib.suppress(OSError):
                    handle.directory.rmdir()
        now = time.time()
        gone: dict[str, Any] = {"owner_pid": None, "step": "", "handle": {}}
        if record.state is State.CREATING or record.blank:
            await asyncio.to_thread(self._store.delete, record.id)
            return State.TERMINATED
        wanted = death.kind in {DeathKind.STOPPED, DeathKind.EXPIRED}
        if not wanted and record.state is State.SUSPENDING:
            # Its owner ended between the snapshot and the record of it.
            record = replace(record, snapshot=await asyncio.to_thread(self._saved_in, record.id))
        if not wanted and record.snapshot is not None and record.state in {State.RESUMING, State.SUSPENDING}:
            # A failed resume leaves the snapshot.
            record = record.moved(State.SUSPENDED, now, **gone)
            await asyncio.to_thread(self._store.put, record)
            self._events.moved(before, record, death.describe())
            return record.state
        if record.snapshot is not None:
            with contextlib.suppress(SandboxGatewayError):  # what is left is collected later
                await asyncio.to_thread(self._snapshots.remove, record.snapshot)
        if death.kind is DeathKind.EXPIRED and record.state is State.SUSPENDED:
            record = record.moved(State.EXPIRED, now, death=death, snapshot=None, **gone)
        elif death.kind is DeathKind.MACHINE_RESTARTED and record.state is not State.TERMINATING:
            record = record.moved(State.FAILED, now, death=death, snapshot=None, **gone)
        else:
            if record.state is not State.TERMINATING:
                record = record.moved(State.TERMINATING, now, death=death)
            record = record.moved(State.TERMINATED, now, snapshot=None, **gone)
        await asyncio.to_thread(self._store.put, record)
        self._events.moved(before, record)
        return record.state

    def _saved_in(self, sandbox_id: str) -> str | None:
        for snapshot in self._snapshots.list():
            if snapshot.manifest.kind is Kind.SUSPENDED and snapshot.manifest.sandbox == sandbox_id:
                return snapshot.id
        return None

    async def _remove_strays(self) -> None:
        """What has no live record: a crash came before it was written, or between a sandbox's end and its files'.

        What is suspended keeps its directory: the next owner learns there how far clients have been served.
        """
        records = await asyncio.to_thread(self._store.list)
        states = {record.id: record.state for record in records}
        live = {found for found, state in states.items() if state in LIVE}
        # One that stood ready goes on under the runtime's name for it.
        live |= {str(record.handle.get("id")) for record in records if record.state in LIVE and record.handle}
        asleep = {found for found, state in states.items() if state is State.SUSPENDED}
        for name in NAMES:
            with contextlib.suppress(SandboxGatewayError):  # a runtime that is not set up has left nothing
                runtime = self._runtime(name)
                for sandbox_id in await runtime.list():
                    await self._remove_stray(sandbox_id, live, runtime)
        for name in await asyncio.to_thread(os.listdir, self._paths.runtime):
            if name.startswith(_TRIAL):
                await self._remove_trial(self._paths.runtime / name)
            elif name not in _OTHER_DIRECTORIES:
                await self._remove_stray(name, live | asleep, None)

    async def _remove_trial(self, place: Path) -> None:
        from sandbox_gateway.runtimes.gvisor_trial import remove_left

        try:
            await remove_left(self._paths, place, lambda paths: make_runtime("gvisor", paths))
        except SandboxGatewayError as error:  # the next sweep tries again
            log.warning("%s was left by a trial and cannot be removed: %s", place, error.message)

    async def _remove_stray(self, sandbox_id: str, live: set[str], runtime: Runtime | None) -> None:
        if sandbox_id in live or sandbox_id in self._mine or sandbox_id.startswith(_TRIAL):
            return
        lock = OwnerLock(self._paths.sandbox(sandbox_id))
        if not lock.try_acquire():
            return
        stays = False
        try:
            # It may have been made, or resumed, since we looked.
            state = await asyncio.to_thread(self.state, sandbox_id)
            stays = state in LIVE or state is State.SUSPENDED
            if state in LIVE:
                return
            log.info("removing what is left of %s, which has no live record", sandbox_id)
            if runtime is not None:
                await runtime.destroy(Handle(sandbox_id, runtime.name, lock.directory))
        finally:
            if not stays:
                _empty_directory(lock.directory)
            lock.release(remove=not stays)

    def state(self, sandbox_id: str) -> State | None:
        """What is on record of it; None where nothing is."""
        try:
            return self._store.get(sandbox_id).state
        except SandboxGatewayError as error:
            if error.code != "unknown_sandbox":
                raise
            return None

    def _trim_tombstones(self) -> None:
        ended = sorted(self._store.list(_ENDED), key=lambda record: record.changed, reverse=True)
        for place, record in enumerate(ended):
            if place >= KEPT_TOMBSTONES and holder(self._paths.sandbox(record.id)) is not None:
                continue  # a server lists it as a dead kernel
            # Of what was never anybody's there is nothing to tell: its owner was killed before it forgot it.
            if place >= KEPT_TOMBSTONES or record.id.startswith((BLANK, STANDBY)):
                self._store.delete(record.id)
                (self._paths.logs / f"{record.id}.log").unlink(missing_ok=True)


def _empty_directory(directory: Path) -> None:
    """Remove what is in a sandbox's directory but the owner's lock, which is removed as it is released."""
    for path in directory.iterdir():
        if path.name != LOCK_NAME:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
