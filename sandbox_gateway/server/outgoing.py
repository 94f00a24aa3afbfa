"""A page's messages on their way to a gateway: what waits, and what was written and is not known to have arrived.

What a network takes with it when it goes had already left this machine. The gateway counts what arrives
(:mod:`sandbox_gateway.server.inlet`) and says so with the next handshake: the rest goes out again, and nothing twice.
Meanwhile a pong confirms all that was written before its ping, so that little is kept. Pure.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from struct import Struct, error
from typing import Final

_PING: Final = Struct("!4sQ")
_MARK: Final = b"sent"


@dataclass(frozen=True, slots=True)
class Resumed:
    """With what a new connection begins."""

    number: int
    """Of the first message that is written again."""
    size: int
    """Its size; 0 where none is."""
    given_up: int
    """Messages of which nobody knows whether they arrived."""


class Outgoing:
    """One page's messages, numbered from 1 as they are written."""

    def __init__(self) -> None:
        self._waiting: deque[str | bytes] = deque()
        self._written: deque[str | bytes] = deque()
        self._last = 0
        self._begun = self._left = 0
        """Numbers up to which messages were ever begun to be written, and have left as a whole: those behind
        :attr:`_last` wait to be written again."""
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
        self._begun = max(self._begun, self._last)
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

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come."""
        return self._asked > 0

    def resume(self, received: int | None, *, left: bool) -> Resumed:
        """A new connection begins, to a gateway that says it has ``received`` all up to this number.

        None, or a number that cannot be: it knows nothing of this page, as after its own restart, and counts from here
        on. Then nobody knows what became of the unconfirmed messages, and running a cell twice is worse than not
        running it. Only the last one, where it has not ``left`` this machine as a whole, has surely not arrived.
        """
        self._asked = given_up = 0
        self._left = max(self._left, self._last - (not left))
        first, begun = self._last - len(self._written) + 1, self._begun
        self._waiting.extendleft(reversed(self._written))
        self._written.clear()
        self._last = received or 0
        if received is not None and first - 1 <= received <= begun:
            gone = received - first + 1
        else:
            gone = given_up = max(0, self._left - first + 1)
            self._begun = self._left = self._last
        for _ in range(gone):
            self.size -= len(self._waiting.popleft())
        again = begun - first + 1 - gone > 0
        return Resumed(self._last + 1, len(self._waiting[0]) if again else 0, given_up)

    def _confirm(self, number: int) -> bool:
        before = len(self._written)
        while self._written and self._last - len(self._written) < number:
            self.size -= len(self._written.popleft())
        return len(self._written) < before
