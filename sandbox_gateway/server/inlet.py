"""What one session's client has sent, by number: nothing is passed on twice, nothing is lost with a broken connection.

A client that names itself (the parameter ``sender`` of the URL, beside ``session_id``) is told with each handshake the
number of the last of its messages that has arrived here (:data:`HEADER`), and goes on behind it. Both sides count, so
that no message has to carry a number. Pure.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Final

HEADER: Final = "Sandbox-Received"
"""Of the handshake: the number of the sender's last message that arrived, over all connections of the session. Where
nothing is known of the sender, it is one that cannot be mistaken for that, and counting begins there."""
LONGEST_SENDER: Final = 64
"""Characters of a sender's name; a longer one is nobody's."""
MOST: Final = 256
"""Sessions of one kernel whose senders are remembered, also when the sessions themselves are over."""
_LEAST, _SPAN = 1 << 32, 1 << 60


class Inlet:
    """The messages of the client that has one session."""

    def __init__(self) -> None:
        self._sender = ""
        self._received = 0

    def told(self, sender: str) -> int | None:
        """What the handshake tells ``sender``, None for nobody. It is for :meth:`open`, once there is a connection."""
        if not 0 < len(sender) <= LONGEST_SENDER:
            return None
        return self._received if sender == self._sender else _LEAST + secrets.randbelow(_SPAN)

    def open(self, sender: str, told: int | None) -> Arriving:
        """The messages of a new connection of ``sender``, who was ``told`` that."""
        if told is None:
            return Arriving(None, 0)
        if sender != self._sender:
            self._sender, self._received = sender, told
        return Arriving(self, told)

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


class Inlets:
    """The inlets of one kernel's sessions by their identities; those of sessions that are over stay for a while."""

    def __init__(self) -> None:
        self._all: OrderedDict[bytes, Inlet] = OrderedDict()

    def of(self, identity: bytes) -> Inlet:
        """The inlet of a session."""
        inlet = self._all.setdefault(identity, Inlet())
        self._all.move_to_end(identity)
        while len(self._all) > MOST:
            self._all.popitem(last=False)
        return inlet
