"""The kernel's side of the relay: its connection file and its ZMQ sockets, over ``ipc://`` in a private directory.

The kernel binds, the agent connects. All three request sockets carry the same identity, since a kernel sends an
``input_request`` to the identity from which the execute request came. Nothing is parsed but where a message's header
begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import zmq

IDENTITY: Final = b"agent"
DELIMITER: Final = b"<IDS|MSG>"
MAX_PART: Final = 512 * 1024 * 1024
"""Bytes of one message part; a larger one costs the kernel that connection."""

NAMES: Final = ("shell", "control", "stdin", "iopub", "hb")
_DROPPABLE = re.compile(rb'"msg_type"\s*:\s*"(?:stream|display_data|update_display_data)"')
_WELCOME = re.compile(rb'"msg_type"\s*:\s*"iopub_welcome"')


def header_of(parts: Sequence[bytes | memoryview]) -> bytes:
    """The raw header of a Jupyter message (protocol 5: behind delimiter and signature); empty if there is none."""
    for index, part in enumerate(parts[:16]):
        if part == DELIMITER:
            return bytes(parts[index + 2]) if len(parts) > index + 2 else b""
    return b""


def droppable(parts: Sequence[bytes | memoryview]) -> bool:
    """Whether a bounded buffer may let go of this IOPub message first: streams and displays, nothing else."""
    return _DROPPABLE.search(header_of(parts)) is not None


def is_welcome(parts: Sequence[bytes | memoryview]) -> bool:
    """Whether this is the greeting that an XPUB kernel (ipykernel 7.2 and later) sends to a new subscriber."""
    return _WELCOME.search(header_of(parts)) is not None


class KernelDirectory:
    """Where one agent's kernels find their connection file and put their sockets.

    The top belongs to the agent, so that nothing of the kernel's can be put in the place of the connection file. Each
    generation of the kernel has a folder of its own below, which it may write (by its group) and the agent owns:
    the agent has no capability to override permissions, only to change owners.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self._created = not top.exists()
        top.mkdir(mode=0o711, parents=True, exist_ok=True)
        if top.stat().st_uid != os.geteuid():
            os.chown(top, os.geteuid(), -1)
        top.chmod(0o711)

    @property
    def connection_file(self) -> Path:
        """The file whose path a kernelspec calls ``{connection_file}``."""
        return self.top / "connection.json"

    def sockets(self, generation: int) -> dict[str, Path]:
        """The path of each socket of a generation."""
        folder = self.top / str(generation)
        return {name: folder / f"k-{number}" for number, name in enumerate(NAMES, 1)}

    def prepare(self, generation: int, key: str, uid: int, gid: int) -> None:
        """Make the folder of a generation and the connection file, readable by the kernel alone (OSError)."""
        folder = self.top / str(generation)
        folder.mkdir(mode=0o700)
        path = self.connection_file
        path.unlink(missing_ok=True)
        info = {f"{name}_port": number for number, name in enumerate(NAMES, 1)}
        text = json.dumps(
            {
                "transport": "ipc",
                "ip": str(folder / "k"),
                "key": key,
                "signature_scheme": "hmac-sha256",
                "kernel_name": "",
                **info,
            }
        )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, text.encode())
            if uid != os.geteuid():
                os.fchown(fd, uid, gid)
                os.chown(folder, -1, gid)
                folder.chmod(0o770)
        finally:
            os.close(fd)

    def present(self, generation: int) -> bool:
        """Whether the kernel has made all its sockets; takes over their ownership, so that the agent may connect."""
        for path in self.sockets(generation).values():
            try:
                status = path.lstat()
            except OSError:
                return False
            if not stat.S_ISSOCK(status.st_mode):
                return False
            if status.st_uid != os.geteuid() and os.geteuid() != 0:
                # Not followed: a link put there meanwhile changes its own owner only.
                with contextlib.suppress(OSError):
                    os.chown(path, os.geteuid(), -1, follow_symlinks=False)
        return True

    def forget(self, generation: int) -> None:
        """Remove a generation's folder as far as that is permitted; what a kernel hid in it stays, unused."""
        shutil.rmtree(self.top / str(generation), ignore_errors=True)

    def remove(self) -> None:
        """Remove everything, when this object made it."""
        self.connection_file.unlink(missing_ok=True)
        if self._created:
            shutil.rmtree(self.top, ignore_errors=True)


class KernelSockets:
    """One generation's sockets. Made after the fork of the kernel: each context has a thread, and forks want none."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._context = zmq.Context(1)
        self._paths = paths
        # In the order in which they are read: a request for input before the reply that ends its cell.
        self.requests = {name: self._request_socket() for name in ("stdin", "shell", "control")}
        self.heartbeat = self._make(zmq.DEALER)
        self.iopub = self._make(zmq.SUB)
        for name, socket in self.requests.items():
            socket.connect(f"ipc://{paths[name]}")
        self.heartbeat.connect(f"ipc://{paths['hb']}")

    def subscribe(self) -> None:
        """Take part in IOPub. There is no high-water mark on this side: nothing is lost while the agent drains."""
        self.iopub.setsockopt(zmq.SUBSCRIBE, b"")
        self.iopub.connect(f"ipc://{self._paths['iopub']}")

    def descriptor(self, socket: zmq.Socket[bytes]) -> int:
        """What to watch for a socket: readable when it has something to say, but see :func:`receive`."""
        return int(socket.getsockopt(zmq.FD))

    def all(self) -> list[zmq.Socket[bytes]]:
        """Every socket, for the event loop."""
        return [*self.requests.values(), self.heartbeat, self.iopub]

    def _make(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART)
        socket.setsockopt(zmq.RECONNECT_IVL, 10)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        return socket

    def _request_socket(self) -> zmq.Socket[bytes]:
        socket = self._make(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, IDENTITY)
        return socket

    def ping(self) -> None:
        """Ask the kernel's heartbeat; the answer makes :attr:`heartbeat` readable."""
        self.heartbeat.send_multipart([b"", b"ping"], zmq.NOBLOCK)

    def close(self) -> None:
        """Close everything and wait for the context's thread to end (at once: nothing lingers)."""
        self._context.destroy(linger=0)


def receive(socket: zmq.Socket[bytes], limit: int) -> tuple[list[list[bytes]], bool]:
    """At most ``limit`` messages that are there already, and whether there may be more.

    ZMQ signals edges: unless this returned ``False``, the socket's descriptor need not become readable again.
    """
    messages: list[list[bytes]] = []
    take = socket.recv_multipart
    try:
        for _ in range(limit):
            messages.append(take(zmq.NOBLOCK))
    except zmq.Again:
        return messages, False
    return messages, True
