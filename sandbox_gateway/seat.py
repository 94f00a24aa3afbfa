"""A kernel's place in the process that owns it: the lock, the channels, the endpoints for jupyter_client.

It outlives the sandboxes that come and go under the kernel's id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.cursors import CursorFile
from sandbox_gateway.owner import OwnerLock
from sandbox_gateway.zmq_bridge import ZmqBridge


class Seat:
    """Made with a lock that is held; :meth:`release` gives everything back."""

    def __init__(self, lock: OwnerLock, key: bytes, *, missing_file_hint: str = "") -> None:
        self.lock = lock
        self.key = key
        self.channels = KernelChannels(key, missing_file_hint=missing_file_hint)
        self.cursors = CursorFile(lock.directory)
        self.restored = asyncio.Event()
        """Set while a sandbox is made for it from another one's memory, as soon as that runs and answers: what is left
        is that it becomes this one. Never set for one that starts cold."""
        self._bridge: ZmqBridge | None = None
        self._closers: list[Callable[[bool], object]] = []

    def on_release(self, closer: Callable[[bool], object]) -> None:
        """Call ``closer`` when the seat is given up; it is told whether its files have to go."""
        self._closers.append(closer)

    @property
    def directory(self) -> Path:
        """The sandbox's runtime directory."""
        return self.lock.directory

    @property
    def connected(self) -> bool:
        """Whether any client is connected to the endpoints."""
        return self._bridge is not None and self._bridge.connected

    def bridge(self) -> ZmqBridge:
        """The endpoints, opened on demand, and again where somebody removed their files.

        Raises ``data_directory`` when they cannot be made.
        """
        if self._bridge is None:
            bridge = ZmqBridge(self.directory, self.key, self.channels.request)
            bridge.follow(self.channels)
            self._bridge = bridge
        else:
            self._bridge.publish_endpoints()
        return self._bridge

    def release(self, *, remove: bool = True) -> None:
        """Close the endpoints and give the id up; with ``remove`` the directory goes too, if nothing else is in it."""
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.close()
        closers, self._closers = self._closers, []
        for closer in closers:
            closer(remove and self.lock.held)
        # Of one that was given up before nothing is ours to remove: another process may own it by now.
        self.cursors.close(remove=remove and self.lock.held)
        self.lock.release(remove=remove)
