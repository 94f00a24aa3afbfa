"""The launcher: a process of its own that starts a sandbox and then stays as its reaper. Standard library only.

runsc leaves the sandbox's processes to whoever adopts orphans. Where that is slow to reap, ``runsc delete`` waits for
seconds; and an embedding application must not be made a subreaper for our sake. So the launcher becomes the subreaper,
runs ``runsc create``, reports, ignores SIGCHLD (which makes the kernel reap for it, sigaction(2)) and turns itself by
``exec`` into something tiny that ends soon after the sandbox: both settings survive an exec.

Every start and every restore of a sandbox waits for it, and Python takes ten milliseconds to begin. So this program
begins once for an application, as ``launch.py --serve FD``, and forks a launcher for each message on that socket
(``AF_UNIX``, ``SOCK_SEQPACKET``): the launcher's marker (``NAME=value``), and the descriptor of its connection. It ends
when the application has closed the socket, or is gone. It imports little (``json``, ``signal`` and ``typing`` would
take as long again).

A launcher reads one marshalled dictionary from its connection, to the end, and writes a JSON object there::

    {"argv": [...], "environment": {...}, "marker": "NAME=value", "pid_file": path|null, "stdin": fifo, "stdout": fifo,
     "stderr": fifo, "pipe_size": bytes, "join": [cgroup.procs...], "cores": [n...]|null, "user_namespace": bool,
     "holder": [argv with {pid}]|null}
    -> {"holder": [pid, start], "process": [pid, start]} | {"error": str}

With a ``pid_file`` the command is waited for and the file names the process to hold; without one the command itself
is that process (the fake runtime). The start time beside each pid is field 22 of ``/proc/<pid>/stat``.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_PR_SET_CHILD_SUBREAPER = 36
_F_SETPIPE_SZ = 1031
_SIGCHLD = 17
_SIG_DFL = 0
_SIG_IGN = 1
_DEFAULT_SIGNALS = (2, 13)
"""SIGINT and SIGPIPE, which Python ignores or takes."""
_MESSAGE = 1 << 13
"""Bytes that a marker has at most: a path with its name."""
_WIDE = 300
"""A descriptor beyond those to which gVisor moves the standard streams (253 to 255)."""


_libc: Any = None


def libc() -> Any:
    """The C library."""
    global _libc
    if _libc is None:
        import ctypes

        _libc = ctypes.CDLL(None, use_errno=True)
    return _libc


def _check(result: int, what: str) -> None:
    """Raise the error of a call of the C library's that has failed."""
    if result != 0:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter_user_namespace() -> None:
    """Become uid 0 of a new user namespace with a mount namespace, in which only our own uid and gid are mapped.

    What ``unshare -Ur -m`` does; raises OSError where the machine does not allow it. Needs a single thread.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check(libc().unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def become_subreaper() -> None:
    """Adopt the orphans among our descendants (prctl(2))."""
    _check(libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def _on_ended_children(what: int) -> None:
    """``signal(SIGCHLD, what)``. The module of that name takes 7 ms of the processor to import."""
    import ctypes

    libc().signal(_SIGCHLD, ctypes.c_void_p(what))


def _mark(marker: str) -> None:
    """Have ``/proc/<pid>/environ`` say the marker and nothing else, which shows the memory that the environment had at
    the program's begin (proc(5)); it was made long enough."""
    import ctypes

    with open("/proc/self/stat", "rb") as file:
        begin, end = (int(word) for word in file.read().rpartition(b")")[2].split()[47:49])
    text = os.fsencode(marker)
    if len(text) >= end - begin:
        raise ValueError(f"a marker of {len(text)} bytes is too long")
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, text, len(text))


def _reference(pid: int) -> list[int]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return [pid, int(file.read().rpartition(b")")[2].split()[19])]


def _open_fifos(request: dict[str, Any]) -> list[int]:
    fds = []
    for name in ("stdin", "stdout", "stderr"):
        # Read-write: opening never waits for the other side, and no side's death is an end of file for the other.
        # Nobody reads the standard error while all is well: rather refused than blocked when it is full.
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_NONBLOCK if name == "stderr" else 0)
        fd = os.open(request[name], flags)
        if name != "stderr":
            # Where it is beyond this user's allowance the default size works, more slowly.
            libc().fcntl(fd, _F_SETPIPE_SZ, request["pipe_size"])
        fds.append(fd)
    return fds


