"""What one session's client has sent, by number: nothing is passed on twice, nothing is lost with a broken connection.

A client that names itself (the parameter ``sender`` of the URL, beside ``session_id``) is told with each handshake how
many of its messages have arrived here (:data:`HEADER`), and begins behind them. Both sides count, so that no message
has to carry a number. Pure.
"""

from __future__ import annotations

from typing import Final

HEADER: Final = "Sandbox-Received"
"""Of the handshake: messages of this sender that arrived, over all connections of the session. Absent where nothing is
known of it: the session is new, or the gateway was started anew."""
LONGEST_SENDER: Final = 64
"""Characters of a sender's name; a longer one is nobody's."""


class Inlet:
    """The messages of the client that has one session."""

    def __init__(self) -> None:
        self._sender = ""
        self._received = 0

    def received(self, sender: str) -> int | None:
        """How many messages of ``sender`` have arrived; None where nothing is known of it."""
        return self._received if sender and sender == self._sender else None

    def open(self, sender: str, told: int | None) -> Arriving:
        """The messages of a new connection of ``sender``, which was ``told`` that so many have arrived."""
        if not sender or len(sender) > LONGEST_SENDER:
            return Arriving(None, 0)
        if sender != self._sender:
            self._sender, self._received = sender, told or 0
        return Arriving(self, told or 0)

    def take(self, number: int) -> bool:
        """Whether the message with ``number`` is a new one; it has arrived from now on."""
        if number <= self._received:
            return False
        self._received = number
        return True


class Arriving:
    """The messages of one connection, in order."""

    def __init__(self, inlet: Inlet | None, number: int) -> None:
        self._inlet = inlet
        self._number = number

    def take(self) -> bool:
        """The next message has come: whether it is to be passed on. An earlier connection, of which the client heard
        no more, may have brought it meanwhile."""
        self._number += 1
        return self._inlet is None or self._inlet.take(self._number)
