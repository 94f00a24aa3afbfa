"""Files of the host that a saved kernel had open or mapped, and whether they are still the same.

gVisor opens such a file again by its path and compares nothing: a file that was changed meanwhile would be silent
corruption in the kernel (``reference/GVISOR.md``). Files that were not open may change freely.

The rule: while inode, size, modification and change time are the same, nobody wrote. When one of them differs, the
content decides where its checksum is known, so that a mere touch, a ``git checkout`` of the same version or an equal
copy is no change; for larger files size, modification time and inode decide.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.snapshots.files import Unusable, identity_of, open_plain, sha256_of
from sandbox_gateway.snapshots.manifest import WorkspaceFile

HASH_LIMIT: Final = 64 * 2**20
"""Bytes up to which one file's content is compared."""
HASH_BUDGET: Final = 256 * 2**20
"""Bytes hashed for one snapshot in all (about 0.15 s); the smallest files come first."""
_NAMED = 20


def describe_files(paths: Iterable[str]) -> tuple[WorkspaceFile, ...]:
    """What the files are now. Blocks (see :data:`HASH_BUDGET`).

    What is no regular file, or is gone already, is left out: there is nothing to be compared later. A symlink is
    described as what it leads to. Raises ``snapshot_failed`` for a file that is being written to right now.
    """
    found = []
    for path in sorted({os.path.realpath(path) for path in paths}):
        try:
            fd = open_plain(path)
        except (OSError, Unusable):
            continue
        try:
            found.append(WorkspaceFile(path, identity_of(os.fstat(fd))))
        finally:
            os.close(fd)
    left = HASH_BUDGET
    hashed: dict[str, WorkspaceFile] = {}
    for file in sorted(found, key=lambda file: file.identity.size):
        if file.identity.size > min(HASH_LIMIT, left):
            break
        left -= file.identity.size
        hashed[file.path] = _hashed(file)
    return tuple(hashed.get(file.path, file) for file in found)


def _hashed(file: WorkspaceFile) -> WorkspaceFile:
    for _ in range(3):
        try:
            fd = open_plain(file.path)
        except (OSError, Unusable):
            return file
        try:
            before = identity_of(os.fstat(fd))
            digest = sha256_of(fd)
            if identity_of(os.fstat(fd)) == before:
                return replace(file, identity=before, sha256=digest)
        finally:
            os.close(fd)
    raise SandboxGatewayError(
        "snapshot_failed",
        f"{file.path} is open in the kernel, and another program is writing to it",
        "Try again when nothing writes there. The kernel runs on.",
    )


def changed_files(files: Iterable[WorkspaceFile]) -> list[str]:
    """Those that are not what they were, each as ``path: what changed``. Blocks."""
    return [f"{file.path}: {change}" for file in files if (change := _change(file))]


def _change(file: WorkspaceFile) -> str:
    try:
        fd = open_plain(file.path)
    except FileNotFoundError:
        return "is gone"
    except Unusable as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    try:
        was, now = file.identity, identity_of(os.fstat(fd))
        if now == was:
            return ""
        if now.size != was.size:
            return f"has {now.size} bytes instead of {was.size}"
        if file.sha256 is not None:
            return "" if sha256_of(fd) == file.sha256 else "has other content"
        if now.mtime_ns != was.mtime_ns:
            return "was written to"
        return "is another file" if now.ino != was.ino else ""
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    finally:
        os.close(fd)


def check_files(files: Iterable[WorkspaceFile]) -> None:
    """Raise ``workspace_changed``, naming every file that changed. Blocks."""
    changed = changed_files(files)
    if not changed:
        return
    what = "a file that the kernel has open" if len(changed) == 1 else f"{len(changed)} files that the kernel has open"
    shown = "; ".join(changed[:_NAMED]) + (f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else "")
    raise SandboxGatewayError(
        "workspace_changed",
        f"{what} changed since it was saved: {shown}",
        "Put the files back as they were and try again, or restart the kernel: its variables and files are lost then.",
    )
