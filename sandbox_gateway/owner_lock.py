"""The lock that makes one process the owner of a sandbox.

It is an open file description lock (``F_OFD_SETLK``) on ``<runtime>/<id>/owner.lock``: it ends with its holder
however that dies, is not disturbed when somebody else opens the file, and, unlike ``flock``, can be asked for without
being taken. The file's text tells who holds it: ``{"pid": ..., "socket": ...}``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import struct
import weakref
from pathlib import Path
from typing import Final

from sandbox_gateway.errors import SandboxGatewayError, storage_error

LOCK_NAME: Final = "owner.lock"
OWNERS: Final = "owners"
"""Where the owners' sockets are, beside the directories of the sandboxes."""
_FLOCK = struct.Struct("hhqqi4x")

log = logging.getLogger(__name__)

_held: weakref.WeakSet[OwnerLock] = weakref.WeakSet()
_tag = secrets.token_hex(4)


def default_socket(runtime: Path) -> Path:
    """Where this process answers unless it says otherwise. The tag tells apart equal pids of two pid namespaces."""
    return runtime / OWNERS / f"{os.getpid()}-{_tag}.sock"


class OwnerLock:
    """The right to drive one sandbox.

    ``directory`` is the sandbox's runtime directory, made if it is missing (mode 0700). ``server`` is the socket that
    answers for this owner (default: :func:`default_socket` of the directory's parent).
    """

    def __init__(self, directory: Path, server: Path | None = None) -> None:
        self.directory = directory
        self._server = server if server is not None else default_socket(directory.parent)
        self._fd: int | None = None

    @property
    def pid(self) -> int:
        """Of the process that holds it or would: this one."""
        return os.getpid()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Take the lock; raises ``owned_elsewhere`` naming the holder, or ``data_directory``."""
        if not self.try_acquire():
            pid = holder(self.directory)
            who = f"process {pid}" if pid else "another process"
            raise SandboxGatewayError("owned_elsewhere", f"sandbox {self.directory.name} is owned by {who}")

    def try_acquire(self) -> bool:
        """Take the lock if it is free; True when it is held now.

        Raises ``data_directory`` or ``disk_full`` when it cannot be made.
        """
        if self._fd is not None:
            return True
        try:
            fd = _open_locked(self.directory)
        except OSError as error:
            raise storage_error(error, f"cannot lock {self.directory}") from error
        if fd is None:
            return False
        self._fd = fd
        _held.add(self)
        try:
            self._sign(fd)
        except OSError as error:
            # A directory that was there before is not empty, and stays.
            self.release(remove=True)
            raise storage_error(error, f"cannot lock {self.directory}") from error
        return True

    def _sign(self, fd: int) -> None:
        text = json.dumps({"pid": os.getpid(), "socket": str(self._server)}).encode() + b"\n"
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))

    def renew(self) -> bool:
        """Keep the file young, and make it again where somebody removed it: cleaners of temporary directories take
        what is old. False when another process has locked a new one meanwhile: there are two owners then.
        """
        fd = self._fd
        if fd is None:
            return True
        if self._in_place(fd):
            os.utime(fd)
            return True
        fresh = _open_locked(self.directory)
        if fresh is None:
            return False
        self._fd = fresh
        os.close(fd)
        self._sign(fresh)
        return True

    def _in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.directory / LOCK_NAME, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up; harmless when it is not held.

        ``remove`` takes the lock file away first, and the directory too if nothing else is in it.
        """
        fd, self._fd = self._fd, None
        if fd is None:
            return
        _held.discard(self)
        try:
            if remove:
                # Not the file of somebody who took the place of one that was removed under us.
                with contextlib.suppress(OSError):
                    if self._in_place(fd):
                        os.unlink(self.directory / LOCK_NAME)
                    os.rmdir(self.directory)
            else:
                os.ftruncate(fd, 0)
            # Said in words, not left to close(): a child between its fork and exec still has a copy for a moment.
            _lock(fd, fcntl.F_UNLCK)
        finally:
            os.close(fd)

    def __enter__(self) -> OwnerLock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def renew_held() -> None:
    """Renew all locks of this process (:meth:`OwnerLock.renew`); what goes wrong is logged."""
    for lock in tuple(_held):
        try:
            if not lock.renew():
                log.error("%s was removed, and another process has taken it", lock.directory / LOCK_NAME)
        except OSError as error:
            log.warning("%s cannot be kept: %s", lock.directory / LOCK_NAME, error)


def holder(directory: Path) -> int | None:
    """The pid of the process that owns the sandbox of this runtime directory right now; None when nobody does.

    0 means that somebody does who has not yet written who he is.
    """
    found = find_holder(directory)
    return None if found is None else found[0]


def find_holder(directory: Path) -> tuple[int, Path | None] | None:
    """As :func:`holder`, with the socket that answers for it; None in its place while that is not written."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        query = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        if _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))[0] == fcntl.F_UNLCK:
            return None
        text = os.pread(fd, 4096, 0)
    finally:
        os.close(fd)
    try:
        data = json.loads(text)
        return int(data["pid"]), Path(data["socket"])
    except (ValueError, KeyError, TypeError):
        return 0, None


def _open_locked(directory: Path) -> int | None:
    # A holder that removes the directory may do so between any two of these steps: begin again then.
    for _ in range(100):
        # Not exist_ok: it looks again at what was there, which may be gone by then.
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700, parents=True)
        path = directory / LOCK_NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue
        try:
            if not _lock(fd, fcntl.F_WRLCK):
                os.close(fd)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.EBUSY, "it is made and removed again and again")


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _after_fork() -> None:
    """A forked child owns nothing; its copies of the descriptors would keep the locks after the parent's death."""
    global _tag
    _tag = secrets.token_hex(4)
    for lock in tuple(_held):
        fd, lock._fd = lock._fd, None
        if fd is not None:
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
