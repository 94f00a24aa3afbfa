"""Control groups of our own: one per sandbox, under one parent per installation.

Sources: cgroups(7), the kernel's ``Documentation/admin-guide/cgroup-v1`` and ``cgroup-v2.rst``. Everything works on a
tree of files below given mount points, so that the logic is tested on an ordinary directory.

We make the groups ourselves, in every v1 hierarchy that is mounted, and let runsc join what it finds: it removes only
what it made, and its own removal would race with another sandbox's creation.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.model import Limits

CPU_PERIOD = 100_000
"""Microseconds: the kernel's default scheduling period."""
WANTED = ("memory", "cpu", "pids")
"""Controllers that carry our limits."""
_REMOVAL_TIMEOUT = 5.0


def host_threads(processes: int) -> int:
    """Host threads that a sandbox of ``processes`` guest processes may need (systrap's stubs and the sentry's own).

    The guest's number is held by RLIMIT_NPROC inside; this is the backstop for the host.
    """
    return 8 * processes + 256


@dataclass(frozen=True, slots=True)
class CgroupUsage:
    """What a group used; None where its controller is missing."""

    memory: int | None = None
    cpu_seconds: float | None = None
    processes: int | None = None
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """Where groups can be made on this machine by this user."""

    version: int
    """1 or 2."""
    roots: Mapping[str, Path]
    """v1: hierarchy name -> directory under which we make groups. v2: one entry, ``""``."""
    prefix: str = "/"
    """The path of those directories inside their hierarchies, as runsc's ``cgroupsPath`` wants it."""
    controllers: tuple[str, ...] = ()
    """Which of :data:`WANTED` work here."""
    reason: str = ""
    """Why there are none, for people; empty when all is well."""
    rmdir: Callable[[Path], None] = field(default=os.rmdir, compare=False)

    @property
    def usable(self) -> bool:
        """Whether groups can be made at all."""
        return bool(self.roots)

    def path(self, parent: str, name: str) -> str:
        """The group's path as runsc's ``cgroupsPath`` wants it."""
        return os.path.join(self.prefix, parent, name)

    def create(self, parent: str, name: str, limits: Limits) -> None:
        """Make the group and set the limits that its controllers can hold.

        Raises ``limit_unsupported`` when a limit is refused by the kernel.
        """
        for hierarchy, root in self.roots.items():
            directory = root / parent / name
            _make(directory)
            if self.version == 2:
                _delegate(root / parent, self.controllers)
            elif hierarchy == "cpuset":
                for part in (directory.parent, directory):
                    _copy_cpuset(part)
        try:
            self._limit(parent, name, limits)
        except OSError as error:
            raise SandboxGatewayError("limit_unsupported", f"cgroup {parent}/{name}: {error.strerror}") from error

    def _limit(self, parent: str, name: str, limits: Limits) -> None:
        def directory(controller: str) -> Path | None:
            root = self.roots.get("" if self.version == 2 else controller)
            return root / parent / name if root is not None and controller in self.controllers else None

        if (memory := directory("memory")) is not None and limits.memory is not None:
            if self.version == 1:
                _write(memory / "memory.limit_in_bytes", str(limits.memory))
                _write_if_there(memory / "memory.memsw.limit_in_bytes", str(limits.memory))
            else:
                _write(memory / "memory.max", str(limits.memory))
                _write_if_there(memory / "memory.swap.max", "0")
                # One process of a sandbox is worth nothing without the others.
                _write_if_there(memory / "memory.oom.group", "1")
        if (cpu := directory("cpu")) is not None and limits.cpu is not None:
            quota = max(int(limits.cpu * CPU_PERIOD), 1000)
            if self.version == 1:
                _write(cpu / "cpu.cfs_period_us", str(CPU_PERIOD))
                _write(cpu / "cpu.cfs_quota_us", str(quota))
            else:
                _write(cpu / "cpu.max", f"{quota} {CPU_PERIOD}")
        if (tasks := directory("pids")) is not None and limits.processes is not None:
            _write(tasks / "pids.max", str(host_threads(limits.processes)))

    def join_files(self, parent: str, name: str) -> list[str]:
        """The files into which a process writes its pid to enter the group."""
        return [str(root / parent / name / "cgroup.procs") for root in self.roots.values()]

    def expect_moves(self) -> None:
        """Take the wait before processes are moved: the first move for some time lasts a grace period of the kernel's
        (15 ms), for the lock that it needs, and those after it do not. This one is of ourselves, to where we are.
        """
        for line in _text("/proc/self/cgroup").splitlines():
            _, names, path = line.split(":", 2)
            root = next((self.roots[name] for name in names.split(",") if name in self.roots), None)
            if root is not None:
                here = os.path.relpath(path, self.prefix)
                if here.split("/")[0] != "..":
                    _write_if_there(root / here / "cgroup.procs", str(os.getpid()))
                return

    def processes(self, parent: str, name: str) -> list[ProcessRef]:
        """The processes in the group now."""
        found: dict[int, ProcessRef] = {}
        for root in self.roots.values():
            try:
                text = (root / parent / name / "cgroup.procs").read_text()
            except OSError:
                continue
            for word in text.split():
                if word != "0" and (process := ProcessRef.of(int(word))) is not None:
                    found[process.pid] = process
        return list(found.values())

    def names(self, parent: str) -> list[str]:
        """Names of the groups under ``parent``, in any hierarchy."""
        names: set[str] = set()
        for root in self.roots.values():
            try:
                with os.scandir(root / parent) as entries:
                    names.update(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            except OSError:
                continue
        return sorted(names)

    def usage(self, parent: str, name: str) -> CgroupUsage:
        """What the group uses and how often the kernel killed in it for want of memory."""
        if self.version == 1:
            memory, cpu, tasks = (
                root / parent / name if (root := self.roots.get(c)) is not None else None
                for c in ("memory", "cpuacct", "pids")
            )
            nanoseconds = _number(cpu, "cpuacct.usage")
            return CgroupUsage(
                _number(memory, "memory.usage_in_bytes"),
                None if nanoseconds is None else nanoseconds / 1e9,
                _number(tasks, "pids.current"),
                _keyed(memory, "memory.oom_control").get("oom_kill", 0),
            )
        root = self.roots.get("")
        group = root / parent / name if root is not None else None
        microseconds = _keyed(group, "cpu.stat").get("usage_usec")
        return CgroupUsage(
            _number(group, "memory.current"),
            None if microseconds is None else microseconds / 1e6,
            _number(group, "pids.current"),
            _keyed(group, "memory.events").get("oom_kill", 0),
        )

    def memory_alarm(self, parent: str, name: str) -> int | None:
        """An eventfd that becomes readable when the group's memory runs out, closed by the caller.

        Only version 1 needs it: there the kernel kills one process of the group, with version 2 (``memory.oom.group``)
        all of them. None where it cannot be had.
        """
        root = self.roots.get("memory")
        if self.version != 1 or root is None:
            return None
        group = root / parent / name
        alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            with open(group / "memory.oom_control", "rb") as control:
                _write(group / "cgroup.event_control", f"{alarm} {control.fileno()}")
        except OSError:
            os.close(alarm)
            return None
        return alarm

    def remove(self, parent: str, name: str) -> None:
        """Remove the group, which no process is in any more, and the parent when it was the last one.

        Waits for processes that are still leaving; raises ``runtime_failed`` when that takes too long.
        """
        end = time.monotonic() + _REMOVAL_TIMEOUT
        for root in self.roots.values():
            while True:
                try:
                    self.rmdir(root / parent / name)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    if error.errno == errno.EBUSY and time.monotonic() < end:
                        time.sleep(0.005)  # there is no event for the end of an exit
                        continue
                    raise SandboxGatewayError(
                        "runtime_failed", f"cgroup {root / parent / name} cannot be removed: {error.strerror}"
                    ) from error
                break
            try:
                self.rmdir(root / parent)
            except OSError:
                pass  # another sandbox lives in it, or it never was


def discover(
    *,
    mounts: str | None = None,
    own: str | None = None,
    mount_root: Path = Path("/"),
    user: int | None = None,
) -> CgroupTree:
    """Find where this user can make control groups.

    ``mounts`` and ``own`` are the contents of ``/proc/self/mounts`` and ``/proc/self/cgroup``; ``mount_root`` is put
    before the mount points (tests). As root: the hierarchies' tops. As another user: the topmost v2 group that was
    delegated to them and holds this process somewhere below it (a process may only be moved within a delegation).
    """
    mounts = _text("/proc/self/mounts") if mounts is None else mounts
    own = _text("/proc/self/cgroup") if own is None else own
    user = os.geteuid() if user is None else user
    hierarchies: dict[str, Path] = {}
    unified: Path | None = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 4:
            continue
        point = mount_root / fields[1].lstrip("/")
        options = fields[3].split(",")
        if fields[2] == "cgroup" and "rw" in options:
            for name in options:
                if name in _V1 or name.startswith("name="):
                    hierarchies.setdefault(name, point)
        elif fields[2] == "cgroup2" and "rw" in options:
            unified = point
    if "memory" in hierarchies or "cpu" in hierarchies:
        return _first_version(hierarchies, user)
    if unified is None:
        return CgroupTree(2, {}, reason="no control group filesystem is mounted for writing")
    return _second_version(unified, own, user)


_V1 = frozenset(
    ("cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "devices", "freezer", "hugetlb", "perf_event", "net_cls")
)


def _first_version(hierarchies: Mapping[str, Path], user: int) -> CgroupTree:
    if user != 0:
        return CgroupTree(1, {}, reason="this machine has control groups version 1, which only root may make")
    roots: dict[str, Path] = {}
    for name, point in hierarchies.items():
        # Co-mounted controllers (cpu,cpuacct) show up once per name with one directory: that is harmless.
        if os.access(point, os.W_OK):
            roots[name] = point
    controllers = tuple(name for name in WANTED if name in roots)
    return CgroupTree(1, roots if controllers else {}, "/", controllers, _missing(controllers))


def _second_version(mount: Path, own: str, user: int) -> CgroupTree:
    base = mount
    prefix = "/"
    if user != 0:
        path = next((line[3:] for line in own.splitlines() if line.startswith("0::")), "/")
        found = _delegated(mount, path)
        if found is None:
            return CgroupTree(2, {}, reason="no control group is delegated to this user (systemd's Delegate=)")
        base, prefix = found
    elif not os.access(mount, os.W_OK):
        return CgroupTree(2, {}, reason=f"{mount} cannot be written")
    _delegate(base, WANTED)
    enabled = _text(base / "cgroup.subtree_control").split()
    controllers = tuple(name for name in WANTED if name in enabled)
    if not controllers:
        return CgroupTree(2, {}, reason=f"no controller can be enabled under {base}")
    return CgroupTree(2, {"": base}, prefix, controllers, _missing(controllers))


def _missing(controllers: tuple[str, ...]) -> str:
    missing = [name for name in WANTED if name not in controllers]
    return f"controllers missing: {', '.join(missing)}" if missing else ""


def _delegated(mount: Path, path: str) -> tuple[Path, str] | None:
    """The topmost group above (or at) ``path`` in which this user may make groups and move processes."""
    best: tuple[Path, str] | None = None
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts), 0, -1):
        prefix = "/" + "/".join(parts[:depth])
        group = mount / prefix.lstrip("/")
        entries = (group, group / "cgroup.procs", group / "cgroup.subtree_control")
        if not all(os.access(entry, os.W_OK) for entry in entries):
            break
        best = (group, prefix)
    return best


