"""Clones: new sandboxes from what another one was, each with an identity of its own.

What is shared and what is not: docs/explanation/fast-starts.md. Nothing here drives a clone once it is there.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from dataclasses import dataclass
from typing import Protocol

from sandbox_gateway import request as requests
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.ledger import new_record
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Idle, Launch, OnOwnerExit, SandboxRecord
from sandbox_gateway.profiles import Profile, load_profiles
from sandbox_gateway.runtimes.base import Runtime, RuntimeReport
from sandbox_gateway.snapshots import Kind, Snapshot, SnapshotStore
from sandbox_gateway.store import Store
from sandbox_gateway.suspension import Saved, Suspension

MAX_FORK = 1000
"""Children of one fork at most."""
AT_A_TIME = 4
"""Restores under way at the same time."""


@dataclass(frozen=True, slots=True)
class ForkOutcome:
    """What became of one child."""

    id: str
    error: SandboxGatewayError | None = None


class Maker(Protocol):
    """What is needed of :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    paths: Paths
    store: Store
    snapshots: SnapshotStore

    async def runtime(self, name: str) -> tuple[Runtime, RuntimeReport]:
        """A runtime, and what it can do here."""
        ...

    async def clone(self, record: SandboxRecord, launch: Launch, saved: Saved, parent: Launch) -> LiveSandbox:
        """Make one, which this process owns from then on; on any failure nothing is left."""
        ...


class Clones:
    """Makes them, several at a time. ``ends``: what becomes of them when this process ends (None: their profile's)."""

    def __init__(self, maker: Maker, ends: OnOwnerExit | None) -> None:
        self._maker = maker
        self._ends = ends

    async def spawn(self, snapshot_id: str, count: int, owner: str) -> list[ForkOutcome]:
        """As :meth:`Lifecycle.spawn <sandbox_gateway.lifecycle.Lifecycle.spawn>`."""
        if not 1 <= count <= MAX_FORK:
            raise SandboxGatewayError("invalid_request", f"{count} is not a number of children from 1 to {MAX_FORK}")
        snapshots = self._maker.snapshots
        snapshot = await asyncio.to_thread(snapshots.find, snapshot_id)
        runtime, report = await self._maker.runtime(snapshot.manifest.runtime)
        lease = await asyncio.to_thread(snapshots.hold, snapshot)
        try:
            await Suspension(runtime, report, snapshots).fit(Saved(snapshot))
            room = asyncio.Semaphore(AT_A_TIME)
            return list(await asyncio.gather(*(self._one(snapshot, owner, room) for _ in range(count))))
        finally:
            lease.release()

    async def _one(self, snapshot: Snapshot, owner: str, room: asyncio.Semaphore) -> ForkOutcome:
        async with room:
            child = str(uuid.uuid4())
            try:
                parent = snapshot.manifest.saved_launch()
                launch = requests.clone(parent, child, secrets.token_hex(32).encode())
                record = await asyncio.to_thread(self._record, snapshot, child, owner)
                await self._maker.clone(record, launch, Saved(snapshot), parent)
            except SandboxGatewayError as error:
                return ForkOutcome(child, error)
            return ForkOutcome(child)

    def _record(self, snapshot: Snapshot, child: str, owner: str) -> SandboxRecord:
        manifest = snapshot.manifest
        profile = self._profile(manifest.profile)
        return new_record(
            child,
            profile=manifest.profile,
            runtime=manifest.runtime,
            layers=manifest.layers,
            on_owner_exit=self._ends or (profile.on_owner_exit if profile is not None else OnOwnerExit.KEEP),
            grace=profile.grace if profile is not None else Profile(manifest.profile).grace,
            parent=f"sandbox:{manifest.sandbox}" if manifest.kind is Kind.FORK else f"snapshot:{snapshot.id}",
            epoch=manifest.epoch,
            owner=owner,
            idle=self._chosen_idle(manifest.sandbox),
        )

    def _chosen_idle(self, parent: str) -> Idle | None:
        """The idle times that were chosen for the sandbox that a snapshot is of, while it is known."""
        try:
            return self._maker.store.get(parent).idle
        except SandboxGatewayError:
            return None

    def _profile(self, name: str) -> Profile | None:
        try:
            return load_profiles(self._maker.paths).get(name)
        except SandboxGatewayError:
            return None
