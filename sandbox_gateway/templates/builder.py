"""Building a template: a sandbox that nobody uses is booted, prepared, saved and removed.

However many processes want the same template, one of them builds it. What a crash leaves is a sandbox that was never
finished, and a draft of a snapshot or one that no record names: all are swept like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventKind, EventLog
from sandbox_gateway.kernel_watch import Preparation
from sandbox_gateway.model import BLANK, Launch
from sandbox_gateway.owner import OwnerLock
from sandbox_gateway.profiles import Profile
from sandbox_gateway.seat import Seat
from sandbox_gateway.snapshots import Kind, Snapshot, SnapshotStore
from sandbox_gateway.snapshots.draft import to_its_end
from sandbox_gateway.standby import Standby
from sandbox_gateway.templates.blank import blank, make_holders
from sandbox_gateway.templates.plan import Plan
from sandbox_gateway.templates.records import TemplateRecord, TemplateRecords

log = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Told what goes on, in a few words."""
HOLDERS = "owner.mounts"
"""Directory in the sandbox's runtime directory with the place holders of its mounts."""
_WAIT = 0.2
"""Seconds between two looks whether another process has built it."""


class Maker(Protocol):
    """What a builder needs of :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    @property
    def events(self) -> EventLog:
        """Where it is written down that a template was built."""
        ...

    async def claim(self, sandbox_id: str) -> OwnerLock:
        """Take the right to an id."""
        ...

    async def blank(self, launch: Launch, profile: Profile, seat: Seat, name: str) -> Standby:
        """Record a sandbox that nobody is to use; nothing of it is made yet."""
        ...


class Builder:
    """Builds templates with the sandboxes of one lifecycle."""

    def __init__(
        self,
        maker: Maker,
        snapshots: SnapshotStore,
        records: TemplateRecords,
        on_built: Callable[[TemplateRecord], None] | None = None,
    ) -> None:
        self._maker = maker
        self._snapshots = snapshots
        self._records = records
        self._on_built = on_built

    async def build(self, plan: Plan, say: Say | None = None, *, again: bool = False, wait: bool = True) -> Snapshot:
        """The template for ``plan``, built unless it is there; with ``again`` it is built in any case.

        When another process is building it, its end is awaited, or with ``wait=False`` ``template_failed`` raised at
        once. Raises ``template_failed`` with the reason, which is remembered.
        """
        say = say or _nothing
        told = False
        while True:
            with self._records.building(plan.key.digest) as ours:
                if ours:
                    found = None if again else await asyncio.to_thread(self.find, plan.key.digest)
                    return found or await self._build(plan, say)
            if not wait:
                raise SandboxGatewayError("template_failed", "another process is building this template")
            if not told:
                say(f"waiting for another process that builds the template of {plan.profile.name}")
                told = True
            again = False
            await asyncio.sleep(_WAIT)

    def find(self, key: str) -> Snapshot | None:
        """The snapshot of the template with this key, if it is there. Blocks for a moment."""
        record = self._records.get(key)
        if record is None or record.snapshot is None:
            return None
        try:
            snapshot = self._snapshots.get(record.snapshot)
        except SandboxGatewayError:
            return None
        return snapshot if snapshot.manifest.template_key == key else None

    async def _build(self, plan: Plan, say: Say) -> Snapshot:
        key, profile = plan.key, plan.profile
        record = TemplateRecord(key.digest, key.slot, profile.name, profile.runtime, profile.preload)
        began = time.monotonic()
        before = await asyncio.to_thread(self._records.get, key.digest)
        try:
            async with self._nothing_unnamed(key.digest):
                snapshot, prepared = await self._make(plan, say)
                say(f"checking the template of {profile.name}")
                snapshot = await self._snapshots.seal(snapshot)
                made = replace(
                    record,
                    snapshot=snapshot.id,
                    built=time.time(),
                    took=time.monotonic() - began,
                    preload_failed=prepared.failed,
                )
                await to_its_end(lambda: self._records.put(made), None)
        except SandboxGatewayError as error:
            await asyncio.to_thread(self._records.failed, record, error.message)
            text = f"the template of profile {profile.name} could not be built: {error.message}"
            raise SandboxGatewayError("template_failed", text, error.hint) from error
        log.info("template %s of profile %s was built in %.1f s", key.short, profile.name, made.took)
        self._maker.events.note("", EventKind.TEMPLATE_BUILT, profile.name, profile=profile.name, seconds=made.took)
        if self._on_built is not None:
            self._on_built(made)
        await asyncio.to_thread(self._retire, made, before)
        return snapshot

    @contextlib.asynccontextmanager
    async def _nothing_unnamed(self, key: str) -> AsyncIterator[None]:
        """What fails or is cancelled in here leaves no template that no record names, however far it has come."""
        try:
            yield
        except BaseException:
            # Whether it was committed, or written down, who was cancelled over it has not heard.
            await to_its_end(lambda: self._discard_unnamed(key), None)
            raise

    def _discard_unnamed(self, key: str) -> None:
        """Remove this template's snapshots that its record does not name: while it is ours to build, nobody else is
        about to write one down. Blocks."""
        try:
            found = [one for one in self._snapshots.list() if one.manifest.kind is Kind.TEMPLATE]
        except SandboxGatewayError as error:  # they are collected later
            log.warning("what was saved for a template may be left: %s", error.message)
            return
        for snapshot in found:
            if snapshot.manifest.template_key == key and self._records.orphaned(key, snapshot.id):
                self.discard(snapshot.id)

    async def _make(self, plan: Plan, say: Say) -> tuple[Snapshot, Preparation]:
        profile = plan.profile
        what = f" and importing {', '.join(profile.preload)}" if profile.preload else ""
        say(f"starting a kernel{what}, to see what the template of {profile.name} needs")
        async with self._sandbox(plan) as sandbox:
            prepared, modules = await sandbox.survey(profile.preload)
        _check(prepared)
        async with self._sandbox(plan) as sandbox:
            say(f"starting the kernel of the template of {profile.name}")
            prepared = await sandbox.prepare(profile.preload, modules)
            _check(prepared)
            say(f"saving the template of {profile.name}")
            return await sandbox.preserve(plan.key.digest), prepared

    @contextlib.asynccontextmanager
    async def _sandbox(self, plan: Plan) -> AsyncIterator[Standby]:
        """One that nobody uses, removed at the end."""
        sandbox_id = f"{BLANK}{plan.key.short}-{secrets.token_hex(3)}"
        profile = plan.profile
        lock = await self._maker.claim(sandbox_id)
        holders = lock.directory / HOLDERS
        launch = blank(plan.launch, sandbox_id, holders)
        seat = Seat(lock, launch.key)
        sandbox = None
        try:
            await asyncio.to_thread(make_holders, plan.launch, holders, root=os.geteuid() == 0)
            sandbox = await self._maker.blank(launch, profile, seat, f"building the template of {profile.name}")
            yield sandbox
        finally:
            await asyncio.shield(_remove(sandbox, seat, holders))

    def _retire(self, made: TemplateRecord, before: TemplateRecord | None) -> None:
        """Remove what the new one takes the place of, unless somebody is starting from it right now."""
        if before is not None and before.snapshot is not None and before.snapshot != made.snapshot:
            self.discard(before.snapshot)
        for record in self._records.list():
            older = record.slot == made.slot and record.key != made.key and record.built < made.built
            if older and (record.snapshot is None or self.discard(record.snapshot)):
                self._records.remove(record.key)

    def discard(self, snapshot_id: str) -> bool:
        """Remove a template's snapshot; False while it is in use. Blocks."""
        try:
            self._snapshots.remove(snapshot_id)
        except SandboxGatewayError as error:
            return error.code == "unknown_snapshot"
        return True


def _check(prepared: Preparation) -> None:
    if not prepared.identity:
        hint = "Its kernels start cold; install a current ipykernel into the profile's environment."
        raise SandboxGatewayError("template_failed", "this ipykernel cannot be given another identity", hint)


async def _remove(sandbox: Standby | None, seat: Seat, holders: Path) -> None:
    try:
        if sandbox is not None:
            await sandbox.vanish()
    finally:
        await asyncio.to_thread(shutil.rmtree, holders, ignore_errors=True)
        with contextlib.suppress(OSError):
            seat.release()


def _nothing(text: str) -> None:
    """Nobody listens."""
