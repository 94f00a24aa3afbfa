"""Whether anything in some folders has changed, told by the kernel (inotify(7)) instead of by looking at each file.

Of our own, in few lines: the packages that wrap inotify run programs to find the C library, or threads.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Collection, Iterator

__all__ = ["FolderWatch"]

_IN_MODIFY, _IN_ATTRIB, _IN_MOVED_FROM, _IN_MOVED_TO = 0x2, 0x4, 0x40, 0x80
_IN_CREATE, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_IN_ONLYDIR = 0x1000000
_CHANGES = (
    _IN_MODIFY | _IN_ATTRIB | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
)
_EVENT = struct.Struct("iIII")
_EVENTS_AT_ONCE = 1 << 16

_TOLD = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0xCA451A4E,  # bcachefs
        0xF2F52010,  # F2FS
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlayfs, as in containers
    }
)
"""Types of file systems (statfs(2)) whose every change is told. Not so NFS, 9p, FUSE and virtiofs, which others change
too, and ZFS, which is rolled back in silence."""


class FolderWatch:
    """Watches folders, each for its own entries, not for what lies deeper.

    Changes of a file through a mapping of its memory, or through another hard link, are not told by inotify.
    """

    def __init__(self, unheeded: Collection[str] = ()) -> None:
        """``unheeded`` are names of entries that may come and go. Raises OSError where no watch can be had."""
        self._unheeded = frozenset(os.fsencode(name) for name in unheeded)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = _checked(self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._close = weakref.finalize(self, os.close, self._fd)
        self._devices: set[int] = set()
        self._process = os.getpid()

    def add(self, folder: str) -> None:
        """Watch a folder from now on; of one that is not there, the nearest that is and in which it would appear.

        Raises OSError when it cannot be watched: there are too many, its changes would not be told, or it is a link.
        """
        while True:
            if os.path.islink(folder):
                raise OSError("nobody tells when it leads elsewhere")
            try:
                self._told(folder)
                path = os.fsencode(folder)
                _checked(self._libc.inotify_add_watch(self._fd, path, _CHANGES | _IN_ONLYDIR))
                return
            except (FileNotFoundError, NotADirectoryError):
                parent = os.path.dirname(folder)
                if parent == folder:
                    raise
                folder = parent

    def _told(self, folder: str) -> None:
        device = os.stat(folder).st_dev
        if device in self._devices:
            return
        found = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type
        _checked(self._libc.statfs(os.fsencode(folder), found))
        if ctypes.c_long.from_buffer(found).value not in _TOLD:
            raise OSError("changes of this file system may come from elsewhere")
        self._devices.add(device)

    @property
    def changed(self) -> bool:
        """Whether anything has changed, or may have; once it has, it stays so."""
        if not self._close.alive or os.getpid() != self._process:  # a fork's reading would take them from its parent
            return True
        # An event of a folder itself has no name, nor has the one that tells that others were lost.
        if all(name in self._unheeded for name in self._events()):
            return False
        self.close()
        return True

    def _events(self) -> Iterator[bytes]:
        """The names of the entries to which something happened since."""
        while True:
            try:
                data = os.read(self._fd, _EVENTS_AT_ONCE)
            except BlockingIOError:
                return
            except OSError:  # somebody has closed it
                yield b""
                return
            while data:
                *_, length = _EVENT.unpack_from(data)
                yield data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                data = data[_EVENT.size + length :]

    def close(self) -> None:
        """Watch no more; everything counts as changed from now on."""
        self._close()


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
