"""Which files of the host a gVisor sandbox has open or mapped behind its bind mounts.

gVisor's kernel (the sentry) opens such files itself ("directfs"), so they are in its ``/proc/<pid>/fd``, by their path
inside under ``/root``. Seen by trying, and in gVisor's ``pkg/sentry/fsimpl/gofer`` (``directfs_inode.go``,
``save_restore.go``):

* A file that was only looked at has one descriptor with O_NONBLOCK; one that is or was open or mapped has another
  without.
* That one is kept after the last close, in a cache. A save empties the cache: right after a snapshot there is exactly
  what is open or mapped, which is what a restore opens again by path, whatever lies there then.
* A file that is open and deleted is saved with its contents.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.processes import ProcessRef

_ROOT = "/root"
"""Where the gofer has the sandbox's root."""
_DELETED = " (deleted)"


def open_files(sandbox: ProcessRef, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths on the host of regular files that the sandbox with this ``config.json`` has open or mapped, sorted.

    Raises ``runtime_failed`` when the sandbox is gone or cannot be looked at.
    """
    sources = _sources(config)
    found = set()
    directory = f"/proc/{sandbox.pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise SandboxGatewayError("runtime_failed", f"open files cannot be seen: {error.strerror}") from error
    for name in names:
        try:
            inside = os.readlink(f"{directory}/{name}")
            if not inside.startswith(f"{_ROOT}/") or inside.endswith(_DELETED):
                continue
            opened = os.stat(f"{directory}/{name}")
            path = _on_host(inside.removeprefix(_ROOT), sources)
            if path is not None and stat.S_ISREG(opened.st_mode) and not _only_looked_at(sandbox.pid, name):
                found.add(path)
        except OSError:
            continue  # closed meanwhile
    if not sandbox.alive():
        raise SandboxGatewayError("runtime_failed", "the sandbox has ended")
    return tuple(sorted(found))


def _sources(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Directory or file on the host by its destination inside, of each bind mount and of a root that is one."""
    found = {mount["destination"]: mount["source"] for mount in config["mounts"] if mount["type"] == "bind"}
    if "dev.gvisor.spec.rootfs.source" not in config["annotations"]:
        found["/"] = config["root"]["path"]
    return found


def _on_host(inside: str, sources: Mapping[str, str]) -> str | None:
    place = inside
    while place not in sources:
        if place == "/":
            return None
        place = os.path.dirname(place)
    return os.path.join(sources[place], os.path.relpath(inside, place)) if place != inside else sources[place]


def _only_looked_at(pid: int, fd: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        for line in file:
            if line.startswith("flags:"):
                return bool(int(line.split()[1], 8) & os.O_NONBLOCK)
    return False
