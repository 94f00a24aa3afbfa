"""How far each client session of a kernel has got, in a file that survives the server.

Whoever adopts the kernel after a crash knows the sessions again: a client that comes back gets what follows what it
had, and nothing twice but what was in flight.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.wire.frames import CHANNELS, MAX_SEQ

NAME: Final = "owner.sessions"
DELAY: Final = 0.05
"""Seconds between two writes at least."""
_MAX_SIZE = 1 << 20
_IDENTITY = 32


@dataclass(frozen=True, slots=True)
class Saved:
    """What is in the file."""

    received: tuple[int, ...] = (0,) * CHANNELS
    """The last number of each channel that came."""
    sessions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By a session's identity, the numbers up to which its client has each channel."""
    state: str = ""
    """The kernel's execution state."""
    parent: str = ""
    """The raw header of the request that the state belongs to."""
    activity: float = 0.0
    """Seconds since the epoch of the last activity."""


class SessionFile:
    """The file in a sandbox's runtime directory. Never raises: without it, clients begin anew."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._last = b""

    def read(self) -> Saved:
        """What an earlier server wrote; nothing, where it is missing or damaged."""
        try:
            with self._path.open("rb") as file:
                return _saved(json.loads(file.read(_MAX_SIZE)))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return Saved()

    def write(self, saved: Saved) -> None:
        """Replace it, if it says something new."""
        data = json.dumps(
            {
                "version": 1,
                "received": saved.received,
                "sessions": saved.sessions,
                "state": saved.state,
                "parent": saved.parent,
                "activity": saved.activity,
            },
            separators=(",", ":"),
        ).encode()
        if data == self._last:
            return
        fresh = self._path.with_name(f"{NAME}~")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(OSError):
            fd = os.open(fresh, flags, 0o600)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
            os.rename(fresh, self._path)
            self._last = data

    def remove(self) -> None:
        """It is not needed any more."""
        for path in (self._path, self._path.with_name(f"{NAME}~")):
            with contextlib.suppress(OSError):
                path.unlink()


def _saved(found: Any) -> Saved:
    if found["version"] != 1:
        return Saved()
    sessions = {
        str(identity): _numbers(numbers)
        for identity, numbers in found["sessions"].items()
        if len(identity) == _IDENTITY
    }
    return Saved(
        _numbers(found["received"]), sessions, str(found["state"]), str(found["parent"]), float(found["activity"])
    )


def _numbers(found: Any) -> tuple[int, ...]:
    if len(found) != CHANNELS or not all(isinstance(n, int) and 0 <= n <= MAX_SEQ for n in found):
        raise ValueError("not numbers of channels")
    return tuple(found)
