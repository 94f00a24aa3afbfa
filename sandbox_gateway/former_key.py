"""What a clone's kernel had signed with its parent's key, and not yet sent, when it got a key of its own.

A snapshot may be taken in the middle of a cell: a few messages are then on their way, in the kernel's threads and
sockets or in the agent, and come out of the clone before it can be told anything. Its clients know only its own key.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from typing import Final

from sandbox_gateway import messages
from sandbox_gateway.messages import Buffer

LASTS: Final = 10.0
"""Seconds after the first message in which the former key is looked for; what was under way is out long before."""


class FormerKey:
    """Signs anew what came with the former key's signature, and leaves everything else as it is."""

    def __init__(self, former: bytes, key: bytes, *, now: Callable[[], float] = time.monotonic) -> None:
        self._former = former
        self._key = key
        self._now = now
        self._until: float | None = None

    @property
    def over(self) -> bool:
        """Whether its time is over."""
        return self._until is not None and self._now() > self._until

    def renew(self, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """``parts`` as the kernel would sign them now."""
        if self._until is None:
            self._until = self._now() + LASTS
        at = messages.delimiter_index(parts)
        if at is None:
            return parts
        body = parts[at + 2 : at + 6]
        if not hmac.compare_digest(bytes(parts[at + 1]), messages.sign(self._former, body)):
            return parts
        return [*parts[: at + 1], messages.sign(self._key, body), *parts[at + 2 :]]
