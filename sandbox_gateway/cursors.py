"""How far the clients of a kernel have been served, in a file that survives its owner.

The owner writes it after everything up to these numbers was handed to every client's socket. Whoever adopts the
sandbox after a ``kill -9`` goes on from there: what was in flight comes again, with the same ``msg_id``, never not at
all (DESIGN, invariant 1).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sandbox_gateway.wire.frames import CHANNELS

NAME: Final = "owner.cursors"
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
