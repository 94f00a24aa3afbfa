"""A kernel's ZMQ endpoints on the host, for any jupyter_client: they outlive whatever happens to the sandbox.

They speak ZMTP themselves (:mod:`sandbox_gateway.zmtp`) on unix sockets instead of using libzmq's ROUTER and XPUB, for
what those cannot do: an XPUB knows nothing of its subscribers, so it either drops silently at its high-water mark, or
grows without bound, or lets one slow subscriber stop all of them. Here each client has a queue of its own, bounded in
bytes; at the bound its oldest streams and displays go, replaced by a notice that tells how much is missing, and never
anything else; before that, small stream messages that wait are joined (:mod:`sandbox_gateway.bridge_queue`). There is
no thread, no socket limit per context, and one hop less.

A bridge stays open while its kernel is suspended. When its process is killed, the next owner opens one on the same
paths with the same key: clients reconnect by themselves, find the replies that were kept for them, and get the output
that :meth:`~sandbox_gateway.channels.KernelChannels.retain` kept.

Everything runs on the event loop on which the bridge was made; nothing here blocks or raises into the caller.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.bridge_endpoint import HEARTBEAT, Endpoint, OnRequest
from sandbox_gateway.bridge_listener import Listener, UnixListener, inode, unlink_own
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import storage_error
from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

QUEUE_LIMIT: Final = 128 << 20
"""Bytes that may wait for one slow client on one channel before output is left out."""
PORTS: Final[Mapping[str, int]] = {
    "shell_port": int(Channel.SHELL),
    "control_port": int(Channel.CONTROL),
    "stdin_port": int(Channel.STDIN),
    "iopub_port": int(Channel.IOPUB),
    "hb_port": HEARTBEAT,
}
"""The endpoints' numbers, by jupyter_client's names for their ports; ports of their own where the transport is ipc."""
CONNECTION_FILE: Final = "owner.connection.json"
"""Name of the file that clients connect by, in the sandbox's runtime directory."""


class Bridge:
    """Five endpoints at the places that ``listeners`` names by their numbers. Made on a running event loop.

    ``on_request`` gets the clients' messages of the shell, control and stdin channels; :meth:`deliver` takes the
    kernel's.
    """

    def __init__(
        self, listeners: Mapping[int, Listener], key: bytes, on_request: OnRequest, *, queue_limit: int = QUEUE_LIMIT
    ) -> None:
        self._endpoints = {
            number: Endpoint(listener, number, key, on_request, queue_limit) for number, listener in listeners.items()
        }

    def listen(self) -> None:
        """Listen where we do not (or no longer: somebody removed the file). Connections that exist are not touched.

        Raises OSError; what listens by then goes on.
        """
        for endpoint in self._endpoints.values():
            endpoint.listen()

    def hold(self, held: bool) -> None:
        """Take no more requests of the shell channel from clients, or go on."""
        self._endpoints[int(Channel.SHELL)].hold(held)

    @property
    def connected(self) -> bool:
        """Whether any client is connected."""
        return any(endpoint.peers for endpoint in self._endpoints.values())

    @property
    def backlog(self) -> int:
        """Bytes that wait for the slowest client."""
        return max((peer.pending for endpoint in self._endpoints.values() for peer in endpoint.peers), default=0)

    @property
    def settled(self) -> bool:
        """Whether everything was written to its clients' sockets, in whole messages.

        False for as long as some client does not read, or a reply waits for one that was not connected here yet. One
        that hung up is not waited for.
        """
        return all(endpoint.settled for endpoint in self._endpoints.values())

    def deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Pass a message of the kernel on: on iopub to all who subscribed, else to the client it is addressed to.

        An identity that is not connected here belongs to another front end's client and is passed over.
        """
        endpoint = self._endpoints.get(channel)
        if endpoint is None or not parts:
            # It comes from inside, as often as that likes: nothing for the log.
            log.debug("a message for channel %d was dropped", channel)
        elif channel == Channel.IOPUB:
            endpoint.publish(parts)
        else:
            endpoint.route(parts)

    def close(self) -> None:
        """Remove the endpoints. What clients have not yet taken is written for a second more
        (:data:`sandbox_gateway.bridge_peer.LINGER`)."""
        for endpoint in self._endpoints.values():
            endpoint.close()


class ZmqBridge(Bridge):
    """Endpoints ``ipc://<directory>/owner.z-<n>``, private to this user, and the file that names them.

    ``kernel_name`` is the kernelspec's, for the connection file. Raises ``data_directory`` when the sockets or the file
    cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        key: bytes,
        on_request: OnRequest,
        *,
        queue_limit: int = QUEUE_LIMIT,
        kernel_name: str = "",
    ) -> None:
        self.directory = directory
        self._prefix = directory / "owner.z"
        self._key = key
        self._kernel_name = kernel_name
        self._file_inode: tuple[int, int] | None = None
        listeners = {number: UnixListener(Path(f"{self._prefix}-{number}")) for number in PORTS.values()}
        super().__init__(listeners, key, on_request, queue_limit=queue_limit)
        self.publish_endpoints()

    def follow(self, channels: KernelChannels) -> None:
        """Carry this kernel's messages; clients that subscribe are its listeners."""
        output = self._endpoints[int(Channel.IOPUB)]
        subscription = channels.subscribe(
            self.deliver, listening=lambda: any(peer.topics for peer in output.peers), settled=lambda: self.settled
        )
        output.on_listener = subscription.listen

    @property
    def connection_file(self) -> Path:
        """The file that ``jupyter console --existing`` and ``BlockingKernelClient`` connect by."""
        return self.directory / CONNECTION_FILE

    @property
    def connection_info(self) -> dict[str, Any]:
        """What jupyter_client connects by; ``key`` is bytes, as a provisioner returns it."""
        return {
            "transport": "ipc",
            "ip": str(self._prefix),
            **PORTS,
            "key": self._key,
            "signature_scheme": "hmac-sha256",
        }

    def publish_endpoints(self) -> None:
        """As :meth:`listen`, and write the connection file where it is missing. Raises ``data_directory``."""
        try:
            self.listen()
            if self._file_inode is None or inode(self.connection_file) != self._file_inode:
                self._write_connection_file()
        except OSError as error:
            self.close()
            raise storage_error(error, f"cannot make sockets in {self.directory}") from error

    def close(self) -> None:
        """As :meth:`Bridge.close`, and remove the connection file."""
        super().close()
        if self._file_inode is not None:
            unlink_own(self.connection_file, self._file_inode)
            self._file_inode = None

    def _write_connection_file(self) -> None:
        content = {**self.connection_info, "key": self._key.decode(), "kernel_name": self._kernel_name}
        fresh = self.directory / f"{CONNECTION_FILE}~"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump(content, file, indent=1)
                found = os.fstat(file.fileno())
            os.rename(fresh, self.connection_file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        self._file_inode = (found.st_dev, found.st_ino)
