"""Ends the kernel when its owner is gone for too long and the sandbox's policy says so."""

from __future__ import annotations

import time
from collections.abc import Callable

from sandbox_gateway.agent.loop import Loop, Timer


class OwnerWatch:
    """Counts the seconds without a sign of life from the host.

    A restore makes the monotonic clock jump by the time that the sandbox lay on disk, in which nobody could be heard.
    So time is counted in small steps, and a step counts no more than its length.
    """

    def __init__(self, loop: Loop, expired: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = loop
        self._expired = expired
        self._clock = clock
        self._absent = 0.0
        self._last = clock()
        self._grace: float | None = None
        self._step = 1.0
        self._timer: Timer | None = None

    def set(self, terminate: bool, grace: float) -> None:
        """Begin (or cease) to end the kernel after ``grace`` seconds without a sign of life."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._grace = grace if terminate else None
        if terminate:
            self._step = min(max(grace / 6, 0.05), 10.0)
            self.alive()
            self._arm()

    def alive(self) -> None:
        """The owner was heard."""
        self._absent = 0.0
        self._last = self._clock()

    def check(self) -> None:
        """Count the time since the last check; calls ``expired`` when the grace time is over."""
        if self._grace is None:
            return
        now = self._clock()
        self._absent += min(now - self._last, 2 * self._step)
        self._last = now
        if self._absent >= self._grace:
            self._grace = None
            self._expired()
        else:
            self._arm()

    def _arm(self) -> None:
        self._timer = self._loop.later(self._step, self.check)
