"""The fingerprints of an environment's layers, remembered for as long as the kernel tells of no change.

Asking some 2,900 files for their times takes 13 ms of the processor at each start, and three quarters of what a start
must know of its image; asking whether anything has happened in their 400 folders takes none. Where that cannot be
asked (a network's file system, too many watches), it is looked each time.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from sandbox_gateway.host.folder_watch import FolderWatch
from sandbox_gateway.images.host_env import EnvironmentLayer, fingerprint

__all__ = ["Fingerprints"]

log = logging.getLogger(__name__)

_REMEMBERED = 32
"""Layers of which the fingerprint is kept; each takes an inotify instance, of which a user has 128."""
_PAUSE = 60.0
"""Seconds after which it is tried again to watch what could not be watched."""


class Fingerprints:
    """One per process; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[EnvironmentLayer, _Known | float] = {}
        """An answer and its watch, or from when on (monotonic seconds) there may be one."""

    def of(self, layer: EnvironmentLayer) -> str:
        """What :func:`~sandbox_gateway.images.host_env.fingerprint` would answer now.

        Watching begins with the second question: most programs start a single kernel.
        """
        with self._lock:
            known = self._known.pop(layer, None)
        # Not while the lock is held: a file system may keep those who look for long.
        if known is None:
            found: _Known | float = time.monotonic()
        elif isinstance(known, _Known):
            found = known if known.holds else _Known.look(layer)
        else:
            found = _Known.look(layer) if time.monotonic() >= known else known
        self._remember(layer, found)
        return found.answer if isinstance(found, _Known) else fingerprint(layer)

    def _remember(self, layer: EnvironmentLayer, found: _Known | float) -> None:
        with self._lock:
            other = self._known.pop(layer, None)  # of a thread that asked at the same time
            if isinstance(found, float) and isinstance(other, _Known):
                found, other = other, None
            forgotten = [other]
            self._known[layer] = found
            while len(self._known) > _REMEMBERED:
                forgotten.append(self._known.pop(next(iter(self._known))))
        for one in forgotten:
            if isinstance(one, _Known):
                one.watch.close()


class _Known:
    """An answer, and what tells whether it still holds."""

    def __init__(self, path: str, watch: FolderWatch) -> None:
        self.answer = ""
        self.watch = watch
        self._path = path
        self._place = _place(path)

    @classmethod
    def look(cls, layer: EnvironmentLayer) -> _Known | float:
        """Look while watching; where that cannot be, when it may be tried again."""
        known = None
        try:
            known = cls(layer.path, FolderWatch(unheeded=("__pycache__",)))
            known.answer = fingerprint(layer, known.watch.add)
        except OSError as error:
            if known is not None:
                known.watch.close()
            log.debug("changes of %s cannot be watched: %s", layer.path, error)
            return time.monotonic() + _PAUSE
        return known

    @property
    def holds(self) -> bool:
        # A folder above may have been renamed, or something mounted over it: of that, nobody tells.
        if self._place is not None and self._place == _place(self._path) and not self.watch.changed:
            return True
        self.watch.close()
        return False


def _place(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino
