"""Specifications, states and transitions: frozen values, no I/O."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError


class State(enum.StrEnum):
    """Where a sandbox is in its life (DESIGN section 5)."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    RESUMING = "resuming"
    RESTARTING = "restarting"
    EXPIRED = "expired"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    FAILED = "failed"


_ALWAYS = frozenset({State.TERMINATING, State.FAILED})

TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.CREATING: _ALWAYS | {State.RUNNING},
        State.RUNNING: _ALWAYS | {State.PAUSED, State.SUSPENDING, State.RESTARTING},
        State.PAUSED: _ALWAYS | {State.RUNNING, State.SUSPENDING},
        State.SUSPENDING: _ALWAYS | {State.SUSPENDED, State.RUNNING, State.PAUSED},
        State.SUSPENDED: _ALWAYS | {State.RESUMING, State.EXPIRED},
        State.RESUMING: _ALWAYS | {State.RUNNING, State.SUSPENDED},
        State.RESTARTING: _ALWAYS | {State.RUNNING},
        State.EXPIRED: _ALWAYS,
        State.TERMINATING: frozenset({State.TERMINATED, State.FAILED}),
        State.TERMINATED: frozenset({State.CREATING, State.TERMINATING}),
        State.FAILED: frozenset({State.CREATING, State.TERMINATING}),
    }
)

LIVE = frozenset(
    {State.CREATING, State.RUNNING, State.PAUSED, State.SUSPENDING, State.RESUMING, State.RESTARTING, State.TERMINATING}
)
"""States in which processes of the sandbox may exist."""


BLANK = "template-"
"""The beginning of the ids of sandboxes that are made for a template."""
STANDBY = "standby-"
"""The beginning of the ids of sandboxes that stand ready for the next kernel."""


def advance(old: State, new: State) -> State:
    """Return ``new`` when the table allows ``old -> new``; raise ``illegal_transition`` otherwise."""
    if new not in TRANSITIONS[old]:
        raise SandboxGatewayError("illegal_transition", f"a sandbox that is {old} cannot become {new}")
    return new


NOT_ISOLATED = frozenset({"fake"})
"""Runtimes that isolate nothing; said wherever they show (DESIGN 4.12)."""


