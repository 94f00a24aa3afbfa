"""One sandbox that this process owns: its states, its kernel, its end.

Everything here runs on one event loop (DESIGN 4.15). Operations on one sandbox are serialised, and each goes on to its
end when its caller is cancelled. A sandbox ends in one of two ways: it is destroyed on request, or it dies and the
reason is recorded; in both its processes, mounts, cgroups and files are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sandbox_gateway import raw_log
from sandbox_gateway.attachment import Attachment, Callbacks, Remains
from sandbox_gateway.cursors import Progress
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventKind, EventLog
from sandbox_gateway.idle.world import Reading
from sandbox_gateway.in_order import InOrder
from sandbox_gateway.incarnation import Incarnation
from sandbox_gateway.introduction import inherited
from sandbox_gateway.kernel_exit import KernelExit
from sandbox_gateway.kernel_watch import KernelWatch
from sandbox_gateway.ledger import Ledger
from sandbox_gateway.link.host import Link
from sandbox_gateway.messages import Buffer
from sandbox_gateway.model import (
    NOT_ISOLATED,
    Death,
    DeathKind,
    KernelSpec,
    Launch,
    OnOwnerExit,
    SandboxRecord,
    State,
)
from sandbox_gateway.runtimes.base import Handle, Runtime, Stats
from sandbox_gateway.seat import Seat
from sandbox_gateway.snapshots import Kind, Snapshot
from sandbox_gateway.store import Store
from sandbox_gateway.suspension import Saved, Suspension

log = logging.getLogger(__name__)

T = TypeVar("T")

Confirm = Callable[[], Awaitable[None]]
"""Returns when a sandbox may be seen; raises what is against it."""

SETTLE = 1.0
"""Seconds that clients are given to take what is theirs before an owner goes; what is left comes again."""
_LOOK = 0.5
"""Seconds in which the agent tells what its files take; it does in some milliseconds."""
_AWAKE = frozenset({State.RUNNING, State.RESTARTING})
_FOR_GOOD = frozenset({"snapshot_damaged", "snapshot_unfit", "unknown_snapshot", "workspace_changed"})
"""Why a suspended sandbox cannot be woken, however often that is tried."""


class LiveSandbox:
    """Drives one sandbox; made by :class:`~sandbox_gateway.lifecycle.Lifecycle`.

    Also a suspended one, which has no processes: its owner keeps the kernel's endpoints open and wakes it.
    """

    def __init__(
        self,
        record: SandboxRecord,
        launch: Launch,
        seat: Seat,
        *,
        runtime: Runtime,
        store: Store,
        suspension: Suspension,
        events: EventLog,
        on_end: Callable[[LiveSandbox], object],
        log_file: Path,
    ) -> None:
        self.launch = launch
        self.seat = seat
        self.death: Death | None = None
        self.unwanted = False
        """Whether somebody ended it on purpose, also while it was ending already."""
        self.kernel = KernelWatch(record.id, seat.channels.notice, seat.channels.disconnect)
        self.ended = asyncio.Event()
        self.admission: Callable[[], AbstractAsyncContextManager[object]] = contextlib.nullcontext
        """Entered when a client's wish is to wake it; raises where its owner may not have one more (a quota)."""
        self._suspension = suspension
        self._events = events
        self._ledger = Ledger(record, store, events)
        self._on_end = on_end
        self._log_file = log_file
        callbacks = Callbacks(self._message, seat.channels.dropped, self.kernel.event, self._died)
        self._incarnation = Incarnation(
            launch.spec, seat, callbacks, runtime=runtime, suspension=suspension, ledger=self._ledger
        )
        self._ending = False
        self._removal: asyncio.Task[None] | None = None
        self._making: asyncio.Task[Any] | None = None
        self._waking: asyncio.Task[None] | None = None
        self._progress = Progress(seat.cursors, seat.channels.served, self._numbers)
        seat.channels.on_served = self._progress.moved
        self._leaving: asyncio.Task[None] | None = None
        self._saved: Saved | None = None
        self._left_off: Remains | None = None
        self._sealing: asyncio.Task[None] | None = None
        self._order = InOrder()

    @property
    def id(self) -> str:
        """The sandbox's id, which is the kernel's."""
        return self.record.id

    @property
    def record(self) -> SandboxRecord:
        """What the store knows of it."""
        return self._ledger.record

    @property
    def state(self) -> State:
        """Its state now."""
        return self.record.state

    @property
    def left(self) -> bool:
        """Whether it was left to another owner, and goes on without this object."""
        return self._ending and self._removal is None

    @property
    def link(self) -> Link:
        """The link; raises ``link_failed`` while the sandbox is not running."""
        return self._incarnation.link

    # Beginnings, driven by Lifecycle

    async def create(self, kernel: KernelSpec) -> None:
        """Take the runtime's steps, each recorded before it is taken, attach to the agent and start the kernel.

        Raises ``runtime_failed`` also when the sandbox is destroyed meanwhile.
        """
        await self._make(self._create(kernel))

    async def restore(self, saved: Saved, identity: Mapping[str, Any], confirm: Confirm | None = None) -> None:
        """Become a clone of what was saved, with an ``identity`` of its own (see :mod:`sandbox_gateway.identity`).

        ``confirm`` is awaited before anybody sees it; what it raises is raised.
        """
        await self._make(self._restore_as_new(saved, identity, confirm))

    async def step_in(
        self, attachment: Attachment | None, saved: Saved, identity: Mapping[str, Any], confirm: Confirm | None = None
    ) -> None:
        """Go on with what stood by, which was made from ``saved``, with an ``identity`` of its own.

        The record has its handle and its epoch. ``confirm``, and what is raised, as for :meth:`restore`.
        """
        await self._make(self._step_in(attachment, saved, identity, confirm))

    async def _step_in(
        self, attachment: Attachment | None, saved: Saved, identity: Mapping[str, Any], confirm: Confirm | None
    ) -> None:
        self._descend(saved)
        if attachment is None:
            await self._incarnation.restore_into(saved, identity)
        else:
            await self._incarnation.take(attachment, identity)
        await self._began(confirm)

    async def _make(self, making: Coroutine[Any, Any, T]) -> T:
        self._making = task = asyncio.create_task(self._order.serially(making))
        try:
            return await task
        except asyncio.CancelledError:
            if not self._ending:
                raise
            raise SandboxGatewayError("runtime_failed", "the sandbox was ended while starting") from None
        finally:
            self._making = None

    async def _create(self, kernel: KernelSpec) -> None:
        await self._incarnation.make()
        await self._incarnation.start()
        await self._boot(kernel)

    async def _boot(self, kernel: KernelSpec) -> None:
        """Start the kernel process; returns when it is spawned. Raises ``kernel_failed`` when it cannot be."""
        self.kernel.booting()
        await self.link.call("start_kernel", **self._kernel_parameters(kernel))
        self.seat.channels.connect(self.link)
        await self._ledger.move(State.RUNNING)

    def _descend(self, saved: Saved) -> None:
        """Be a clone: know what the one that was saved had said of itself, under the key that it had."""
        parent = saved.snapshot.manifest.saved_launch()
        self.seat.channels.renew(parent.key)
        self.seat.channels.recall(inherited(parent.facts))

    async def _restore_as_new(self, saved: Saved, identity: Mapping[str, Any], confirm: Confirm | None) -> None:
        self._descend(saved)
        await self._incarnation.restore(saved, identity)
        await self._began(confirm)

    async def _began(self, confirm: Confirm | None) -> None:
        if confirm is not None:
            await confirm()
            if self.link.closed:
                raise SandboxGatewayError("link_failed", "the sandbox ended while starting")
        self._begin()
        await self._ledger.move(State.RUNNING)

    def unnoticed(self) -> None:
        """What becomes of it from now on is no event: nobody has seen it, and another one takes its place."""
        self._ledger.quiet = True

    async def adopt(self) -> None:
        """Go on where an owner that is gone has left off. The record's state is RUNNING, PAUSED, SUSPENDED,
        SUSPENDING (which is undone) or RESTARTING (which is finished)."""
        await self._order.serially(self._adopt())

    async def _adopt(self) -> None:
        channels = self.seat.channels
        channels.retain()
        channels.recall(self.launch.facts)
        if self.state in {State.PAUSED, State.SUSPENDED}:
            channels.sleep(self._wake)
            await self._ledger.save(owner_pid=os.getpid())
            return
        try:
            # An owner that was killed in a pause, a suspend or a fork left it frozen, whatever is on record.
            await self._suspension.thaw(self._incarnation.made)
        except SandboxGatewayError as error:
            if error.code != "unsupported":
                raise
        await self._incarnation.attach(self.record.epoch, Remains(self.seat.cursors.read(), None))
        told = await self.link.call("stats")
        if told.get("phase") == "none":
            if self.state is State.RESTARTING:
                await self._boot(self.launch.kernel)
            elif isinstance(told.get("last_exit"), dict):
                self.kernel.event({"event": "kernel_exit", **told["last_exit"]})
        self._connect()
        await self._ledger.move(State.RUNNING)
        await self._ledger.save(owner_pid=os.getpid())

    def _begin(self) -> None:
        """Everything is in order: clients may see and be seen."""
        self._incarnation.release()
        self._connect()

    def _connect(self) -> None:
        """Carry requests to the kernel from now on; those to one that has ended wait for the next."""
        if self.kernel.exit is None:
            self.seat.channels.connect(self.link)
        else:
            self.seat.channels.disconnect()

    # Pause, suspend, resume

    async def pause(self, reason: str = "") -> None:
        """Freeze it, memory kept. Harmless when it is paused. Raises ``unsupported``, ``illegal_transition``."""
        await self._shielded(self._pause(reason))

    async def _pause(self, reason: str) -> None:
        if self.state is State.PAUSED:
            return
        self._ledger.check(State.PAUSED)
        self.seat.channels.sleep(self._wake)
        attachment = self._incarnation.attachment
        if attachment is not None:
            attachment.freeze()
        try:
            await self._suspension.freeze(self._incarnation.made)
            await self._keep_facts()
            self._ledger.why = reason
            await self._ledger.move(State.PAUSED)
        except BaseException:
            with contextlib.suppress(SandboxGatewayError):
                await self._suspension.thaw(self._incarnation.made)
            self._go_on()
            raise

    def _go_on(self) -> None:
        if self._incarnation.attachment is not None:
            self._incarnation.attachment.thaw()
            self._connect()

    async def suspend(self, reason: str = "") -> None:
        """Save it to disk and release its memory. Harmless when it is suspended.

        Raises ``snapshot_failed`` with the reason, ``disk_full``, ``unsupported`` or ``illegal_transition``; it then
        goes on as before. ``reason`` is for people.
        """
        await self._shielded(self._suspend(reason))

    async def _suspend(self, reason: str) -> None:
        if self.state is State.SUSPENDED:
            return
        self._ledger.check(State.SUSPENDING)
        self._suspension.check()
        before, handle = self.state, self._incarnation.made
        self._ledger.why = ""
        self.seat.channels.sleep(self._wake)
        try:
            await self._ledger.move(State.SUSPENDING)
        except BaseException:
            if before is State.RUNNING:
                self._go_on()
            raise
        attachment = self._incarnation.let_go()
        remains = self._remains()
        try:
            if attachment is not None:
                if before is State.RUNNING:
                    await raw_log.keep(attachment.link, self._log_file)
                # A guest that does not fall silent in time is saved all the same: the next attach finds its way.
                remains = await attachment.close(silence=before is State.RUNNING)
            if before is State.RUNNING:
                await self._suspension.freeze(handle)
            snapshot = await self._suspension.save(handle, self.record, self.launch, remains.received, Kind.SUSPENDED)
            try:
                await self._keep_facts()
                self._ledger.why = reason
                await self._ledger.move(State.SUSPENDED, snapshot=snapshot.id)
            except BaseException:
                await self._suspension.remove(snapshot.id)
                raise
        except BaseException as error:
            log.warning("sandbox %s could not be suspended: %s", self.id, error)
            self._ledger.why = str(error)
            await self._stay(before, remains)
            raise
        self._saved, self._left_off = Saved(snapshot, remains), None
        # From here on the snapshot counts; what cannot be removed now is swept later.
        await self._incarnation.drop()
        self._sealing = asyncio.create_task(self._suspension.seal(snapshot))
        self._progress.moved()
        log.info("sandbox %s was suspended%s", self.id, f": {reason}" if reason else "")

    async def _keep_facts(self) -> None:
        """What the next owner needs to answer for the sleeping kernel."""
        self.launch = replace(self.launch, facts=self.seat.channels.facts())
        await self._ledger.save_launch(self.launch)

    async def _stay(self, before: State, remains: Remains) -> None:
        """A suspend failed: go on as ``before``. What is beyond that has died."""
        try:
            if before is State.RUNNING:
                await self._suspension.thaw(self._incarnation.made)
                await self._incarnation.attach(self.record.epoch, remains)
                self._connect()
            elif remains.outbox is not None:
                self._left_off = remains
            await self._ledger.insist(before)
        except SandboxGatewayError as error:
            self._died(Death(DeathKind.FAILED, f"it could not be suspended, and does not go on: {error.message}"))

    def _remains(self) -> Remains:
        """Where the link was left off; of what an earlier owner had, as far as clients have been served."""
        return self._left_off or Remains(self.seat.cursors.read(), None)

    async def resume(self) -> None:
        """Let a paused or suspended one go on; harmless when it runs.

        Raises ``restore_failed``, ``snapshot_damaged``, ``snapshot_unfit``, ``workspace_changed``; it then stays
        suspended, with its snapshot.
        """
        await self._shielded(self._resume())

    async def wake(self) -> None:
        """As :meth:`resume`, for a client who wants something that needs the kernel."""
        async with self.admission() if self.state is State.SUSPENDED else contextlib.nullcontext():
            await self.resume()

    async def _resume(self) -> None:
        if self.state in _AWAKE:
            return
        if self.state is State.PAUSED:
            try:
                await self._suspension.thaw(self._incarnation.made)
            except SandboxGatewayError:
                # Without an attachment nobody saw it end.
                if (death := await self._incarnation.ended()) is not None:
                    self._died(death)
                raise
            if self._incarnation.attachment is None:
                await self._incarnation.attach(self.record.epoch, self._remains())
                self._left_off = None
            self._go_on()
            await self._ledger.insist(State.RUNNING)
            if not self._incarnation.policy_told:
                # It was changed while the agent could not hear of it.
                await self._incarnation.tell_policy()
            return
        self._ledger.check(State.RESUMING)
        # Checksums are for later; until there are some, the files' identity tells that they are what was saved.
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.cancel()
        try:
            async with self._suspension.expecting(self.seat.directory):
                saved = self._saved or self._as_served(await self._suspension.load(self.record))
                await self._suspension.fit(saved)
                await self._ledger.move(State.RESUMING)
                await self._incarnation.restore(saved)
        except BaseException as error:
            if sealing is not None and self._saved is not None:
                self._sealing = asyncio.create_task(self._suspension.seal(self._saved.snapshot))
            if self.state is State.RESUMING:
                self._ledger.why = str(error)
                await self._ledger.insist(State.SUSPENDED)
            self.seat.channels.asleep_again(error.message if isinstance(error, SandboxGatewayError) else str(error))
            raise
        self._saved = None
        # On record before anybody hears of it: a crash in between must not go back behind what clients have seen.
        written = await self._ledger.insist(State.RUNNING, snapshot=None)
        self._begin()
        if written:
            # Where it is not, the record on disk names the snapshot still, and is what a crash would go back to.
            self._suspension.done_with(saved, self._incarnation.made)

    def _as_served(self, saved: Saved) -> Saved:
        """What an earlier owner had taken and its clients had not: the agent has to send it again."""
        served = self.seat.cursors.read()
        if not served:
            return saved
        received = {channel: min(number, served.get(channel, 0)) for channel, number in saved.received.items()}
        return Saved(saved.snapshot, Remains(received, None))

    async def _sealed(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            await sealing

    async def save(
        self,
        kind: Kind,
        name: str = "",
        template_key: str | None = None,
        saved: Callable[[Snapshot], object] | None = None,
        among: Collection[str] | None = None,
    ) -> Snapshot:
        """A snapshot of it as it is now; it goes on. Raises as :meth:`suspend`, and ``invalid_request`` for a name that
        is malformed, or not free ``among`` the snapshots of these ids (None: all).

        ``saved`` is told of it a moment earlier: when it is made, and the sandbox does not go on yet.
        """
        snapshot = await self._shielded(self._save_as(kind, name, template_key, saved, among))
        if kind is not Kind.FORK:
            await self._suspension.seal(snapshot)
        if kind is Kind.SAVED:
            self._events.note(self.id, EventKind.SNAPSHOT, name, snapshot=snapshot.id)
        return snapshot

    async def _save_as(
        self,
        kind: Kind,
        name: str,
        template_key: str | None,
        saved: Callable[[Snapshot], object] | None,
        among: Collection[str] | None,
    ) -> Snapshot:
        if self.state not in {State.RUNNING, State.PAUSED}:
            hint = "Resume it first." if self.state is State.SUSPENDED else None
            raise SandboxGatewayError("illegal_transition", f"a sandbox that is {self.state} cannot be saved", hint)
        self._suspension.check()
        attachment, handle = self._incarnation.attachment, self._incarnation.made
        running = self.state is State.RUNNING
        if attachment is not None:
            attachment.freeze()
        try:
            if running:
                await self._suspension.freeze(handle)
            received = self._remains().received if attachment is None else attachment.link.received()
            launch = replace(self.launch, facts=inherited(self.seat.channels.facts()))
            snapshot = await self._suspension.save(
                handle, self.record, launch, received, kind, name=name, template_key=template_key, among=among
            )
            if saved is not None:
                saved(snapshot)
            return snapshot
        finally:
            if running:
                await self._goes_on(handle)
                if attachment is not None:
                    attachment.thaw()

    async def _goes_on(self, handle: Handle) -> None:
        try:
            await self._suspension.thaw(handle)
        except SandboxGatewayError as error:
            self._died(Death(DeathKind.FAILED, f"it was saved, and does not go on: {error.message}"))
            raise

    def _wake(self) -> None:
        """A client wants something that needs the kernel."""
        self._events.note(self.id, EventKind.WOKE)
        if self._waking is None or self._waking.done():
            self._waking = asyncio.create_task(self._try_to_wake())

    async def _try_to_wake(self) -> None:
        try:
            await self.wake()
        except Exception as error:
            log.warning("sandbox %s could not be woken: %s", self.id, error)
            if self.state in {State.PAUSED, State.SUSPENDED}:
                self.seat.channels.asleep_again(str(error))

    # The kernel inside

    async def reboot(self, kernel: KernelSpec, announce: Callable[[], object] | None = None) -> None:
        """Restart in place (DESIGN, Restart): end every process of the kernel's uid, keep the files, boot again.

        ``announce`` is called when requests begin to wait for the new kernel: whoever hears of the restart may ask.
        """
        await self._shielded(self._reboot(kernel, announce))

    async def beyond_waking(self, error: SandboxGatewayError) -> bool:
        """After a :meth:`reboot` that failed with ``error``: whether it was that it cannot be woken any more.

        It is ended then, files and all: who restarts a kernel wants one that runs.
        """
        if self.state is not State.SUSPENDED or error.code not in _FOR_GOOD:
            return False
        await self.destroy(Death(DeathKind.FAILED, f"it could not be woken: {error.message}"))
        if self.left:
            return False
        await self.ended.wait()
        return True

    async def _reboot(self, kernel: KernelSpec, announce: Callable[[], object] | None) -> None:
        await self._resume()
        self.seat.channels.disconnect()
        if announce is not None:
            announce()
        try:
            await self._ledger.move(State.RESTARTING)
        except BaseException:
            self._connect()
            raise
        await self.link.call("restart_kernel", timeout=30.0, **self._kernel_parameters(kernel))
        self.kernel.booting()
        self.launch = replace(self.launch, kernel=kernel)
        await self._ledger.save_launch(self.launch)
        self.seat.channels.connect(self.link)
        await self._ledger.move(State.RUNNING)

    def _kernel_parameters(self, kernel: KernelSpec) -> dict[str, Any]:
        return {
            "argv": list(kernel.argv),
            "env": dict(kernel.environment),
            "cwd": kernel.cwd,
            "uid": self.launch.uid,
            "gid": self.launch.gid,
            "interrupt_mode": kernel.interrupt_mode,
            "key": self.launch.key.decode("ascii"),
            "rlimits": {},
            # The agent takes its own way for ipykernel's output; it knows that command and leaves others alone.
            "fast_iopub": True,
        }

    async def signal(self, number: int) -> None:
        """Send a signal to the kernel's process group, waking it first; one that is gone, or cannot be woken, takes
        none."""
        if self.kernel.exit is None and self.death is None and await self._woken():
            await self.link.call("signal", signum=number)

    async def _woken(self) -> bool:
        try:
            await self.wake()
        except SandboxGatewayError as error:
            log.warning("sandbox %s could not be woken: %s", self.id, error)
        return self.state in _AWAKE

    def expect_exit(self) -> None:
        """The kernel was asked to shut down: its end is no news. Thread-safe: it only sets a mark."""
        self.kernel.expect_exit()

    async def interrupt(self) -> None:
        """Interrupt what runs, in the kernelspec's own way, waking it first."""
        await self.wake()
        await self.link.call("interrupt")

    async def stop_kernel(self, grace: float) -> None:
        """SIGTERM, ``grace`` seconds, SIGKILL; the sandbox stays. A suspended kernel is not woken for its end."""
        if self.kernel.exit is not None or self.death is not None:
            return
        if self.state is State.SUSPENDED:
            self.kernel.ended(KernelExit(None, signal.SIGKILL, "", expected=True))
        elif await self._woken():
            await self.link.call("stop_kernel", timeout=grace + 30.0, grace=grace)

    async def amend(self, *, name: str | None = None, on_owner_exit: OnOwnerExit | None = None) -> None:
        """Change its label for people, or what becomes of it when its owner is gone."""
        await self._shielded(self._amend(name, on_owner_exit))

    async def _amend(self, name: str | None, on_owner_exit: OnOwnerExit | None) -> None:
        if name is not None:
            await self._ledger.save(name=name)
        if on_owner_exit is not None:
            await self._ledger.save(on_owner_exit=on_owner_exit)
            self._incarnation.policy_told = False
            if self.state is State.RUNNING:
                await self._incarnation.tell_policy()

    def poll(self) -> int | None:
        """None while the kernel lives (paused and suspended are alive), else its return code (negative: a signal)."""
        if self.kernel.exit is not None:
            return self.kernel.exit.returncode
        if self.death is not None:
            return self.death.exit_code if self.death.exit_code is not None else -signal.SIGKILL
        return None

    async def wait_kernel(self) -> int | None:
        """Return when the kernel or the whole sandbox has ended; None when it was left to another owner."""
        while (code := self.poll()) is None and not self.left:
            await self.kernel.gone.wait()
        return code

    async def activity(self) -> Reading:
        """What its kernel does; raises ``link_failed`` while it is not running."""
        return Reading.of(await self.link.call("activity"))

    async def stats(self) -> Stats:
        """Resource use of the sandbox now."""
        return await self._incarnation.stats()

    async def usage(self) -> Stats:
        """As :meth:`stats`, with what only its agent sees: the files inside. Not known while it does not run."""
        stats = await self.stats()
        if stats.disk is not None or self.state is not State.RUNNING or self.record.runtime in NOT_ISOLATED:
            return stats
        try:
            told = await self.link.call("stats", timeout=_LOOK, disk=True)
        except SandboxGatewayError:
            return stats
        found = told.get("disk")
        known = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63
        return replace(stats, disk=found if known else None)

    async def log(self) -> bytes:
        """What the kernel wrote to its raw stdout and stderr, up to the agent's bound."""
        if self.state in {State.PAUSED, State.SUSPENDED}:
            return await asyncio.to_thread(raw_log.kept, self._log_file)
        return await raw_log.output(self.link)

    # The end

    async def destroy(self, death: Death) -> None:
        """End and remove everything; idempotent. ``death`` is recorded unless there is an earlier reason.

        Goes on to its end when the caller is cancelled: nobody else would finish what is half removed. One that is
        being left to another owner is that one's to end; who asks hears it from :attr:`left`.
        """
        self.unwanted = self.unwanted or death.kind in {DeathKind.STOPPED, DeathKind.OWNER_GONE}
        if self._removal is None:
            if self._leaving is not None:
                await asyncio.wait({self._leaving})
            if self._ending:
                return
            self._ending = self.kernel.muted = True
            self._removal = asyncio.create_task(self._finish(death, State.TERMINATED))
            if self._making is not None:
                self._making.cancel()
        await asyncio.shield(self._removal)

    async def expire(self, reason: str) -> None:
        """End it for good because its time is over; the record says why."""
        self.seat.channels.kernel_died(f"\n[sandbox] The kernel has expired: {reason}\n")
        await self.destroy(Death(DeathKind.EXPIRED, reason))

    async def detach(self) -> None:
        """Leave the sandbox as it is for its next owner. It is left, or at its end, when this
        returns, whoever began it."""
        if self._removal is not None:
            await asyncio.wait({self._removal})
            return
        if self._leaving is None:
            self._ending = self.kernel.muted = True
            self._leaving = asyncio.create_task(self._order.serially(self._detach()))
        await asyncio.shield(self._leaving)

    async def _detach(self) -> None:
        await self._sealed()
        self._progress.stop()
        self.seat.channels.disconnect()
        attachment = self._incarnation.let_go()
        received = self._numbers()
        if attachment is not None:
            received = (await attachment.close(silence=self.state is State.RUNNING)).received
        if received is not None:
            await self.seat.channels.settle(SETTLE)
            if (served := self.seat.channels.served(received)) is not None:
                self.seat.cursors.write(served)
        with contextlib.suppress(SandboxGatewayError):  # the lock tells it too
            await self._ledger.save(owner_pid=None)
        self.kernel.gone.set()

    async def _finish(self, death: Death, final: State) -> None:
        async with self._order.lock:
            if final is State.TERMINATED and self.state is State.RUNNING and self._incarnation.attachment is not None:
                await raw_log.keep(self._incarnation.link, self._log_file)
            self.death = self.death or death
            # Live until all of it is gone: whoever comes after a crash of ours still finds something to remove.
            with contextlib.suppress(SandboxGatewayError):
                if self.death.kind is DeathKind.EXPIRED and self.state is State.SUSPENDED:
                    final = State.EXPIRED
                    await self._ledger.save(death=self.death)
                else:
                    await self._ledger.insist(State.TERMINATING, death=self.death)
            self.seat.channels.disconnect()
            self._progress.stop()
            attachment = self._incarnation.let_go()
            if attachment is not None:
                await attachment.close()
            try:
                await self._incarnation.remove()
                await self._sealed()
                if self.record.snapshot is not None:
                    await self._suspension.remove(self.record.snapshot)
                with contextlib.suppress(SandboxGatewayError):
                    await self._ledger.insist(final, owner_pid=None, snapshot=None)
            finally:
                self.kernel.gone.set()
                self.ended.set()
                self._on_end(self)

    def _died(self, death: Death) -> None:
        if self._ending:
            return
        death = self._explained(death)
        log.warning("sandbox %s died: %s", self.id, death.describe())
        self.seat.channels.kernel_died(f"\n[sandbox] The kernel died: {death.describe()}\n")
        self._ending = self.kernel.muted = True
        self._removal = asyncio.create_task(self._finish(death, State.FAILED))
        self._removal.add_done_callback(self._removed)

    def _removed(self, removal: asyncio.Task[None]) -> None:
        if not removal.cancelled() and removal.exception() is not None:
            log.error("sandbox %s could not be removed; the next start tries again: %s", self.id, removal.exception())

    def _explained(self, death: Death) -> Death:
        if death.kind is DeathKind.OUT_OF_MEMORY and not death.detail and self.launch.spec.limits.memory:
            size = self.launch.spec.limits.memory / 2**20
            return replace(death, detail=f"out of memory at {size:.0f} MiB; its files are lost")
        return death

    # What comes from inside

    def _message(self, channel: int, parts: Sequence[Buffer], number: int) -> None:
        self.seat.channels.received(channel, parts, number)
        self._progress.moved()

    def _numbers(self) -> Mapping[int, int] | None:
        """What was taken of each channel; None while that is not known here."""
        attachment = self._incarnation.attachment
        if attachment is not None:
            # What is held back was not given to any client.
            return None if attachment.holding else attachment.link.received()
        remains = self._saved.remains if self._saved is not None else self._left_off
        return remains.received if remains is not None else None

    async def _shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """One after the other, and to its end whatever becomes of the caller."""
        if self._ending:
            work.close()
            what = "another owner's by now" if self.left else str(self.state)
            raise SandboxGatewayError("illegal_transition", f"sandbox {self.id} is {what}")
        return await self._order.to_its_end(work)
