"""The fingerprints of an environment's layers, remembered for as long as the kernel tells of no change.

Asking some 2,900 files for their times takes 13 ms of the processor at each start, and three quarters of what a start
must know of its image; asking whether anything has happened in their 400 folders takes none. Where that cannot be
asked (a network's file system, too many watches), it is looked each time.
"""

from __future__ import annotations

import logging
import os
import threading

from sandbox_gateway.host.folder_watch import FolderWatch
from sandbox_gateway.images.host_env import EnvironmentLayer, fingerprint

__all__ = ["Fingerprints"]

log = logging.getLogger(__name__)

_REMEMBERED = 32
"""Layers of which the fingerprint is kept; each takes an inotify instance, of which a user has 128."""


class Fingerprints:
    """One per process; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[EnvironmentLayer, _Known | None] = {}

    def of(self, layer: EnvironmentLayer) -> str:
        """What :func:`~sandbox_gateway.images.host_env.fingerprint` would answer now.

        Watching begins with the second question: most programs start a single kernel.
        """
        with self._lock:
            asked_before = layer in self._known
            known = self._known.pop(layer, None)
            if known is not None and not known.holds:
                known = None
            if known is None and asked_before:
                known = _Known.look(layer)
            self._known[layer] = known
            while len(self._known) > _REMEMBERED:
                forgotten = self._known.pop(next(iter(self._known)))
                if forgotten is not None:
                    forgotten.watch.close()
        return known.answer if known is not None else fingerprint(layer)


class _Known:
    """An answer, and what tells whether it still holds."""

    def __init__(self, path: str, watch: FolderWatch) -> None:
        self.answer = ""
        self.watch = watch
        self._path = path
        self._place = _place(path)

    @classmethod
    def look(cls, layer: EnvironmentLayer) -> _Known | None:
        """Look while watching; None where it cannot be watched."""
        try:
            watch = FolderWatch(unheeded=("__pycache__",))
        except OSError as error:
            log.debug("changes of %s cannot be watched: %s", layer.path, error)
            return None
        known = cls(layer.path, watch)
        try:
            known.answer = fingerprint(layer, watch.add)
        except OSError as error:
            watch.close()
            log.debug("changes of %s cannot be watched: %s", layer.path, error)
            return None
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
