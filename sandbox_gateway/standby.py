"""A sandbox that nobody uses yet: it is made for a template, or stands by in a pool for one that will take its place.

Its record stays CREATING and *blank*, so that one which is found without an owner is removed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sandbox_gateway import identity
from sandbox_gateway.attachment import Attachment, Remains
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.introduction import imported, introduce, rehearse
from sandbox_gateway.kernel_watch import Preparation
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind
from sandbox_gateway.snapshots import Kind, Snapshot
from sandbox_gateway.suspension import Saved

log = logging.getLogger(__name__)

PREPARATION = 600.0
"""Seconds that a kernel may take until it has imported everything that its template is to hold."""
MODULES_PIECE = 128 * 1024
"""Bytes of the file of modules that are sent at once: no part of the agent's memory has to hold the whole."""
STILLNESS = 0.2
"""Seconds that a kernel is left alone before it is saved as a template."""


class Standby(LiveSandbox):
    """Made by :meth:`Lifecycle.blank <sandbox_gateway.lifecycle.Lifecycle.blank>`."""

    # For a template

    async def survey(self, preload: Sequence[str]) -> tuple[Preparation, bytes | None]:
        """Boot a kernel as for a template, to see what it imports: the code of all of it, for :meth:`prepare` of
        another one. Raises as :meth:`create`."""
        return await self._make(self._survey(preload))

    async def _survey(self, preload: Sequence[str]) -> tuple[Preparation, bytes | None]:
        prepared = await self._ready_kernel(preload)
        channels, key = self.seat.channels, self.launch.key
        modules = await imported(channels, key) if await rehearse(channels, key) else None
        if modules is None:
            log.info("a kernel does not tell what it imports; its template looks at every file")
        return prepared, modules

    async def prepare(self, preload: Sequence[str], modules: bytes | None = None) -> Preparation:
        """Boot a kernel for a template, and wait until it is ready and still. Raises as :meth:`create`.

        With ``modules``, what a :meth:`survey` has brought, it looks at few files when it imports.
        """
        return await self._make(self._prepare(preload, modules))

    async def _prepare(self, preload: Sequence[str], modules: bytes | None) -> Preparation:
        prepared = await self._ready_kernel(preload, modules)
        self.launch = replace(self.launch, facts=await introduce(self.seat.channels, self.launch.key))
        await asyncio.sleep(STILLNESS)
        await self.link.drain()
        return prepared

    async def _ready_kernel(self, preload: Sequence[str], modules: bytes | None = None) -> Preparation:
        ready: asyncio.Future[Preparation] = asyncio.get_running_loop().create_future()
        self.kernel.ready = ready
        await self._incarnation.make()
        await self._incarnation.start()
        if modules is not None:
            await self._hand_over(modules)
        await self.link.call("start_kernel", **self._kernel_parameters(self.launch.kernel), preload=list(preload))
        gone = asyncio.create_task(self.kernel.gone.wait())
        try:
            either: set[asyncio.Future[Any]] = {ready, gone}
            await asyncio.wait(either, timeout=PREPARATION, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not ready.done():
            what = "ended" if self.kernel.exit is not None else f"was not ready within {PREPARATION:.0f} seconds"
            raise SandboxGatewayError("kernel_failed", f"the kernel {what}")
        self.seat.channels.connect(self.link)
        return ready.result()

    async def _hand_over(self, modules: bytes) -> None:
        try:
            for at in range(0, len(modules), MODULES_PIECE):
                await self.link.call("add_modules", attachment=memoryview(modules)[at : at + MODULES_PIECE])
        except SandboxGatewayError as error:  # it is there to be faster: without, all is found as usual
            log.info("a template's kernel imports from many files: %s", error.message)

    async def preserve(self, template_key: str) -> Snapshot:
        """Save what :meth:`prepare` made, as a template; it is left paused, for :meth:`vanish`.

        Raises ``snapshot_failed``, ``disk_full``, ``unsupported``.
        """
        return await self._make(self._preserve(template_key))

    async def _preserve(self, template_key: str) -> Snapshot:
        self._suspension.check()
        attachment = self._incarnation.let_go()
        remains = Remains({}) if attachment is None else await attachment.close(silence=True)
        handle = self._incarnation.made
        await self._suspension.freeze(handle)
        return await self._suspension.save(
            handle, self.record, self.launch, remains.received, Kind.TEMPLATE, template_key=template_key
        )

    # For a pool

    async def stand_by(self, saved: Saved | None) -> None:
        """Be ready for the sandbox that will :meth:`step_in <sandbox_gateway.live.LiveSandbox.step_in>`: restored from
        ``saved``, attached and rehearsed, or with None only made.

        Raises as :meth:`create`, and what stands against the restore.
        """
        await self._make(self._stand_by(saved))

    async def _stand_by(self, saved: Saved | None) -> None:
        if saved is None:
            await self._incarnation.make()
            return
        with self._suspension.hold(saved):
            await self._suspension.fit(saved)
            # As who it is already: what an identity needs is in the memory's first reach when it is given one.
            before = saved.snapshot.manifest.saved_launch()
            await self._incarnation.restore(saved, identity.fresh(before))
        # So is what a cell needs. Nobody hears of this one.
        self._incarnation.release()
        self.seat.channels.connect(self.link)
        rehearsed = await rehearse(self.seat.channels, before.key)
        self._incarnation.hold()
        if not rehearsed or not self.stands:
            # Who got it would hear the rest of this, or wait for it.
            raise SandboxGatewayError("kernel_failed", "a kernel that was to stand ready could not run a cell")

    @property
    def stands(self) -> bool:
        """Whether what stands by is still there, as far as can be told without asking it."""
        attachment = self._incarnation.attachment
        alive = attachment is None or not attachment.link.closed
        return alive and not self._ending and self.kernel.exit is None

    def surrender(self) -> Attachment | None:
        """Give up what stood by to the sandbox whose record has its handle by now; this one is nothing any more."""
        self._ending = self.kernel.muted = True
        self._progress.stop()
        self.seat.channels.disconnect()
        return self._incarnation.surrender()

    # Its end

    async def vanish(self) -> None:
        """End and remove everything, the record too: of a sandbox that nobody ever used."""
        await self.destroy(Death(DeathKind.STOPPED, "it was made for a template"))
        await self._ledger.delete()
