"""The contract of a runtime (DESIGN section 5).

A runtime makes places with a root filesystem, limits and a network policy, whose PID 1 is our agent and whose link
is a pair of byte streams. It knows nothing of Jupyter. Optional abilities are protocols of their own, reported by
:meth:`Runtime.probe` with a reason when they are absent; callers ask the report, never ``isinstance``.

The contract suite in :mod:`sandbox_gateway.testing.contract` runs against every runtime.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sandbox_gateway.model import Death, SandboxSpec


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing a runtime can or cannot do here."""

    name: str
    """``run``, ``limits.<name of a limit>``, ``pause``, ``snapshots``, ``gpu``..."""
    available: bool
    reason: str = ""
    """Why not, or in which way only (``soft: the owner watches and kills``)."""
    hint: str = ""
    """What the user can do about it."""


@dataclass(frozen=True, slots=True)
class RuntimeReport:
    """What :meth:`Runtime.probe` found."""

    runtime: str
    isolated: bool
    """False for ``fake``: shown wherever the runtime shows."""
    version: str = ""
    """For people only; never parsed."""
    capabilities: tuple[Capability, ...] = ()

    def get(self, name: str) -> Capability:
        """The capability called ``name``; an unknown one is absent."""
        for capability in self.capabilities:
            if capability.name == name:
                return capability
        return Capability(name, False, "this runtime does not know it")


@dataclass(frozen=True, slots=True)
class Handle:
    """What is needed to find a sandbox again from another process. Plain JSON values only."""

    id: str
    runtime: str
    directory: Path
    """The sandbox's private runtime directory; the runtime may keep files of its own in it."""
    step: str = ""
    """Name of the creation step that is about to be taken."""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def linked(self) -> bool:
        """Whether its pipes are there, before it is: what is written into them waits for it."""
        return self.data.get("linked") is True

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`of` reads them back."""
        return {
            "id": self.id,
            "runtime": self.runtime,
            "directory": str(self.directory),
            "step": self.step,
            "data": dict(self.data),
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Handle | None:
        """A recorded handle; None when nothing was made (an empty record)."""
        if not data:
            return None
        return cls(data["id"], data["runtime"], Path(data["directory"]), data.get("step", ""), data.get("data", {}))


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What one sandbox uses of the GPUs that it was given, all together; None is not known."""

    busy: float | None = None
    """How much of their time they worked lately, from 0 to 1."""
    memory: int | None = None
    """Bytes now, of their own memory."""
    memory_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """Resource use of one sandbox, all its host processes counted."""

    memory: int | None = None
    """Bytes now."""
    memory_limit: int | None = None
    cpu_seconds: float | None = None
    """Processor time since the start."""
    processes: int | None = None
    """Host threads or processes, as the runtime counts them."""
    disk: int | None = None
    """Bytes of the files written inside; a runtime that cannot see them leaves it to the agent."""
    gpu: GpuUse | None = None
    """None where it has no GPU."""


@dataclass(frozen=True, slots=True)
class LinkFds:
    """The host's ends of the link, non-blocking, owned by the caller who closes both."""

    read_fd: int
    """What PID 1 writes to its standard output."""
    write_fd: int
    """What PID 1 reads from its standard input."""


class Runtime(Protocol):
    """Makes, finds and removes sandboxes."""

    name: str
    isolated: bool

    async def probe(self) -> RuntimeReport:
        """Try what this machine, user and binary can do. Never raises for something that is merely absent."""
        ...

    def expecting(self, directory: Path) -> AbstractAsyncContextManager[None]:
        """Within the block a sandbox will be made in ``directory``, probably: what needs no specification may begin.

        Only a hint, of which nothing is left after the block.
        """
        ...

    def create(self, spec: SandboxSpec, directory: Path) -> AsyncIterator[Handle]:
        """Make the sandbox step by step, without starting PID 1.

        Each yielded handle describes *the step about to be taken*; the caller records it and then asks for the next
        one. After a crash at any point :meth:`destroy` with the last recorded handle leaves nothing behind.
        The last handle is the finished one (step ``"created"``). ``directory`` exists, is private and empty but for
        files whose names begin with ``owner``.
        """
        ...

    async def start(self, handle: Handle) -> Handle:
        """Start PID 1 (the agent) and return the handle with what is now known (process ids)."""
        ...

    async def attach(self, handle: Handle) -> LinkFds:
        """Open the host's ends of the link; works again after any earlier process that had them was killed."""
        ...

    async def wait(self, handle: Handle) -> Death:
        """Return when the sandbox as a whole has ended, with the reason as far as the runtime knows it."""
        ...

    async def alive(self, handle: Handle) -> bool:
        """Whether PID 1 of the sandbox still runs."""
        ...

    async def list(self) -> list[str]:
        """Ids of all sandboxes of this installation that this runtime knows, half-made ones included."""
        ...

    async def stats(self, handle: Handle) -> Stats:
        """Resource use now; fields that cannot be had are None."""
        ...

    async def destroy(self, handle: Handle) -> None:
        """End and remove everything of the sandbox (processes, mounts, cgroups, files it made in ``directory``).

        Idempotent; works for a handle of any step.
        """
        ...

    def close(self) -> None:
        """End what this process keeps ready to make sandboxes; those that are there stay. Idempotent, and no end: what
        is needed again is made again."""
        ...


