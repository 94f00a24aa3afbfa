"""A small agent for the link's tests: the wire's agent role over two descriptors, in the test's own event loop.

It answers calls (``ping``, ``echo``, ``fail``, ``silent``), sends messages back on the channel they came on, keeps what
it got, and serves the stream kinds ``echo``, ``source`` and ``refuse``.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sandbox_gateway.wire.endpoint import AgentEndpoint
from sandbox_gateway.wire.events import (
    Event,
    Message,
    StreamData,
    StreamEnded,
    StreamOpened,
    StreamWritable,
)
from sandbox_gateway.wire.frames import Buffer, Channel
from sandbox_gateway.wire.reliable import Outbox

ACK_DELAY = 0.01


class Peer:
    """The agent's end. ``events`` has all that came; ``changed`` is notified with each of them."""

    def __init__(self, read_fd: int, write_fd: int, *, outbox: Outbox | None = None, echo: bool = False) -> None:
        self.endpoint = AgentEndpoint(outbox or Outbox(keep_acked=True), info={"peer": True})
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.events: list[Event] = []
        self.echo = echo
        self.closed = False
        self.reading = True
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Condition()
        self._sources: dict[int, memoryview] = {}
        self._ended: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._writing = False
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._loop.add_reader(read_fd, self._readable)

    @property
    def messages(self) -> list[tuple[int, list[bytes]]]:
        """All messages that came, agent calls left out."""
        found = [event for event in self.events if isinstance(event, Message) and event.channel != Channel.AGENT]
        return [(event.channel, [bytes(part) for part in event.parts]) for event in found]

    def count(self, kind: type[Event]) -> int:
        """How many events of a kind came."""
        return sum(isinstance(event, kind) for event in self.events)

    async def until(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Return when ``condition`` holds; looked at after each event."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)

    def send(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Send a message now or when somebody attaches."""
        self.endpoint.send(channel, parts)
        self.flush()

    def event(self, name: str, **fields: object) -> None:
        """Send an agent event."""
        self.send(Channel.AGENT, [json.dumps({"event": name, **fields}).encode()])

    def pause(self) -> None:
        """Stop reading, as a stuck sandbox does."""
        self.reading = False
        self._loop.remove_reader(self.read_fd)

    def resume(self) -> None:
        """Read again."""
        self.reading = True
        self._loop.add_reader(self.read_fd, self._readable)

    def close(self) -> None:
        """Close both descriptors."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.read_fd)
        if self._writing:
            self._loop.remove_writer(self.write_fd)
        if self._timer is not None:
            self._timer.cancel()
        os.close(self.read_fd)
        os.close(self.write_fd)

    def flush(self) -> None:
        """Write as much as the pipe takes."""
        while not self.closed and self.endpoint.wants_write:
            buffers = self.endpoint.output()
            if not buffers:
                break
            try:
                self.endpoint.wrote(os.writev(self.write_fd, buffers))
            except BlockingIOError:
                break
            except BrokenPipeError:
                self.close()
                return
        wants = self.endpoint.wants_write and not self.closed
        if wants and not self._writing:
            self._loop.add_writer(self.write_fd, self.flush)
        elif not wants and self._writing:
            self._loop.remove_writer(self.write_fd)
        self._writing = wants

    def _readable(self) -> None:
        try:
            data = os.read(self.read_fd, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        for event in self.endpoint.feed(data):
            self._handle(event)
        self.flush()
        if self.endpoint.ack_pending and self._timer is None:
            self._timer = self._loop.call_later(ACK_DELAY, self._acknowledge)
        self._loop.create_task(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _acknowledge(self) -> None:
        self._timer = None
        self.endpoint.request_ack()
        self.flush()

    def _handle(self, event: Event) -> None:
        self.events.append(event)
        endpoint = self.endpoint
        match event:
            case Message(Channel.AGENT, _, parts):
                self._answer(json.loads(bytes(parts[0])))
            case Message(channel, _, parts) if self.echo:
                endpoint.send(channel, parts)
            case StreamOpened(number, "refuse", _):
                endpoint.stream_abort(number, "no such stream")
            case StreamOpened(number, "source", params):
                self._sources[number] = memoryview(bytes(params["size"]))
                self._ended.add(number)
                self._pour(number)
            case StreamData(number, data):
                self._sources[number] = memoryview(bytes(self._sources.get(number, b"")) + data)
                endpoint.stream_consumed(number, self._pour(number))
            case StreamWritable(number) if number in self._sources:
                endpoint.stream_consumed(number, self._pour(number))
            case StreamEnded(number):
                self._ended.add(number)
                self._pour(number)
            case _:
                pass

    def _pour(self, number: int) -> int:
        left = self._sources.get(number, memoryview(b""))
        written = self.endpoint.stream_write(number, left) if left else 0
        self._sources[number] = left[written:]
        if not self._sources[number] and number in self._ended:
            del self._sources[number]
            self.endpoint.stream_end(number)
        return written

    def _answer(self, request: dict[str, object]) -> None:
        answer: dict[str, object] = {"id": request["id"]}
        if request["op"] == "silent":
            return
        if request["op"] == "fail":
            answer["error"] = {"code": request.get("code", "kernel_failed"), "message": "it went wrong"}
        else:
            answer["ok"] = {key: value for key, value in request.items() if key not in ("id", "op")}
        self.endpoint.send(Channel.AGENT, [json.dumps(answer).encode()])


@contextmanager
def fifos() -> Iterator[tuple[Path, Path]]:
    """Two FIFOs ``in`` and ``out`` as a runtime makes them."""
    with tempfile.TemporaryDirectory() as directory:
        paths = Path(directory, "in"), Path(directory, "out")
        for path in paths:
            os.mkfifo(path)
        yield paths


def open_both(path: Path) -> int:
    """A FIFO opened for reading and writing: neither waits for the other side nor ends with it."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
