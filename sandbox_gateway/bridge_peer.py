"""One client's connection to a bridge: what it says, decoded; what waits for it, bounded and written in whole messages.

Part of :mod:`sandbox_gateway.zmq_bridge`. Nothing here blocks or raises into its caller.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import Final, Protocol

from sandbox_gateway import zmtp
from sandbox_gateway.bridge_queue import Message, Notice, OutputQueue
from sandbox_gateway.messages import Buffer
from sandbox_gateway.stream_runs import StreamRun
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

LINGER: Final = 1.0
"""Seconds that a closed bridge goes on writing what clients have not yet taken."""
_READ_SIZE = 256 << 10
_MAX_BUFFERS = 256


class PeerOwner(Protocol):
    """The endpoint, as its clients' connections see it."""

    number: int
    key: bytes
    queue_limit: int
    socket_type: bytes
    loop: asyncio.AbstractEventLoop

    def ready(self, peer: Peer, identity: bytes) -> None:
        """A client said who it is."""
        ...

    def received(self, peer: Peer, frames: list[bytes]) -> None:
        """A client sent a message."""
        ...

    def subscription(self, peer: Peer, begins: bool, topic: bytes) -> None:
        """A client begins or ends to listen to a topic."""
        ...

    def gone(self, peer: Peer, *, cut_off: bool) -> None:
        """The connection has ended; ``cut_off``: by us, since the client did not read."""
        ...


def matches(topic: Buffer, prefixes: Sequence[bytes]) -> bool:
    """Whether a subscription to one of ``prefixes`` takes ``topic``."""
    return any(topic[: len(prefix)] == prefix for prefix in prefixes)


class Peer:
    """One client's connection."""

    def __init__(self, endpoint: PeerOwner, connected: socket.socket) -> None:
        self.identity = b""
        self.topics: list[bytes] = []
        self._endpoint = endpoint
        self._socket = connected
        self._fd = connected.fileno()
        self._loop = endpoint.loop
        self._decoder = zmtp.Decoder()
        self._queue = OutputQueue(endpoint.queue_limit)
        self._writing = [memoryview(zmtp.GREETING + zmtp.ready(endpoint.socket_type))]
        self._scheduled = False
        self._blocked = False
        self._finishing = False
        self._closed = False

    def start(self) -> None:
        """Greet the client and listen to it."""
        self._loop.add_reader(self._fd, self._readable)
        self._flush()

    def wants(self, topic: Buffer) -> bool:
        """Whether the client subscribed to a prefix of ``topic``."""
        topics = self.topics
        return topics == _EVERYTHING or matches(topic, topics)

    @property
    def pending(self) -> int:
        """Bytes that wait for it."""
        return self._queue.pending

    @property
    def settled(self) -> bool:
        """Whether nothing waits, nor is half written."""
        return not self._writing and not self._queue.entries

    def send(self, message: Message, parts: Sequence[Buffer] | None = None) -> None:
        """Queue a message. It is written when the loop has run what is ready now, together with others.

        With ``parts``, which are its own, it may be joined with others when many wait.
        """
        if self._closed or self._finishing:
            return
        if self._queue.add(message, parts):
            log.error("a client that does not read %d MB of replies was disconnected", self.pending >> 20)
            self.drop("it does not read", cut_off=True)
        elif not self._scheduled and not self._blocked:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def hold(self, held: bool) -> None:
        """Read nothing more from it, or go on."""
        if self._closed:
            return
        if held:
            self._loop.remove_reader(self._fd)
        else:
            self._loop.add_reader(self._fd, self._readable)

    def drop(self, reason: str, *, cut_off: bool = False) -> None:
        """End the connection at once."""
        if self._closed:
            return
        self._closed = True
        log.debug("a client of channel %d is gone: %s", self._endpoint.number, reason)
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._socket.close()
        self._queue.clear()
        self._writing.clear()
        self._endpoint.gone(self, cut_off=cut_off)

    def finish(self) -> None:
        """End the connection when all is written, or after :data:`LINGER` seconds."""
        self._flush()
        if not self._closed and not self.settled:
            self._finishing = True
            self._loop.call_later(LINGER, self.drop, "it did not take the last messages")
        else:
            self.drop("the bridge was closed")

    def _flush(self) -> None:
        self._scheduled = False
        while not self._closed:
            if not self._writing:
                self._take()
                if not self._writing:
                    break
            try:
                sent = _send(self._socket, self._writing)
            except (BlockingIOError, InterruptedError):
                if not self._blocked:
                    self._blocked = True
                    self._loop.add_writer(self._fd, self._flush)
                return
            except OSError as error:
                self.drop(str(error))
                return
            self._advance(sent)
        if self._closed:
            return
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._fd)
        if self._finishing:
            self.drop("the bridge was closed")

    def _take(self) -> None:
        """Move messages from the queue, where they may still be left out, to what is being written."""
        writing = self._writing
        taken = 0
        while self._queue.entries and taken < _READ_SIZE and len(writing) < _MAX_BUFFERS:
            entry = self._queue.take()
            if isinstance(entry, Notice):
                entry = Message(zmtp.encode(entry.parts(self._endpoint.key, _SLOW)))
            elif isinstance(entry, StreamRun):
                entry = Message(zmtp.encode(entry.parts(self._endpoint.key)))
            assert isinstance(entry, Message)
            writing.extend(map(memoryview, entry.buffers))
            taken += entry.size

    def _advance(self, sent: int) -> None:
        writing = self._writing
        done = 0
        for buffer in writing:
            if sent < len(buffer):
                break
            sent -= len(buffer)
            done += 1
        del writing[:done]
        if sent:
            writing[0] = writing[0][sent:]

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.drop(str(error))
            return
        if not data:
            self.drop("it hung up")
            return
        if self._finishing:
            return
        try:
            for found in self._decoder.feed(data):
                if isinstance(found, zmtp.Command):
                    self._command(found)
                elif not self.identity:
                    raise zmtp.ZmtpError("a message before READY")
                else:
                    self._endpoint.received(self, found)
                if self._closed:
                    return
        except zmtp.ZmtpError as error:
            log.warning("a client of channel %d was disconnected: %s", self._endpoint.number, error)
            self.drop(str(error))

    def _command(self, command: zmtp.Command) -> None:
        if command.name == b"READY":
            self._endpoint.ready(self, zmtp.properties(command.body).get("identity", b""))
        elif command.name == b"PING":
            self.send(Message([zmtp.command(b"PONG", command.body[2:18])]))
        elif command.name in (b"SUBSCRIBE", b"CANCEL") and self._endpoint.number == Channel.IOPUB:
            self._endpoint.subscription(self, command.name == b"SUBSCRIBE", command.body)
        elif command.name == b"ERROR":
            raise zmtp.ZmtpError("the client refused us")


def _send(connected: socket.socket, buffers: list[memoryview]) -> int:
    """Write what the socket takes of the first buffers; returns how many bytes that were."""
    if _GATHERS:
        return connected.sendmsg(buffers[:_MAX_BUFFERS])
    joined = bytearray()
    for buffer in buffers[:_MAX_BUFFERS]:
        if len(joined) + len(buffer) > _READ_SIZE:
            break
        joined += buffer
    return connected.send(joined or buffers[0])


_GATHERS = hasattr(socket.socket, "sendmsg")
"""Not on Windows."""
_SLOW = "this client reads more slowly than the kernel prints"
_EVERYTHING = [b""]
