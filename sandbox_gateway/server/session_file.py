"""How far each client session of a kernel has got, in a file that survives the server.

Whoever adopts the kernel after a crash knows the sessions again: a client that comes back gets what follows what it
had, and nothing twice but what was in flight.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.wire.frames import CHANNELS, MAX_SEQ

NAME: Final = "owner.sessions"
DELAY: Final = 0.05
"""Seconds between two writes at least."""
_PLACE = 128 << 10
"""Bytes of each place, head and all; what is written has a tenth of that."""
_HEAD = struct.Struct("<4sQII")
_MAGIC = b"sgs1"
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
    """The file in a sandbox's runtime directory. Never raises: without it, clients begin anew.

    It has two places, which are written in turn: a crash spoils at most the one that was being written, and nothing is
    renamed (which waits for the disk, at every write, in the middle of a kernel's output).
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._last = b""
        self._turn = 0
        self._fd: int | None = None

    def read(self) -> Saved:
        """What an earlier server wrote last; nothing, where it is missing or damaged."""
        try:
            with self._path.open("rb") as file:
                places = [file.read(_PLACE), file.read(_PLACE)]
            found = [place for place in map(_content, places) if place is not None]
            self._turn, data = max(found)
            return _saved(json.loads(data))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return Saved()

    def write(self, saved: Saved) -> None:
        """Write it, if it says something new."""
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
        if data == self._last or len(data) > _PLACE - _HEAD.size:
            return
        with contextlib.suppress(OSError):
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            head = _HEAD.pack(_MAGIC, self._turn + 1, len(data), zlib.crc32(data))
            os.pwrite(self._fd, head + data, (self._turn + 1) % 2 * _PLACE)
            self._turn += 1
            self._last = data

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and remove it with ``remove``."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        if remove:
            with contextlib.suppress(OSError):
                self._path.unlink()


def _content(place: bytes) -> tuple[int, bytes] | None:
    """When it was written, as the number of the write, and the JSON; None where there is nothing whole."""
    try:
        magic, turn, size, check = _HEAD.unpack_from(place)
    except struct.error:
        return None
    data = place[_HEAD.size : _HEAD.size + size]
    return (turn, data) if magic == _MAGIC and len(data) == size and zlib.crc32(data) == check else None


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
