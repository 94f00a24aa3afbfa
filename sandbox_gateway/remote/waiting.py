"""Requests of applications that wait to be sent, in the order in which they may leave.

Pure but for two events. Requests on the shell channel keep their order. After a break they are *barred* until it is
known which of those sent before have to go again, in front of them: only what keeps no order with them may pass.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from sandbox_gateway.remote.in_flight import Pending
from sandbox_gateway.wire.frames import Channel

HOLD: Final = 64 << 20
"""Bytes of requests that wait for the gateway, from where on applications have to wait."""


class Waiting:
    """Told of each request by :meth:`add`; asked by :meth:`next` which one goes. ``hold`` is called with True when
    applications should send no more for now, and with False when they may."""

    def __init__(self, hold: Callable[[bool], None]) -> None:
        self._hold = hold
        self._shell: deque[Pending] = deque()
        self._urgent: deque[Pending] = deque()
        self._size = 0
        self._some = asyncio.Event()
        self.barred = False
        """Whether requests on shell wait for :meth:`unbar`."""
        self.wanted = asyncio.Event()
        """Set when a request is barred that wakes a kernel. Whoever acts on it clears it."""

    def add(self, item: Pending) -> None:
        """Take a request to the end of the line."""
        if item.channel != Channel.SHELL or (self.barred and _harmless(item)):
            self._urgent.append(item)
        else:
            self._shell.append(item)
            if self.barred and item.wakes:
                self.wanted.set()
        self._grown(item)
        if self._size > HOLD:
            self._hold(True)
        self._some.set()

    async def next(self) -> Pending:
        """The request that goes now; waits for one."""
        while not (queue := self._urgent or (() if self.barred else self._shell)):
            self._some.clear()
            await self._some.wait()
        item = queue.popleft()
        self._shrunk(item)
        return item

    def bar(self, barred: bool, repeated: Sequence[Pending]) -> None:
        """After a break: ``repeated`` go first, and those on shell, where they are ``barred``, when :meth:`unbar` says.

        What is harmless passes the bar, also what came during the break.
        """
        for item in repeated:
            self._urgent.appendleft(item)
            self._grown(item)
        self.barred = barred
        self.wanted.clear()
        if barred:
            waiting = tuple(self._shell)
            self._urgent.extend(item for item in waiting if _harmless(item))
            self._shell = deque(item for item in waiting if not _harmless(item))
            self.want_again()
        self._some.set()

    def want_again(self) -> None:
        """Set :attr:`wanted` if anybody who waits wakes the kernel."""
        if any(item.wakes for item in self._shell):
            self.wanted.set()

    def unbar(self, again: Sequence[Pending] = ()) -> None:
        """Let those on shell go, ``again`` in front of them."""
        for item in reversed(again):
            self._shell.appendleft(item)
            self._grown(item)
        self.barred = False
        self._some.set()

    def unanswerable(self) -> list[Pending]:
        """Take out what waits on shell for a reply that will not come; what has none waits on."""
        waiting, self._shell = self._shell, deque()
        taken = []
        for item in waiting:
            if item.request.reply_type is None:
                self._shell.append(item)
            else:
                taken.append(item)
                self._shrunk(item)
        return taken

    def clear(self) -> list[Pending]:
        """Take out everything."""
        left = [*self._urgent, *self._shell]
        self._urgent.clear()
        self._shell.clear()
        self._size = 0
        self._hold(False)
        return left

    def _grown(self, item: Pending) -> None:
        self._size += len(item.frame)

    def _shrunk(self, item: Pending) -> None:
        self._size -= len(item.frame)
        if self._size <= HOLD // 2:
            self._hold(False)


def _harmless(item: Pending) -> bool:
    """Whether a request changes nothing, and may overtake others: front ends wait for its answer on loading a page,
    before they send what would wake the kernel."""
    return item.request.msg_type == "kernel_info_request"
