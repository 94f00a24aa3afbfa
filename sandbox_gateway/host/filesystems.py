"""Which filesystem a directory is on, and whether it is one on which locks, FIFOs and sockets do not hold."""

from __future__ import annotations

import functools
import os
import re

NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "ocfs2"}
)
"""Filesystem types on which locks, FIFOs or sockets do not hold; every ``fuse.*`` but the local ones counts too."""
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuseblk", "fuse.ext2", "fuse.ntfs-3g", "fuse.bindfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")
MOUNTS = "/proc/self/mountinfo"


def filesystem_of(path: str | os.PathLike[str], mountinfo: str) -> str:
    """Type of the filesystem that holds ``path`` (or will), by ``/proc/self/mountinfo``'s text; empty if unknown."""
    target = os.path.realpath(path)
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields = left.split()
        if not separator or len(fields) < 5:
            continue
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        # A later line of the same mount point covers the earlier one.
        if inside and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind


def is_network_filesystem(kind: str) -> bool:
    """Whether a filesystem of this type is, or may be, on another machine."""
    return kind in NETWORK_FILESYSTEMS or (kind.startswith("fuse") and kind not in _LOCAL_FUSE)


@functools.lru_cache(maxsize=32)
def own_filesystem_of(path: str, mounts: str = MOUNTS) -> str:
    """:func:`filesystem_of` by this process's own mounts, asked once for each path; empty if they cannot be read."""
    try:
        with open(mounts, errors="replace") as file:
            return filesystem_of(path, file.read())
    except OSError:
        return ""
