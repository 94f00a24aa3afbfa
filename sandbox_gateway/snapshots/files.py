"""The files of a snapshot on disk: what is there, whose it is, whether anybody wrote to it, and its checksum."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sandbox_gateway.snapshots.manifest import FileIdentity

Report = Callable[[int, int], None]
"""Told how many bytes of how many are done; called on the working thread."""
_CHUNK = 2**20
_DEPTH = 8
_FILES = 10_000


class Stopped(Exception):
    """The caller gave up; what was under way is to be left."""


class Unusable(Exception):
    """Something that does not belong into a snapshot, in one line."""


def identity_of(found: os.stat_result) -> FileIdentity:
    """The identity of the file that ``found`` describes."""
    return FileIdentity(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_plain(path: Path | str) -> int:
    """A descriptor for reading a regular file that is no symlink; never waits, as opening a pipe would.

    Raises OSError, or :class:`Unusable`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Unusable("is no regular file")
    return fd


def sha256_of(fd: int, done: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    """The checksum of all that ``fd`` gives, hexadecimal. ``done`` is told the bytes of each piece.

    Raises :class:`Stopped` soon after ``stop`` is set.
    """
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    while size := os.readv(fd, [view]):
        if stop is not None and stop.is_set():
            raise Stopped
        digest.update(view[:size])
        if done is not None:
            done(size)
    return digest.hexdigest()


def walk(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All files and directories below ``directory`` by their relative paths, sorted; nothing is followed.

    Raises :class:`Unusable` for anything that is neither, or for a tree that no snapshot of ours has.
    """
    count = 0
    todo = [(directory, "", 0)]
    while todo:
        place, prefix, depth = todo.pop()
        with os.scandir(place) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            count += 1
            path, status = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)
            if depth >= _DEPTH or count > _FILES:
                raise Unusable("holds more than any snapshot does")
            if stat.S_ISDIR(status.st_mode):
                todo.append((Path(entry.path), f"{path}/", depth + 1))
            elif not stat.S_ISREG(status.st_mode):
                raise Unusable(f"{path!a} is neither a file nor a directory")
            yield path, status


def disk_usage(directory: Path) -> int:
    """Bytes that a directory takes on its disk, as far as they can be seen."""
    total = 0
    for place, folders, names in os.walk(directory):
        for name in (*folders, *names):
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def remove_all(directory: Path) -> None:
    """Remove a directory and what is below it, without following anything. Raises OSError when some of it stays."""
    for attempt in range(5):
        try:
            shutil.rmtree(directory)
            return
        except FileNotFoundError:
            if not os.path.lexists(directory):
                return
            if attempt == 4:
                raise
        except OSError:
            # Somebody put a file into it meanwhile (a seal that was under way), or took rights away from it.
            if attempt == 4:
                raise
            with contextlib.suppress(OSError):
                os.chmod(directory, 0o700)


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def strangers(status: os.stat_result) -> str:
    """Who but this user could have changed a file or directory: empty, or the reason for a refusal."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}"
    if stat.S_IMODE(status.st_mode) & 0o022:
        return "can be written by other users"
    return ""
