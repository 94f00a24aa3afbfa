"""When to look at a source of messages that may come fast.

Waking up for each message costs more than handling it, inside gVisor above all. So while messages come quickly one
after another, the agent stops being woken and looks every :data:`INTERVAL` seconds; a request or reply on another
channel ends that at once, so that no round trip pays for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sandbox_gateway.agent.loop import Loop, Timer

INTERVAL = 0.002
"""Seconds between two looks while messages come fast. A pipe of 1 MiB then takes 500 MB/s."""

_CLOSE = 0.003
_STREAK = 6
_GIVE_UP = 3
_HELD = 0.01


class Pace:
    """Decides between being woken and looking by the clock; holds no clock itself."""

    __slots__ = ("_empty", "_last", "_streak", "paced")

    def __init__(self) -> None:
        self._last = 0.0
        self._streak = 0
        self._empty = 0
        self.paced = False
        """True: look again after :data:`INTERVAL`. False: wait to be woken."""

    def looked(self, now: float, found: int) -> bool:
        """Note a look at time ``now`` that found so many messages; returns :attr:`paced`."""
        if self.paced:
            self._empty = 0 if found else self._empty + 1
            if self._empty >= _GIVE_UP:
                self.relax()
        elif found:
            if now - self._last < _CLOSE:
                self._streak += 1
                self.paced = self._streak >= _STREAK
            else:
                self._streak = 0
        self._last = now
        return self.paced

    def relax(self) -> None:
        """Wait to be woken again: nothing came, or somebody waits for an answer."""
        self.paced = False
        self._streak = self._empty = 0


class Source:
    """A descriptor, and a function that takes what is there: ``look() -> (messages found, more at once)``.

    Not looking is how a writer is held back, so ``allowed`` may say no; it is asked again before long.
    """

    def __init__(
        self, loop: Loop, fd: int, look: Callable[[], tuple[int, bool]], allowed: Callable[[], bool] | None = None
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._take = look
        self._allowed = allowed
        self._pace = Pace()
        self._timer: Timer | None = None
        self._watching = False
        self._queued = False
        self._closed = False
        self._watch(True)

    def look(self) -> bool:
        """Take what is there, and arrange for the next look; returns whether there may be more at once."""
        self._queued = False
        if self.is_closed():
            return False
        if self._allowed is not None and not self._allowed():
            self._watch(False)
            if self._timer is None:
                self._timer = self._loop.later(_HELD, self._asked)
            return False
        found, more = self._take()
        if self.is_closed():
            return False
        paced = self._pace.looked(time.monotonic(), found)
        if more:
            self._again()
        elif paced:
            self._watch(False)
            if self._timer is None:
                self._timer = self._loop.later(INTERVAL, self._due)
        else:
            self._watch(True)
        return more

    def relax(self) -> None:
        """Somebody waits: be woken at once from now on."""
        if self._pace.paced:
            self._pace.relax()
            self._watch(True)
            self._again()  # a ZMQ descriptor signals edges, and this one may have passed unseen
        else:
            self._pace.relax()

    def is_closed(self) -> bool:
        """Whether :meth:`close` was called (perhaps by what was looked at)."""
        return self._closed

    def close(self) -> None:
        """Look no more. The descriptor stays its owner's to close."""
        self._closed = True
        self._watch(False)
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        # Not watching although nothing is paced any more: it was held back while this timer was under way.
        if self._pace.paced or not self._watching:
            self.look()

    def _asked(self) -> None:
        self._timer = None
        self.look()

    def _again(self) -> None:
        if not self._queued:
            self._queued = True
            self._loop.soon(self.look)

    def _watch(self, wanted: bool) -> None:
        if wanted == self._watching:
            return
        self._watching = wanted
        if wanted:
            self._loop.watch(self._fd, self.look)
        else:
            self._loop.forget(self._fd)
