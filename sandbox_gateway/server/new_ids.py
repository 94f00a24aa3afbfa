"""Ids of sandboxes that are to be made: our own, or one that a client has chosen."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sandbox_gateway.errors import SandboxGatewayError


class NewIds:
    """Gives each id once. ``recorded`` tells whether there is a record of an id; it may block."""

    def __init__(self, recorded: Callable[[str], bool]) -> None:
        self._recorded = recorded
        self._making: set[str] = set()

    @asynccontextmanager
    async def take(self, asked: str | None) -> AsyncIterator[str]:
        """An id for a new sandbox, while it is made: who asks for the same one meanwhile is refused as later.

        Raises ``invalid_request``, ``id_taken``.
        """
        if asked is None:
            yield str(uuid.uuid4())
            return
        try:
            canonical = str(uuid.UUID(asked))
        except (ValueError, AttributeError, TypeError):
            canonical = ""
        if canonical != asked:
            raise SandboxGatewayError("invalid_request", f"{str(asked)[:80]!r} is not a UUID", "Leave the id out.")
        taken = SandboxGatewayError("id_taken", f"{asked} cannot be the id of a new sandbox")
        if asked in self._making:
            raise taken
        self._making.add(asked)
        try:
            # Also one that has ended: its log and its reason would go over to another owner.
            if await asyncio.to_thread(self._recorded, asked):
                raise taken
            yield asked
        finally:
            self._making.discard(asked)
