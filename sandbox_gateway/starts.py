"""How a sandbox for a request comes to be: from one that stands ready, from a template, or new.

What the image is made of on this host is found out for each start (DESIGN 4.6), which takes as long as giving a ready
kernel its identity where its files have to be looked at (:mod:`sandbox_gateway.images.fingerprints`). So a start goes
by the image that the last look found, and nobody sees the sandbox before its own look is over: where that finds another
image, what was made is removed and the start begins again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sandbox_gateway import identity
from sandbox_gateway import request as requests
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.service import ImageService, Progress
from sandbox_gateway.ledger import new_record
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Image, Launch, SandboxRecord
from sandbox_gateway.profiles import Profile
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import Handle, Runtime, RuntimeReport
from sandbox_gateway.seat import Seat
from sandbox_gateway.snapshots import SnapshotStore
from sandbox_gateway.store import Store
from sandbox_gateway.suspension import Saved, Suspension
from sandbox_gateway.templates import Member, Plan, Pool, Templates

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

RESTORING = 0.03
"""Seconds from which on a restore leaves this process nothing to do for a while; it takes a tenth or two."""


class Maker(Protocol):
    """What is needed of :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    paths: Paths
    store: Store
    snapshots: SnapshotStore
    images: ImageService
    templates: Templates
    pool: Pool

    @property
    def live(self) -> MutableMapping[str, LiveSandbox]:
        """What this process owns, by id."""
        ...

    async def runtime(self, name: str) -> tuple[Runtime, RuntimeReport]:
        """A runtime, and what it can do here."""
        ...

    async def clear(self, sandbox_id: str) -> None:
        """Remove what an earlier owner of this id has left half-way."""
        ...

    async def enter(self, record: SandboxRecord, launch: Launch, seat: Seat, **how: Any) -> LiveSandbox:
        """Record one that is to be made; nothing of it is made yet."""
        ...

    async def made(self, sandbox: LiveSandbox, making: Awaitable[None]) -> None:
        """Make it; on any failure nothing is left and the reason is raised."""
        ...

    async def undo(self, sandbox: LiveSandbox, error: BaseException) -> None:
        """Remove one that was made for nobody."""
        ...


class Otherwise(Exception):
    """The image is not the expected one, or none can be had: a failure of no template and of nothing ready."""

    def __init__(self) -> None:
        super().__init__("its image has changed; it is started again")


