"""How short of memory this machine is: what is free, and how much work waits for it.

Sources: proc(5) (``/proc/meminfo``), cgroups(7) with the kernel's ``cgroup-v2.rst`` and ``cgroup-v1/memory.rst``, and
``Documentation/accounting/psi.rst`` (``/proc/pressure/memory``). Reading takes well under a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """One look."""

    available: int | None
    """Bytes that can be had without swapping: the machine's, or less where a cgroup of this process leaves less. None
    when that cannot be told."""
    stalled: float | None = None
    """Percent of the last 10 s in which all work waited for memory; None where the kernel does not count it."""


def memory_pressure(root: Path = Path("/")) -> MemoryPressure:
    """Look now. ``root`` is for tests: the directory that holds ``proc`` and ``sys``."""
    free = [left for left in (_machine(root), *_cgroups(root)) if left is not None]
    return MemoryPressure(min(free) if free else None, _stalled(root))


def _machine(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return _number(line.split()[1:2], 1024)
    return None


def _stalled(root: Path) -> float | None:
    for line in _lines(root / "proc/pressure/memory"):
        # full avg10=0.00 avg60=0.00 avg300=0.00 total=0
        words = line.split()
        if words[:1] == ["full"] and len(words) > 1 and words[1].startswith("avg10="):
            try:
                return float(words[1].removeprefix("avg10="))
            except ValueError:
                return None
    return None


def _cgroups(root: Path) -> Iterator[int]:
    """What each group that this process is in leaves below its limit, droppable file cache counted as free."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, limit, usage, cache = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for length in range(len(parts) + 1):
            group = top.joinpath(*parts[:length])
            most, used = _value(group / limit), _value(group / usage)
            if most is not None and used is not None:
                yield max(0, most - used + _cache(group, cache))


def _cache(group: Path, name: str) -> int:
    for line in _lines(group / "memory.stat"):
        words = line.split()
        if words[:1] == [name]:
            return _number(words[1:2], 1) or 0
    return 0


def _value(path: Path) -> int | None:
    lines = _lines(path)
    return _number(lines[0].split()[:1], 1) if lines else None  # "max" is no number: no limit


def _number(words: list[str], factor: int) -> int | None:
    return int(words[0]) * factor if words and words[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
