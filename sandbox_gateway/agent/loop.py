"""One thread, one ``epoll``: descriptors, timers and child signals. Nothing in the agent waits anywhere else."""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

_IDLE = 60.0
"""Longest sleep, in seconds; nothing depends on it."""
_JUMP = 2.0
"""Seconds that a turn may take beyond its sleep; what is above did not pass for this process."""


class Timer:
    """A call that is due at a moment of :meth:`Loop.now`."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], object]) -> None:
        self.due = due
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Not any more."""
        self.call = None


class Loop:
    """Callbacks by descriptor and by time. Made once per process: it owns the SIGCHLD wake-up."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], object]] = {}
        self._events: dict[int, int] = {}
        self._skipped = 0.0
        self._turned = time.monotonic()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._soon: list[Callable[[], object]] = []
        self.stopped = False

    def now(self) -> float:
        """Seconds that have passed for this process.

        A restore lets the monotonic clock jump by the time that the sandbox lay on disk, and a pause does the same:
        neither must let everything fall due at once, be it a grace time or a limit for somebody who was away as well.
        """
        return time.monotonic() - self._skipped

    def renew(self) -> None:
        """Listen anew to all that is watched: a listener can go deaf in a restore."""
        old, self._epoll = self._epoll, select.epoll()
        for fd, events in self._events.items():
            self._epoll.register(fd, events)
        old.close()

    def watch(self, fd: int, call: Callable[[], object], events: int = READ) -> None:
        """Call back whenever ``fd`` is ready (level-triggered). Watching it again changes callback and events."""
        if fd in self._calls:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._calls[fd] = call
        self._events[fd] = events

    def forget(self, fd: int) -> None:
        """Stop watching; unknown descriptors are ignored. Call it before closing one."""
        if self._calls.pop(fd, None) is not None:
            self._events.pop(fd, None)
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def later(self, delay: float, call: Callable[[], object]) -> Timer:
        """Call once, ``delay`` seconds from now."""
        timer = Timer(self.now() + delay, call)
        self._count += 1
        heapq.heappush(self._timers, (timer.due, self._count, timer))
        return timer

    def soon(self, call: Callable[[], object]) -> None:
        """Call once in the next turn, without sleeping before it."""
        self._soon.append(call)

    def on_child(self, call: Callable[[], object]) -> None:
        """Call back when a child ended (and perhaps when none did)."""
        receiving, sending = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

        def drain() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(receiving, 4096)
            call()

        self.watch(receiving, drain)

    def turn(self) -> None:
        """Sleep until something is due or ready, and call what is."""
        timeout = _IDLE
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        if self._soon:
            timeout = 0.0
        elif self._timers:
            timeout = min(max(self._timers[0][0] - self.now(), 0.0), _IDLE)
        ready = self._epoll.poll(timeout)
        turned = time.monotonic()
        away = turned - self._turned - timeout
        if away > _JUMP:
            self._skipped += away
        self._turned = turned
        if self._soon:
            due, self._soon = self._soon, []
            for call in due:
                call()
        if self._timers:
            now = self.now()
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                if timer.call is not None:
                    timer.call()
        for fd, _ in ready:
            known = self._calls.get(fd)
            if known is not None:
                known()

    def close(self) -> None:
        """Give the descriptors back."""
        self._epoll.close()
