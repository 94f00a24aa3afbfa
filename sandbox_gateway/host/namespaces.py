"""Whether an ordinary user may have a user namespace here, found by making one.

Only a try tells: ``user.max_user_namespaces``, Debian's ``kernel.unprivileged_userns_clone``, Ubuntu's AppArmor
restriction, container seccomp profiles and security modules can each say no.
"""

from __future__ import annotations

import functools
import marshal
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sandbox_gateway.host import launch

_SWITCHES = (
    ("/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that allows userns",
    ),
)


@functools.cache
def launch_code() -> bytes:
    """The input of :func:`launch_program`: its code, which from its file would be compiled each time."""
    return marshal.dumps(compile(Path(launch.__file__).read_bytes(), launch.__file__, "exec", dont_inherit=True))


def launch_program(control: int) -> list[str]:
    """The command line of what forks launchers, with its end of the socket; isolated, without site packages."""
    load = "import sys, marshal\nexec(marshal.loads(sys.stdin.buffer.read()))"
    return [*_interpreter(), "-c", load, "--serve", str(control)]


def wrap_user_namespace(argv: Sequence[str]) -> list[str]:
    """``argv``, to be run inside a new user and mount namespace."""
    return [*_interpreter(), str(launch.__file__), *argv]


def _interpreter() -> list[str]:
    return [sys.executable or shutil.which("python3") or "python3", "-I", "-S"]


@functools.cache
def why_no_user_namespace() -> tuple[str, str] | None:
    """None when a user namespace with a mapping of our own can be made; else (reason, hint)."""
    try:
        outcome = subprocess.run(
            wrap_user_namespace(["/bin/true"]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot try a user namespace: {error}", ""
    if outcome.returncode == 0:
        return None
    lines = outcome.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"user namespaces are not allowed here: {lines[-1] if lines else 'no reason given'}", _hint()


def _hint() -> str:
    for path, value, advice in _SWITCHES:
        try:
            if Path(path).read_text().strip() == value:
                return f"An administrator can allow them: {advice}. Or run as root."
        except OSError:
            continue
    return "Inside a container, allow unshare and mount for it (seccomp, AppArmor); or run as root."
