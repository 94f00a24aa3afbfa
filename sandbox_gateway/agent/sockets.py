"""The agent's ZMQ sockets, over ``ipc://`` in the kernel's private directory.

The kernel binds, the agent connects. All three request sockets carry the same identity, since a kernel sends an
``input_request`` to the identity from which the execute request came.

Nothing imports this module before the first kernel is spawned: libzmq is loaded while the kernel boots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import zmq

IDENTITY: Final = b"agent"
MUCH: Final = 4 * 1024 * 1024
"""Bytes of messages that get on their way before more are taken."""
MAX_PART: Final = 512 * 1024 * 1024
"""Bytes of one message part; a larger one costs the kernel that connection."""


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
        """What to watch for a socket: readable when it has something to say, but see :meth:`receive`."""
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

    def send(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Hand a message to the kernel. Lost when it is going down: its exit will be reported."""
        with contextlib.suppress(zmq.ZMQError):
            self.requests[name].send_multipart(parts, zmq.NOBLOCK)

    def ping(self, payload: bytes = b"ping") -> None:
        """Ask the kernel's heartbeat; the answer, which ends with ``payload``, makes :attr:`heartbeat` readable."""
        self.heartbeat.send_multipart([b"", payload], zmq.NOBLOCK)

    def close(self) -> None:
        """Close everything and wait for the context's thread to end (at once: nothing lingers)."""
        self._context.destroy(linger=0)

    @staticmethod
    def receive(socket: zmq.Socket[bytes], limit: int) -> tuple[list[list[bytes]], bool]:
        """Messages that are there already, and whether there may be more: at most ``limit``, and no further one beyond
        :data:`MUCH`.

        ZMQ signals edges: unless this returned ``False``, the socket's descriptor need not become readable again.
        """
        messages: list[list[bytes]] = []
        size = 0
        take = socket.recv_multipart
        try:
            for _ in range(limit):
                messages.append(take(zmq.NOBLOCK))
                size += sum(map(len, messages[-1]))
                if size > MUCH:
                    break
        except zmq.Again:
            return messages, False
        return messages, True
