"""The endpoints that jupyter_client connects to for a remote kernel: unix sockets, or loopback TCP ports.

Unix sockets are private to this user and are taken where they are to be had. Over TCP every user of the machine can
connect, as with any Jupyter kernel: requests without the right signature are dropped, but output can be read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.bridge_endpoint import OnRequest
from sandbox_gateway.bridge_listener import LOOPBACK, Listener, TcpListener, UnixListener
from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.zmq_bridge import PORTS, Bridge

IPC, TCP = "ipc", "tcp"
_PREFIX = "sandbox-remote-"
_LONGEST: Final = 100
"""Bytes of a socket's path; macOS takes 103."""
_SETTLED: Final = 60.0
"""Seconds after which a directory without a listening socket is one that a killed application left."""


class LocalEndpoints:
    """Five endpoints for one kernel, until :meth:`close`. Made on a running event loop.

    ``transport`` is ``ipc``, ``tcp`` or empty for what suits the machine. Raises ``data_directory`` or
    ``unsupported``.
    """

    def __init__(self, key: bytes, on_request: OnRequest, transport: str = "") -> None:
        self._key = key
        self._directory: Path | None = None
        self._tcp: Mapping[int, TcpListener] = {}
        if transport not in ("", IPC, TCP):
            raise SandboxGatewayError("invalid_request", f"the transport {transport!r} is neither {IPC} nor {TCP}")
        if transport != TCP:
            self._directory = _make_directory(required=transport == IPC)
        listeners: Mapping[int, Listener]
        if self._directory is not None:
            prefix = self._directory / "z"
            listeners = {number: UnixListener(Path(f"{prefix}-{number}")) for number in PORTS.values()}
        else:
            self._tcp = {number: TcpListener() for number in PORTS.values()}
            listeners = self._tcp
        self.bridge = Bridge(listeners, key, on_request)

    def listen(self) -> None:
        """Listen where we do not: jupyter_client removes the sockets' files at each restart."""
        try:
            self.bridge.listen()
        except OSError as error:
            raise storage_error(error, f"cannot listen for local clients in {self._directory or LOOPBACK}") from error

    @property
    def connection_info(self) -> dict[str, Any]:
        """What jupyter_client connects by; ``key`` is bytes, as a provisioner returns it."""
        common = {"key": self._key, "signature_scheme": "hmac-sha256"}
        if self._directory is not None:
            return {"transport": IPC, "ip": str(self._directory / "z"), **PORTS, **common}
        ports = {name: self._tcp[number].port for name, number in PORTS.items()}
        return {"transport": TCP, "ip": LOOPBACK, **ports, **common}

    def close(self) -> None:
        """Remove them."""
        self.bridge.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _make_directory(*, required: bool) -> Path | None:
    """A directory of mode 0700 for the sockets; None where there are no unix sockets, or only under too long a path."""
    if os.name != "posix" or not hasattr(socket, "AF_UNIX"):
        if required:
            raise SandboxGatewayError("unsupported", f"there is no {IPC} on this system", f"Choose {TCP}.")
        return None
    base = Path(tempfile.gettempdir())
    _sweep(base)
    try:
        made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    except OSError as error:
        raise storage_error(error, f"cannot make a directory in {base}") from error
    if len(os.fsencode(made / "z-5~")) <= _LONGEST:
        return made
    made.rmdir()
    if required:
        raise SandboxGatewayError("unsupported", f"a socket's path in {base} is too long", "Set TMPDIR, or choose tcp.")
    return None


def _sweep(base: Path) -> None:
    """Remove directories that killed applications of this user left. Whoever listens is asked, not believed by a pid:
    applications in containers may share the directory."""
    for found in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = found.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _SETTLED and not _listened(found):
                shutil.rmtree(found, ignore_errors=True)


def _listened(directory: Path) -> bool:
    for path in directory.glob("z-*"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.setblocking(False)
            try:
                asking.connect(str(path))
                return True
            except BlockingIOError:
                return True
            except OSError:
                continue
    return False
