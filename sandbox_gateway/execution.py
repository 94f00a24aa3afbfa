"""One running cell as a program sees it: an iterator over what it gives, fed from another thread.

The kernel's messages arrive on the background loop, whatever the program's own loop does meanwhile, and wait here,
bounded in bytes: beyond :data:`LIMIT` the oldest streams and displays are left out, and a line on ``stderr`` in their
place says how much is missing. Everything is read from the message only when the program takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Final

from sandbox_gateway import results
from sandbox_gateway.bridge_queue import Notice, OutputQueue
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.messages import Buffer
from sandbox_gateway.results import Done, Message
from sandbox_gateway.retention import Kept
from sandbox_gateway.stream_runs import StreamRun

LIMIT: Final = 16 << 20
"""Bytes of one cell's output that wait for the program."""
_REASON = "they came faster than they were read"
_BREATH = 0.005
"""Seconds of reading what waits already, after which the loop's other tasks are let in."""


class Execution(AsyncIterator[Message]):
    """What :meth:`~sandbox_gateway.sandbox.Sandbox.execute` gives: ``async for message in execution``.

    The last message is a :class:`~sandbox_gateway.results.Done`; or the iteration raises what kept the cell from its
    end, with the reason. Leaving the loop, or being cancelled in it, loses nothing: the cell runs on, and another loop
    over the same object goes on where that one stopped. It can be read from any event loop, by one task at a time.
    """

    def __init__(
        self,
        code: str,
        key: bytes,
        *,
        id: str | None = None,
        stdin: bool = False,
        silent: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex if id is None else id
        """The id of the request; :meth:`~sandbox_gateway.sandbox.Sandbox.follow` takes it in another process."""
        self.code = code
        self.stdin = stdin
        self.silent = silent
        self.timeout = timeout
        self.asked = False
        """Whether the cell waits for a line."""
        self._key = key
        self._lock = threading.Lock()
        self._queue = OutputQueue(LIMIT)
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._end: Done | SandboxGatewayError | None = None
        self._told = False
        self._since = 0.0

    @property
    def done(self) -> bool:
        """Whether the cell has ended; what it gave may still wait to be read."""
        return self._end is not None

    def __aiter__(self) -> Execution:
        return self

    async def __anext__(self) -> Message:
        while True:
            with self._lock:
                entry = self._queue.take() if self._queue.entries else None
                waiter = None
                if entry is None and self._end is None:
                    if self._waiter is not None and not self._waiter[1].done():
                        raise RuntimeError("another task is reading this cell's messages")
                    loop = asyncio.get_running_loop()
                    waiter = loop.create_future()
                    self._waiter = (loop, waiter)
            if entry is not None:
                await self._breathe()
                message = self._read(entry)
                if message is not None:
                    return message
            elif waiter is not None:
                await waiter
                self._since = time.monotonic()
            elif isinstance(self._end, Done) and not self._told:
                self._told = True
                return self._end
            elif isinstance(self._end, SandboxGatewayError):
                raise SandboxGatewayError(self._end.code, self._end.message, self._end.hint)
            else:
                raise StopAsyncIteration

    async def _breathe(self) -> None:
        if time.monotonic() - self._since > _BREATH:
            await asyncio.sleep(0)
            self._since = time.monotonic()

    def _read(self, entry: object) -> Message | None:
        if isinstance(entry, Kept):
            return results.read(entry.parts)
        if isinstance(entry, (StreamRun, Notice)):
            parts = entry.parts(self._key) if isinstance(entry, StreamRun) else entry.parts(self._key, _REASON)
            return results.read(parts)
        return None

    # From the background loop

    def add(self, parts: Sequence[Buffer]) -> None:
        """Take a message of the cell. Thread-safe, as :meth:`end`."""
        with self._lock:
            if self._end is not None:
                return
            if self._queue.add(Kept(parts), parts):
                # A kernel can publish nothing but errors for ever.
                self._queue.make_room()
        self._wake()

    def take_over(self, other: Execution) -> None:
        """Go on as ``other``, with what waits there, before anybody reads this one's first message."""
        with other._lock, self._lock:
            self.id, self.asked = other.id, other.asked
            self._queue, other._queue = other._queue, OutputQueue(LIMIT)
            self._end = other._end
        self._wake()

    def end(self, how: Done | SandboxGatewayError) -> None:
        """There is nothing more; the first end counts."""
        with self._lock:
            self._end = self._end or how
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiter = self._waiter, None
        if waiting is not None:
            loop, future = waiting
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits on it
                loop.call_soon_threadsafe(_set, future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
