"""The gateway without HTTP: which sandboxes a server has, whose they are, and what their owners do with them.

Everything runs on the server's event loop, the lifecycle included (DESIGN 4.15): a message passes from a kernel's link
to a WebSocket without changing threads. A sandbox of another owner does not exist for a caller (``unknown_sandbox``);
administrators see all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from sandbox_gateway.choices import chosen
from sandbox_gateway.clones import ForkOutcome
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.service import Progress
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import LIVE, SandboxRecord, State, WorkspaceMode
from sandbox_gateway.owner import OWNERS
from sandbox_gateway.profiles import Profile, load_profiles
from sandbox_gateway.profiles.profile import RESERVED_VARIABLES
from sandbox_gateway.quotas import Quota, Quotas, Read, Usage, usage_of
from sandbox_gateway.runtimes.base import Stats
from sandbox_gateway.seat import Seat
from sandbox_gateway.server.callers import DEFAULT_OWNER, Caller
from sandbox_gateway.server.hub import Hub, HubSettings
from sandbox_gateway.server.kernel import ServedKernel
from sandbox_gateway.server.new_ids import NewIds
from sandbox_gateway.server.settings import Settings
from sandbox_gateway.snapshots import Kind, Snapshot

log = logging.getLogger(__name__)

ADOPT_AT_A_TIME: Final = 4
DEAD_KEPT: Final = 16
"""Kernels of one owner whose sandboxes have died, and that he can still restart."""
_LEFT = frozenset({State.RUNNING, State.PAUSED, State.SUSPENDED, State.SUSPENDING, State.RESUMING, State.RESTARTING})
"""States in which a sandbox whose owner is gone can go on."""
ALIASES: Final = ("python", "python3")
"""Names that mean the default profile, as clients take them for granted."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller asks for: one new sandbox."""

    profile: str = ""
    """Empty: the default profile."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the kernel."""
    offered: Mapping[str, str] = field(default_factory=dict)
    """The environment of an application, of which the profile lets some variables through."""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen within the profile's bounds (:mod:`sandbox_gateway.choices`)."""
    name: str = ""
    """A label for people."""
    id: str | None = None
    """The id, if the caller chooses it: a UUID."""
    directory: Path | None = None
    """The folder that a profile with a workspace opens."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a kernel of a profile starts."""

    template: bool
    """Whether there is a template, from which it is restored."""
    seconds: float | None
    """What the last restore from it took here; None before the first one."""


