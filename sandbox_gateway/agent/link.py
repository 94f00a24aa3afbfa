"""The agent's end of the link: bytes between two descriptors and the endpoint, never waiting for either."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from sandbox_gateway.agent import relay
from sandbox_gateway.agent.loop import READ, WRITE, Loop, Timer
from sandbox_gateway.wire.endpoint import AgentEndpoint
from sandbox_gateway.wire.events import Attached, Detached, Event
from sandbox_gateway.wire.frames import Buffer, Channel
from sandbox_gateway.wire.reliable import Outbox
from sandbox_gateway.wire.sizes import ReadSize

LIMIT: Final = 64 * 1024 * 1024
"""Bytes kept for the host before streams and displays are dropped, oldest first."""
HARD_LIMIT: Final = 256 * 1024 * 1024
KEEP: Final = 8 * 1024 * 1024
"""Bytes kept although acknowledged: for a host that comes back with older numbers."""
_HOLD: Final = 16 * 1024 * 1024
_STALLED: Final = 5.0
_ACK_DELAY: Final = 0.02
_ROUNDS: Final = 16


def droppable(channel: int, parts: Sequence[Buffer]) -> bool:
    """What the outbox may let go of at its bound."""
    return channel == Channel.IOPUB and relay.droppable(parts)  # type: ignore[arg-type]


class Link:
    """Reads, writes and acknowledges; hands events to ``on_event`` and reports the end of the pipe by ``on_end``.

    A pipe that a runtime holds open (a FIFO opened for reading and writing) never ends; a plain one does when the
    host is gone, and then nobody can come back.
    """

    def __init__(
        self,
        loop: Loop,
        read_fd: int,
        write_fd: int,
        info: dict[str, Any],
        on_event: Callable[[Event], None],
        on_end: Callable[[], None],
    ) -> None:
        outbox = Outbox(LIMIT, HARD_LIMIT, droppable, keep_acked=True, keep_bytes=KEEP)
        self.endpoint = AgentEndpoint(outbox, info=info)
        self._loop = loop
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._on_event = on_event
        self._on_end = on_end
        self._reading = ReadSize()
        self._blocked = False
        self._ended = False
        self._progress = self._loop.now()
        self._ack_timer: Timer | None = None
        self.heard: Callable[[], None] = lambda: None
        """Called whenever something came from the host."""
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        loop.watch(read_fd, self._readable, READ)

    def send(self, channel: Channel, parts: Sequence[Buffer]) -> None:
        """Queue a message for the host; :meth:`flush` writes it."""
        endpoint = self.endpoint
        if not endpoint.unwritten and not endpoint.outbox.ready:
            self._progress = self._loop.now()  # until now there was nothing to get on with
        endpoint.send(channel, parts)

    def hungry(self) -> bool:
        """Whether a source that can wait should be read now.

        It waits while a host that reads is far behind, so that nothing has to be dropped; it does not wait for a
        host that is gone or stands still.
        """
        endpoint = self.endpoint
        if endpoint.full:
            return False
        if not endpoint.attached or endpoint.outbox.backlog < _HOLD:
            return True
        return self._loop.now() - self._progress > _STALLED

    def flush(self) -> None:
        """Write what there is, as far as the pipe takes it: one ``writev`` for many frames."""
        endpoint = self.endpoint
        if self._blocked or self._ended:
            return
        for _ in range(_ROUNDS):
            if not endpoint.wants_write:
                break
            if endpoint.ack_pending:
                endpoint.request_ack()  # it costs little beside other frames, and saves a wake-up
            try:
                written = os.writev(self._write_fd, endpoint.output())
            except BlockingIOError:
                self._blocked = True
                self._loop.watch(self._write_fd, self._writable, WRITE)
                return
            except OSError:
                self._end()
                return
            self._progress = self._loop.now()
            endpoint.wrote(written)
        else:
            self._loop.soon(self.flush)
        if endpoint.ack_pending and self._ack_timer is None:
            self._ack_timer = self._loop.later(_ACK_DELAY, self._acknowledge)

    @property
    def busy(self) -> bool:
        """Whether something is still to be written, to a host that can read it."""
        return not self._ended and self.endpoint.attached and self.endpoint.wants_write

    def stats(self) -> dict[str, Any]:
        """Figures for ``stats``: bytes kept and not yet acknowledged, what was dropped."""
        outbox = self.endpoint.outbox
        return {
            "kept_bytes": outbox.bytes,
            "backlog_bytes": outbox.backlog,
            "dropped_messages": outbox.dropped_messages,
            "dropped_bytes": outbox.dropped_bytes,
        }

    def _acknowledge(self) -> None:
        self._ack_timer = None
        self.endpoint.request_ack()

    def _writable(self) -> None:
        self._blocked = False
        self._loop.forget(self._write_fd)
        self.flush()

    def _readable(self) -> None:
        try:
            data = os.read(self._read_fd, self._reading.next)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._reading.filled(len(data))
        self.heard()
        for event in self.endpoint.feed(data):
            if isinstance(event, Attached):
                self._progress = self._loop.now()
            elif isinstance(event, Detached):
                self._reading = ReadSize()  # the next host, perhaps after a restore, begins with little
            self._on_event(event)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._loop.forget(self._read_fd)
            self._loop.forget(self._write_fd)
            self._on_end()