class _Look:
    """A look at the image of one start that goes on beside it, and the image by which the start goes meanwhile."""

    def __init__(self, expected: Image | None, looking: Callable[[OnProgress], Coroutine[Any, Any, Image]]) -> None:
        """``looking`` reports, on any thread, only where something has to be built."""
        self.expected = expected
        self._looking = looking
        self._found: asyncio.Task[Image] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._decided = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def begin(self, delay: float = 0.0) -> None:
        """Look, in ``delay`` seconds: it takes the interpreter from whoever has more to do than wait."""
        if delay and self._timer is None:
            self._timer = self._loop.call_later(delay, self.begin)
        elif self._found is None:
            self._found = asyncio.create_task(self._looking(self._builds))
            self._found.add_done_callback(lambda _: self._decided.set())

    def _builds(self, step: Progress) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, which a build on its thread outlives
            self._loop.call_soon_threadsafe(self._decided.set)

    async def found(self) -> Image:
        """What it is made of; raises what stands in the way."""
        self.begin()
        assert self._found is not None
        return await asyncio.shield(self._found)

    async def confirm(self) -> None:
        """Return when the image is known to be the expected one; raises :class:`Otherwise` as soon as it is not."""
        self.begin()
        await self._decided.wait()
        look = self._found
        known = look is not None and look.done() and not look.cancelled() and look.exception() is None
        if look is None or not known or look.result() != self.expected:
            raise Otherwise

    async def close(self) -> None:
        """Nobody wants to know any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._found is not None:
            self._found.cancel()
            await asyncio.gather(self._found, return_exceptions=True)


class Starts:
    """Makes sandboxes for requests. One per process; use it on one event loop."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker
        self._seen: dict[tuple[str, bool, int, bool], Image] = {}

    async def create(self, wanted: CreateRequest, seat: Seat, progress: OnProgress | None) -> LiveSandbox:
        """As :meth:`Lifecycle.create <sandbox_gateway.lifecycle.Lifecycle.create>`."""
        before = self._maker.live.get(wanted.id)
        try:
            return await self._begun(wanted, seat, progress)
        except BaseException as error:
            # Who asked for it may have given up when it was made, and what was begun for it was being put away.
            unclaimed = self._maker.live.get(wanted.id)
            if unclaimed is not None and unclaimed is not before:
                await asyncio.shield(self._maker.undo(unclaimed, error))
            raise

    async def _begun(self, wanted: CreateRequest, seat: Seat, progress: OnProgress | None) -> LiveSandbox:
        await self._check(wanted.profile)
        uid = self._who(wanted).uid
        look = _Look(
            self._seen.get(_key(wanted.profile, uid)),
            lambda heard: self.image(wanted.profile, uid, _both(heard, progress)),
        )
        try:
            if look.expected is not None:
                try:
                    return await self._create(wanted, seat, look, progress)
                except Otherwise:
                    log.info("the image of %s is another one by now: starting it again", wanted.id)
            look.expected = await look.found()
            return await self._create(wanted, seat, look, progress)
        finally:
            await look.close()

    async def _create(
        self,
        wanted: CreateRequest,
        seat: Seat,
        look: _Look,
        progress: OnProgress | None,
    ) -> LiveSandbox:
        assert look.expected is not None
        runtime, report = await self._maker.runtime(wanted.profile.runtime)
        await self._maker.clear(wanted.id)
        async with self._expecting(runtime, wanted.profile, seat):
            return await self._make(wanted, seat, look, runtime, report, progress)

    def _expecting(
        self, runtime: Runtime, profile: Profile, seat: Seat
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """What the runtime can begin already, unless one stands ready that will do."""
        return (
            contextlib.nullcontext() if self._maker.pool.sizes.get(profile.name) else runtime.expecting(seat.directory)
        )

    async def _make(
        self,
        wanted: CreateRequest,
        seat: Seat,
        look: _Look,
        runtime: Runtime,
        report: RuntimeReport,
        progress: OnProgress | None,
    ) -> LiveSandbox:
        assert look.expected is not None
        launch, notes = await self.compose(wanted, look.expected)
        templates = self._maker.templates
        start = await templates.find(wanted, launch, runtime, report)
        record = replace(record_of(launch, wanted.profile), name=wanted.name, notes=notes, owner=wanted.owner)
        say = progress or _unheard
        if (saved := start.saved) is not None and (plan := start.plan) is not None:
            say(Progress("sandbox", 0, 0, "restoring it from its template"))
            warm = replace(record, parent=f"template:{plan.key.short}", epoch=saved.epoch)
            try:
                sandbox = await self._from_pool(plan, saved, warm, launch, seat, look)
                if sandbox is None:
                    sandbox = await self._restored(saved, warm, launch, seat, look)
            except SandboxGatewayError as error:
                if isinstance(error, _Ended):
                    raise
                # Before anything is held against the template: a layer that was lost is made anew by the look.
                await look.confirm()
                start = await asyncio.to_thread(templates.failed, start, error)
            else:
                if not plan.profile.chosen:
                    # What one caller chose for himself is nothing to keep ready for the next.
                    self._maker.pool.order(plan, saved, launch)
                return sandbox
        await look.confirm()
        say(Progress("sandbox", 0, 0, "starting it without a template"))
        record = replace(record, notes=(*notes, *start.notes))
        sandbox = await self._maker.enter(record, launch, seat)
        await self._maker.made(sandbox, sandbox.create(launch.kernel))
        if start.plan is not None:
            templates.want(start.plan, lambda: sandbox.id in self._maker.live)
        return sandbox

    async def _from_pool(
        self,
        plan: Plan,
        saved: Saved,
        record: SandboxRecord,
        launch: Launch,
        seat: Seat,
        look: _Look,
    ) -> LiveSandbox | None:
        """One that stood ready, as a sandbox of ``launch``; None when there is none, or it turned out to be of no use.

        Raises ``_Ended`` when it was ended meanwhile.
        """
        member = self._maker.pool.take(plan, saved, launch)
        if member is None:
            return None
        try:
            return await self._stepped_in(member, saved, record, launch, seat, look)
        except _Ended:
            raise
        except SandboxGatewayError as error:
            log.warning("a sandbox that stood ready for %s was of no use: %s", plan.profile.name, error.message)
            return None
        finally:
            member.leave()

    async def _stepped_in(
        self,
        member: Member,
        saved: Saved,
        record: SandboxRecord,
        launch: Launch,
        seat: Seat,
        look: _Look,
    ) -> LiveSandbox:
        maker = self._maker
        stood = member.sandbox.record
        # While both records would name it, a sweep could end it for the sake of the old one; its lock is still ours.
        try:
            await asyncio.to_thread(maker.store.delete, stood.id)
        except BaseException:
            await asyncio.shield(member.sandbox.vanish())
            raise
        attachment = member.sandbox.surrender()
        maker.live.pop(stood.id, None)
        record = replace(record, handle=stood.handle, step=stood.step, epoch=stood.epoch)
        try:
            sandbox = await maker.enter(record, launch, seat, pool=True)
        except BaseException:
            if (handle := Handle.of(stood.handle)) is not None:
                runtime, _ = await maker.runtime(record.runtime)
                await asyncio.shield(runtime.destroy(handle))
            raise
        look.begin()
        await self._unless_ended(sandbox, sandbox.step_in(attachment, saved, identity.fresh(launch), look.confirm))
        return sandbox

    async def _unless_ended(self, sandbox: LiveSandbox, making: Awaitable[None]) -> None:
        """Make it; raises ``_Ended`` when somebody ended it meanwhile."""
        try:
            await self._maker.made(sandbox, making)
        except (SandboxGatewayError, Otherwise) as error:
            if not sandbox.unwanted:
                raise
            if isinstance(error, SandboxGatewayError):
                raise _Ended(error.code, error.message, error.hint) from error
            text = "the sandbox was ended while it started"
            raise _Ended("runtime_failed", text, "Start it again if it is still wanted.") from error

    async def _restored(
        self,
        saved: Saved,
        record: SandboxRecord,
        launch: Launch,
        seat: Seat,
        look: _Look,
    ) -> LiveSandbox:
        """A sandbox from a template, with the identity of ``launch``; raises ``_Ended`` when it was ended meanwhile."""
        runtime, report = await self._maker.runtime(record.runtime)
        suspension = Suspension(runtime, report, self._maker.snapshots)
        with suspension.hold(saved):
            await suspension.fit(saved)
            sandbox = await self._maker.enter(record, launch, seat)
            look.begin(RESTORING)
            await self._unless_ended(sandbox, sandbox.restore(saved, identity.fresh(launch), look.confirm))
            return sandbox

    # What a sandbox is made from

    async def launch(self, wanted: CreateRequest, progress: OnProgress | None) -> tuple[Launch, tuple[str, ...]]:
        """What a sandbox for ``wanted`` is made from, and notes on what does not hold here, or only softly."""
        await self._check(wanted.profile)
        return await self.compose(wanted, await self.image(wanted.profile, self._who(wanted).uid, progress))

    async def compose(self, wanted: CreateRequest, image: Image) -> tuple[Launch, tuple[str, ...]]:
        """As :meth:`launch`, from an image that is known."""
        _, report = await self._maker.runtime(wanted.profile.runtime)
        notes, limits = requests.enforceable(report, wanted.profile)
        who = self._who(wanted)
        paths = self._maker.paths
        private = (paths.home, paths.runtime)
        spec = requests.compose(wanted, image, who, limits, private=private, empty=self._empty())
        kernel = requests.kernel(wanted, image)
        return Launch(spec, kernel, wanted.key, who.uid, who.gid, requests.missing_file_hint(wanted)), notes

    async def _check(self, profile: Profile) -> None:
        """Raise what stands in the way on this machine, before an image is built for nothing."""
        _, report = await self._maker.runtime(profile.runtime)
        requests.enforceable(report, profile)

    async def image(self, profile: Profile, kernel_uid: int, progress: OnProgress | None = None) -> Image:
        """The profile's root filesystem as it is now, built where it is missing or stale."""
        key = _key(profile, kernel_uid)
        try:
            image = await self._maker.images.resolve(
                profile.image,
                editable=profile.editable,
                kernel_uid=kernel_uid,
                require_python=profile.argv is None,
                progress=progress,
            )
        except SandboxGatewayError:
            self._seen.pop(key, None)
            raise
        self._seen[key] = image
        return image

    @staticmethod
    def _who(wanted: CreateRequest) -> requests.Identity:
        return requests.identity(wanted, root=os.geteuid() == 0)

    def _empty(self) -> Path:
        empty = self._maker.paths.runtime / "empty"
        empty.mkdir(mode=0o555, exist_ok=True)
        return empty


def record_of(launch: Launch, profile: Profile) -> SandboxRecord:
    """The record of a sandbox of this process's that is to be made."""
    image = launch.spec.image
    return new_record(
        launch.spec.id,
        profile=profile.name,
        runtime=profile.runtime,
        layers=tuple(layer.digest for layer in (*image.layers, image.agent) if layer and layer.digest),
        on_owner_exit=profile.on_owner_exit,
        grace=profile.grace,
        idle=profile.idle if "idle" in profile.chosen else None,
    )


def _key(profile: Profile, uid: int) -> tuple[str, bool, int, bool]:
    return profile.image, profile.editable, uid, profile.argv is None


def _both(first: OnProgress, second: OnProgress | None) -> OnProgress:
    def tell(step: Progress) -> None:
        first(step)
        if second is not None:
            second(step)

    return tell


def _unheard(step: Progress) -> None:
    """Nobody wants to know how far it is."""


class _Ended(SandboxGatewayError):
    """Somebody ended a sandbox while it was made: nothing takes its place."""
