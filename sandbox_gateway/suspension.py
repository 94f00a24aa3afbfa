"""Where a runtime's ability to save and restore meets the store of snapshots.

Nothing here knows of states, clients or records' changes; that is :mod:`sandbox_gateway.live`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sandbox_gateway.attachment import Remains
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link.host import Link
from sandbox_gateway.model import Launch, SandboxRecord, SandboxSpec
from sandbox_gateway.operations import growing
from sandbox_gateway.owner import report_progress
from sandbox_gateway.runtimes.base import Handle, Pausable, Prepared, Runtime, RuntimeReport, Snapshots
from sandbox_gateway.snapshots import Facts, Kind, Lease, Snapshot, SnapshotStore, check_files, describe_files
from sandbox_gateway.wire.handshake import VERSION

log = logging.getLogger(__name__)

HEART = 10.0
"""Seconds that a restored kernel is given for its first heartbeat."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A sandbox on disk, and where its link went on."""

    snapshot: Snapshot
    remains: Remains | None = None
    """Of the link that this process had to it."""

    @property
    def received(self) -> Mapping[int, int]:
        """The numbers that were taken of each channel when it was saved."""
        return {int(channel): number for channel, number in self.snapshot.manifest.cursors.items()}

    @property
    def epoch(self) -> int:
        """The epoch in which it was saved."""
        return self.snapshot.manifest.epoch


