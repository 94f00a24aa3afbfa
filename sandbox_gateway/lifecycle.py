"""Creating, finding and removing sandboxes: the one place that drives runtimes, store and ownership together.

A crash at any point leaks nothing for longer than until the next start: each step is recorded before it is taken
(DESIGN 4.7), and :meth:`Lifecycle.sweep` removes what an owner that is gone has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox_gateway import request as requests
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.service import ImageService, Progress
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import LIVE, Death, DeathKind, Image, Limits, OnOwnerExit, SandboxRecord, State
from sandbox_gateway.owner import LOCK_NAME, OWNERS, NoOwner, OwnerLock, OwnerServer, ask, holder
from sandbox_gateway.owner import sweep as sweep_sockets
from sandbox_gateway.profiles import Profile
from sandbox_gateway.registry import make_runtime
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import Handle, Runtime, RuntimeReport
from sandbox_gateway.store import Store

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
_OTHER_DIRECTORIES = frozenset({OWNERS, "empty", "runsc"})
KEPT_TOMBSTONES = 100
"""Records of ended sandboxes kept for `ps --all`, newest first."""


class Lifecycle:
    """All sandboxes of one installation as this process sees them. Use it on one event loop."""

    def __init__(
        self,
        paths: Paths,
        *,
        runtimes: Callable[[str, Paths], Runtime] = make_runtime,
        images: ImageService | None = None,
    ) -> None:
        self.paths = paths.ensure()
        self.store = Store(paths.database)
        self.images = images or ImageService(paths)
        self.live: dict[str, LiveSandbox] = {}
        self._make_runtime = runtimes
        self._runtimes: dict[str, tuple[Runtime, RuntimeReport]] = {}
        self._probing = asyncio.Lock()
        self._server: OwnerServer | None = None
        self._starting = asyncio.Lock()
        self._sweeping: asyncio.Task[None] | None = None

    # Creating

    async def claim(self, sandbox_id: str) -> OwnerLock:
        """Take the right to an id, before anything is made under it; the caller releases it when it is done with it.

        Raises ``owned_elsewhere`` when another process has it. What owners that are gone have left is removed
        beside it, in the background.
        """
        requests.checked_id(sandbox_id)
        await self._serve()
        lock = OwnerLock(self.paths.sandbox(sandbox_id))
        lock.acquire()
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweep_aside())
        return lock

    async def _sweep_aside(self) -> None:
        try:
            await self.sweep()
        except Exception:
            log.exception("what others left could not be removed; the next start tries again")

    async def create(
        self, wanted: CreateRequest, lock: OwnerLock, channels: KernelChannels, progress: OnProgress | None = None
    ) -> LiveSandbox:
        """Make a sandbox and boot its kernel; on any failure nothing is left and the reason is raised.

        ``lock`` is that of the id, from :meth:`claim`.
        """
        runtime, report = await self.runtime(wanted.profile.runtime)
        notes, limits = _enforceable(report, wanted.profile)
        who = requests.identity(wanted, root=os.geteuid() == 0)
        image = await self.image(wanted.profile, who.uid, progress)
        spec = requests.compose(
            wanted, image, who, limits, private=(self.paths.home, self.paths.runtime), empty=self._empty()
        )
        now = time.time()
        record = SandboxRecord(
            id=wanted.id,
            state=State.CREATING,
            profile=wanted.profile.name,
            runtime=wanted.profile.runtime,
            created=now,
            changed=now,
            boot_id=boot_id(),
            layers=tuple(layer.digest for layer in (*image.layers, image.agent) if layer and layer.digest),
            on_owner_exit=wanted.profile.on_owner_exit,
            grace=wanted.profile.grace,
            owner_pid=os.getpid(),
            notes=notes,
            name=wanted.name,
        )
        await asyncio.to_thread(self.store.put, record)
        sandbox = LiveSandbox(
            spec,
            record,
            who,
            runtime=runtime,
            store=self.store,
            lock=lock,
            channels=channels,
            key=wanted.key,
            log_file=self.paths.logs / f"{wanted.id}.log",
            on_end=lambda ended: self.live.pop(ended.id, None),
        )
        self.live[wanted.id] = sandbox
        try:
            await sandbox.create()
            await sandbox.boot(requests.kernel(wanted, image))
        except BaseException as error:
            died = sandbox.death
            await asyncio.shield(self._undo(sandbox, error))
            if died is not None and isinstance(error, SandboxGatewayError):
                # What failed is only that nobody answers any more.
                text = f"the sandbox ended while starting: {died.describe()}"
                raise SandboxGatewayError("runtime_failed", text) from error
            raise
        return sandbox

    async def _undo(self, sandbox: LiveSandbox, error: BaseException) -> None:
        log.info("creating %s failed (%s); removing what was made", sandbox.id, error)
        try:
            await sandbox.destroy(Death(DeathKind.FAILED, str(error)))
        finally:
            with contextlib.suppress(SandboxGatewayError):
                await asyncio.to_thread(self.store.delete, sandbox.id)

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
        return await self.images.resolve(
            profile.image,
            editable=profile.editable,
            kernel_uid=kernel_uid,
            require_python=profile.argv is None,
            progress=progress,
        )

    def _empty(self) -> Path:
        empty = self.paths.runtime / "empty"
        empty.mkdir(mode=0o555, exist_ok=True)
        return empty

    # The owner's socket (DESIGN 4.8)

    async def _serve(self) -> None:
        async with self._starting:
            if self._server is None:
                server = OwnerServer(self.paths, self._answer)
                await server.start()
                self._server = server

    async def _answer(self, op: str, sandbox_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        sandbox = self.live.get(sandbox_id)
        if sandbox is None:
            raise SandboxGatewayError("unknown_sandbox", f"this process does not own sandbox {sandbox_id}")
        if op == "stop":
            await sandbox.destroy(
                Death(DeathKind.STOPPED, str(params.get("reason") or "stopped by `jupyter sandbox stop`"))
            )
            return {"state": str(sandbox.record.state)}
        if op == "log":
            return {"log": (await sandbox.log()).decode(errors="replace")}
        if op == "stats":
            stats = await sandbox.stats()
            return {"memory": stats.memory, "cpu_seconds": stats.cpu_seconds, "processes": stats.processes}
        raise SandboxGatewayError("invalid_request", f"unknown request {op!r}")

    async def close(self) -> None:
        """End what this process owns, by each sandbox's ``on_owner_exit``; then stop answering."""
        if self._sweeping is not None:
            await asyncio.wait({self._sweeping}, timeout=5.0)
        await asyncio.gather(*(self._leave(sandbox) for sandbox in tuple(self.live.values())))
        if self._server is not None:
            await self._server.stop()
            self._server = None
        self.store.close()

    async def _leave(self, sandbox: LiveSandbox) -> None:
        try:
            if sandbox.record.on_owner_exit is OnOwnerExit.TERMINATE:
                await sandbox.destroy(Death(DeathKind.OWNER_GONE, "its application ended"))
            else:
                self.live.pop(sandbox.id, None)
                await sandbox.detach()
        except Exception:
            log.exception("sandbox %s could not be left in order", sandbox.id)

    # What others left

    async def stop(self, sandbox_id: str) -> SandboxRecord:
        """End a sandbox whoever owns it: ask the owner, or take the lock where there is none."""
        record = await asyncio.to_thread(self.store.get, sandbox_id)
        if record.state not in LIVE:
            return record
        try:
            await ask(self.paths, record.id, "stop", timeout=60.0)
        except NoOwner:
            if not await self._destroy_unowned(record, Death(DeathKind.STOPPED, "stopped by `jupyter sandbox stop`")):
                hint = "Another process took it meanwhile; try again."
                raise SandboxGatewayError("owned_elsewhere", f"sandbox {sandbox_id} is being removed", hint) from None
        return await asyncio.to_thread(self.store.get, sandbox_id)

    async def remove(self, sandbox_id: str) -> None:
        """End a sandbox and forget it."""
        await self.stop(sandbox_id)
        await asyncio.to_thread(self.store.delete, sandbox_id)
        (self.paths.logs / f"{sandbox_id}.log").unlink(missing_ok=True)

    async def sweep(self) -> list[str]:
        """Remove what owners that are gone have left; returns the ids of sandboxes that were ended.

        A sandbox whose ``on_owner_exit`` is not ``terminate``, or whose grace time still runs, is left alone.
        """
        swept = []
        for record in await asyncio.to_thread(self.store.list):
            if record.state in LIVE and record.id not in self.live:
                death = await self._due(record)
                if death is not None and await self._destroy_unowned(record, death):
                    swept.append(record.id)
        await self._remove_strays()
        await asyncio.to_thread(sweep_sockets, self.paths.runtime / OWNERS)
        await asyncio.to_thread(self._trim_tombstones)
        return swept

    async def _due(self, record: SandboxRecord) -> Death | None:
        if record.boot_id != boot_id():
            return Death(DeathKind.MACHINE_RESTARTED)
        directory = self.paths.sandbox(record.id)
        if holder(directory) is not None:
            return None
        if record.state in {State.CREATING, State.TERMINATING}:
            return Death(DeathKind.OWNER_GONE, "its owner ended half-way")
        handle = _handle(record)
        runtime = self._make_runtime(record.runtime, self.paths)
        if handle is None or not await runtime.alive(handle):
            return Death(DeathKind.OWNER_GONE)
        return None

    async def _destroy_unowned(self, record: SandboxRecord, death: Death) -> bool:
        lock = OwnerLock(self.paths.sandbox(record.id))
        if not lock.try_acquire():
            return False
        try:
            handle = _handle(record)
            if handle is not None:
                await self._make_runtime(record.runtime, self.paths).destroy(handle)
            crashed_creating = record.state is State.CREATING
            if crashed_creating:
                await asyncio.to_thread(self.store.delete, record.id)
            else:
                if record.state is not State.TERMINATING:
                    target = State.FAILED if death.kind is DeathKind.MACHINE_RESTARTED else State.TERMINATING
                    record = record.moved(target, time.time(), death=death, owner_pid=None)
                if record.state is State.TERMINATING:
                    record = record.moved(State.TERMINATED, time.time(), owner_pid=None)
                await asyncio.to_thread(self.store.put, record)
        finally:
            _empty_directory(lock.directory)
            lock.release(remove=True)
        return True

    async def _remove_strays(self) -> None:
        """What has no record: a crash came before it was written, or between a sandbox's end and its endpoints'."""
        live = {record.id for record in await asyncio.to_thread(self.store.list) if record.state in LIVE}
        for runtime, _ in tuple(self._runtimes.values()):
            for sandbox_id in await runtime.list():
                await self._remove_stray(sandbox_id, live, runtime)
        for name in await asyncio.to_thread(os.listdir, self.paths.runtime):
            if name not in _OTHER_DIRECTORIES and not name.startswith("trial-"):
                await self._remove_stray(name, live, None)

    async def _remove_stray(self, sandbox_id: str, live: set[str], runtime: Runtime | None) -> None:
        if sandbox_id in live or sandbox_id in self.live:
            return
        lock = OwnerLock(self.paths.sandbox(sandbox_id))
        if not lock.try_acquire():
            return
        try:
            log.info("removing what is left of %s, which has no live record", sandbox_id)
            if runtime is not None:
                await runtime.destroy(Handle(sandbox_id, runtime.name, lock.directory))
            _empty_directory(lock.directory)
        finally:
            lock.release(remove=True)

    def _trim_tombstones(self) -> None:
        ended = [record for record in self.store.list() if record.state in {State.TERMINATED, State.FAILED}]
        ended.sort(key=lambda record: record.changed, reverse=True)
        for record in ended[KEPT_TOMBSTONES:]:
            self.store.delete(record.id)
            (self.paths.logs / f"{record.id}.log").unlink(missing_ok=True)