def timestamp(then: float) -> str:
    """``then`` (seconds since the epoch) as RFC 3339 in UTC, always with a fraction.

    jupyter_server reads a gateway's kernels with ``%f`` (``gateway/managers.py``), also whole seconds.
    """
    return datetime.fromtimestamp(then, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class OnOwnerExit(enum.StrEnum):
    """What becomes of a sandbox whose owning process is gone (DESIGN 4.8)."""

    TERMINATE = "terminate"
    KEEP = "keep"
    SUSPEND = "suspend"


class WorkspaceMode(enum.StrEnum):
    """Whether the notebook's directory is visible inside, and how."""

    NONE = "none"
    RO = "ro"
    RW = "rw"


DEFAULT_IDLE_CPU = 0.02
"""Cores. An idle ipykernel in gVisor uses about a tenth of it."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Seconds without activity until each tier; None means never (DESIGN 4.11)."""

    pause: float | None = None
    suspend: float | None = None
    expire: float | None = None
    cpu: float = DEFAULT_IDLE_CPU
    """Processor use, in cores, from which on a kernel without a running request is not idle."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sandbox may use. ``None`` means no limit of ours."""

    cpu: float | None = None
    """Cores, as a rate: 1.5 is one and a half cores."""
    memory: int | None = None
    """Bytes, everything of the sandbox counted (application, files in memory, gVisor itself)."""
    disk: int | None = None
    """Bytes of files written inside (they live in memory; see ``memory``)."""
    processes: int | None = None
    """Processes and threads inside."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A host directory seen inside."""

    source: str
    """Absolute path on the host."""
    destination: str
    """Absolute path inside."""
    readonly: bool = True


@dataclass(frozen=True, slots=True)
class Layer:
    """One immutable EROFS file (or, without mkfs.erofs, a live read-only directory) of a root filesystem."""

    source: str
    """Absolute path on the host of the ``.erofs`` file, or of the directory when ``kind`` is ``"bind"``."""
    destination: str
    """Absolute path inside; ``"/"`` for the root layer."""
    kind: str = "erofs"
    """``"erofs"`` or ``"bind"``."""
    digest: str | None = None
    """``sha256:...`` of the file; None for a live view."""
    writable: bool = False
    """True: writes are taken, in memory, and vanish with the sandbox."""


@dataclass(frozen=True, slots=True)
class Image:
    """A root filesystem: one root layer and what is mounted over it, parents before children."""

    name: str
    """How users call it: ``host``, ``host:/path/to/python``, ``directory:/path``."""
    layers: tuple[Layer, ...]
    interpreter: str | None = None
    """Absolute path inside of the Python that kernels use; None where the image has none."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables the image wants set for a kernel (``PATH``, ``LANG``...)."""
    agent: Layer | None = None
    """The agent's own layer, mounted at ``/opt/agent``."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What to run as the kernel, as a Jupyter kernelspec says it."""

    argv: tuple[str, ...]
    """With ``{connection_file}`` where the path belongs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/home/jovyan"
    interrupt_mode: str = "signal"
    """``"signal"`` or ``"message"``."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """Everything a runtime needs to make one sandbox. The id is the kernel's id."""

    id: str
    profile: str
    runtime: str
    image: Image
    limits: Limits = Limits()
    mounts: tuple[Mount, ...] = ()
    hostname: str = "sandbox"
    kernel_uid: int = 1000
    """Guest uid of the kernel; has no capabilities even when it is 0."""
    agent_uid: int = 64999
    """Guest uid of PID 1; never equal to ``kernel_uid``."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What another process needs to drive a sandbox that it did not create, beside the record. Private: it holds the
    kernel's environment and key."""

    spec: SandboxSpec
    kernel: KernelSpec
    key: bytes
    """The HMAC key that clients and kernel sign messages with."""
    uid: int
    """The kernel's uid and gid inside."""
    gid: int
    missing_file_hint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What has to be known to answer for the kernel while it sleeps (``KernelChannels.facts``)."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form; :meth:`from_dict` reads it back."""
        return {**asdict(self), "key": self.key.decode("ascii")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Launch:
        """Read what :meth:`as_dict` wrote."""
        spec, kernel = dict(data["spec"]), dict(data["kernel"])
        image = dict(spec["image"])
        image["layers"] = tuple(Layer(**layer) for layer in image["layers"])
        image["agent"] = None if image["agent"] is None else Layer(**image["agent"])
        spec["image"] = Image(**image)
        spec["limits"] = Limits(**spec["limits"])
        spec["mounts"] = tuple(Mount(**mount) for mount in spec["mounts"])
        kernel["argv"] = tuple(kernel["argv"])
        return cls(
            **{**data, "spec": SandboxSpec(**spec), "kernel": KernelSpec(**kernel), "key": data["key"].encode("ascii")}
        )


class DeathKind(enum.StrEnum):
    """Why a kernel or its sandbox ended."""

    EXITED = "exited"
    """The kernel process ended by itself or by a signal; the sandbox may live on."""
    OUT_OF_MEMORY = "out_of_memory"
    STOPPED = "stopped"
    """We were asked to end it."""
    OWNER_GONE = "owner_gone"
    AGENT_DIED = "agent_died"
    """PID 1 was ended or stopped speaking: the sandbox is gone."""
    MACHINE_RESTARTED = "machine_restarted"
    EXPIRED = "expired"
    """Its idle time was over (DESIGN 4.11)."""
    FAILED = "failed"
    """The runtime failed; ``detail`` says how."""


@dataclass(frozen=True, slots=True)
class Death:
    """The reason for an end; every end has one (DESIGN 5, Errors)."""

    kind: DeathKind
    detail: str = ""
    """One line for people."""
    exit_code: int | None = None
    signal: int | None = None
    stderr_tail: str = ""
    """The last lines of the kernel's stderr."""

    def describe(self) -> str:
        """One line that tells a user what happened."""
        return self.detail or _DEATH_TEXT[self.kind]

    def as_dict(self) -> dict[str, Any]:
        """JSON form; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Death:
        """Read what :meth:`as_dict` wrote."""
        return cls(**{**data, "kind": DeathKind(data["kind"])})


_DEATH_TEXT = {
    DeathKind.EXITED: "the kernel exited",
    DeathKind.OUT_OF_MEMORY: "out of memory",
    DeathKind.STOPPED: "stopped on request",
    DeathKind.OWNER_GONE: "ended because the process that owned it is gone",
    DeathKind.AGENT_DIED: "the sandbox's init process ended",
    DeathKind.MACHINE_RESTARTED: "machine restarted",
    DeathKind.EXPIRED: "expired",
    DeathKind.FAILED: "the runtime failed",
}


@dataclass(frozen=True, slots=True)
class Activity:
    """When a sandbox was used last, and what was announced since; times in seconds since the epoch."""

    last: float
    expiry_announced: float | None = None
    """When its users were told that it will expire; counts only if nothing used it since."""
    end_announced: float | None = None
    """When they were told that the longest life of its profile will be over."""


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """What the store knows of one sandbox."""

    id: str
    state: State
    profile: str
    runtime: str
    created: float
    """Seconds since the epoch."""
    changed: float
    """Seconds since the epoch, of the last state change."""
    boot_id: str
    """The machine's boot id when it was created."""
    step: str = ""
    """The creation step that was begun last."""
    handle: Mapping[str, Any] = field(default_factory=dict)
    """What the runtime needs to find it again (JSON)."""
    layers: tuple[str, ...] = ()
    """Digests of the layers it uses; they are kept while it exists."""
    on_owner_exit: OnOwnerExit = OnOwnerExit.TERMINATE
    grace: float = 30.0
    """Seconds without an owner before ``on_owner_exit`` applies."""
    owner_pid: int | None = None
    death: Death | None = None
    notes: tuple[str, ...] = ()
    """What is only soft or cannot be enforced here, for people."""
    name: str = ""
    """A label for people (the notebook's path)."""
    epoch: int = 1
    """Numbers of the link belong to an epoch, which each restore begins anew (DESIGN 4.3)."""
    snapshot: str | None = None
    """The snapshot that a suspended sandbox is saved in."""
    parent: str | None = None
    """What it was made from: ``sandbox:<id>``, ``snapshot:<id>`` or ``template:<key>``; None for a cold start."""
    owner: str = ""
    """The user of a gateway that it belongs to; empty for one that an application on this machine made."""
    idle: Idle | None = None
    """The idle times that its caller chose; None: its profile's, as they are at any time."""

    @property
    def blank(self) -> bool:
        """Whether it is nobody's: being made for a template, or standing ready in a pool."""
        return self.id.startswith((BLANK, STANDBY)) and self.state in {State.CREATING, State.TERMINATING}

    def over(self) -> SandboxGatewayError:
        """The error for who wants something of it when it has ended: ``expired`` or ``illegal_transition``."""
        why = self.death.describe() if self.death is not None else "it has ended"
        expired = self.death is not None and self.death.kind is DeathKind.EXPIRED
        return SandboxGatewayError(
            "expired" if expired else "illegal_transition", f"sandbox {self.id} is {self.state}: {why}"
        )

    def moved(self, state: State, now: float, **changes: Any) -> SandboxRecord:
        """A copy in ``state``, checked against :data:`TRANSITIONS`."""
        return replace(self, state=advance(self.state, state), changed=now, **changes)
