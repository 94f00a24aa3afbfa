"""The gVisor runtime: one runsc container per sandbox, detached, its init's standard streams on named pipes.

Everything of a sandbox is in three places that a later process can look through without any record: its runtime
directory (pipes and bundle), ``<runtime>/runsc`` (runsc's state files) and our control group parent. Its processes are
known by what the launcher recorded, by the group, and by an environment variable or runsc's own arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import cgroups, processes
from sandbox_gateway.host.cgroups import CgroupTree
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.model import Death, DeathKind, SandboxSpec
from sandbox_gateway.runtimes import (
    gvisor_bundle,
    gvisor_files,
    gvisor_hostfiles,
    gvisor_probe,
    gvisor_snapshots,
    gvisor_trial,
    launcher,
)
from sandbox_gateway.runtimes.base import Handle, LinkFds, RuntimeReport, Stats
from sandbox_gateway.runtimes.forkserver import Forkserver
from sandbox_gateway.runtimes.gvisor_files import BUNDLE
from sandbox_gateway.runtimes.gvisor_requirements import Requirements
from sandbox_gateway.runtimes.memory import MemoryWatch, end_on_alarm, sandbox_memory
from sandbox_gateway.runtimes.runsc import TIMEOUT, Runsc
from sandbox_gateway.runtimes.waiting import to_its_end

_KILL_TIMEOUT = 10.0
_ROUNDS = 20
_MOVES = 0.01
"""Seconds between two moves that make the next ones quick; some 30 are enough."""


class GvisorRuntime:
    """Sandboxes by runsc, as root or as an ordinary user (then inside a user namespace)."""

    name = "gvisor"
    isolated = True

    def __init__(
        self,
        paths: Paths,
        binary: Path | None = None,
        *,
        argv: Sequence[str] | None = None,
        cgroup_tree: CgroupTree | None = None,
    ) -> None:
        """``binary`` is the runsc to use, None where there is none (:meth:`probe` then says so).

        ``argv`` is what PID 1 runs, the agent of the image's agent layer by default.
        """
        self.paths = paths
        self.binary = binary
        self.cgroup_parent = f"sandbox_gateway-{hashlib.sha256(os.fsencode(paths.runtime)).hexdigest()[:10]}"
        self._argv = tuple(argv) if argv is not None else None
        self._tree = cgroup_tree
        self._rootless = os.geteuid() != 0
        self._ending: set[str] = set()
        self._ended: set[ProcessRef] = set()
        self._requirements: dict[Path, Requirements] = {}
        self._departures: dict[Path, _Departure] = {}
        self._forkserver = Forkserver()

    def close(self) -> None:
        """End what forks the launchers."""
        self._forkserver.close()

    @property
    def tree(self) -> CgroupTree:
        """Where control groups can be made; found once."""
        if self._tree is None:
            self._tree = cgroups.discover()
        return self._tree

    async def probe(self) -> RuntimeReport:
        """Try what this binary, kernel and user can do; nothing merely absent raises."""
        report = await gvisor_probe.probe(self.paths, self.binary, self.tree)
        if self.binary is None or not report.get("run").available:
            return report
        saving = await gvisor_trial.capabilities(self.paths, self.binary, self._for_trial)
        return replace(report, capabilities=(*report.capabilities, *saving))

    def _for_trial(self, paths: Paths, argv: tuple[str, ...]) -> GvisorRuntime:
        return GvisorRuntime(paths, self.binary, argv=argv, cgroup_tree=self.tree)

    # Creation

    @contextlib.asynccontextmanager
    async def expecting(self, directory: Path) -> AsyncIterator[None]:
        """Start the launcher."""
        departure = self._departures[directory] = self._set_out(directory)
        try:
            yield
        finally:
            self._departures.pop(directory, None)
            await departure.close()

    def create(self, spec: SandboxSpec, directory: Path) -> AsyncIterator[Handle]:
        """Make pipes and bundle, the control group, and the container, each announced before it is made.

        Raises ``runtime_missing``, ``runtime_failed`` with runsc's reason, ``limit_unsupported``, ``disk_full``.
        """
        return self._make(spec, directory, None)

    async def _make(self, spec: SandboxSpec, directory: Path, image: Path | None) -> AsyncIterator[Handle]:
        async with self._departure(directory) as departure:
            runsc = self._runsc(None if image is None else await self._binary_for(spec, image))
            tree = self.tree
            grouped = tree.usable
            flags = gvisor_bundle.flags(spec, rootless=self._rootless)
            if self._rootless or not grouped:
                flags.append("--ignore-cgroups")
            data: dict[str, Any] = {
                "flags": flags,
                "grouped": grouped,
                "memory_limit": spec.limits.memory,
                "binary": str(runsc.binary),
                "restored": image is not None,
            }
            if spec.limits.memory is not None and not (grouped and "memory" in tree.controllers):
                data["soft_memory"] = spec.limits.memory
            handle = Handle(spec.id, self.name, directory, "files", data)
            self._ending.discard(spec.id)
            yield handle
            group = tree.path(self.cgroup_parent, spec.id) if grouped and not self._rootless else None
            await to_its_end(
                asyncio.to_thread(gvisor_files.make, self.paths.runsc_root, spec, directory, self._init(), group)
            )
            if grouped:
                yield replace(handle, step="cgroup")
                await to_its_end(asyncio.to_thread(tree.create, self.cgroup_parent, spec.id, spec.limits))
                if tree.version == 1:
                    # runsc moves into the group and back; in version 2 what it starts begins there.
                    departure.expect_moves(tree)
            data = {**data, "linked": True}
            yield replace(handle, step="container", data=data)
            pid_file = directory / BUNDLE / "pid"
            command: tuple[str, ...] = ("create", f"--bundle={directory / BUNDLE}", f"--pid-file={pid_file}", spec.id)
            if image is not None:
                command = (*gvisor_snapshots.restore_command(image), *command[1:])
            launched = await departure.program.launch(
                runsc.argv(flags, *command),
                pid_file=pid_file,
                environment=runsc.environment(),
                # As root runsc puts what it starts into the group that its bundle names.
                join=tree.join_files(self.cgroup_parent, spec.id) if grouped and self._rootless else (),
                cores=gvisor_files.cores(spec) if not (grouped and "cpu" in tree.controllers) else None,
                user_namespace=self._rootless,
                timeout=TIMEOUT if image is None else gvisor_snapshots.RESTORE_TIMEOUT,
            )
            data = {**data, "holder": launched.holder.as_json(), "sandbox": launched.process.as_json()}
            yield replace(handle, step="created" if image is None else "started", data=data)

    def _set_out(self, directory: Path) -> _Departure:
        departure = _Departure(directory, self._forkserver)
        if self._rootless and self.tree.usable:
            departure.expect_moves(self.tree)  # the launcher moves, as soon as there is a group
        return departure

    @contextlib.asynccontextmanager
    async def _departure(self, directory: Path) -> AsyncIterator[_Departure]:
        """The launcher, where nobody has let it start earlier beside the preparations for it; gone afterwards."""
        departure = self._departures.pop(directory, None) or self._set_out(directory)
        try:
            yield departure
        finally:
            await departure.close()

    def _init(self) -> tuple[str, ...]:
        if self._argv is not None:
            return self._argv
        from sandbox_gateway.images.agent_layer import AGENT_ARGV

        return tuple(AGENT_ARGV)

    async def start(self, handle: Handle) -> Handle:
        """Start PID 1. Raises ``runtime_failed`` with runsc's reason."""
        await self._runsc_of(handle).call(handle.data["flags"], "start", handle.id)
        return replace(handle, step="started")

    # Pausable and Snapshots

    async def pause(self, handle: Handle) -> None:
        """Stop every process where it is; raises ``runtime_failed``."""
        await gvisor_snapshots.pause(self._runsc_of(handle), handle)

    async def resume(self, handle: Handle) -> None:
        """Let a paused sandbox go on; raises ``runtime_failed``."""
        await gvisor_snapshots.resume(self._runsc_of(handle), handle)

    async def snapshot(self, handle: Handle, image: Path) -> None:
        """Save a paused sandbox into the new directory ``image``; raises ``runtime_failed``, ``disk_full``."""
        shape = gvisor_bundle.shape(await asyncio.to_thread(gvisor_files.configuration, handle.directory))
        needs = gvisor_snapshots.Needs(await self.requirements(handle), shape)
        await gvisor_snapshots.save(self._runsc_of(handle), handle, image, needs)

    def restore(self, spec: SandboxSpec, directory: Path, image: Path) -> AsyncIterator[Handle]:
        """Make pipes and bundle, the control group, and the container from its image; it runs at the end.

        The memory is read from the image while the sandbox runs: until :meth:`loaded` has returned the image's files
        must not be changed. Their names are no longer needed from here on (removing is no change).
        """
        return self._make(spec, directory, image)

    async def loaded(self, handle: Handle) -> None:
        """Return when a restored sandbox has read all of its image; raises ``runtime_failed`` when it could not."""
        if handle.data.get("restored"):
            await gvisor_snapshots.loaded(self._runsc_of(handle), handle)

    async def requirements(self, handle: Handle | None = None) -> Mapping[str, str]:
        """The hash of the runsc (that made this sandbox) and the processor's features; raises ``runtime_missing``."""
        runsc = self._runsc() if handle is None else self._runsc_of(handle)
        return await self._fitness(runsc.binary).current()

    async def unfit(self, requirements: Mapping[str, str]) -> str:
        """Which runsc or which feature of the processor is missing; empty when none is."""
        return await self._fitness(self._runsc().binary).unfit(requirements)

    async def host_files(self, handle: Handle) -> tuple[str, ...]:
        """Files of bind mounts that are open or mapped: exactly, after a snapshot; before one also those that were
        open lately. Raises ``runtime_failed`` when the sandbox cannot be looked at."""
        sandbox = ProcessRef.from_json(handle.data.get("sandbox"))
        if sandbox is None:
            raise SandboxGatewayError("runtime_failed", f"the sandbox was never finished (step {handle.step})")
        config = await asyncio.to_thread(gvisor_files.configuration, handle.directory)
        return await asyncio.to_thread(gvisor_hostfiles.open_files, sandbox, config)

    def shape(self, spec: SandboxSpec) -> Mapping[str, str]:
        """Digests of what must be the same to restore one specification's image for another."""
        return gvisor_bundle.shape(gvisor_bundle.config(spec, self._init(), empty_root=""))

    async def _binary_for(self, spec: SandboxSpec, image: Path) -> Path:
        """The runsc that made the image, for a specification that it can be restored with."""
        needs = await asyncio.to_thread(gvisor_snapshots.read_image, image)
        needs.check_shape(self.shape(spec))
        binary = await self._fitness(self._runsc().binary).binary_for(needs.requirements)
        if binary is None:
            raise SandboxGatewayError("snapshot_unfit", await self.unfit(needs.requirements))
        return binary

    def _fitness(self, binary: Path) -> Requirements:
        if binary not in self._requirements:
            self._requirements[binary] = Requirements(self.paths, binary)
        return self._requirements[binary]

    async def restore_into(self, handle: Handle, image: Path) -> Handle:
        """Restore onto a sandbox that :meth:`create` has finished; raises as :meth:`restore`."""
        config = await asyncio.to_thread(gvisor_files.configuration, handle.directory)
        needs = await asyncio.to_thread(gvisor_snapshots.read_image, image)
        needs.check_shape(gvisor_bundle.shape(config))
        runsc = self._runsc_of(handle)
        if why := await self._fitness(runsc.binary).unfit(needs.requirements, only_own=True):
            raise SandboxGatewayError("snapshot_unfit", why)
        await gvisor_snapshots.restore_into(runsc, handle, image)
        return replace(handle, step="started", data={**handle.data, "restored": True})

    # Life

    async def attach(self, handle: Handle) -> LinkFds:
        """Open the host's ends of the link; raises ``link_failed`` when the pipes are gone."""
        return open_link(handle)

    async def wait(self, handle: Handle) -> Death:
        """Return when the sandbox has ended, which running out of memory is: while this is awaited, a soft memory limit
        is watched, and a control group's kill of one guest process becomes the end of the whole."""
        sandbox = ProcessRef.from_json(handle.data.get("sandbox"))
        if sandbox is None:
            return Death(DeathKind.FAILED, f"the sandbox was never finished (step {handle.step})")
        before = self._oom_kills(handle)
        over = False
        with launcher.LastWords(handle.directory) as words, contextlib.ExitStack() as stack:
            limit = handle.data.get("soft_memory")
            alarm = self.tree.memory_alarm(self.cgroup_parent, handle.id) if handle.data.get("grouped") else None
            if isinstance(limit, int):
                over = await MemoryWatch(sandbox, limit).run()
            elif alarm is not None:
                stack.callback(os.close, alarm)
                over = await end_on_alarm(sandbox, alarm)
            else:
                await processes.wait_exit(sandbox)
            said = words.read()
        if handle.id in self._ending or sandbox in self._ended:
            return Death(DeathKind.STOPPED, stderr_tail=said)
        if over or self._oom_kills(handle) > before:
            return Death(DeathKind.OUT_OF_MEMORY, stderr_tail=said)
        return Death(DeathKind.AGENT_DIED, stderr_tail=said)

    def _oom_kills(self, handle: Handle) -> int:
        return self.tree.usage(self.cgroup_parent, handle.id).oom_kills if handle.data.get("grouped") else 0

    async def alive(self, handle: Handle) -> bool:
        """Whether the sandbox's process runs: from the end of its creation to the end of its PID 1."""
        sandbox = ProcessRef.from_json(handle.data.get("sandbox"))
        return sandbox is not None and sandbox.alive()

    async def list(self) -> list[str]:
        """Ids found in the runtime directory, runsc's state and the control group parent."""
        return [*await asyncio.to_thread(self._list)]

    def _list(self) -> Sequence[str]:
        found = set(self.tree.names(self.cgroup_parent))
        with contextlib.suppress(OSError):
            found.update(path.parent.name for path in self.paths.runtime.glob(f"*/{BUNDLE}"))
        with contextlib.suppress(OSError):
            found.update(path.name.partition("_sandbox:")[0] for path in self.paths.runsc_root.glob("*_sandbox:*"))
        return sorted(found)

    async def stats(self, handle: Handle) -> Stats:
        """From the control group where there is one, else summed over the sandbox's processes."""
        return await asyncio.to_thread(self._stats, handle)

    def _stats(self, handle: Handle) -> Stats:
        limit = _limit_of(handle)
        sandbox = ProcessRef.from_json(handle.data.get("sandbox"))
        holder = ProcessRef.from_json(handle.data.get("holder"))
        group = cgroups.CgroupUsage()
        if handle.data.get("grouped"):
            group = self.tree.usage(self.cgroup_parent, handle.id)
        memory, cpu, count = group.memory, group.cpu_seconds, group.processes
        if None in (memory, cpu, count) and sandbox is not None and sandbox.alive():
            roots = [ref.pid for ref in (holder, sandbox) if ref is not None and ref.alive()]
            used = processes.usage(processes.descendants(roots))
            exact = sandbox_memory(sandbox)
            memory = memory if memory is not None else exact if exact is not None else used.memory
            cpu = cpu if cpu is not None else used.cpu_seconds
            count = count if count is not None else used.threads
        return Stats(memory, limit, cpu, count)

    # The end

    async def destroy(self, handle: Handle) -> None:
        """End and remove everything of the sandbox, whatever step its creation reached. Idempotent.

        Raises ``runtime_failed`` when a process or a control group will not go.
        """
        self._ending.add(handle.id)
        if (sandbox := ProcessRef.from_json(handle.data.get("sandbox"))) is not None:
            self._ended.add(sandbox)  # its id may be restored before everybody has noticed
        # All that was ever made of a finished one is in its group, or written down: no need to ask runsc.
        known = "holder" in handle.data and bool(handle.data.get("grouped"))
        if not known and self.binary is not None and self._state_files(handle.id):
            with contextlib.suppress(SandboxGatewayError):  # what it leaves is removed by hand below
                await self._runsc_of(handle).call(handle.data.get("flags", ()), "delete", "--force", handle.id)
                known = "holder" in handle.data
        await to_its_end(asyncio.to_thread(self._remove, handle, known))

    def _remove(self, handle: Handle, known: bool) -> None:
        holder = ProcessRef.from_json(handle.data.get("holder"))
        # Nothing can be launched any more from here on: the launcher opens the pipes first.
        launcher.Fifos.inside(handle.directory).remove()
        left: list[ProcessRef] = []
        quiet = 0
        # Twice nothing: one look over /proc can miss a process that is forked meanwhile.
        for _ in range(_ROUNDS):
            refs = [ref for ref in self._processes(handle, known) if ref != holder and ref.alive()]
            quiet = 0 if refs else quiet + 1
            if quiet == (1 if known else 2):
                break
            left = processes.kill_all(refs, _KILL_TIMEOUT)
        # The holder last: it reaps the others.
        left += processes.kill_all([holder] if holder is not None else [], _KILL_TIMEOUT)
        if left:
            pids = ", ".join(str(ref.pid) for ref in left)
            raise SandboxGatewayError("runtime_failed", f"processes of sandbox {handle.id} will not end: {pids}")
        for path in self._state_files(handle.id):
            path.unlink(missing_ok=True)
        self.tree.remove(self.cgroup_parent, handle.id)
        shutil.rmtree(handle.directory / BUNDLE, ignore_errors=True)

    def _processes(self, handle: Handle, known: bool) -> set[ProcessRef]:
        """All that may run of the sandbox; ``known`` when the recorded ones and the group's are all there can be."""
        found = set(self.tree.processes(self.cgroup_parent, handle.id))
        sandbox = ProcessRef.from_json(handle.data.get("sandbox"))
        if sandbox is not None:
            found.add(sandbox)
        if not known:
            found.update(processes.find(lambda argv, environment: self._is_ours(handle, argv, environment)))
        return found

    def _is_ours(self, handle: Handle, argv: Sequence[str], environment: Sequence[str]) -> bool:
        if f"{launcher.MARKER}={handle.directory}" in environment:
            return True
        bundle = str(handle.directory / BUNDLE)
        ours = {handle.id, bundle, f"--bundle={bundle}"}
        return f"--root={self.paths.runsc_root}" in argv and not ours.isdisjoint(argv)

    def _state_files(self, sandbox_id: str) -> Sequence[Path]:
        root = self.paths.runsc_root
        with contextlib.suppress(OSError):
            names = (f"{sandbox_id}_sandbox:", f"runsc-{sandbox_id}.sock")
            return [path for path in root.iterdir() if path.name.startswith(names)]
        return []

    def _runsc(self, binary: Path | None = None) -> Runsc:
        binary = binary or self.binary
        if binary is None:
            raise SandboxGatewayError("runtime_missing", "there is no runsc")
        return Runsc(binary, self.paths.runsc_root)

    def _runsc_of(self, handle: Handle) -> Runsc:
        """The binary that made the sandbox, which need not be ours any more; ours when it is gone."""
        named = handle.data.get("binary")
        return self._runsc(Path(named) if isinstance(named, str) and os.access(named, os.X_OK) else None)


