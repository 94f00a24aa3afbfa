"""Starting, signalling, reaping and ending the kernel's processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_gateway.agent import privileges

OOM_SCORE = 500
"""The memory killer takes the kernel before the agent."""


class SpawnError(Exception):
    """The kernel's program could not be run; the text says what and why, in one line."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to run as the kernel, and as whom."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str
    uid: int
    gid: int
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Soft and hard limits by lower-case name without ``RLIMIT_`` (``nofile``); -1 is unlimited."""


@dataclass(slots=True)
class Child:
    """A process being started: its standard output and error, and the pipe on which a failed exec says why."""

    pid: int
    stdout: int
    stderr: int
    failure: int
    extra: int | None = None
    """Read end of the kernel's own IOPub pipe, when it was given one."""


EXTRA_FD = 3
"""Where the kernel finds the write end of its IOPub pipe."""


def spawn(command: Command, *, extra_pipe: bool = False) -> Child:
    """Fork and exec; returns before the exec has happened (see :func:`read_failure`).

    The child is the leader of a session of its own, holds descriptors 0 to 2 (and :data:`EXTRA_FD` if asked) and
    nothing else, has the default signal dispositions, and no privilege. Raises :class:`SpawnError` when the machine
    cannot fork. No other thread may run in this process meanwhile.
    """
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(4 if extra_pipe else 3)]
    (out_r, out_w), (err_r, err_w), (fail_r, fail_w) = pipes[:3]
    extra_r, extra_w = pipes[3] if extra_pipe else (-1, -1)
    try:
        sys.stderr.flush()
        pid = os.fork()
    except OSError as error:
        for pair in pipes:
            os.close(pair[0])
            os.close(pair[1])
        raise SpawnError(f"the sandbox cannot start another process: {error.strerror}") from error
    if pid == 0:
        failure = fail_w
        try:
            failure = _arrange_descriptors(out_w, err_w, fail_w, extra_w)
            _become_kernel(command)
        except BaseException as error:  # whatever it is: this process must end here, and say why
            with contextlib.suppress(OSError):
                os.write(failure, _explain(command, error).encode()[:4000])
        finally:
            os._exit(127)
    for _, write_end in pipes:
        os.close(write_end)
    for fd in (out_r, err_r, fail_r):
        os.set_blocking(fd, False)
    if extra_pipe:
        os.set_blocking(extra_r, False)
    return Child(pid, out_r, err_r, fail_r, extra_r if extra_pipe else None)


def _explain(command: Command, error: BaseException) -> str:
    if isinstance(error, OSError):
        about = error.strerror if not isinstance(error, privileges.PrivilegeError) else str(error)
        return f"cannot run {command.argv[0]!r} as the kernel: {about}"
    return f"cannot run {command.argv[0]!r} as the kernel: {type(error).__name__}: {error}"


def _arrange_descriptors(out_w: int, err_w: int, fail_w: int, extra_w: int) -> int:
    """Leave 0 to 2, :data:`EXTRA_FD` if wanted, and the failure pipe (close-on-exec), whose number is returned."""
    privileges.allow_own_proc()
    null = os.open(os.devnull, os.O_RDWR)
    # First everything that stays moves out of the way of the numbers that are about to be overwritten.
    wanted = [null, out_w, err_w] + ([extra_w] if extra_w >= 0 else [])
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (*wanted, fail_w)]
    for target, source in enumerate(moved[:-1]):
        os.dup2(source, target, inheritable=True)
    failure = os.dup2(moved[-1], len(wanted), inheritable=False)
    for fd in _open_descriptors():
        if fd > failure:
            with contextlib.suppress(OSError):
                os.close(fd)
    return failure


def _open_descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return list(range(3, 4096))


def _become_kernel(command: Command) -> None:
    """Exec the kernel in the forked child, after giving up everything it must not have. Raises what goes wrong."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):  # those the C library keeps for itself
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    privileges.set_oom_score(OOM_SCORE)
    for name, (soft, hard) in command.rlimits.items():
        _set_rlimit(name, soft, hard)
    os.umask(0o022)
    privileges.drop_everything(command.uid, command.gid)
    try:
        os.chdir(command.cwd)
    except OSError:
        os.chdir("/")
    os.execvpe(command.argv[0], list(command.argv), dict(command.environment))


def _set_rlimit(name: str, soft: int, hard: int) -> None:
    number = getattr(resource, f"RLIMIT_{name.upper()}")
    current = resource.getrlimit(number)[1]
    if current != resource.RLIM_INFINITY:  # an unprivileged agent may only lower
        hard = current if hard == resource.RLIM_INFINITY else min(hard, current)
        soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(number, (soft, hard))


def known_rlimit(name: str) -> bool:
    """Whether this system has a resource limit called ``name`` (lower case, without ``RLIMIT_``)."""
    return isinstance(getattr(resource, f"RLIMIT_{name.upper()}", None), int)


def reap() -> Iterator[tuple[int, int]]:
    """Every child that ended, as ``(pid, wait status)``; never waits."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def has_children() -> bool:
    """Whether any process that this one would have to reap is left, ended or not."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def outcome(status: int) -> tuple[int | None, int | None]:
    """A wait status as ``(exit code, signal)``, one of them None."""
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None


def processes() -> dict[int, int]:
    """Every visible process as ``{pid: parent's pid}``."""
    found: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_bytes()
            except OSError:
                continue  # ended meanwhile
            fields = stat[stat.rfind(b")") + 2 :].split()
            if len(fields) > 1:
                found[int(entry)] = int(fields[1])
    return found


def descendants() -> list[int]:
    """All processes below this one. Complete when this one is PID 1 or a child subreaper: orphans come back to it."""
    tree = processes()
    children: dict[int, list[int]] = {}
    for pid, parent in tree.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        for pid in children.get(todo.pop(), ()):
            found.append(pid)
            todo.append(pid)
    return found


def signal_all(number: int) -> None:
    """Send a signal to every process of the kernel, wherever it hid (``setsid``, double forks).

    As PID 1 that is everybody else, in one call that a fork bomb cannot outrun for long; elsewhere (tests, the fake
    runtime) ``kill(-1)`` would reach the user's other processes, so this process's descendants are walked.
    Call it again until :func:`has_children` says no.
    """
    if os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(-1, number)
        return
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the kernel's process group (it leads one), or to the process alone."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def substitute(argv: Sequence[str], connection_file: str) -> tuple[str, ...]:
    """A kernelspec's argv with ``{connection_file}`` filled in."""
    return tuple(word.replace("{connection_file}", connection_file) for word in argv)


def with_fast_iopub(argv: Sequence[str]) -> tuple[str, ...] | None:
    """The same command for our ipykernel application, a script in this folder; None for what is not ipykernel's.

    Options of the interpreter before ``-m ipykernel_launcher`` stay, and so do the arguments behind it.
    """
    for index in range(1, min(len(argv) - 1, 8)):
        if argv[index] == "-m":
            if argv[index + 1] not in ("ipykernel_launcher", "ipykernel"):
                return None
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ipykernel_app.py")
            return (*argv[:index], script, *argv[index + 2 :])
        if not argv[index].startswith("-") and argv[index - 1] not in ("-X", "-W"):
            return None
    return None