class Gateway:
    """Use it on one event loop."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        *,
        quota_of: Callable[[str], Quota | None] = lambda owner: None,
        lifecycle: Callable[..., Lifecycle] = Lifecycle,
    ) -> None:
        self.paths = paths
        self.settings = settings
        socket = paths.runtime / OWNERS / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        self.lifecycle = lifecycle(paths, attend=self._attend, socket=socket, clones=settings.on_stop)
        self.kernels: dict[str, ServedKernel] = {}
        """Every kernel that this server has, by its id."""
        self.quotas = Quotas(settings.quota, quota_of)
        self._hubs: dict[str, Hub] = {}
        self._taking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._listeners: list[Callable[[ServedKernel, bool], None]] = []
        self.before_close: list[Callable[[], Awaitable[object]]] = []
        """Awaited before any sandbox is left."""
        self._took: dict[str, float] = {}
        """Seconds of the last restore from the template of each profile as it is offered."""
        self._ids = NewIds(lambda sandbox_id: self.lifecycle.store.has(sandbox_id))
        self._closers: list[Callable[[], object]] = []
        self._started: asyncio.Task[None] | None = None
        self._closed = False

    # The server's beginning and end

    async def start(self) -> None:
        """Take over what an earlier server left; returns when that is done. Harmless when it was called before."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        records = await asyncio.to_thread(self.lifecycle.store.list, _LEFT)
        room = asyncio.Semaphore(ADOPT_AT_A_TIME)

        async def one(record: SandboxRecord) -> None:
            async with room:
                try:
                    self._enter(await self.lifecycle.adopt(record.id))
                except SandboxGatewayError as error:
                    self._hubs.pop(record.id, None)
                    if error.code != "owned_elsewhere":
                        log.warning("sandbox %s of an earlier server is not taken over: %s", record.id, error)

        await asyncio.gather(*(one(record) for record in records if record.owner))

    async def close(self) -> None:
        """Leave every sandbox as its profile, or the server's settings, say."""
        if self._closed:
            return
        self._closed = True
        if self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        for first in self.before_close:
            await first()
        for kernel in tuple(self.kernels.values()):
            kernel.muted = True
        await self.lifecycle.close()
        for kernel in tuple(self.kernels.values()):
            # Of one that has ended nothing is left; another's next owner finds there how far its clients are.
            kernel.close(remove=kernel.live.death is not None)
        self.kernels.clear()
        for closer in self._closers:
            closer()

    def on_close(self, closer: Callable[[], object]) -> None:
        """Call ``closer`` when everything has been left."""
        self._closers.append(closer)

    def on_kernel(self, listener: Callable[[ServedKernel, bool], None]) -> None:
        """Call ``listener`` with each kernel that comes (True) or goes (False)."""
        self._listeners.append(listener)

    # Looking

    async def records(self, caller: Caller, *, states: frozenset[State] | None = None) -> tuple[SandboxRecord, ...]:
        """The sandboxes of a caller, the oldest first; those of local applications are nobody's here."""
        found = await asyncio.to_thread(self.lifecycle.store.list, states)
        mine = (self._now(record) for record in found if record.owner and not record.blank)
        return tuple(record for record in mine if caller.may_use(record.owner))

    async def record(self, caller: Caller, sandbox_id: str) -> SandboxRecord:
        """One sandbox's record; raises ``unknown_sandbox`` also for another owner's."""
        try:
            record = await asyncio.to_thread(self.lifecycle.store.get, sandbox_id)
        except SandboxGatewayError as error:
            raise _unknown(sandbox_id) if error.code == "unknown_sandbox" else error from None
        if not record.owner or not caller.may_use(record.owner):
            raise _unknown(sandbox_id)
        return self._now(record)

    def _now(self, record: SandboxRecord) -> SandboxRecord:
        live = self.lifecycle.live.get(record.id)
        return record if live is None else live.record

    def owner_of(self, sandbox_id: str) -> str | None:
        """Whose a kernel of this server is; None for one that it does not have."""
        kernel = self.kernels.get(sandbox_id)
        return None if kernel is None else kernel.owner

    def kernel(self, caller: Caller, sandbox_id: str) -> ServedKernel:
        """A kernel of this server; raises ``unknown_sandbox``."""
        kernel = self.kernels.get(sandbox_id)
        if kernel is None or not caller.may_use(kernel.owner):
            raise _unknown(sandbox_id)
        return kernel

    def hub(self, sandbox_id: str) -> Hub:
        """A kernel's WebSocket sessions; raises ``unknown_sandbox``."""
        kernel = self.kernels.get(sandbox_id)
        if kernel is None:
            raise _unknown(sandbox_id)
        return kernel.hub

    async def events(self, caller: Caller, *, since: int = 0, sandbox: str | None = None) -> tuple[Event, ...]:
        """What happened to a caller's sandboxes after event ``since``, oldest first."""
        if sandbox is not None:
            await self.record(caller, sandbox)
        found = await asyncio.to_thread(lambda: self.lifecycle.store.events(sandbox, since=since))
        if sandbox is not None or caller.admin:
            return found
        mine = {record.id for record in await self.records(caller)}
        return tuple(event for event in found if event.sandbox in mine)

    async def profiles(self, caller: Caller) -> tuple[Profile, ...]:
        """What the administrator offers here."""
        return tuple((await self._offers()).values())

    async def starts(self) -> Callable[[Profile], Start]:
        """How a kernel of a profile, as it is offered, starts now."""
        records = await asyncio.to_thread(self.lifecycle.templates.records.list)
        ready = {record.profile for record in records if record.snapshot is not None}
        return lambda profile: Start(profile.name in ready, self._took.get(profile.name))

    async def profile(self, name: str) -> Profile:
        """An offer by its name, or by one that means the default; raises ``unknown_profile``."""
        offers = await self._offers()
        if not name or (name in ALIASES and name not in offers):
            name = self.settings.default_profile
        found = offers.get(name)
        if found is None:
            hint = f"There are: {', '.join(offers)}."
            raise SandboxGatewayError("unknown_profile", f"there is no profile {name!r} here", hint)
        return found

    async def _offers(self) -> dict[str, Profile]:
        loaded = await asyncio.to_thread(load_profiles, self.paths)
        return {name: profile for name, profile in loaded.items() if self.settings.offers(profile)}

    # Making and ending

    async def create(
        self, caller: Caller, wanted: Wanted, progress: Callable[[Progress], None] | None = None
    ) -> SandboxRecord:
        """Start a kernel. Raises ``unknown_profile``, ``invalid_request``, ``over_quota``, ``rate_limited``, or what
        failed; nothing is left then."""
        profile = await self._chosen(wanted)
        usage = self._usage(caller.name)
        async with (
            self._ids.take(wanted.id) as kernel_id,
            self.quotas.create(caller.name, usage, memory=profile.limits.memory, ids=[kernel_id]),
        ):
            kernel = ServedKernel(self, kernel_id, caller.name, self._directory(wanted, profile, caller))
            began = time.monotonic()
            await kernel.launch(profile, wanted, progress)
            if kernel.live.record.parent is not None and not profile.chosen:
                # A cold start goes on when this returns: its kernel still boots.
                self._took[profile.name] = time.monotonic() - began
        self.kernels[kernel_id] = kernel
        self._announce(kernel, True)
        return kernel.live.record

    async def _chosen(self, wanted: Wanted) -> Profile:
        profile = chosen(await self.profile(wanted.profile), wanted.resources)
        for name in wanted.environment:
            if name in RESERVED_VARIABLES or name in profile.environment or not self.settings.allows(name):
                why = "is set by the profile" if name in profile.environment else "cannot be chosen here"
                raise SandboxGatewayError("invalid_request", f"the variable {name} {why}", "Leave it out.")
        if self.settings.on_stop is not None:
            profile = replace(profile, on_owner_exit=self.settings.on_stop)
        # What was asked for by name is allowed; what an application's environment offers is still filtered.
        return replace(profile, client_environment=(*profile.client_environment, *wanted.environment))

    def _directory(self, wanted: Wanted, profile: Profile, caller: Caller) -> Path | None:
        if profile.workspace is WorkspaceMode.NONE or self.settings.workspaces is None:
            return wanted.directory
        # Each owner has a folder of his own; the name is the server's, checked by who made the user.
        place = self.settings.workspaces / caller.name
        if place.parent != self.settings.workspaces or caller.name in {"", ".", ".."}:
            raise SandboxGatewayError("invalid_request", f"{caller.name!r} cannot have a folder")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place

    async def delete(self, caller: Caller, sandbox_id: str) -> None:
        """End a sandbox: kernel, memory, files, snapshot. Its record stays as a tombstone; harmless when it ended."""
        if sandbox_id in self.kernels:
            kernel = self.kernel(caller, sandbox_id)  # of one that died long ago nothing else may be left
            await kernel.shutdown(
                "deleted by its owner" if caller.name == kernel.owner else "deleted by an administrator"
            )
            self._leave(kernel)
        elif (await self.record(caller, sandbox_id)).state in {*LIVE, State.SUSPENDED}:
            await self.lifecycle.stop(sandbox_id)

    async def forget(self, caller: Caller, sandbox_id: str) -> None:
        """As :meth:`delete`, the record too."""
        await self.delete(caller, sandbox_id)
        if await asyncio.to_thread(self.lifecycle.store.has, sandbox_id):
            await self.lifecycle.remove(sandbox_id)

    # Doing

    async def live(self, caller: Caller, sandbox_id: str) -> LiveSandbox:
        """The sandbox itself, taken back from another process of ours if that has it.

        Raises ``unknown_sandbox``, ``expired``, or ``illegal_transition`` where it has ended.
        """
        record = await self.record(caller, sandbox_id)
        kernel = self.kernels.get(sandbox_id)
        if kernel is None:
            if record.state not in LIVE and record.state is not State.SUSPENDED:
                raise record.over()
            kernel = await self._taken(sandbox_id)
        return await kernel.ours()

    async def _taken(self, sandbox_id: str) -> ServedKernel:
        from sandbox_gateway.keeper import take_over

        # Two requests at once would take it from each other.
        async with self._taking.setdefault(sandbox_id, asyncio.Lock()):
            kernel = self.kernels.get(sandbox_id)
            return kernel or self._enter(await take_over(self.lifecycle, sandbox_id))

    async def suspend(self, caller: Caller, sandbox_id: str, reason: str = "") -> SandboxRecord:
        """Save it to disk and release its memory."""
        live = await self.live(caller, sandbox_id)
        if live.state is not State.SUSPENDED:
            owner, disk = live.record.owner, (await live.stats()).memory or 0
            async with self.quotas.suspend(owner, self._usage(owner), sandbox_id, disk=disk):
                await live.suspend(reason or "asked for by its owner")
        return live.record

    async def resume(self, caller: Caller, sandbox_id: str) -> SandboxRecord:
        """Let a paused or suspended one go on."""
        live = await self.live(caller, sandbox_id)
        await live.wake()
        return live.record

    async def pause(self, caller: Caller, sandbox_id: str) -> SandboxRecord:
        """Freeze it, memory kept."""
        live = await self.live(caller, sandbox_id)
        await live.pause()
        return live.record

    async def interrupt(self, caller: Caller, sandbox_id: str) -> None:
        """Interrupt what runs; wakes it."""
        await (await self.live(caller, sandbox_id)).interrupt()

    async def restart(self, caller: Caller, sandbox_id: str, *, clean: bool = False) -> SandboxRecord:
        """Start the kernel anew, files kept; of one whose sandbox died, or ``clean``, a new sandbox under the same
        id."""
        kernel = self.kernel(caller, sandbox_id)
        await kernel.restart(clean=clean)
        return kernel.live.record

    async def rename(self, caller: Caller, sandbox_id: str, name: str) -> SandboxRecord:
        """Change its label for people."""
        live = await self.live(caller, sandbox_id)
        await live.amend(name=name)
        return live.record

    async def logs(self, caller: Caller, sandbox_id: str) -> bytes:
        """What the kernel wrote past Jupyter; of one that has ended, what was kept."""
        record = await self.record(caller, sandbox_id)
        if sandbox_id in self.kernels and record.state in _LEFT:
            return await (await self.live(caller, sandbox_id)).log()
        from sandbox_gateway import raw_log

        return await asyncio.to_thread(raw_log.kept, self.paths.logs / f"{sandbox_id}.log")

    async def stats(self, caller: Caller, sandbox_id: str) -> Stats:
        """What it uses now."""
        return await (await self.live(caller, sandbox_id)).usage()

    async def sizes(self, ids: Collection[str]) -> dict[str, int]:
        """Bytes that snapshots take, by their ids; without those that are gone or damaged."""

        def look() -> dict[str, int]:
            found = {}
            for snapshot_id in ids:
                with contextlib.suppress(SandboxGatewayError):
                    found[snapshot_id] = self.lifecycle.snapshots.get(snapshot_id).size
            return found

        return await asyncio.to_thread(look) if ids else {}

    # Multiplying

    async def fork(self, caller: Caller, sandbox_id: str, count: int) -> list[ForkOutcome]:
        """``count`` children that go on from where it is; they belong to its owner."""
        live = await self.live(caller, sandbox_id)
        owner, memory = live.record.owner, live.launch.spec.limits.memory
        async with self.quotas.create(owner, self._usage(owner), count=count, memory=memory) as reservation:
            saved = live.record.snapshot
            if live.state is State.SUSPENDED and saved is not None:
                outcomes = await self.lifecycle.spawn(saved, count, owner)
            else:
                outcomes = await self.lifecycle.fork(sandbox_id, count, owner)
            reservation.made(*(outcome.id for outcome in outcomes))
            self._born(outcomes)
        return outcomes

    async def snapshot(self, caller: Caller, sandbox_id: str, name: str) -> Snapshot:
        """Save it; it goes on. The snapshot belongs to its owner."""
        live = await self.live(caller, sandbox_id)
        owner, disk = live.record.owner, (await live.stats()).memory or 0
        async with self.quotas.snapshot(owner, self._usage(owner), disk=disk) as reservation:
            own = [found for found, (whose, _) in (await asyncio.to_thread(self._owners)).items() if whose == owner]
            snapshot = await live.save(Kind.SAVED, name, among=own)
            await asyncio.to_thread(self.lifecycle.store.put_snapshot_owner, snapshot.id, owner)
            reservation.made(snapshot.id)
        return snapshot

    async def snapshots(self, caller: Caller) -> list[tuple[Snapshot, str, bool]]:
        """The saved snapshots that a caller may start from, each with its owner and whether it is published."""
        found = await asyncio.to_thread(self.lifecycle.snapshots.list)
        owners = await asyncio.to_thread(self._owners)
        views = []
        for snapshot in found:
            owner, published = owners.get(snapshot.id, ("", False))
            if snapshot.manifest.kind is Kind.SAVED and (published or (owner and caller.may_use(owner))):
                views.append((snapshot, owner, published))
        return views

    def _owners(self) -> dict[str, tuple[str, bool]]:
        """Whose the saved snapshots are, and whether they are published. One whose owner was not written down (the
        server was killed at that moment) is that of its sandbox's."""
        store = self.lifecycle.store
        owners = dict(store.snapshot_owners())
        strays = [found for found in self.lifecycle.snapshots.list() if found.id not in owners]
        if any(found.manifest.kind is Kind.SAVED for found in strays):
            whose = {record.id: record.owner for record in store.list()}
            owners |= {
                found.id: (whose[found.manifest.sandbox], False)
                for found in strays
                if found.manifest.kind is Kind.SAVED and whose.get(found.manifest.sandbox)
            }
        return owners

    async def _snapshot(self, caller: Caller, wanted: str, *, change: bool) -> Snapshot:
        found = [
            (wanted != snapshot.id, owner != caller.name, snapshot.manifest.created, snapshot)
            for snapshot, owner, _ in await self.snapshots(caller)
            if wanted in (snapshot.id, snapshot.name) and (not change or caller.may_use(owner))
        ]
        if found:
            # An id counts before a name, and a name of one's own before another's.
            return min(found, key=lambda each: each[:3])[-1]
        raise SandboxGatewayError("unknown_snapshot", f"there is no snapshot {wanted[:80]!r}", "")

    async def start_from(self, caller: Caller, snapshot: str, count: int = 1) -> list[ForkOutcome]:
        """New sandboxes of the caller's from a snapshot of his, or one that is published."""
        found = await self._snapshot(caller, snapshot, change=False)
        usage, memory = self._usage(caller.name), found.manifest.saved_launch().spec.limits.memory
        async with self.quotas.create(caller.name, usage, count=count, memory=memory) as reservation:
            outcomes = await self.lifecycle.spawn(found.id, count, caller.name)
            reservation.made(*(outcome.id for outcome in outcomes))
            self._born(outcomes)
        return outcomes

    async def remove_snapshot(self, caller: Caller, snapshot: str) -> None:
        """Remove a snapshot of the caller's."""
        found = await self._snapshot(caller, snapshot, change=True)
        await asyncio.to_thread(self.lifecycle.snapshots.remove, found.id)
        await asyncio.to_thread(self.lifecycle.store.forget_snapshot_owner, found.id)

    async def publish(self, caller: Caller, snapshot: str, published: bool) -> None:
        """Let everybody start from a snapshot, or no longer; administrators only."""
        if not caller.admin:
            raise SandboxGatewayError("forbidden", "only administrators publish snapshots")
        found = await self._snapshot(caller, snapshot, change=True)
        owners = await asyncio.to_thread(self._owners)
        owner = owners.get(found.id, (DEFAULT_OWNER, False))[0]
        await asyncio.to_thread(lambda: self.lifecycle.store.put_snapshot_owner(found.id, owner, published=published))

    # Whose it is

    def admission(self, live: LiveSandbox) -> AbstractAsyncContextManager[object]:
        """For one that becomes live again, by whatever way: raises ``over_quota``."""
        owner, memory = live.record.owner, live.launch.spec.limits.memory
        return self.quotas.resume(owner, self._usage(owner), live.id, memory=memory)

    async def usage(self, owner: str) -> Usage:
        """What an owner has now."""
        return await asyncio.to_thread(self._measure, owner, dict(self.lifecycle.live))

    async def quota(self, caller: Caller) -> tuple[Quota, Usage, int]:
        """What a caller may have, what he has, and how many sandboxes he made in the last minute."""
        return self.quotas.quota(caller.name), await self.usage(caller.name), self.quotas.made(caller.name)

    def _usage(self, owner: str) -> Read:
        return lambda: self.usage(owner)

    def _measure(self, owner: str, live: Mapping[str, LiveSandbox]) -> Usage:
        store = self.lifecycle.store
        records = [live[record.id].record if record.id in live else record for record in store.list()]
        sizes = {snapshot.id: snapshot.size for snapshot in self.lifecycle.snapshots.list()}
        own = [snapshot_id for snapshot_id, (whose, _) in self._owners().items() if whose == owner]
        return usage_of(
            owner, records, lambda found: live[found].launch.spec.limits.memory if found in live else None, sizes, own
        )

    # Kernels that come and go

    def _attend(self, sandbox_id: str, seat: Seat) -> None:
        """A kernel that is adopted or cloned: its sessions are there before anything of it is."""
        self._hubs[sandbox_id] = self.new_hub(seat)

    def new_hub(self, seat: Seat) -> Hub:
        """The sessions of one kernel."""
        return Hub(seat, settings=HubSettings(**self.settings.hub))

    def _enter(self, live: LiveSandbox) -> ServedKernel:
        kernel = self.kernels.get(live.id)
        if kernel is None:
            seat = self.lifecycle.entrust(live.id)  # first: one that is being made is refused, and stays as it is
            kernel = ServedKernel(self, live.id, live.record.owner, None)
            self.kernels[live.id] = kernel
            kernel.adopted(live, seat, self._hubs.pop(live.id))
            self._announce(kernel, True)
        return kernel

    def _born(self, outcomes: list[ForkOutcome]) -> None:
        for outcome in outcomes:
            live = self.lifecycle.live.get(outcome.id)
            if outcome.error is None and live is not None:
                self._enter(live)
            else:
                self._hubs.pop(outcome.id, None)

    def taken_back(self, kernel: ServedKernel, live: LiveSandbox) -> None:
        """A kernel that another process had is this one's again."""
        kernel.adopted(live, self.lifecycle.entrust(live.id), self._hubs.pop(live.id))

    def _leave(self, kernel: ServedKernel) -> None:
        if self.kernels.get(kernel.id) is kernel:
            del self.kernels[kernel.id]
            kernel.close(remove=True)
            self._announce(kernel, False)

    def gone(self, kernel: ServedKernel) -> None:
        """A kernel is over, and nobody restarts it."""
        self._leave(kernel)

    def died(self, kernel: ServedKernel) -> None:
        """A kernel's sandbox has died. It stays until its owner restarts or deletes it; the first of many do not, as
        no quota counts them."""
        if self.kernels.get(kernel.id) is kernel:
            self.kernels[kernel.id] = self.kernels.pop(kernel.id)  # behind those that died before
        dead = [one for one in self.kernels.values() if one.owner == kernel.owner and one.dead]
        for one in dead[:-DEAD_KEPT]:
            log.info("kernel %s died some time ago, and is listed no longer", one.id)
            self._leave(one)

    def _announce(self, kernel: ServedKernel, here: bool) -> None:
        for listener in self._listeners:
            listener(kernel, here)


def _unknown(sandbox_id: str) -> SandboxGatewayError:
    return SandboxGatewayError("unknown_sandbox", f"there is no sandbox {sandbox_id[:80]!r}", "")
