"""The byte stream ``log``: the kernel's raw stdout and stderr, from the oldest byte that is kept."""

from __future__ import annotations

import contextlib
from typing import Final

from sandbox_gateway.agent.logring import LogRing
from sandbox_gateway.wire.endpoint import AgentEndpoint
from sandbox_gateway.wire.events import Event, StreamClosed, StreamData, StreamEnded, StreamOpened, StreamWritable

_CHUNK: Final = 64 * 1024


class LogStreams:
    """Serves every open ``log`` stream; other kinds are refused."""

    def __init__(self, endpoint: AgentEndpoint, log: LogRing) -> None:
        self._endpoint = endpoint
        self._log = log
        self._offsets: dict[int, int] = {}
        self._following: set[int] = set()

    def handle(self, event: Event) -> None:
        """Take an event that concerns a stream."""
        if isinstance(event, StreamOpened):
            if event.kind != "log":
                self._endpoint.stream_abort(event.stream, f"the agent knows no stream {event.kind!r}")
                return
            self._offsets[event.stream] = self._log.start
            if event.params.get("follow") is True:
                self._following.add(event.stream)
            self._pump(event.stream)
        elif isinstance(event, StreamWritable):
            self._pump(event.stream)
        elif isinstance(event, StreamData):
            self._endpoint.stream_abort(event.stream, "nothing can be written to a log")
            self._forget(event.stream)
        elif isinstance(event, StreamEnded):
            self._endpoint.stream_end(event.stream)
            self._forget(event.stream)
        elif isinstance(event, StreamClosed):
            self._forget(event.stream)

    def grown(self) -> None:
        """The log has more: pass it on to who follows."""
        for stream in list(self._following):
            self._pump(stream)

    def _pump(self, stream: int) -> None:
        offset = self._offsets.get(stream)
        if offset is None:
            return
        with contextlib.suppress(ValueError):  # the stream went away meanwhile
            while True:
                position, data = self._log.read(offset, _CHUNK)
                if not data:
                    break
                taken = self._endpoint.stream_write(stream, data)
                self._offsets[stream] = offset = position - len(data) + taken
                if taken < len(data):
                    return
            if stream not in self._following:
                self._endpoint.stream_end(stream)
                self._forget(stream)

    def _forget(self, stream: int) -> None:
        self._offsets.pop(stream, None)
        self._following.discard(stream)
