"""A page's messages on their way to a gateway: what waits, and what was written and is not known to have arrived.

What a network takes with it when it goes had already left this machine. The gateway counts what arrives
(:mod:`sandbox_gateway.server.inlet`) and says so with the next handshake: the rest goes out again, and nothing twice.
Meanwhile a pong confirms all that was written before its ping, so that little is kept. Pure.
"""

from __future__ import annotations

from collections import deque
from struct import Struct, error
from typing import Final

_PING: Final = Struct("!4sQ")
_MARK: Final = b"sent"


class Outgoing:
    """One page's messages, numbered from 1 as they are written."""

    def __init__(self) -> None:
        self._waiting: deque[str | bytes] = deque()
        self._written: deque[str | bytes] = deque()
        self._last = 0
        self._asked = 0
        self.size = 0
        """Bytes (characters of text) of all messages here."""

    def __bool__(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._waiting)

    def add(self, message: str | bytes) -> None:
        """The page has sent it."""
        self._waiting.append(message)
        self.size += len(message)

    def take(self) -> str | bytes:
        """The next message, which is written now. Raises IndexError where none waits."""
        message = self._waiting.popleft()
        self._written.append(message)
        self._last += 1
        return message

    def question(self) -> bytes | None:
        """What to send as a ping; None when nothing is to be asked, or an answer is still to come."""
        if self._asked or not self._written:
            return None
        self._asked = self._last
        return _PING.pack(_MARK, self._last)

    def answer(self, pong: bytes) -> bool:
        """A pong has come: all before its ping has arrived. Whether that was news."""
        try:
            mark, number = _PING.unpack(pong)
        except error:
            return False
        if mark != _MARK or number != self._asked:
            return False
        self._asked = 0
        return self._confirm(number)

    def resume(self, received: int | None, *, left: bool) -> int:
        """A new connection begins, to a gateway that has ``received`` so many; returns the size of the first message that
        is written again, 0 where none is.

        None: it knows nothing of this page, as after its own restart, and counts from here on. Then nobody knows what
        became of the unconfirmed messages, and running a cell twice is worse than not running it. Only the last one,
        where it has not ``left`` this machine as a whole, has surely not arrived.
        """
        self._asked = 0
        if received is not None and self._last - len(self._written) <= received <= self._last:
            self._confirm(received)
        else:
            received = received or 0
            while len(self._written) > (not left):
                self.size -= len(self._written.popleft())
        again = len(self._written[0]) if self._written else 0
        self._waiting.extendleft(reversed(self._written))
        self._written.clear()
        self._last = received
        return again

    def _confirm(self, number: int) -> bool:
        before = len(self._written)
        while self._written and self._last - len(self._written) < number:
            self.size -= len(self._written.popleft())
        return len(self._written) < before