def _prepare(request: dict[str, Any]) -> None:
    for path in request["join"]:
        with open(path, "w") as file:
            file.write("0")
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    if request["user_namespace"]:
        enter_user_namespace()
    become_subreaper()  # before the command, which may end at once and leave somebody behind


def _launch(request: dict[str, Any]) -> tuple[int, list[int]]:
    """Start the command; return the pid to hold and the descriptors of the FIFOs."""
    fds = _open_fifos(request)
    _prepare(request)
    argv = request["argv"]
    # A process that has threads waits a grace period of the kernel's (15 ms on an idle machine) when its table of
    # descriptors grows, and gVisor's does before anything runs in it. A table is as wide as the highest descriptor at
    # the fork, and stays so: one that can neither be read nor written makes it wide enough from the beginning.
    wide = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    pid = os.posix_spawn(
        argv[0],
        argv,
        request["environment"],
        file_actions=[
            *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)),
            (os.POSIX_SPAWN_DUP2, wide, _WIDE),
        ],
        setsigdef=_DEFAULT_SIGNALS,
    )
    if request["pid_file"] is None:
        return pid, fds
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise RuntimeError(_said(fds[2]) or f"exit status {os.waitstatus_to_exitcode(status)}")
    with open(request["pid_file"]) as file:
        return int(file.read()), fds


def _said(fd: int) -> str:
    """What the command wrote to its standard error, the last lines of it."""
    data = b""
    try:
        while chunk := os.read(fd, 1 << 16):
            data += chunk
    except BlockingIOError:
        pass
    return data.decode("utf-8", "replace").strip()[-2000:]


def _report(answer: str) -> None:
    try:
        os.write(1, answer.encode() + b"\n")
    except OSError:
        pass  # the one who asked is gone; whoever sweeps finds us by our environment


def _hold(request: dict[str, Any], process: list[int], fds: list[int]) -> NoReturn:
    """Stay as the reaper until the process is gone."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    # Who asked waits for the end of these two: before anything else. The second keeps the sandbox's last words, which
    # can be read after its end.
    os.dup2(null, 1)
    os.dup2(fds[2], 2)
    os.chdir("/")  # the application's folder may be unmounted while the sandbox lives
    _on_ended_children(_SIG_IGN)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    if request["holder"]:
        argv = [word.replace("{pid}", str(process[0])) for word in request["holder"]]
        environment = dict([request["marker"].split("=", 1)])
        try:
            os.execve(argv[0], argv, environment)
        except OSError:
            pass  # no such program after all: stay as we are
    for fd in fds:
        os.close(fd)
    import select

    try:
        if _reference(process[0]) == process:
            select.select([os.pidfd_open(process[0])], [], [])
    except OSError:
        pass
    os._exit(0)


def _launch_for(connection: int, marker: str) -> None:
    """Be a launcher: wait for the request, launch, answer, and stay."""
    _on_ended_children(_SIG_DFL)
    os.setsid()
    for number in range(3):
        os.dup2(connection, number)
    os.close(connection)
    try:
        try:
            _mark(marker)
        finally:
            with open(0, "rb", closefd=False) as file:
                text = file.read()
        if not text:
            return  # who was about to ask has no need any more, or is gone
        request = marshal.loads(text)
        pid, fds = _launch(request)
        process = _reference(pid)
        _report(f'{{"holder": {_reference(os.getpid())}, "process": {process}}}')
    except (OSError, RuntimeError, ValueError) as error:
        import json

        _report(json.dumps({"error": str(error)}))
        os._exit(1)
    _hold(request, process, fds)


def serve(control: int) -> None:
    """Fork a launcher for each connection that comes, as nobody's child, until the application is gone."""
    import _socket

    libc()  # what is missing is said while somebody hears it
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in range(3):
        os.dup2(null, number)
    _on_ended_children(_SIG_IGN)  # the kernel reaps the launchers
    home = _socket.socket(fileno=control)
    while True:
        marker, passed, _, _ = home.recvmsg(_MESSAGE, _socket.CMSG_SPACE(4))
        if not passed:
            return
        connection = int.from_bytes(passed[0][2][:4], sys.byteorder)
        try:
            launcher = os.fork()
        except OSError as error:
            os.write(connection, f'{{"error": "fork: {error.strerror}"}}'.encode())
            launcher = -1
        if launcher == 0:
            home.close()
            _launch_for(connection, os.fsdecode(marker))
            return
        os.close(connection)


def main() -> None:
    """Serve an application; or, as ``launch.py command...``, run the command in a user namespace in our place."""
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:
        enter_user_namespace()
        os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
