"""What the host's processes of one kernel use: read from ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def tree(roots: Iterable[int]) -> set[int]:
    """The processes ``roots`` and all their descendants."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        parent = _parent(pid)
        if parent is not None:
            children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found and os.path.exists(f"/proc/{pid}"):
            found.add(pid)
            waiting.extend(children.get(pid, ()))
    return found


def of_sandbox(sandbox_id: str) -> set[int]:
    """Every host process of a sandbox: those that carry its id in their arguments, and all their descendants.

    The runtime's processes (sentry, gofer where there is one, launcher) all name the sandbox; what systrap runs the
    guest's code in are children of the sentry. The process that asks is left out.
    """
    named = []
    for pid in _pids():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if sandbox_id.encode() in arguments:
            named.append(pid)
    own = {os.getpid(), os.getppid()}
    return tree(pid for pid in named if pid not in own) - own


def pss(pids: Iterable[int]) -> int:
    """Proportional set size of the processes together, in bytes; one that is gone counts nothing."""
    return sum(_pss(pid) for pid in pids)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that the living threads of the processes have used, in seconds.

    The scheduler's own count in nanoseconds: the ticks of ``stat`` (10 ms each) are too coarse for an idle kernel.
    """
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except (OSError, IndexError):
                continue
    return total / 1e9


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return None
