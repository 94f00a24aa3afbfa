"""What the host's processes of one kernel use: read from ``/proc``."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_KCMP = {"x86_64": 312, "aarch64": 272}
"""Number of the kcmp system call."""


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


@dataclass(frozen=True)
class Memory:
    """Bytes. Pages that several processes map count for each of them by its share (PSS)."""

    pss: int
    private: int
    """What of it is anonymous or shared memory: what one more kernel costs, whatever the page cache holds anyway."""


def memory(pids: Iterable[int]) -> Memory:
    """What the processes use together; one that is gone counts nothing.

    systrap runs the guest's threads in processes that share one address space; each address space counts once.
    """
    total = private = 0
    counted: list[int] = []
    for pid in sorted(pids):
        if any(_same_memory(pid, other) for other in counted):
            continue
        counted.append(pid)
        fields = _rollup(pid)
        total += fields.get("Pss", 0)
        private += fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0)
    return Memory(total, private)


def _same_memory(one: int, other: int) -> bool:
    """Whether two processes share one address space (kcmp(2), KCMP_VM); False where that cannot be asked."""
    number = _KCMP.get(platform.machine())
    return number is not None and _LIBC.syscall(number, one, other, 1, 0, 0) == 0


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


def _rollup(pid: int) -> dict[str, int]:
    """The sums of ``smaps_rollup``, in bytes."""
    fields: dict[str, int] = {}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return fields


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return None
