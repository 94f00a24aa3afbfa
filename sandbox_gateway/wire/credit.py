"""Credit: how many bytes each side of a byte stream may still send.

A sender starts with :data:`INITIAL_CREDIT` bytes and gets more as the receiver's application consumes, so that a
receiver that does not read holds at most one window of each stream, and stops nothing but that stream.
"""

from __future__ import annotations

from struct import Struct

from sandbox_gateway.wire.frames import Buffer, WireError

INITIAL_CREDIT = 256 * 1024
MAX_CREDIT = 1024 * 1024
"""No sender is ever allowed more at once; a grant beyond it is an error."""
_GRANT = Struct("!I")


class SendCredit:
    """The sender's side."""

    __slots__ = ("available",)

    def __init__(self, initial: int = INITIAL_CREDIT) -> None:
        self.available = initial
        """Bytes that may be sent now."""

    def spend(self, wanted: int) -> int:
        """Take up to ``wanted`` bytes of the credit; return how many."""
        spent = min(wanted, self.available)
        self.available -= spent
        return spent

    def grant(self, amount: int) -> None:
        """The other side allows ``amount`` more bytes; raises :class:`WireError` beyond :data:`MAX_CREDIT`."""
        if amount < 1 or self.available + amount > MAX_CREDIT:
            raise WireError(f"a grant of {amount} bytes of credit")
        self.available += amount


class ReceiveCredit:
    """The receiver's side: at most ``window`` bytes are on the way or unread."""

    __slots__ = ("_consumed", "_open", "_window")

    def __init__(self, window: int = INITIAL_CREDIT) -> None:
        self._window = window
        self._open = window
        self._consumed = 0

    def received(self, size: int) -> None:
        """``size`` bytes came; raises :class:`WireError` if they were not allowed."""
        if size > self._open:
            raise WireError("a byte stream sends more than it was allowed")
        self._open -= size

    def consume(self, size: int) -> None:
        """The application has taken ``size`` bytes away (of those that came: more does not count)."""
        self._consumed += min(size, self._window - self._open - self._consumed)

    def take_grant(self) -> int:
        """Bytes to grant now: 0 until half a window has been consumed, so that grants stay few."""
        if self._consumed * 2 < self._window:
            return 0
        grant, self._consumed = self._consumed, 0
        self._open += grant
        return grant


def encode_grant(amount: int) -> bytes:
    """The payload of a CREDIT frame."""
    return _GRANT.pack(amount)


def decode_grant(payload: Buffer) -> int:
    """The number of bytes in a CREDIT frame."""
    if len(payload) != _GRANT.size:
        raise WireError("a malformed grant of credit")
    amount: int = _GRANT.unpack(payload)[0]
    return amount
