"""From the profile file to :class:`Profile` values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import Idle, Limits, Mount, OnOwnerExit, WorkspaceMode
from sandbox_gateway.profiles.checks import MIN_DISK, MIN_MEMORY, plain, semantic_problems
from sandbox_gateway.profiles.file import Problem, ProfileError, read
from sandbox_gateway.profiles.profile import BUILT_IN, Choices, Profile, Settings, is_ipykernel
from sandbox_gateway.profiles.values import duration, machine_memory, size

DEFAULT_MEMORY = "50%"
"""Of the machine: one runaway cell cannot push a laptop into swap, and one analysis still has room."""
DEFAULT_DISK = "25%"
"""Of the machine's *memory*, where the files live. Half of the default memory limit, so that a full disk says so
inside (``No space left on device``) before the sandbox runs out of memory."""
DEFAULT_PROCESSES = 1024
"""Stops a fork bomb; far above what BLAS thread pools and ``multiprocessing`` take on a laptop."""


class Places(Protocol):
    """The part of :class:`sandbox_gateway.host.paths.Paths` that profiles need (they stand below it)."""

    @property
    def home(self) -> Path:
        """What the product stores."""
        ...

    @property
    def runtime(self) -> Path:
        """Locks, sockets and FIFOs of the sandboxes."""
        ...

    @property
    def profiles(self) -> Path:
        """The profile file; it need not exist."""
        ...


class Profiles:
    """Profiles by name, the built-in ones first. Read-only, and like a mapping but for :meth:`get`."""

    def __init__(self, profiles: Mapping[str, Profile], file: Path, settings: Settings | None = None) -> None:
        self._profiles = MappingProxyType(dict(profiles))
        self.settings = settings or Settings()
        """What holds for all of them."""
        self.file = file
        """Where an administrator adds to them; it need not exist."""

    def get(self, name: str) -> Profile:
        """The profile called ``name``; raises ``unknown_profile``, whose hint lists the names."""
        found = self._profiles.get(name)
        if found is not None:
            return found
        near = difflib.get_close_matches(name, self._profiles, n=1)
        advice = f"Did you mean {near[0]!r}? " if near else ""
        hint = f"{advice}There are: {', '.join(self._profiles)}; {self.file} can add more."
        raise SandboxGatewayError("unknown_profile", f"there is no profile {name!r}", hint)

    def __getitem__(self, name: str) -> Profile:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._profiles

    def __iter__(self) -> Iterator[str]:
        return iter(self._profiles)

    def __len__(self) -> int:
        return len(self._profiles)

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._profiles.keys()

    def values(self) -> ValuesView[Profile]:
        """The profiles."""
        return self._profiles.values()

    def items(self) -> ItemsView[str, Profile]:
        """Names and profiles."""
        return self._profiles.items()


def load_profiles(paths: Places, *, memory: int | None = None) -> Profiles:
    """The built-in profiles and those of ``paths.profiles``; raises :class:`ProfileError` with all problems.

    ``memory`` (bytes) stands for the machine's own in shares such as ``"50%"``; None measures it.
    """
    total = machine_memory() if memory is None else memory
    merged = {name: _with_default_limits(profile, total) for name, profile in BUILT_IN.items()}
    file = read(paths.profiles)
    if file is None:
        return Profiles(merged, paths.profiles)
    problems: list[Problem] = []
    for name, table in file.tables.items():
        base = merged.get(name) or _with_default_limits(Profile(name=name, display_name=name), total)
        found = semantic_problems(file, name, table, base, total, (paths.home, paths.runtime))
        problems += found
        if not found:
            merged[name] = _apply(base, table, total, file.path)
    if problems:
        raise ProfileError(sorted(problems, key=lambda problem: problem.line))
    return Profiles(merged, paths.profiles, _settings(file.settings, total))


def _settings(table: Mapping[str, Any], memory: int) -> Settings:
    return Settings(**{key: size(value, memory) for key, value in table.items()})


def _with_default_limits(profile: Profile, memory: int) -> Profile:
    limits = Limits(
        memory=_bounded(DEFAULT_MEMORY, memory, MIN_MEMORY),
        disk=_bounded(DEFAULT_DISK, memory, MIN_DISK),
        processes=DEFAULT_PROCESSES,
    )
    return replace(profile, limits=limits)


def _apply(base: Profile, table: Mapping[str, Any], memory: int, source: str) -> Profile:
    """``base`` with the (checked) keys of ``table``."""
    changes: dict[str, Any] = {"source": source}
    limits: dict[str, Any] = {}
    for key, value in table.items():
        match key:
            case "cpu":
                limits[key] = None if value == "none" else float(value)
            case "processes":
                limits[key] = None if value == "none" else int(value)
            case "memory":
                limits[key] = _bounded(value, memory, MIN_MEMORY)
            case "disk":
                limits[key] = _bounded(value, memory, MIN_DISK)
            case "workspace":
                changes[key] = WorkspaceMode(value)
            case "on_owner_exit":
                changes[key] = OnOwnerExit(value)
            case "grace" | "max_busy" | "max_lifetime":
                changes[key] = duration(value)
            case "idle":
                changes[key] = replace(base.idle, **_converted(value, cpu=float))
            case "pool":
                changes[key] = replace(base.pool, **_converted(value, created=int, ready=int))
            case "choices":
                changes[key] = _choices(value, memory)
            case "environment":
                changes[key] = MappingProxyType({**base.environment, **value})
            case "client_environment" | "argv":
                changes[key] = tuple(value)
            case "preload":
                changes[key] = tuple(dict.fromkeys(value))
            case "mounts":
                changes[key] = tuple(_mount(item) for item in value)
            case _:
                changes[key] = value
    if "argv" in table and not is_ipykernel(table["argv"]):
        changes["template"] = False
    required = frozenset(name for name, value in limits.items() if value is not None)
    loaded = replace(base, limits=replace(base.limits, **limits), required_limits=required, **changes)
    bounds = table.get("choices", {}).get("idle")
    if isinstance(bounds, Mapping):
        # What is not bounded there is bounded by the profile's own time.
        return replace(loaded, choices=replace(loaded.choices, idle=replace(loaded.idle, **_converted(bounds))))
    return loaded


def _choices(table: Mapping[str, Any], memory: int) -> Choices:
    found: dict[str, Any] = {}
    for key, value in table.items():
        match key:
            case "image":
                found[key] = tuple(dict.fromkeys(value))
            case "idle":
                found[key] = value if isinstance(value, bool) else Idle()
            case "memory" | "disk":
                most = size(value, memory)
                found[key] = math.inf if most is None else most
            case _:
                found[key] = math.inf if value == "none" else value
    return Choices(**found)


def _converted(table: Mapping[str, Any], **others: Callable[[Any], Any]) -> dict[str, Any]:
    """The values of a table of durations, in which ``others`` are none."""
    return {key: others.get(key, duration)(value) for key, value in table.items()}


def _mount(item: Mapping[str, Any]) -> Mount:
    return Mount(plain(item["source"]), plain(item["destination"]), item.get("mode", "ro") == "ro")


def _bounded(value: str | int | float, memory: int, least: int) -> int | None:
    found = size(value, memory)
    return found if found is None else max(found, least)