class Suspension:
    """Saves and restores sandboxes of one runtime."""

    def __init__(self, runtime: Runtime, report: RuntimeReport, snapshots: SnapshotStore) -> None:
        self._runtime = runtime
        self._report = report
        self._snapshots = snapshots
        self._removing: set[asyncio.Task[None]] = set()

    def check(self) -> None:
        """Raise ``unsupported``, with the reason, where this runtime cannot save sandboxes here."""
        self._able("snapshots")

    def _able(self, name: str) -> None:
        capability = self._report.get(name)
        if not capability.available:
            text = f"the {self._runtime.name} runtime has no {name} here: {capability.reason}"
            raise SandboxGatewayError("unsupported", text, capability.hint or None)

    # The report is what says that these casts hold; nobody asks for the class (DESIGN section 5).

    @property
    def _pausable(self) -> Pausable:
        self._able("pause")
        return cast(Pausable, self._runtime)

    @property
    def _saving(self) -> Snapshots:
        self._able("snapshots")
        return cast(Snapshots, self._runtime)

    async def freeze(self, handle: Handle) -> None:
        """Stop it where it is. Raises ``unsupported``, ``runtime_failed``."""
        await self._pausable.pause(handle)

    async def thaw(self, handle: Handle) -> None:
        """Let it go on. Raises ``unsupported``, ``runtime_failed``."""
        await self._pausable.resume(handle)

    async def save(
        self,
        handle: Handle,
        record: SandboxRecord,
        launch: Launch,
        received: Mapping[int, int],
        kind: Kind,
        *,
        name: str = "",
        template_key: str | None = None,
        among: Collection[str] | None = None,
    ) -> Snapshot:
        """Save a paused sandbox; it stays paused. Raises ``snapshot_failed`` or ``disk_full``; nothing is then left.

        The name has to be free ``among`` the snapshots of these ids (None: all). What only a power cut could harm is
        left to :meth:`seal`.
        """
        runtime = self._saving
        async with await self._snapshots.begin() as draft:
            try:
                async with growing(draft.image, "writing memory"):
                    await runtime.snapshot(handle, draft.image)
                # Exact only now: before, files that were read and closed lately are among them, and those may change.
                files = await runtime.host_files(handle)
                workspace = await asyncio.to_thread(describe_files, files) if files else ()
                facts = Facts(
                    kind=kind,
                    sandbox=record.id,
                    profile=record.profile,
                    runtime=record.runtime,
                    name=name,
                    parent=record.parent,
                    layers=record.layers,
                    requirements=await runtime.requirements(handle),
                    link_version=VERSION,
                    epoch=record.epoch,
                    cursors={str(channel): number for channel, number in received.items()},
                    launch=launch.as_dict(),
                    workspace=workspace,
                    template_key=template_key,
                )
                return await draft.commit(facts, sealed=False, among=among)
            except SandboxGatewayError as error:
                if error.code not in {"runtime_failed", "timeout"}:
                    raise
                raise SandboxGatewayError("snapshot_failed", f"it could not be saved: {error.message}") from error

    async def seal(self, snapshot: Snapshot) -> None:
        """Compute its checksums and make it survive a power cut; never raises."""
        try:
            await self._snapshots.seal(snapshot)
        except SandboxGatewayError as error:
            log.warning("snapshot %s has no checksums: %s", snapshot.id, error.message)

    async def load(self, record: SandboxRecord) -> Saved:
        """What a suspended sandbox is saved in; raises ``unknown_snapshot``, ``snapshot_damaged``."""
        if record.snapshot is None:
            raise SandboxGatewayError("unknown_snapshot", f"sandbox {record.id} has no snapshot")
        return Saved(await asyncio.to_thread(self._snapshots.get, record.snapshot))

    async def fit(self, saved: Saved) -> None:
        """Refuse, with the reason and before anything is made, what cannot be restored here and now.

        Raises ``snapshot_damaged``, ``snapshot_unfit``, ``workspace_changed``, ``unsupported``.
        """
        runtime = self._saving
        snapshot = await self._snapshots.verify(saved.snapshot)
        why = await runtime.unfit(snapshot.manifest.requirements)
        if why:
            raise SandboxGatewayError("snapshot_unfit", why)
        if snapshot.manifest.workspace:
            await asyncio.to_thread(check_files, snapshot.manifest.workspace)

    def hold(self, saved: Saved) -> Lease:
        """Nobody removes it until the lease is released."""
        return self._snapshots.hold(saved.snapshot)

    def expecting(self, directory: Path) -> contextlib.AbstractAsyncContextManager[None]:
        """A restore into ``directory`` follows within the block; see :meth:`Runtime.expecting`."""
        return self._runtime.expecting(directory)

    def restore(self, spec: SandboxSpec, directory: Path, saved: Saved) -> AsyncIterator[Handle]:
        """Make a sandbox from it, step by step; see :meth:`Snapshots.restore`."""
        report_progress({"message": "reading memory", "total": saved.snapshot.size})
        return self._saving.restore(spec, directory, saved.snapshot.image)

    async def restore_into(self, handle: Handle, saved: Saved) -> Handle:
        """Restore it onto a sandbox that was created before; see :meth:`Prepared.restore_into`."""
        self._able("prepared")
        return await cast(Prepared, self._runtime).restore_into(handle, saved.snapshot.image)

    async def heartbeat(self, link: Link) -> None:
        """See that the agent and the kernel of a restored sandbox hear and answer. Raises ``restore_failed``."""
        try:
            await link.ping(HEART)
            await link.call("ping_kernel", timeout=HEART + 5.0, seconds=HEART)
        except SandboxGatewayError as error:
            if error.code == "invalid_request":
                return  # an agent of an earlier version, which does not know the operation
            text = f"it does not answer after the restore: {error.message}"
            raise SandboxGatewayError("restore_failed", text) from error

    def done_with(self, saved: Saved, handle: Handle) -> None:
        """It runs again: what it was suspended in is removed, once all of it is read."""
        task = asyncio.create_task(self._remove_when_loaded(saved, handle))
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    async def _remove_when_loaded(self, saved: Saved, handle: Handle) -> None:
        with contextlib.suppress(SandboxGatewayError):  # the sandbox ends then, and says why
            await self._saving.loaded(handle)
        await self.remove(saved.snapshot.id)

    async def remove(self, snapshot_id: str) -> None:
        """Remove what a sandbox was suspended in; what cannot be removed now is swept later."""
        try:
            await asyncio.to_thread(self._snapshots.remove, snapshot_id)
        except SandboxGatewayError as error:
            if error.code != "unknown_snapshot":
                log.warning("snapshot %s is left for the next clean-up: %s", snapshot_id, error.message)