class Pausable(Protocol):
    """Freezing and thawing; reported as the capability ``pause``."""

    async def pause(self, handle: Handle) -> None:
        """Stop every process of the sandbox where it is; its memory stays. Idempotent. Raises ``runtime_failed``."""
        ...

    async def resume(self, handle: Handle) -> None:
        """Let a paused sandbox go on. Idempotent. Raises ``runtime_failed``."""
        ...


class Snapshots(Protocol):
    """Saving a sandbox to disk and making sandboxes from what was saved; reported as the capability ``snapshots``.

    A runtime that has it is :class:`Pausable` too. What lies around an image (manifest, references, verification) is
    :mod:`sandbox_gateway.snapshots`' business; the runtime knows only its own files in one directory.
    """

    async def snapshot(self, handle: Handle, image: Path) -> None:
        """Save memory and files of a *paused* sandbox into ``image``, a directory that is made here (mode 0700).

        The sandbox stays paused, whatever happens. Raises ``runtime_failed`` or ``disk_full``; what is then in
        ``image`` is the caller's to remove.
        """
        ...

    def restore(self, spec: SandboxSpec, directory: Path, image: Path) -> AsyncIterator[Handle]:
        """Make a sandbox from an image, step by step as :meth:`Runtime.create`; the last handle (step ``"started"``)
        is that of a running one, whatever it was when it was saved.

        ``spec`` is that of the saved sandbox but for id, hostname, the sources of mounts, and limits that the host
        enforces. The image is only read, and that may go on after the last step until :meth:`loaded` has returned: its
        files may be removed meanwhile, not changed. Raises as :meth:`Runtime.create`, and ``snapshot_unfit``.
        """
        ...

    async def loaded(self, handle: Handle) -> None:
        """Return when a restored sandbox needs nothing of its image any more; at once for one that was not restored.

        Raises ``runtime_failed`` when the image could not be read to its end: the sandbox ends then.
        """
        ...

    def shape(self, spec: SandboxSpec) -> Mapping[str, str]:
        """What must be the same in two specifications for the image of the one to be restored for the other, by the
        names of the parts; a restore for another shape is refused (``snapshot_unfit``)."""
        ...

    async def requirements(self, handle: Handle | None = None) -> Mapping[str, str]:
        """What restoring an image that is made now (of this sandbox) will need, as texts for :meth:`unfit` later.

        gvisor: ``runsc`` (sha256 of the binary) and ``cpu`` (features, comma-separated)."""
        ...

    async def unfit(self, requirements: Mapping[str, str]) -> str:
        """Why an image with these requirements cannot be restored here now, in one line; empty when it can."""
        ...

    async def host_files(self, handle: Handle) -> tuple[str, ...]:
        """Paths on the host of regular files behind the sandbox's mounts that it has open or mapped.

        Exact between a snapshot and what follows it (the sandbox is paused then); at other times files that were open
        lately may be among them. A file that is open and deleted is not named: it is saved with its contents.
        """
        ...


class Prepared(Protocol):
    """Restoring onto a sandbox that was created before; reported as the capability ``prepared``. It is
    :class:`Snapshots` too."""

    async def restore_into(self, handle: Handle, image: Path) -> Handle:
        """Restore onto what :meth:`Runtime.create` has finished (step ``"created"``), instead of a start.

        Its specification has the shape of the saved one. Returns the handle of the running sandbox. Raises as
        :meth:`Snapshots.restore`; the sandbox is of no use then.
        """
        ...