def _delegate(group: Path, controllers: tuple[str, ...]) -> None:
    """Let the children of ``group`` have the controllers; one by one, as one that is missing refuses all."""
    for name in controllers:
        try:
            _write(group / "cgroup.subtree_control", f"+{name}")
        except OSError:
            pass  # what is enabled in the end is read back by the caller


def _make(directory: Path) -> None:
    for _ in range(100):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return
        except (FileNotFoundError, FileExistsError):
            continue  # the parent was removed with its last child, before or while we looked at it: make it again
        except OSError as error:
            raise SandboxGatewayError("runtime_failed", f"cannot make cgroup {directory}: {error.strerror}") from error
    raise SandboxGatewayError("runtime_failed", f"cannot make cgroup {directory}")


def _copy_cpuset(directory: Path) -> None:
    """A fresh v1 cpuset is empty, and no process can enter it."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not _text(directory / name).strip():
            _write_if_there(directory / name, _text(directory.parent / name).strip())


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _write_if_there(path: Path, text: str) -> None:
    try:
        with open(path, "r+") as file:
            file.write(text)
    except OSError:
        pass  # swap accounting and group kills are not there on every kernel


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _number(directory: Path | None, name: str) -> int | None:
    text = _text(directory / name).strip() if directory is not None else ""
    return int(text) if text.isdigit() else None


def _keyed(directory: Path | None, name: str) -> dict[str, int]:
    found = {}
    for line in (_text(directory / name) if directory is not None else "").splitlines():
        key, _, value = line.partition(" ")
        if value.strip().isdigit():
            found[key] = int(value)
    return found
