"""Processes of the host named so that a recycled pid is never mistaken for the one that was meant.

A pid is only a number that the kernel gives away again; with the start time beside it (field 22 of
``/proc/<pid>/stat``, proc(5)) it names one process for the uptime of the machine. Signals go through a pidfd that was
opened before the start time was compared, so that there is no moment in which another process could be hit.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process, for as long as the machine is up."""

    pid: int
    start: int
    """Start time in clock ticks since boot."""

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The process that has ``pid`` now; None where there is none (a zombie counts as none)."""
        found = _stat(pid)
        if found is None or found[0] in "ZX":
            return None
        return cls(pid, found[1])

    @classmethod
    def from_json(cls, value: object) -> ProcessRef | None:
        """Read what :meth:`as_json` wrote; None for anything else."""
        if isinstance(value, list | tuple) and len(value) == 2 and all(type(item) is int for item in value):
            return cls(value[0], value[1])
        return None

    def as_json(self) -> list[int]:
        """Plain JSON values, for a handle."""
        return [self.pid, self.start]

    def alive(self) -> bool:
        """Whether this process still runs; a zombie does not."""
        return ProcessRef.of(self.pid) == self

    def open(self) -> int | None:
        """A pidfd of this process, closed by the caller; None when the process is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return None
        if self.alive():
            return fd
        os.close(fd)
        return None

    def kill(self, signum: int = signal.SIGKILL) -> bool:
        """Send a signal to exactly this process; False when it is gone already."""
        fd = self.open()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode("ascii"), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


async def wait_exit(process: ProcessRef) -> None:
    """Return when the process has ended; needs no parenthood and reaps nothing."""
    fd = process.open()
    if fd is None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
    finally:
        os.close(fd)


def kill_all(processes: Iterable[ProcessRef], timeout: float) -> list[ProcessRef]:
    """SIGKILL each process and wait until they are gone; return those that outlived ``timeout`` seconds."""
    pending: dict[int, ProcessRef] = {}
    poller = select.poll()
    try:
        for process in processes:
            fd = process.open()
            if fd is None:
                continue
            pending[fd] = process
            poller.register(fd, select.POLLIN)
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # gone, or not ours: the caller sees it in the result
        end = time.monotonic() + timeout
        while pending and (left := end - time.monotonic()) > 0:
            for fd, _ in poller.poll(left * 1000):
                poller.unregister(fd)
                os.close(fd)
                del pending[fd]
        return list(pending.values())
    finally:
        for fd in pending:
            os.close(fd)


def pids() -> Iterator[int]:
    """All process ids of this machine that we can see."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty when it is gone, a kernel thread, or not ours to read."""
    return _strings(pid, "cmdline")


def environment(pid: int) -> list[str]:
    """The initial environment of a process as ``NAME=value`` strings; empty when it cannot be read."""
    return _strings(pid, "environ")


def _strings(pid: int, name: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            data = file.read()
    except OSError:
        return []
    return [os.fsdecode(part) for part in data.split(b"\0") if part]


def find(match: Callable[[list[str], list[str]], bool]) -> list[ProcessRef]:
    """This user's processes, but this one, for which ``match(command line, environment)`` holds."""
    found = []
    user = os.geteuid()
    me = os.getpid()
    for pid in pids():
        if pid == me:
            continue
        try:
            if os.stat(f"/proc/{pid}").st_uid != user and user != 0:
                continue
        except OSError:
            continue
        # Taken before the look at what it runs: a pid that changes hands meanwhile then fails the later comparison.
        process = ProcessRef.of(pid)
        if process is not None and match(command_line(pid), environment(pid)):
            found.append(process)
    return found


def descendants(roots: Iterable[int]) -> list[int]:
    """The given processes and all below them, by parent id at this moment."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    todo = list(dict.fromkeys(roots))
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo.extend(children.get(pid, ()))
    return found


@dataclass(frozen=True, slots=True)
class Usage:
    """Resource use of a set of processes."""

    memory: int
    """Bytes: proportional set size where it can be read, else anonymous plus the largest shared part."""
    cpu_seconds: float
    threads: int


def usage(processes: Iterable[int]) -> Usage:
    """Sum up what these processes use; those that have gone count nothing."""
    memory = shared = threads = 0
    cpu = 0.0
    for pid in processes:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        cpu += (int(fields[11]) + int(fields[12])) / _TICKS
        threads += int(fields[17])
        proportional = _proportional(pid)
        if proportional is not None:
            memory += proportional
            continue
        private, common = _resident(pid)
        memory += private
        shared = max(shared, common)
    return Usage(memory + shared, cpu, threads)


def _proportional(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _resident(pid: int) -> tuple[int, int]:
    """(private, shared) resident bytes from ``statm``, which needs no permission."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared = (int(word) * _PAGE for word in file.read().split()[:3])
    except (OSError, ValueError):
        return 0, 0
    return max(resident - shared, 0), shared
