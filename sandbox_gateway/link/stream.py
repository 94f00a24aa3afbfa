"""A byte stream over the link, as the host's application sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.wire.endpoint import Endpoint


class LinkStream:
    """One open stream. Reading slowly stops only the other side of this stream, at one window of bytes.

    Made by :meth:`Link.open_stream <sandbox_gateway.link.host.Link.open_stream>`; not for several readers or several
    writers at once.
    """

    def __init__(self, number: int, endpoint: Endpoint, flush: Callable[[], None]) -> None:
        self.number = number
        self._endpoint = endpoint
        self._flush = flush
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._gone = False
        self._error: str | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    async def read(self) -> bytes:
        """The next bytes, as many as are there; ``b""`` at the end. ``link_failed`` when the stream was aborted."""
        while not self._chunks:
            if self._error is not None:
                raise SandboxGatewayError("link_failed", f"the stream was ended: {self._error}")
            if self._ended:
                return b""
            self._readable.clear()
            await self._readable.wait()
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._endpoint.stream_consumed(self.number, len(data))
        self._flush()
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """Send all of ``data``; waits while the other side allows no more. ``link_failed`` when the stream is gone."""
        view = memoryview(data)
        while view:
            if self._gone:
                raise SandboxGatewayError("link_failed", f"the stream was ended: {self._error or 'closed'}")
            self._writable.clear()
            taken = self._endpoint.stream_write(self.number, view)
            if taken:
                self._flush()
            view = view[taken:]
            if view:
                await self._writable.wait()

    async def end(self) -> None:
        """Send no more; what the other side still sends can be read."""
        if not self._gone:
            self._endpoint.stream_end(self.number)
            self._flush()

    async def close(self) -> None:
        """End both directions now. Does nothing for a stream that is gone."""
        if not self._gone:
            self._endpoint.stream_abort(self.number, "closed")
            self._flush()
            self._closed("closed")

    # -- called by the link

    def _received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._readable.set()

    def _granted(self) -> None:
        self._writable.set()

    def _finished(self) -> None:
        self._ended = True
        self._readable.set()

    def _closed(self, error: str | None) -> None:
        self._gone = self._ended = True
        self._error = self._error or error
        self._readable.set()
        self._writable.set()
