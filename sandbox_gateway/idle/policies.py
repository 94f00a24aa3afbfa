"""The policies of sandboxes as the profile file has them now: a change holds for the sandboxes that exist, too."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import SandboxRecord
from sandbox_gateway.policy import Policy
from sandbox_gateway.profiles import Profiles, load_profiles
from sandbox_gateway.profiles.loading import Places

log = logging.getLogger(__name__)


class Policies:
    """Reads the file again when it was changed. Any thread may ask."""

    def __init__(self, paths: Places) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._stamp: object = None
        self._profiles: Profiles | None = None

    def of(self, record: SandboxRecord) -> Policy:
        """The policy of a sandbox: its profile's, with the idle times that were chosen for it.

        A profile that is not there any more leaves its sandboxes alone.
        """
        profiles = self._loaded()
        known = profiles is not None and record.profile in profiles
        policy = Policy.of(profiles[record.profile]) if profiles is not None and known else Policy()
        idle = record.idle
        if idle is None:
            return policy
        return replace(policy, pause=idle.pause, suspend=idle.suspend, expire=idle.expire, cpu=idle.cpu)

    def reserve(self) -> int | None:
        """Bytes of the machine's memory that should stay free; None when nobody asked for that."""
        profiles = self._loaded()
        return None if profiles is None else profiles.settings.memory_reserve

    def _loaded(self) -> Profiles | None:
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp or self._profiles is None:
                self._stamp = stamp
                try:
                    self._profiles = load_profiles(self._paths)
                except SandboxGatewayError as error:
                    # Whoever edits it is not done yet: what was said before holds.
                    log.warning("the profile file cannot be read, idle times are as before: %s", error.message)
            return self._profiles

    def _look(self) -> object:
        try:
            found = self._paths.profiles.stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino)
