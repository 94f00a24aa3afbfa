"""What a schema cannot say about a profile: relations between keys, and places that must stay free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from sandbox_gateway.model import WorkspaceMode
from sandbox_gateway.profiles.file import Problem, ProfileFile
from sandbox_gateway.profiles.profile import HOME, RESERVED_VARIABLES, WORKSPACE, Profile, is_ipykernel
from sandbox_gateway.profiles.values import duration, size

MIN_MEMORY = 128 * 1024**2
"""Bytes. gVisor, the agent and an idle ipykernel need about 100 MiB."""
MIN_DISK = 1024**2
"""Bytes."""

_RESERVED = ("/proc", "/sys", "/dev", "/opt/agent", "/run/kernel")
"""Neither these, nor what holds them, nor anything in them can be a mount's destination."""
_SYSTEM = frozenset(
    {"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/run", "/opt", "/tmp", "/var", "/home", HOME}
)
"""These cannot be a destination themselves; a folder in them can."""

_LESS = "{!r} is less than what the profile itself has; give as much or more, or lower the profile's own"

_Report = Callable[..., None]


def semantic_problems(
    file: ProfileFile, name: str, table: Mapping[str, Any], base: Profile, memory: int, private: tuple[Path, ...]
) -> list[Problem]:
    """What is wrong with the table of profile ``name``, which follows the schema and changes ``base``.

    ``memory`` is the machine's, in bytes; ``private`` are the product's own directories, which no mount may open.
    """
    problems: list[Problem] = []

    def report(key: tuple[str | int, ...], text: str, value: Any = None) -> None:
        problems.append(file.problem(("profiles", name, *key), text, value))

    _check_sizes(table, memory, report)
    _check_command(table, base, report)
    _check_image(table, report)
    _check_variables(table, report)
    _check_times(table, base, report)
    _check_starts(table, base, report)
    _check_choices(table, base, memory, report)
    workspace = WorkspaceMode(table.get("workspace", base.workspace))
    taken: set[str] = set()
    for index, item in enumerate(table.get("mounts", ())):
        for part, fault in _mount_faults(item, workspace, private, taken):
            report(("mounts", index, part), f"{item[part]!r} {fault}", item[part])
    return problems


def _check_sizes(table: Mapping[str, Any], memory: int, report: _Report) -> None:
    for key, least in (("memory", MIN_MEMORY), ("disk", MIN_DISK)):
        value = table.get(key)
        if value is None or str(value).endswith("%"):
            continue  # a share of a very small machine is raised instead
        found = size(value, memory)
        if found is not None and found < least:
            report((key,), f'{value!r} is too little; give at least {least // 1024**2}MiB, or "none"', value)


def _check_command(table: Mapping[str, Any], base: Profile, report: _Report) -> None:
    argv = table.get("argv")
    if table.get("language", base.language).lower() != "python" and argv is None and base.argv is None:
        report(("language",), "a language other than python needs argv, its kernel's command", table.get("language"))
    if argv is not None and not any("{connection_file}" in word for word in argv):
        report(("argv",), "no element holds {connection_file}, where the kernel reads how it is reached", argv)


def _check_image(table: Mapping[str, Any], report: _Report) -> None:
    image = table.get("image", "host")
    _, _, path = image.partition(":")
    if path and (fault := _path_fault(path)):
        report(("image",), f"{image!r} {fault}; give a normal absolute path", image)


def _check_variables(table: Mapping[str, Any], report: _Report) -> None:
    for variable in table.get("environment", ()):
        if variable in RESERVED_VARIABLES:
            report(("environment", variable), "is set by the product itself; leave it out")
    for index, variable in enumerate(table.get("client_environment", ())):
        if variable in RESERVED_VARIABLES:
            report(("client_environment", index), f"{variable!r} is never taken from a client; leave it out", variable)


def _check_times(table: Mapping[str, Any], base: Profile, report: _Report) -> None:
    given = {f"{key}": table[key] for key in ("max_busy", "max_lifetime") if key in table}
    for key, value in given.items():
        if duration(value) == 0:
            report((key,), f'{value!r} is no time; give a duration such as "1h", or "never"', value)
    tiers = {tier: value for tier, value in table.get("idle", {}).items() if tier != "cpu"}
    for tier, value in tiers.items():
        if duration(value) == 0:
            report(("idle", tier), f'{value!r} is no time; give a duration such as "10m", or "never"', value)
    times = [
        (tier, duration(tiers[tier]) if tier in tiers else getattr(base.idle, tier))
        for tier in ("pause", "suspend", "expire")
    ]
    for (first, sooner), (second, later) in pairwise([(tier, time) for tier, time in times if time]):
        if later < sooner:
            text = f"{second} ({later:g} s) comes before {first} ({sooner:g} s); give a longer time"
            report(("idle", second), text, tiers.get(second))


