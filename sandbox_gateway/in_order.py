"""One piece of work after the other, and each to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class InOrder:
    """Serialises the work on one thing. Use it on one event loop."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    async def serially(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it when everything before it is done."""
        try:
            async with self.lock:
                return await work
        finally:
            work.close()

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """The same, and it goes on when the caller is cancelled."""
        task = asyncio.create_task(self.serially(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)
