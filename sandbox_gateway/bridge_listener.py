"""Where a bridge's endpoint listens: a unix socket in a private directory, or a loopback TCP port where there are none.

Part of :mod:`sandbox_gateway.zmq_bridge`. Imports and runs on macOS and Windows too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final, Protocol

LOOPBACK: Final = "127.0.0.1"
_BACKLOG: Final = 128


class Listener(Protocol):
    """One place to listen at, opened and removed as often as needed."""

    def open(self) -> socket.socket:
        """A listening socket that does not block; clients find it at the same address each time. Raises OSError."""
        ...

    @property
    def stands(self) -> bool:
        """Whether clients still find what :meth:`open` made."""
        ...

    def remove(self) -> None:
        """Take away what clients find it by; never what another process has put there since."""
        ...


def inode(path: Path) -> tuple[int, int] | None:
    """What stands under this name now."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def unlink_own(path: Path, own: tuple[int, int]) -> None:
    """Remove a file unless another owner has put its own under this name meanwhile."""
    with contextlib.suppress(OSError):
        if inode(path) == own:
            os.unlink(path)


class UnixListener:
    """A unix socket at ``path``, mode 0600."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: tuple[int, int] | None = None

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> socket.socket:
        """As :meth:`Listener.open`."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = f"{self.path}~"
        try:
            listening.setblocking(False)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
            listening.bind(fresh)
            os.chmod(fresh, 0o600)
            listening.listen(_BACKLOG)
            found = os.stat(fresh)
            # In one step over what a killed owner may have left under this name.
            os.rename(fresh, self.path)
        except OSError:
            listening.close()
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        self._inode = (found.st_dev, found.st_ino)
        return listening

    @property
    def stands(self) -> bool:
        """As :attr:`Listener.stands`."""
        return inode(self.path) == self._inode

    def remove(self) -> None:
        """As :meth:`Listener.remove`."""
        if self._inode is not None:
            unlink_own(self.path, self._inode)


class TcpListener:
    """A port of the loopback interface, chosen by the system when it is first opened and kept then.

    Other users of the machine can connect, as to any Jupyter kernel over TCP: who takes requests from here has to check
    their signatures.
    """

    def __init__(self) -> None:
        self.port = 0

    def __str__(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def open(self) -> socket.socket:
        """As :meth:`Listener.open`."""
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setblocking(False)
            if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where another process could take the port as well
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            listening.bind((LOOPBACK, self.port))
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
        self.port = int(listening.getsockname()[1])
        return listening

    @property
    def stands(self) -> bool:
        """As :attr:`Listener.stands`; nobody can take a port away."""
        return True

    def remove(self) -> None:
        """As :meth:`Listener.remove`: it ends with its socket."""