def _check_starts(table: Mapping[str, Any], base: Profile, report: _Report) -> None:
    argv = table.get("argv", base.argv)
    ipykernel = argv is None or is_ipykernel(argv)
    template = table.get("template", base.template and ipykernel)
    if template and not ipykernel:
        report(("template",), "is for ipykernel only, and argv is another kernel's; leave it out", True)
    pool = table.get("pool", {})
    if "max_age" in pool and duration(pool["max_age"]) == 0:
        report(("pool", "max_age"), f'{pool["max_age"]!r} is no time; give a duration such as "1h", or "never"')
    if template and ipykernel:
        return
    if table.get("preload"):
        report(("preload",), "needs a template, which this profile's kernels do not start from; leave it out")
    for key in ("created", "ready"):
        if pool.get(key):
            report(("pool", key), "needs a template, which this profile's kernels do not start from; leave it out")


def _check_choices(table: Mapping[str, Any], base: Profile, memory: int, report: _Report) -> None:
    choices: Mapping[str, Any] = table.get("choices", {})
    for key in ("cpu", "memory", "disk", "processes"):
        if key in choices:
            own = _bound(table[key], memory) if key in table else _bound(getattr(base.limits, key) or "none", memory)
            if _bound(choices[key], memory) < own:
                report(("choices", key), _LESS.format(choices[key]), choices[key])
    for index, image in enumerate(choices.get("image", ())):
        _, _, path = image.partition(":")
        if path and (fault := _path_fault(path)):
            report(("choices", "image", index), f"{image!r} {fault}; give a normal absolute path", image)
    bounds = choices.get("idle", {})
    for tier, value in bounds.items() if isinstance(bounds, Mapping) else ():
        own_time = duration(table["idle"][tier]) if tier in table.get("idle", {}) else getattr(base.idle, tier)
        most = duration(value)
        if most == 0:
            text = f'{value!r} is no time; give a duration such as "10m", or "never"'
            report(("choices", "idle", tier), text, value)
        elif most is not None and (own_time is None or most < own_time):
            report(("choices", "idle", tier), _LESS.format(value), value)


def _bound(value: str | int | float, memory: int) -> float:
    if isinstance(value, int | float):
        return value
    found = size(value, memory)
    return math.inf if found is None else found


def _mount_faults(
    item: Mapping[str, Any], workspace: WorkspaceMode, private: tuple[Path, ...], taken: set[str]
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of one mount; ``taken`` collects the destinations."""
    source, destination = plain(item["source"]), plain(item["destination"])
    if fault := _path_fault(item["source"]):
        yield "source", f"{fault}; give a normal absolute path"
    elif source == "/" or any(_inside(source, top) for top in ("/proc", "/sys", "/dev")):
        yield "source", "would open the machine itself; give a folder of data"
    elif any(_inside(os.path.realpath(source), os.path.realpath(place)) for place in private):
        yield "source", "is where this product keeps its own data, other sandboxes' too; give another folder"
    if fault := _path_fault(item["destination"]):
        yield "destination", f"{fault}; give a normal absolute path"
    elif destination == "/" or destination in _SYSTEM or any(_related(destination, top) for top in _RESERVED):
        names = ", ".join(sorted((*_SYSTEM, *_RESERVED)))
        yield "destination", f'is what the sandbox itself needs; give a folder such as "/data" (taken: {names})'
    elif workspace is not WorkspaceMode.NONE and _inside(destination, WORKSPACE):
        yield "destination", f'is where the workspace is; give a folder outside {WORKSPACE}, or workspace = "none"'
    elif destination in taken:
        yield "destination", "is given twice; give each mount a destination of its own"
    taken.add(destination)


def plain(path: str) -> str:
    """``path`` without slashes at its end."""
    return path.rstrip("/") or "/"


def _path_fault(path: str) -> str:
    # normpath keeps two leading slashes, which POSIX gives a meaning of its own.
    return "" if os.path.normpath(path) == plain(path) and not path.startswith("//") else "has '.', '..' or '//' in it"


def _inside(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _related(one: str, other: str) -> bool:
    return _inside(one, other) or _inside(other, one)
