"""A runtime without isolation, for tests and demonstrations: the real agent as an ordinary process of the host.

It keeps the whole contract of :mod:`sandbox_gateway.runtimes.base` (steps, named pipes, a life of its own after its
creator) but nothing is held back from the code that runs: **not isolated**. It must be asked for by name.
Its snapshots are the stopped processes themselves (:mod:`sandbox_gateway.testing.parking`): no copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import sandbox_gateway
from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host import processes
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.model import Death, DeathKind, SandboxSpec
from sandbox_gateway.runtimes import launcher
from sandbox_gateway.runtimes.base import Capability, Handle, LinkFds, RuntimeReport, Stats
from sandbox_gateway.runtimes.forkserver import Forkserver
from sandbox_gateway.runtimes.gvisor import open_link
from sandbox_gateway.runtimes.waiting import to_its_end
from sandbox_gateway.testing import parking
from sandbox_gateway.testing.parking import Parking

KIND = "fake"
"""Directory in a sandbox's runtime directory that says whose it is; the kernel's sockets are in it."""

_KILL_TIMEOUT = 10.0


class FakeRuntime:
    """Runs the agent as a detached process of this user."""

    name = "fake"
    isolated = False

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self._ending: set[str] = set()
        self._parked: dict[ProcessRef, asyncio.Event] = {}
        self._forkserver = Forkserver()

    def close(self) -> None:
        """End what forks the launchers."""
        self._forkserver.close()

    async def probe(self) -> RuntimeReport:
        """Always able to run, never isolated, without any limit."""
        why = "the fake runtime holds nothing back"
        limits = (Capability(f"limits.{name}", False, why) for name in ("memory", "cpu", "processes", "disk"))
        run = Capability("run", True, "not isolated: for tests and demonstrations only")
        saving = Capability("snapshots", True, "into the same id only: the stopped processes are kept, not copied")
        return RuntimeReport("fake", False, "not isolated", (run, Capability("pause", True), saving, *limits))

    def expecting(self, directory: Path) -> contextlib.nullcontext[None]:
        """There is nothing to begin."""
        return contextlib.nullcontext()

    async def create(self, spec: SandboxSpec, directory: Path) -> AsyncIterator[Handle]:
        """Make the pipes."""
        self._ending.discard(spec.id)
        handle = Handle(spec.id, self.name, directory, "files", {"mounts": [mount.source for mount in spec.mounts]})
        yield handle
        try:
            (directory / KIND).mkdir(mode=0o700)
            launcher.Fifos.inside(directory).make()
        except OSError as error:
            raise storage_error(error, f"cannot write in {directory}") from error
        yield replace(handle, step="created")

    async def start(self, handle: Handle) -> Handle:
        """Start the agent, detached."""
        launched = await launcher.launch(
            [sys.executable, "-P", "-m", "sandbox_gateway.agent", "--directory", str(handle.directory / KIND)],
            handle.directory,
            self._forkserver,
            environment=_environment(handle),
            # Not one that ends with the agent: what the agent leaves behind is found among its children.
            holder=[shutil.which("sleep") or "sleep", "infinity"],
        )
        data = {**handle.data, "holder": launched.holder.as_json(), "sandbox": launched.process.as_json()}
        return replace(handle, step="started", data=data)

    # Pausable and Snapshots

    async def pause(self, handle: Handle) -> None:
        """SIGSTOP to everything but the holder."""
        await to_its_end(asyncio.to_thread(parking.stop_all, lambda: self._processes(handle)[0]))

    async def resume(self, handle: Handle) -> None:
        """SIGCONT to everything."""
        await to_its_end(asyncio.to_thread(lambda: parking.proceed(self._all(handle))))

    async def snapshot(self, handle: Handle, image: Path) -> None:
        """Let the sandbox be parked when it is removed, for as long as ``image`` is there."""
        await parking.save(handle, KIND, Parking.of(self.paths, handle.id), image)

    async def restore(self, spec: SandboxSpec, directory: Path, image: Path) -> AsyncIterator[Handle]:
        """Thaw what is parked. Raises ``unsupported`` for another id, ``runtime_failed`` when it is gone."""
        found = await asyncio.to_thread(parking.saved, image)
        if found["id"] != spec.id:
            raise SandboxGatewayError("unsupported", "the fake runtime restores a sandbox under its own id only")
        self._ending.discard(spec.id)
        handle = Handle(spec.id, self.name, directory, "files", {})
        yield handle
        await to_its_end(asyncio.to_thread(Parking.of(self.paths, spec.id).take, directory, KIND))
        handle = replace(handle, data=found["data"])
        yield replace(handle, step="thaw")
        await self.resume(handle)
        if not await self.alive(handle):
            raise SandboxGatewayError("runtime_failed", "the fake runtime's processes of this image have ended")
        yield replace(handle, step="started")

    async def loaded(self, handle: Handle) -> None:
        """At once: nothing is read."""

    def shape(self, spec: SandboxSpec) -> Mapping[str, str]:
        """The id, under which alone a sandbox is restored."""
        return {"id": spec.id}

    async def requirements(self, handle: Handle | None = None) -> Mapping[str, str]:
        """The boot of the machine, which the parked processes do not outlive."""
        return {"boot": boot_id()}

    async def unfit(self, requirements: Mapping[str, str]) -> str:
        """That the machine was restarted; empty when it was not."""
        same = requirements.get("boot") == boot_id()
        return "" if same else "the machine was restarted, which the fake runtime's snapshots do not outlive"

    async def host_files(self, handle: Handle) -> tuple[str, ...]:
        """Regular files below the specification's mounts that a process has open or mapped."""
        mounts = handle.data.get("mounts", ())
        return await asyncio.to_thread(lambda: _open_files([ref.pid for ref in self._processes(handle)[0]], mounts))

    # The rest of its life

    async def attach(self, handle: Handle) -> LinkFds:
        """Open the pipes."""
        return open_link(handle)

    async def wait(self, handle: Handle) -> Death:
        """Return when the agent's process has ended."""
        agent = ProcessRef.from_json(handle.data.get("sandbox"))
        if agent is None:
            return Death(DeathKind.FAILED, f"the sandbox was never started (step {handle.step})")
        if agent in Parking.of(self.paths, handle.id).processes():
            return self._death(handle, "")
        parked = self._parked.setdefault(agent, asyncio.Event())
        with launcher.LastWords(handle.directory) as words:
            waits = [asyncio.ensure_future(wait) for wait in (processes.wait_exit(agent), parked.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            said = words.read()
        return self._death(handle, said)

    def _death(self, handle: Handle, said: str) -> Death:
        kind = DeathKind.STOPPED if handle.id in self._ending else DeathKind.AGENT_DIED
        return Death(kind, stderr_tail=said)

    async def alive(self, handle: Handle) -> bool:
        """Whether the agent's process runs."""
        agent = ProcessRef.from_json(handle.data.get("sandbox"))
        return agent is not None and agent.alive() and agent not in Parking.of(self.paths, handle.id).processes()

    async def list(self) -> list[str]:
        """Ids found in the runtime directory."""
        try:
            return sorted(path.parent.name for path in self.paths.runtime.glob(f"*/{KIND}"))
        except OSError:
            return []

    async def stats(self, handle: Handle) -> Stats:
        """Summed over the processes."""
        refs = (ProcessRef.from_json(handle.data.get(name)) for name in ("holder", "sandbox"))
        roots = [ref.pid for ref in refs if ref is not None and ref.alive()]
        if not roots or not await self.alive(handle):
            return Stats()
        used = await asyncio.to_thread(lambda: processes.usage(processes.descendants(roots)))
        return Stats(memory=used.memory, cpu_seconds=used.cpu_seconds, processes=used.threads)

    async def destroy(self, handle: Handle) -> None:
        """End the agent and everything below it, and remove the files; park it all while an image refers to it."""
        self._ending.add(handle.id)
        await asyncio.shield(asyncio.to_thread(self._remove, handle))
        agent = ProcessRef.from_json(handle.data.get("sandbox"))
        if agent in self._parked:
            self._parked.pop(agent).set()

    def _remove(self, handle: Handle) -> None:
        if Parking.of(self.paths, handle.id).put_if_saved(handle.directory, KIND, lambda: self._all(handle)):
            return
        # Nothing can be launched any more from here on: the launcher opens the pipes first.
        launcher.Fifos.inside(handle.directory).remove()
        left: list[ProcessRef] = []
        quiet = 0
        # Twice nothing: one look over /proc can miss a process that is forked meanwhile.
        while quiet < 2:
            refs, holders = self._processes(handle)
            quiet = 0 if refs or holders else quiet + 1
            # Orphans come to the holder, which is a subreaper: so it goes last, when nothing is below it any more.
            left = processes.kill_all(refs or holders, _KILL_TIMEOUT)
            if left:
                raise SandboxGatewayError("runtime_failed", f"processes of sandbox {handle.id} will not end: {left}")
        shutil.rmtree(handle.directory / KIND, ignore_errors=True)

    def _all(self, handle: Handle) -> set[ProcessRef]:
        return set().union(*self._processes(handle))

    def _processes(self, handle: Handle) -> tuple[set[ProcessRef], set[ProcessRef]]:
        """What runs of the sandbox now, and what holds it."""
        recorded = [ProcessRef.from_json(handle.data.get(name)) for name in ("holder", "sandbox")]
        marker = f"{launcher.MARKER}={handle.directory}"
        marked = processes.find(lambda argv, environment: marker in environment)
        parked = Parking.of(self.paths, handle.id).processes()
        roots = {ref for ref in (*recorded, *marked) if ref is not None and ref.alive()} - parked
        holders = {ref for ref in roots if ref == recorded[0] or processes.command_line(ref.pid)[1:] == ["infinity"]}
        below = processes.descendants([ref.pid for ref in roots])
        return {ref for pid in below if (ref := ProcessRef.of(pid)) is not None} - holders, holders


def _open_files(pids: Iterable[int], mounts: Iterable[str]) -> tuple[str, ...]:
    found = set()
    for pid in pids:
        for place in ("fd", "map_files"):
            for link in Path(f"/proc/{pid}/{place}").glob("*"):
                try:
                    path = os.readlink(link)
                    if any(path.startswith(f"{mount}/") for mount in mounts) and os.path.isfile(path):
                        found.add(path)
                except OSError:
                    continue  # it was closed meanwhile, or is not ours to see
    return tuple(sorted(found))


def _environment(handle: Handle) -> Mapping[str, str]:
    """As bare as inside a sandbox, but the agent has to find our package."""
    package = Path(str(sandbox_gateway.__file__)).parent.parent
    found = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "SANDBOX_ID": handle.id}
    return {**found, "PYTHONPATH": str(package)}


class FailsDuringCreate(FakeRuntime):
    """Fails at one step of the creation: when it is to be taken, or with ``after`` when it has been."""

    def __init__(self, paths: Paths, step: str = "created", *, after: bool = False) -> None:
        super().__init__(paths)
        self.step = step
        self.after = after

    async def create(self, spec: SandboxSpec, directory: Path) -> AsyncIterator[Handle]:
        """As usual up to the step, then ``runtime_failed``."""
        reached = False
        async for handle in super().create(spec, directory):
            if reached or (handle.step == self.step and not self.after):
                break
            reached = handle.step == self.step
            yield handle
        raise SandboxGatewayError("runtime_failed", f"asked to fail at {self.step}")


class FailsDuringStart(FakeRuntime):
    """Starts the agent and then says that it could not."""

    async def start(self, handle: Handle) -> Handle:
        """Raise ``runtime_failed`` with the process running, the worst case for who cleans up."""
        await super().start(handle)
        raise SandboxGatewayError("runtime_failed", "asked to fail at the start")


class FailsDuringAttach(FakeRuntime):
    """Runs, but its link cannot be opened."""

    async def attach(self, handle: Handle) -> LinkFds:
        """Raise ``link_failed``."""
        raise SandboxGatewayError("link_failed", "asked to fail at attach")


class DiesAfter(FakeRuntime):
    """Its agent is killed some seconds after the start."""

    def __init__(self, paths: Paths, seconds: float) -> None:
        super().__init__(paths)
        self.seconds = seconds

    async def wait(self, handle: Handle) -> Death:
        """Kill the agent when its time has come; the death says so."""
        ended = asyncio.ensure_future(super().wait(handle))
        done, _ = await asyncio.wait({ended}, timeout=self.seconds)
        agent = ProcessRef.from_json(handle.data.get("sandbox"))
        if not done and agent is not None:
            agent.kill()
        try:
            return await ended
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                ended.cancel()


class FailsDuringDestroy(FakeRuntime):
    """Its first ``times`` removals fail; later ones work."""

    def __init__(self, paths: Paths, times: int = 1) -> None:
        super().__init__(paths)
        self.times = times

    async def destroy(self, handle: Handle) -> None:
        """Raise ``runtime_failed`` while failures are left."""
        if self.times > 0:
            self.times -= 1
            raise SandboxGatewayError("runtime_failed", "asked to fail at the removal")
        await super().destroy(handle)