def _enforceable(report: RuntimeReport, profile: Profile) -> tuple[tuple[str, ...], Limits]:
    """The limits that hold here and notes on those that do not, or only softly.

    A limit that the profile file asks for and that cannot be enforced is an error (DESIGN 4.14).
    """
    notes: list[str] = []
    absent: dict[str, None] = {}
    for name in ("cpu", "memory", "disk", "processes"):
        if getattr(profile.limits, name) is None:
            continue
        capability = report.get(f"limits.{name}")
        if not capability.available:
            if name in profile.required_limits:
                raise SandboxGatewayError(
                    "limit_unsupported",
                    f"profile {profile.name}: the {name} limit cannot be enforced here: {capability.reason}",
                    capability.hint or None,
                )
            absent[name] = None
        if capability.reason:
            notes.append(f"{name} limit: {capability.reason}")
    return tuple(notes), replace(profile.limits, **absent)


def _handle(record: SandboxRecord) -> Handle | None:
    if not record.handle:
        return None
    data = dict(record.handle)
    return Handle(data["id"], data["runtime"], Path(data["directory"]), data.get("step", ""), data.get("data", {}))


def _empty_directory(directory: Path) -> None:
    """Remove what is in a sandbox's directory but the owner's lock, which is removed as it is released."""
    for path in directory.iterdir():
        if path.name != LOCK_NAME:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
