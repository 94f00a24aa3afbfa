"""How far the clients of a kernel have been served, in a file that survives its owner.

The owner writes it after everything up to these numbers was handed to every client's socket. Whoever adopts the
sandbox after a ``kill -9`` goes on from there: what was in flight comes again, with the same ``msg_id``, never not at
all (DESIGN, invariant 1).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from sandbox_gateway.wire.frames import CHANNELS

NAME: Final = "owner.cursors"
DELAY: Final = 0.02
"""Seconds after a message until it is looked whether the clients have it."""
_NUMBERS = struct.Struct(f"<{CHANNELS}Q")


class CursorFile:
    """The file in a sandbox's runtime directory; Never raises: without it, more comes twice."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._fd: int | None = None

    def read(self) -> dict[int, int]:
        """The numbers by channel; empty when there are none, or they are damaged."""
        try:
            data = self._path.read_bytes()
            return {channel: number for channel, number in enumerate(_NUMBERS.unpack(data)) if number}
        except (OSError, struct.error):
            return {}

    def write(self, received: Mapping[int, int]) -> None:
        """Replace the numbers: one write of few bytes, which no crash of ours tears."""
        with contextlib.suppress(OSError):
            if self._fd is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self._path, flags, 0o600)
            os.pwrite(self._fd, _NUMBERS.pack(*(received.get(channel, 0) for channel in range(CHANNELS))), 0)

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and remove it with ``remove``."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        if remove:
            with contextlib.suppress(OSError):
                self._path.unlink()


class Progress:
    """Writes the file while messages come: soon after each of them, once all clients have them.

    ``received`` gives the numbers of what came, None while there is no link; ``served`` says up to which of them all
    clients have it, None while that is not known.
    """

    def __init__(
        self,
        file: CursorFile,
        served: Callable[[Mapping[int, int]], Mapping[int, int] | None],
        received: Callable[[], Mapping[int, int] | None],
    ) -> None:
        self._file = file
        self._served = served
        self._received = received
        self._timer: asyncio.TimerHandle | None = None

    def moved(self) -> None:
        """A message came. Cheap: it is called for every one."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DELAY, self._look)

    def _look(self) -> None:
        self._timer = None
        received = self._received()
        if received is None:
            return
        served = self._served(received)
        if served is None:
            self.moved()
        else:
            self._file.write(served)

    def stop(self) -> None:
        """Write what can be said now, and look no more."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            received = self._received()
            served = self._served(received) if received is not None else None
            if served is not None:
                self._file.write(served)
