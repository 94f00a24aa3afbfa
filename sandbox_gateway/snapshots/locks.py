"""Who uses a snapshot now: advisory locks that end with the process that held them.

``<snapshot>/lock`` is held shared by whoever makes or reads the snapshot (a lease), and asked for exclusively by who
wants to remove it: so neither a crashed process nor a jump of the clock is ever mistaken for the other.
``<snapshots>/.lock`` is held for moments: while a draft comes into being, a name is given, or leftovers are looked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
STORE_LOCK = ".lock"


class Lease:
    """The promise that a snapshot stays where it is. Release it, or use it as a context manager. Thread-safe enough:
    releasing twice does nothing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def held(self) -> bool:
        """Whether it still holds."""
        return self._fd >= 0

    def release(self) -> None:
        """Let it go; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def take_lease(directory: Path, *, create: bool = False) -> Lease | None:
    """A lease of the snapshot in ``directory``, marking it as used now; None where there is none, or not any more.

    Raises OSError for what else is in the way (a symlink).
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
    try:
        fd = os.open(directory / LOCK, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        # Whoever has it exclusively has it for a moment: to look whether it is used, or to take it away.
        fcntl.flock(fd, fcntl.LOCK_SH)
        if _is_at(fd, directory):
            with contextlib.suppress(OSError):
                os.utime(fd)
            return Lease(fd)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[bool]:
    """Whether nobody has a lease of what is in ``directory``; while the context lasts, nobody gets one.

    A directory without a lock file is nobody's. For moments only, and under the :func:`store_lock`, so that of two who
    look at the same time neither takes the other for a user.
    """
    try:
        fd = os.open(directory / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


@contextlib.contextmanager
def store_lock(store: Path) -> Iterator[None]:
    """Hold the store's own lock for a moment; waits for whoever has it."""
    fd = os.open(store / STORE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_used(directory: Path) -> bool:
    """Whether anybody has a lease of what is in ``directory``; raises OSError."""
    with store_lock(directory.parent), alone(directory) as nobody:
        return not nobody


def last_used(directory: Path) -> float:
    """When a lease was taken last, in seconds since the epoch; 0 where nobody can tell."""
    try:
        return (directory / LOCK).stat(follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


def _is_at(fd: int, directory: Path) -> bool:
    try:
        found = os.stat(directory / LOCK, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