class _Departure:
    """The launcher on its way, and the wait before processes are moved into a control group."""

    def __init__(self, directory: Path, forkserver: Forkserver) -> None:
        self.program = launcher.Launcher(directory, forkserver)
        self._moves: asyncio.Task[None] | None = None

    def expect_moves(self, tree: CgroupTree) -> None:
        """Take that wait now, and keep it away until :meth:`close`. Nothing can be done with groups meanwhile."""
        if self._moves is None:
            self._moves = asyncio.create_task(_expect_moves(tree))

    async def close(self) -> None:
        """End both. Idempotent."""
        if self._moves is not None:
            self._moves.cancel()
        await self.program.close()


async def _expect_moves(tree: CgroupTree) -> None:
    while True:
        await asyncio.to_thread(tree.expect_moves)
        await asyncio.sleep(_MOVES)


def open_link(handle: Handle) -> LinkFds:
    """The host's ends of the pipes in a sandbox's directory, read-write so that no side's end is an end of file."""
    fifos = launcher.Fifos.inside(handle.directory)
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        read_fd = os.open(fifos.stdout, flags)
        try:
            return LinkFds(read_fd, os.open(fifos.stdin, flags))
        except OSError:
            os.close(read_fd)
            raise
    except OSError as error:
        raise SandboxGatewayError("link_failed", f"sandbox {handle.id} has no link: {error.strerror}") from error


def _limit_of(handle: Handle) -> int | None:
    limit = handle.data.get("memory_limit")
    return limit if isinstance(limit, int) else None
