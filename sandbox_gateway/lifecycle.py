"""Creating, finding and removing sandboxes: the one place that drives runtimes, store and ownership together.

A crash at any point leaks nothing for longer than until the next start: each step is recorded before it is taken
(DESIGN 4.7), and :meth:`Lifecycle.sweep` removes what an owner that is gone has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sandbox_gateway import identity
from sandbox_gateway import request as requests
from sandbox_gateway.clones import Clones, ForkOutcome
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind, EventLog
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.housekeeping import tidy
from sandbox_gateway.idle import Abilities, IdleDriver, Policies, World
from sandbox_gateway.images.service import ImageService
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import LIVE, Death, DeathKind, Image, Launch, OnOwnerExit, SandboxRecord, State
from sandbox_gateway.owner import NoOwner, OwnerLock, OwnerServer, ask, holder
from sandbox_gateway.owner_requests import carry_out
from sandbox_gateway.profiles import Profile
from sandbox_gateway.registry import make_runtime
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import Runtime, RuntimeReport
from sandbox_gateway.runtimes.waiting import to_its_end
from sandbox_gateway.seat import Seat
from sandbox_gateway.snapshots import Kind, Snapshot, SnapshotStore, collect
from sandbox_gateway.standby import Standby
from sandbox_gateway.starts import OnProgress, Otherwise, Starts, record_of
from sandbox_gateway.store import Store
from sandbox_gateway.suspension import Saved, Suspension
from sandbox_gateway.templates import Pool, TemplateRecord, Templates
from sandbox_gateway.unowned import Unowned

log = logging.getLogger(__name__)

L = TypeVar("L", bound=LiveSandbox)

SWEPT = 2.0
"""Seconds that a new id is waited for, while another process looks at its directory."""
HANDED_OVER = 5.0
"""Seconds that a sandbox may be between two owners."""
SWEEP_DELAY = 0.3
"""Seconds after a claim until what others left is looked for: what is started now needs the processor first."""
SWEEP_INTERVAL = 5.0
"""Seconds between two such looks of one process: they read the whole store, and many starts may follow each other."""


class Lifecycle:
    """All sandboxes of one installation as this process sees them. Use it on one event loop."""

    def __init__(
        self,
        paths: Paths,
        *,
        runtimes: Callable[[str, Paths], Runtime] = make_runtime,
        images: ImageService | None = None,
        attend: Callable[[str, Seat], None] | None = None,
        socket: Path | None = None,
        clones: OnOwnerExit | None = None,
    ) -> None:
        """``attend`` is called for each kernel that this process adopts or clones, with its id, before anything of it
        is delivered; without it the ZMQ endpoints are opened. ``socket`` is where this owner answers, for a process
        that has several. ``clones``: what becomes of clones when it ends, where not what their profile says."""
        self.paths = paths.ensure()
        self._attend = attend
        self._socket = socket
        self.store = Store(paths.database)
        self.snapshots = SnapshotStore(paths)
        self.images = images or ImageService(paths)
        self.templates = Templates(paths, self, self.snapshots, on_built=self._template_built)
        self.pool = Pool(self)
        self.live: dict[str, LiveSandbox] = {}
        self._starts = Starts(self)
        self._clones = Clones(self, clones)
        self._seats: dict[str, Seat] = {}
        self._handing: set[asyncio.Task[None]] = set()
        self._make_runtime = runtimes
        self._runtimes: dict[str, tuple[Runtime, RuntimeReport]] = {}
        self.events = EventLog(self.store)
        self._unowned = Unowned(
            self.paths, self.store, self.snapshots, lambda name: runtimes(name, paths), self.live, self.events
        )
        policies = Policies(self.paths)
        self.idle = IdleDriver(
            World(self.live, self.store, self.events, policies.of, self._abilities, reserve=policies.reserve)
        )
        self.events.listen(self._tell)
        self._probing = asyncio.Lock()
        self._server: OwnerServer | None = None
        self._starting = asyncio.Lock()
        self._sweeping: asyncio.Task[None] | None = None
        self._swept: float | None = None
        self._closing = asyncio.Event()

    # Creating

    async def claim(self, sandbox_id: str) -> OwnerLock:
        """Take the right to an id, before anything is made under it; the caller releases it when it is done with it.

        Raises ``owned_elsewhere`` when another process has it. What owners that are gone have left is removed
        beside it, in the background.
        """
        requests.checked_id(sandbox_id)
        await self._serve()
        lock = OwnerLock(self.paths.sandbox(sandbox_id), self._socket)
        end = time.monotonic() + SWEPT
        while not lock.try_acquire() and time.monotonic() < end:
            if await asyncio.to_thread(self._unowned.state, sandbox_id) is not None:
                break
            # Another process that sweeps may have found the new directory, and looks whether it is anybody's.
            await asyncio.sleep(0.02)
        lock.acquire()
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweep_aside())
        return lock

    def _abilities(self, runtime: str) -> Abilities:
        report = self._runtimes[runtime][1] if runtime in self._runtimes else RuntimeReport(runtime, False)
        return Abilities(report.get("pause").available, report.get("snapshots").available)

    def _tell(self, event: Event) -> None:
        """Whoever has the notebook open hears of what will happen to the kernel, and of what was done to a cell."""
        sandbox = self.live.get(event.sandbox)
        if sandbox is not None and event.kind in {EventKind.WARNED, EventKind.INTERRUPTED}:
            sandbox.seat.channels.notice(f"\n[sandbox] {event.text[:1].upper()}{event.text[1:]}\n")

    async def _sweep_aside(self) -> None:
        wait = SWEEP_DELAY
        if self._swept is not None:
            wait = max(wait, self._swept + SWEEP_INTERVAL - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._closing.wait()
        self._swept = time.monotonic()
        try:
            await self._sweep_sandboxes()
            await asyncio.to_thread(tidy, self.paths, self.store, self.snapshots, self.images)
        except Exception:
            log.exception("what others left could not be removed; the next start tries again")

    async def create(self, wanted: CreateRequest, seat: Seat, progress: OnProgress | None = None) -> LiveSandbox:
        """Make a sandbox and boot its kernel; on any failure nothing is left and the reason is raised.

        ``seat`` has the lock of the id, from :meth:`claim`.
        """
        return await self._starts.create(wanted, seat, progress)

    async def launch(self, wanted: CreateRequest, progress: OnProgress | None = None) -> tuple[Launch, tuple[str, ...]]:
        """What a sandbox for ``wanted`` is made from, and notes on what does not hold here, or only softly."""
        return await self._starts.launch(wanted, progress)

    def _template_built(self, made: TemplateRecord) -> None:
        text = f"a template of profile {made.profile} was built in {made.took:.1f} s"
        self.events.note("", EventKind.TEMPLATE_BUILT, text, profile=made.profile, key=made.key)

    async def blank(self, launch: Launch, profile: Profile, seat: Seat, name: str) -> Standby:
        """Record a sandbox that is nobody's, for a template or the pool; nothing of it is made yet."""
        runtime, report = await self.runtime(profile.runtime)
        record = replace(record_of(launch, profile), name=name, on_owner_exit=OnOwnerExit.TERMINATE)
        await asyncio.to_thread(self.store.enter, record, launch)
        return self._live(record, launch, seat, runtime, report, Standby)

    async def clear(self, sandbox_id: str) -> None:
        """Remove what an earlier owner of this id, whose lock we have now, has left half-way."""
        try:
            record = await asyncio.to_thread(self.store.get, sandbox_id)
        except SandboxGatewayError as error:
            if error.code != "unknown_sandbox":
                raise
            return
        if record.state is State.SUSPENDED:
            hint = f"`jupyter sandbox resume {sandbox_id}` wakes it, `jupyter sandbox rm {sandbox_id}` removes it."
            raise SandboxGatewayError("invalid_request", f"there is a suspended sandbox {sandbox_id} already", hint)
        if record.state in LIVE:
            await self._unowned.finish(record, Death(DeathKind.OWNER_GONE))

    async def enter(self, record: SandboxRecord, launch: Launch, seat: Seat, **how: Any) -> LiveSandbox:
        """Record a sandbox that is to be made; nothing of it is made yet. ``how`` is told with the event."""
        runtime, report = await self.runtime(record.runtime)
        try:
            await to_its_end(asyncio.to_thread(self.store.enter, record, launch))
        except asyncio.CancelledError:
            await asyncio.shield(self._unrecord(record.id))
            raise
        made_from = {} if record.parent is None else {"parent": record.parent}
        self.events.note(record.id, EventKind.CREATED, **made_from, **how)
        return self._live(record, launch, seat, runtime, report, LiveSandbox)

    def _live(
        self, record: SandboxRecord, launch: Launch, seat: Seat, runtime: Runtime, report: RuntimeReport, kind: type[L]
    ) -> L:
        sandbox = kind(
            record,
            launch,
            seat,
            runtime=runtime,
            store=self.store,
            suspension=Suspension(runtime, report, self.snapshots),
            events=self.events,
            log_file=self.paths.logs / f"{record.id}.log",
            on_end=self._ended,
        )
        self.live[record.id] = sandbox
        return sandbox

    def _ended(self, sandbox: LiveSandbox) -> None:
        self.live.pop(sandbox.id, None)
        seat = self._seats.pop(sandbox.id, None)
        if seat is not None:
            seat.release()

    async def made(self, sandbox: LiveSandbox, making: Awaitable[None]) -> None:
        """Make a sandbox that was entered; on any failure nothing is left and the reason is raised."""
        try:
            await making
        except BaseException as error:
            died = sandbox.death
            if isinstance(error, Otherwise):
                sandbox.unnoticed()
            await asyncio.shield(self.undo(sandbox, error))
            if died is not None and isinstance(error, SandboxGatewayError):
                # What failed is only that nobody answers any more.
                text = f"the sandbox ended while starting: {died.describe()}"
                raise SandboxGatewayError("runtime_failed", text) from error
            raise

    async def undo(self, sandbox: LiveSandbox, error: BaseException) -> None:
        """Remove one that was made for nobody, and every trace of it."""
        log.info("creating %s failed (%s); removing what was made", sandbox.id, error)
        try:
            await sandbox.destroy(Death(DeathKind.FAILED, str(error)))
        finally:
            await self.events.flush()
            await self._unrecord(sandbox.id)

    async def _unrecord(self, sandbox_id: str) -> None:
        with contextlib.suppress(SandboxGatewayError):
            await asyncio.to_thread(self.store.delete, sandbox_id)

    # Saving and multiplying

    def owned(self, sandbox_id: str) -> LiveSandbox:
        """A sandbox that this process owns; raises ``unknown_sandbox``."""
        sandbox = self.live.get(sandbox_id)
        if sandbox is None:
            raise SandboxGatewayError("unknown_sandbox", f"this process does not own sandbox {sandbox_id}")
        return sandbox

    async def adopt(self, sandbox_id: str) -> LiveSandbox:
        """Become the owner of a sandbox that has none and go on where the last one left off.

        Raises ``owned_elsewhere``, ``unknown_sandbox``, ``illegal_transition`` when it has ended, or what went wrong.
        """
        found = self.live.get(sandbox_id)
        if found is not None and not found.left:
            return found
        record = await asyncio.to_thread(self.store.get, sandbox_id)
        lock = await self.claim(record.id)
        try:
            record = await self._unowned.settled(await asyncio.to_thread(self.store.get, sandbox_id))
            launch = await asyncio.to_thread(self.store.launch, record.id)
            runtime, report = await self.runtime(record.runtime)
            seat = Seat(lock, launch.key, missing_file_hint=launch.missing_file_hint)
        except BaseException:
            lock.release()
            raise
        sandbox = self._live(record, launch, seat, runtime, report, LiveSandbox)
        self._seats[record.id] = seat
        try:
            # Before the agent sends what the clients have not: replies wait here for those who come back.
            if self._attend is None:
                seat.bridge()
            else:
                self._attend(sandbox_id, seat)
            await sandbox.adopt()
            self.events.note(sandbox_id, EventKind.ADOPTED)
        except BaseException as error:
            log.warning("sandbox %s could not be adopted: %s", record.id, error)
            if self.live.pop(record.id, None) is not None:
                with contextlib.suppress(Exception):
                    await sandbox.detach()
                self._seats.pop(record.id, None)
                seat.release(remove=False)
            raise
        return sandbox

    async def connect(self, sandbox_id: str) -> Path:
        """The connection file of a sandbox that this process owns, its endpoints open."""
        return self.owned(sandbox_id).seat.bridge().connection_file

    async def hand_over(self, sandbox_id: str) -> None:
        """Give a sandbox up for another owner: flushed, detached, endpoints closed, lock free."""
        handing = asyncio.create_task(self._hand_over(self.owned(sandbox_id)))
        # To its end whatever becomes of who asked: the lock is free when nothing of it is ours any more.
        self._handing.add(handing)
        handing.add_done_callback(self._handing.discard)
        await asyncio.shield(handing)

    async def _hand_over(self, sandbox: LiveSandbox) -> None:
        try:
            await sandbox.detach()
        finally:
            # Of several who asked at once one does this, and whoever is its next owner here has nothing to do with it.
            if sandbox.left and self.live.get(sandbox.id) is sandbox:
                self.events.note(sandbox.id, EventKind.HANDED_OVER)
                del self.live[sandbox.id]
                self._seats.pop(sandbox.id, None)
                sandbox.seat.release(remove=False)

    def entrust(self, sandbox_id: str) -> Seat:
        """The place of an adopted sandbox, for a caller who keeps it beyond the sandbox's end, and releases it.

        Raises ``illegal_transition`` for one that is being made: its place is with whoever makes it.
        """
        seat = self._seats.pop(sandbox_id, None)
        if seat is None:
            raise SandboxGatewayError(
                "illegal_transition", f"{sandbox_id} is being made", "Try again when it is there."
            )
        return seat

    async def fork(self, sandbox_id: str, count: int = 1, owner: str = "") -> list[ForkOutcome]:
        """``count`` clones of a sandbox that this process owns; it goes on itself. See :meth:`spawn`."""
        births: list[asyncio.Task[list[ForkOutcome]]] = []
        try:
            # The children begin while their parent is woken.
            await self.owned(sandbox_id).save(
                Kind.FORK,
                saved=lambda snapshot: births.append(asyncio.create_task(self._births(snapshot, count, owner))),
            )
            outcomes = await asyncio.shield(births[0])
        except BaseException:
            for birth in births:
                birth.cancel()
                await asyncio.wait({birth})
                for outcome in () if birth.cancelled() or birth.exception() else birth.result():
                    if outcome.id in self.live:
                        await self.live[outcome.id].destroy(Death(DeathKind.STOPPED, "its parent could not be woken"))
            raise
        children = [outcome.id for outcome in outcomes if outcome.error is None]
        if children:
            self.events.note(sandbox_id, EventKind.FORKED, children=children)
        return outcomes

    async def _births(self, snapshot: Snapshot, count: int, owner: str) -> list[ForkOutcome]:
        try:
            return await self.spawn(snapshot.id, count, owner)
        finally:
            await asyncio.to_thread(self.snapshots.remove, snapshot.id)

    async def spawn(self, snapshot_id: str, count: int = 1, owner: str = "") -> list[ForkOutcome]:
        """``count`` new sandboxes from a snapshot, owned by this process, each with an identity of its own.

        A child that fails leaves nothing and its reason in its outcome. Raises only what stands in the way of all.
        """
        return await self._clones.spawn(snapshot_id, count, owner)

    async def clone(self, record: SandboxRecord, launch: Launch, saved: Saved, parent: Launch) -> LiveSandbox:
        """One sandbox from a snapshot of ``parent``, with the identity of ``launch``, owned by this process; on any
        failure nothing is left and the reason is raised."""
        seat = Seat(await self.claim(record.id), launch.key, missing_file_hint=launch.missing_file_hint)
        self._seats[record.id] = seat
        try:
            if self._attend is not None:
                self._attend(record.id, seat)
            runtime, _ = await self.runtime(record.runtime)
            async with runtime.expecting(seat.directory):
                sandbox = await self.enter(record, launch, seat)
                seat.channels.retain()
                seat.channels.renew(parent.key)
                await self.made(sandbox, sandbox.restore(saved, identity.fresh(launch)))
            if self._attend is None:
                seat.bridge()
        except BaseException:
            self._seats.pop(record.id, None)
            seat.release()
            raise
        return sandbox

    async def runtime(self, name: str) -> tuple[Runtime, RuntimeReport]:
        """The runtime called ``name`` and what it can do here; raises with a hint when it cannot run at all."""
        async with self._probing:
            if name not in self._runtimes:
                runtime = self._make_runtime(name, self.paths)
                report = await runtime.probe()
                run = report.get("run")
                if not run.available:
                    code = "runtime_too_old" if "too old" in run.reason else "runtime_missing"
                    raise SandboxGatewayError(
                        code, f"the {name} runtime cannot run here: {run.reason}", run.hint or None
                    )
                self._runtimes[name] = (runtime, report)
            return self._runtimes[name]

    async def image(self, profile: Profile, kernel_uid: int, progress: OnProgress | None = None) -> Image:
        """The profile's root filesystem as it is now, built where it is missing or stale."""
        return await self._starts.image(profile, kernel_uid, progress)

    # The owner's socket (DESIGN 4.8)

    async def _serve(self) -> None:
        async with self._starting:
            if self._server is None:
                await asyncio.to_thread(self.store.open)  # what stands against it is said before anything is made
                server = OwnerServer(self.paths, self._answer, socket_path=self._socket)
                await server.start()
                self._server = server

    async def _answer(self, op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        await self._refuse_expired(sandbox_id)
        sandbox = self.owned(sandbox_id)
        answer = await carry_out(op, sandbox, params, self.hand_over)
        if answer is not None:
            return answer
        # Who is told that it is done finds it among the events.
        await self.events.flush()
        return {"state": str(sandbox.state)}

    async def _refuse_expired(self, sandbox_id: str) -> None:
        if sandbox_id in self.live:
            return
        record = None
        with contextlib.suppress(SandboxGatewayError):
            record = await asyncio.to_thread(self.store.get, sandbox_id)
        if record is not None and record.death is not None and record.death.kind is DeathKind.EXPIRED:
            raise record.over()

    async def close(self) -> None:
        """End what this process owns, by each sandbox's ``on_owner_exit``; then stop answering."""
        await self.templates.close()
        await self.pool.close()
        self._closing.set()
        if self._sweeping is not None:
            await asyncio.wait({self._sweeping}, timeout=5.0)
        await self.idle.stop()
        await asyncio.gather(*(self._leave(sandbox) for sandbox in tuple(self.live.values())))
        for runtime, _ in self._runtimes.values():
            runtime.close()
        await self.events.flush()
        if self._server is not None:
            await self._server.stop()
            self._server = None
        self.store.close()

    async def _leave(self, sandbox: LiveSandbox) -> None:
        try:
            policy = sandbox.record.on_owner_exit
            if sandbox.left:
                await self.hand_over(sandbox.id)
                return
            if policy is OnOwnerExit.SUSPEND and sandbox.state is not State.SUSPENDED:
                await sandbox.suspend("its application ended")
            # Who suspended a kernel wants to find it again.
            if policy is OnOwnerExit.TERMINATE and sandbox.state is not State.SUSPENDED:
                await sandbox.destroy(Death(DeathKind.OWNER_GONE, "its application ended"))
            else:
                await self.hand_over(sandbox.id)
        except Exception:
            log.exception("sandbox %s could not be left in order", sandbox.id)

    # What others left

    async def stop(self, sandbox_id: str) -> SandboxRecord:
        """End a sandbox whoever owns it: ask the owner, or take the lock where there is none."""
        record = await asyncio.to_thread(self.store.get, sandbox_id)
        if record.state not in LIVE and record.state is not State.SUSPENDED:
            return record
        await self._stop(record.id)
        return await asyncio.to_thread(self.store.get, sandbox_id)

    async def _stop(self, sandbox_id: str) -> None:
        deadline = time.monotonic() + HANDED_OVER
        while True:
            try:
                await ask(self.paths, sandbox_id, "stop", timeout=60.0)
            except NoOwner:
                if not await self._unowned.end(
                    sandbox_id, Death(DeathKind.STOPPED, "stopped by `jupyter sandbox stop`")
                ):
                    hint = "Another process took it meanwhile; try again."
                    text = f"sandbox {sandbox_id} is being removed"
                    raise SandboxGatewayError("owned_elsewhere", text, hint) from None
            except SandboxGatewayError as error:
                if error.code != "unknown_sandbox" or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)  # between two owners there is no event to wait for
                continue
            return

    async def remove(self, sandbox_id: str) -> None:
        """End a sandbox and forget it."""
        await self.stop(sandbox_id)
        await asyncio.to_thread(self.store.delete, sandbox_id)
        (self.paths.logs / f"{sandbox_id}.log").unlink(missing_ok=True)

    async def sweep(self) -> list[str]:
        """Remove what owners that are gone have left; returns the ids of sandboxes that were ended.

        A sandbox whose ``on_owner_exit`` is not ``terminate``, or whose grace time still runs, is left alone.
        """
        swept = await self._sweep_sandboxes()
        await asyncio.to_thread(collect, self.snapshots, self.store.list)
        return swept

    async def _sweep_sandboxes(self) -> list[str]:
        swept = await self._unowned.sweep()
        await self._suspend_forsaken()
        await self.idle.sweep(self._expire_unowned)
        return swept

    async def _suspend_forsaken(self) -> None:
        """Sandboxes that are to be suspended when their owner is gone."""
        for record in await asyncio.to_thread(self.store.list, frozenset({State.RUNNING, State.PAUSED})):
            if record.on_owner_exit is not OnOwnerExit.SUSPEND or holder(self.paths.sandbox(record.id)) is not None:
                continue
            with contextlib.suppress(SandboxGatewayError):  # somebody else was faster, or it is ended by the next sweep
                sandbox = await self.adopt(record.id)
                await sandbox.suspend("the process that owned it is gone")
                await self.hand_over(record.id)

    async def _expire_unowned(self, sandbox_id: str, reason: str) -> None:
        if not await self._unowned.end(sandbox_id, Death(DeathKind.EXPIRED, reason)):
            raise SandboxGatewayError("owned_elsewhere", f"sandbox {sandbox_id} has an owner")
