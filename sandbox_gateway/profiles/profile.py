"""The values: :class:`Profile`, and the two that are built in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from sandbox_gateway.model import Idle, Limits, Mount, OnOwnerExit, WorkspaceMode

HOME = "/home/jovyan"
"""The kernel's home inside."""
WORKSPACE = f"{HOME}/work"
"""Where the notebook's folder is seen inside."""
DEFAULT_GRACE = 30.0
"""Seconds."""
DEFAULT_POOL_AGE = 3600.0
"""Seconds."""
DEFAULT_SNAPSHOT_BUDGET = 20 * 1024**3
"""Bytes."""
DEFAULT_PROFILE = "python3-gvisor"
RESERVED_VARIABLES = frozenset({"SANDBOX_ID", "JPY_PARENT_PID"})
"""Never taken from a profile or a client: ours, and one that makes ipykernel exit."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many sandboxes are kept ready for the next kernels of a profile."""

    created: int = 0
    """Made, but nothing restored into them yet: nearly no memory."""
    ready: int = 0
    """Fully restored kernels, which hold their memory."""
    max_age: float | None = DEFAULT_POOL_AGE
    """Seconds after which one of them is replaced; None means never."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The most that who starts a sandbox may choose for it. None, or an empty list: what the profile itself has."""

    cpu: float | None = None
    """Cores; infinite: any number, or no limit."""
    memory: float | None = None
    """Bytes; infinite as above."""
    disk: float | None = None
    """Bytes; infinite as above."""
    processes: float | None = None
    """Infinite as above."""
    image: tuple[str, ...] = ()
    """Other images than the profile's own."""
    idle: Idle | bool | None = None
    """The longest times (None in them: any, and never); True: any times; False: none can be chosen."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form: ``"none"`` where there is no bound."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        shown = {key: "none" if value == math.inf else value for key, value in data.items()}
        return {
            **shown,
            "image": list(self.image),
            "idle": asdict(self.idle) if isinstance(self.idle, Idle) else self.idle,
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all profiles of an installation."""

    snapshot_budget: int | None = DEFAULT_SNAPSHOT_BUDGET
    """Bytes on disk that snapshots may take before those that nothing refers to are removed, oldest first; None means
    any amount. A suspended kernel is never removed for it."""
    memory_reserve: int | None = None
    """Bytes of the machine's memory that should stay free: below it idle kernels are suspended, longest idle first.
    None means that memory is not watched."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One offer, checked; what a new sandbox is made from."""

    name: str
    display_name: str = ""
    """What Jupyter's launcher shows; never empty in a loaded profile."""
    description: str = ""
    """One line for people."""
    language: str = "python"
    runtime: str = "gvisor"
    """``gvisor``, or ``fake`` (not isolated)."""
    image: str = "host"
    """``host``, ``host:/path/to/python`` or ``directory:/path``."""
    editable: bool = False
    """Whether editable installs are taken into the image."""
    packages_writable: bool = True
    """Whether the environment takes writes inside (in memory)."""
    workspace: WorkspaceMode = WorkspaceMode.NONE
    limits: Limits = field(default_factory=Limits)
    required_limits: frozenset[str] = frozenset()
    """Names of the limits that the file asks for. One of these that cannot be enforced is an error; a default one is
    a note in the sandbox's record."""
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    client_environment: tuple[str, ...] = ("TZ",)
    """Names, or beginnings with a ``*``, of variables a client may hand in; see :meth:`allows`."""
    mounts: tuple[Mount, ...] = ()
    idle: Idle = field(default_factory=Idle)
    max_busy: float | None = None
    """Seconds a single request may run; None means any time."""
    max_lifetime: float | None = None
    """Seconds a sandbox may live; None means for ever."""
    on_owner_exit: OnOwnerExit = OnOwnerExit.TERMINATE
    grace: float = DEFAULT_GRACE
    """Seconds without an owner before ``on_owner_exit`` applies."""
    template: bool = True
    """Whether its kernels start by restoring a ready one; never true for kernels other than ipykernel."""
    preload: tuple[str, ...] = ()
    """Modules that the ready kernel has imported."""
    pool: Pool = field(default_factory=Pool)
    choices: Choices = field(default_factory=Choices)
    """What a caller may choose; see :mod:`sandbox_gateway.choices`."""
    chosen: frozenset[str] = frozenset()
    """Names of what a caller has chosen in this one; empty in a loaded profile."""
    active_output: bool = False
    """Whether pages run scripts in its kernels' output without asking their user."""
    argv: tuple[str, ...] | None = None
    """The kernel's command inside, where a first word ``python`` or ``python3`` is the image's interpreter;
    None means the kernelspec's own (ipykernel)."""
    interrupt_mode: str = "signal"
    source: str = "built-in"
    """``built-in``, or the path of the file that names it."""

    @property
    def ipykernel(self) -> bool:
        """Whether the kernel is ipykernel, the one that can be given an identity after it has started."""
        return self.argv is None or is_ipykernel(self.argv)

    def allows(self, variable: str) -> bool:
        """Whether a client may set ``variable`` for the kernel (an allow-list; everything else stays outside)."""
        if variable in RESERVED_VARIABLES:
            return False
        return any(
            variable.startswith(entry[:-1]) if entry.endswith("*") else variable == entry
            for entry in self.client_environment
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON form, for people and tools; sizes in bytes, times in seconds."""
        data: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        mounts = [
            {"source": mount.source, "destination": mount.destination, "mode": "ro" if mount.readonly else "rw"}
            for mount in self.mounts
        ]
        return {
            **data,
            "workspace": str(self.workspace),
            "on_owner_exit": str(self.on_owner_exit),
            "limits": {item.name: getattr(self.limits, item.name) for item in fields(Limits)},
            "required_limits": sorted(self.required_limits),
            "environment": dict(self.environment),
            "client_environment": list(self.client_environment),
            "mounts": mounts,
            "idle": {item.name: getattr(self.idle, item.name) for item in fields(Idle)},
            "preload": list(self.preload),
            "pool": {item.name: getattr(self.pool, item.name) for item in fields(Pool)},
            "choices": self.choices.as_dict(),
            "chosen": sorted(self.chosen),
            "argv": None if self.argv is None else list(self.argv),
        }


def is_ipykernel(argv: Sequence[str]) -> bool:
    """Whether a kernel's command starts ipykernel."""
    return any(option == "-m" and name in ("ipykernel_launcher", "ipykernel") for option, name in pairwise(argv))


BUILT_IN: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                name=DEFAULT_PROFILE,
                display_name="Python 3 (gVisor)",
                description="Python in a sandbox without network and without any view of this machine's files.",
            ),
            Profile(
                name="python3-gvisor-files",
                display_name="Python 3 (gVisor, this folder)",
                description=(
                    "Python in a sandbox without network that sees the notebook's folder: any cell can read, change "
                    "and delete the files of that folder and of the folders in it, and nothing else of this machine."
                ),
                workspace=WorkspaceMode.RW,
            ),
        )
    }
)
"""Their limits are those of :func:`sandbox_gateway.profiles.load_profiles`, which knows the machine."""
