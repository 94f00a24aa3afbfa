"""Sizes, durations and the machine's memory, as profiles write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_BINARY = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_DECIMAL = {"K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def size(value: str | int | float, memory: int) -> int | None:
    """Bytes of a schema-checked size; None for ``"none"``.

    ``K`` and ``KiB`` are 1024, ``KB`` is 1000; ``"50%"`` is half of ``memory``.
    """
    if isinstance(value, int | float):
        return int(value)
    if value == "none":
        return None
    if value.endswith("%"):
        return memory * int(value[:-1]) // 100
    parts = re.fullmatch(r"([0-9.]+) ?([KMGT]?)(i?)(B?)", value)
    if parts is None:
        raise ValueError(f"not a size: {value!r}")
    number, unit, binary, byte = parts.groups()
    factor = _DECIMAL[unit] if unit and byte and not binary else _BINARY[unit]
    return int(float(number) * factor)


def duration(value: str | int | float) -> float | None:
    """Seconds of a schema-checked duration such as ``"1h30m"`` or 90; None for ``"never"``."""
    if isinstance(value, int | float):
        return float(value)
    if value == "never":
        return None
    return float(sum(int(count) * _SECONDS[unit] for count, unit in re.findall(r"([0-9]+)([dhms])", value)))


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may count on: the machine's, or less where its own cgroup says so.

    ``root`` is for tests: the directory that holds ``proc`` and ``sys``.
    """
    total = 4 * 1024**3  # an unreadable /proc is strange, and no reason to refuse
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                total = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return min([total, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top, file = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for length in range(len(parts) + 1):
            try:
                limit = int(top.joinpath(*parts[:length], file).read_text())
            except (OSError, ValueError):  # absent at the root, or "max"
                continue
            if limit > 0:
                yield limit
