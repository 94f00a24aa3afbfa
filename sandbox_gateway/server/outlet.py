"""One client session of one kernel: what waits for it, what it was sent and has not confirmed, how far it has got.

A session outlives its WebSockets. What its client has not confirmed when a connection ends comes again over the next
one, with the same ``msg_id``. Confirmation costs clients nothing: behind the messages goes a WebSocket ping with a
number, and the pong that every client's WebSocket stack answers by itself says that all before it has arrived.

Nothing here blocks or raises into its caller, and nothing is awaited for each message.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final, Protocol

from sandbox_gateway import messages, stream_runs
from sandbox_gateway.bridge_queue import JOIN_ABOVE, OVERHEAD, Notice, OutputQueue
from sandbox_gateway.messages import Buffer
from sandbox_gateway.server import ws_protocol
from sandbox_gateway.stream_runs import StreamRun
from sandbox_gateway.wire.frames import CHANNELS, Channel

log = logging.getLogger(__name__)

WINDOW: Final = 8 << 20
"""Bytes that are sent without a confirmation at most, where a client confirms at all; one larger message goes alone."""
IN_FLIGHT: Final = 1 << 20
"""Bytes that are given to a WebSocket before they have left this process."""
BATCH: Final = 128 << 10
"""Bytes of small messages that are written with one system call."""
PING_INTERVAL: Final = 0.1
"""Seconds between two pings, unless much is unconfirmed."""
PATIENCE: Final = 10.0
"""Seconds for the first pong of a connection; a client that never answers is not waited for."""
LARGE_MESSAGE: Final = 1 << 20
"""Bytes of a message from which on it may be what its client's connection breaks at."""
STUMBLES: Final = 3
"""Connections that break at the same large message until it is left out: some clients end theirs at 10 MB."""
REASON: Final = "this client reads more slowly than the kernel prints"
_MAX_BATCH = 1000
_LARGE = 32 << 10
_NUMBER = Struct("!2sQ")
_DROPPABLE = frozenset({"stream", "display_data", "update_display_data"})
_MAX_PARENT = 16 << 10
_EAGER = WINDOW // 4


class ConnectionLost(Exception):
    """The WebSocket is closed."""


class Writer(Protocol):
    """A client's WebSocket."""

    v1: bool
    """Whether it speaks the protocol v1."""

    def write(self, frames: Sequence[bytes]) -> asyncio.Future[None] | None:
        """Write whole WebSocket frames in order; returns a future of their leaving this process, None: they have left.

        Raises :class:`ConnectionLost`.
        """
        ...

    def ping(self, data: bytes) -> None:
        """Send a ping. Raises :class:`ConnectionLost`."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Close the connection; never raises."""
        ...


class Entry:
    """A message on its way to clients, encoded once for each protocol and shared by all sessions."""

    __slots__ = ("_head", "_legacy", "channel", "kind", "legacy_failed", "number", "size", "v1")
    count = 1

    def __init__(self, channel: int, parts: Sequence[Buffer], kind: str, number: int = 0) -> None:
        """``parts``: header, parent, metadata, content and buffers; ``kind``: the message's type; ``number``: the one
        that it has on the link, 0 for the host's own."""
        self.channel = channel
        self.kind = kind
        self.number = number
        self.v1 = ws_protocol.frame_v1(ws_protocol.NAMES[channel], parts)
        self.size = len(self.v1)
        self.legacy_failed = False
        self._legacy: bytes | None = None
        self._head: tuple[bool, bytes] | None = None

    @property
    def head(self) -> tuple[bool, bytes]:
        """Whether it may be left out, and the raw header of the request it belongs to."""
        if self._head is None:
            parent = ws_protocol.parts_of_v1(self.v1)[1]
            self._head = (
                self.channel == Channel.IOPUB and self.kind in _DROPPABLE,
                bytes(parent) if len(parent) <= _MAX_PARENT else b"",
            )
        return self._head

    def keep(self) -> Entry:
        """Never leave it out."""
        self._head = (False, b"")
        return self

    def legacy(self) -> bytes | None:
        """Its frame in the legacy protocol; None when it cannot be said in that."""
        if self._legacy is None and not self.legacy_failed:
            parts = ws_protocol.parts_of_v1(self.v1)
            try:
                self._legacy = ws_protocol.frame_legacy(ws_protocol.NAMES[self.channel], parts)
            except ws_protocol.Malformed as error:
                log.debug("a message was left out: %s", error)
                self.legacy_failed = True
        return self._legacy


class _NumberedRun(StreamRun):
    """Joined stream messages that know the link's number of the last of them."""

    number = 0


class _Queue(OutputQueue):
    """An output queue whose entries keep their numbers when they are joined."""

    __slots__ = ()

    def put(self, entry: Entry, parts: Sequence[Buffer] | None) -> None:
        """Append ``entry``; ``parts``: the message as the kernel sent it, with which it may be joined with others."""
        added: Entry | _NumberedRun = entry
        if self.pending > JOIN_ABOVE and parts is not None and entry.kind == "stream":
            found = stream_runs.read(parts)
            if found is not None:
                last = self.entries[-1] if self.entries else None
                if isinstance(last, _NumberedRun) and last.takes(found):
                    last.add(found)
                    last.number = max(entry.number, last.number)
                    self.pending += found.size
                    return
                added = _NumberedRun(found)
                added.number = entry.number
        if self.add(added, None):
            # A kernel can publish nothing but errors for ever.
            self.make_room()

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Put what was taken in front again, in its order."""
        self.entries.extendleft(reversed(entries))
        self.pending += sum(entry.size + OVERHEAD for entry in entries)

    def forget_numbers(self) -> None:
        """The numbers mean nothing any more."""
        for entry in self.entries:
            if isinstance(entry, Entry | _NumberedRun):
                entry.number = 0


class Outlet:
    """A session.

    ``identity`` is what the kernel addresses its replies to; ``key`` signs what stands in for messages that were joined
    or left out. ``positions`` are numbers by channel up to which its client has everything, ``expected`` those up to
    which something came that it should have; ``moved`` is called when it has more.
    """

    def __init__(
        self,
        identity: bytes,
        key: bytes,
        positions: Sequence[int],
        *,
        limit: int,
        moved: Callable[[], object],
        expected: Sequence[int] | None = None,
        lasting: bool = True,
    ) -> None:
        self.identity = identity
        self.lasting = lasting
        """Whether its client can come back to it."""
        self.left_out = 0
        """Messages that were left out because the client was too slow."""
        self.malformed = 0
        """Messages that the legacy protocol could not tell."""
        self.sent = 0
        """Bytes that were written."""
        self.timer: asyncio.TimerHandle | None = None
        """Its hub's, for the time without a connection."""
        self._key = key
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._queue = _Queue(limit)
        self._confirmed = list(positions)
        self._queued = list(expected or positions)
        self._unconfirmed: deque[Entry] = deque()
        self._unconfirmed_size = 0
        self._writer: Writer | None = None
        self._stumbling: tuple[Entry, int] | None = None
        self._scheduled = False
        self._in_flight = 0
        self._begin()

    def _begin(self) -> None:
        """The state of one connection."""
        self._in_flight = 0
        self._ping = 0
        self._ping_mark = -1
        self._pinged_at = float("-inf")
        self._heard = False
        self._deaf = False
        self._ping_timer: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None

    # The session

    @property
    def connected(self) -> bool:
        """Whether it has a WebSocket now."""
        return self._writer is not None

    @property
    def writer(self) -> Writer | None:
        """Its WebSocket."""
        return self._writer

    @property
    def pending(self) -> int:
        """Bytes that it takes up: what waits, and what is not confirmed."""
        return self._queue.pending + self._unconfirmed_size

    @property
    def settled(self) -> bool:
        """Whether everything has left this process."""
        return not self._queue.entries and not self._in_flight

    def connect(self, writer: Writer) -> None:
        """Go on over this WebSocket. An older one is closed."""
        old = self.disconnect()
        if old is not None:
            old.close(1000, "the session goes on over another connection")
        self._writer = writer
        self._schedule()

    def disconnect(self, writer: Writer | None = None, *, refused: bool = False) -> Writer | None:
        """The connection has ended; returns it. With ``writer``: if it is this one. Unconfirmed messages wait again.

        ``refused``: its client said that a message was too large for it.
        """
        old = self._writer
        if old is None or (writer is not None and writer is not old):
            return None
        self._writer = None
        for timer in (self._ping_timer, self._patience):
            if timer is not None:
                timer.cancel()
        self._begin()
        again, self._unconfirmed = self._unconfirmed, deque()
        self._unconfirmed_size = 0
        self._queue.put_back(self._without_what_it_breaks_at(again, refused))
        return old

    def _without_what_it_breaks_at(self, again: deque[Entry], refused: bool) -> deque[Entry]:
        """A client that cannot take a message breaks its connection at it, for ever if that comes again each time."""
        large = next((entry for entry in again if entry.size >= LARGE_MESSAGE), None)
        if large is None:
            self._stumbling = None
            return again
        times = self._stumbling[1] if self._stumbling is not None and self._stumbling[0] is large else 0
        self._stumbling = (large, times + 1)
        if times + 1 < STUMBLES and not refused:
            return again
        self._stumbling = None
        self.left_out += 1
        text = f"[sandbox] a message of {large.size} bytes was left out: this client's connection breaks at it\n"
        parts = messages.stderr_notice(self._key, text, parent=large.head[1] or messages.EMPTY)
        told = Entry(int(Channel.IOPUB), parts[3:], "stream", large.number if large.channel == Channel.IOPUB else 0)
        return deque(told.keep() if entry is large else entry for entry in again)

    def close(self, code: int, reason: str) -> None:
        """The session is over."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        writer = self.disconnect()
        self._queue.clear()
        if writer is not None:
            writer.close(code, reason)

    # How far it has got

    def position(self, channel: int) -> int | None:
        """The number up to which its client has everything of ``channel``; None: nothing waits for it."""
        confirmed = self._confirmed[channel]
        return confirmed if confirmed < self._queued[channel] else None

    def hold(self, channel: int) -> None:
        """Something without a number follows the last one it has: stay at that until it is confirmed."""
        if self._confirmed[channel] and self._queued[channel] <= self._confirmed[channel]:
            self._queued[channel] = self._confirmed[channel] + 1

    def forget_numbers(self) -> None:
        """The kernel's numbers begin anew."""
        self._confirmed = [0] * CHANNELS
        self._queued = [0] * CHANNELS
        self._queue.forget_numbers()
        for entry in self._unconfirmed:
            entry.number = 0

    # The way out

    def add(self, entry: Entry, parts: Sequence[Buffer] | None = None) -> None:
        """Queue a message. It is written when the loop has run what is ready now, together with others.

        With ``parts``, which are its own, it may be joined with others when many wait. What the client has by its
        number is passed over.
        """
        number = entry.number
        if number:
            channel = entry.channel
            confirmed, queued = self._confirmed[channel], self._queued[channel]
            if number <= confirmed:
                return
            if confirmed >= queued:
                self._confirmed[channel] = number - 1
            self._queued[channel] = number
        queue = self._queue
        if queue.pending + entry.size > queue.limit and queue.entries and self._writer is not None:
            # Before anything is left out: its client may well be fast enough.
            self._flush()
        queue.put(entry, parts)
        if not self._scheduled and self._writer is not None:
            self._scheduled = True
            self._loop.call_soon(self._flush_soon)

    def replay(self, entry: Entry) -> None:
        """Queue a message that is older than what it has."""
        self._queue.put(entry, None)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._writer is not None:
            self._scheduled = True
            self._loop.call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        self._scheduled = False
        self._flush()

    def _flush(self) -> None:
        writer, queue = self._writer, self._queue
        if writer is None:
            return
        try:
            while (
                queue.entries
                and self._in_flight < IN_FLIGHT
                and (self._unconfirmed_size < WINDOW or self._deaf or not self._unconfirmed)
            ):
                self._write(writer)
            if self._unconfirmed:
                self._ask(writer)
        except ConnectionLost:
            # Whoever reads from it learns of that as well, and disconnects.
            log.debug("a WebSocket has ended")

    def _write(self, writer: Writer) -> None:
        """Write some messages."""
        frames: list[bytes] = []
        size = 0
        v1, queue, unconfirmed = writer.v1, self._queue, self._unconfirmed
        while queue.entries and size < BATCH and len(frames) < _MAX_BATCH:
            taken = queue.take()
            entry = taken if isinstance(taken, Entry) else self._made(taken)
            frame = entry.v1 if v1 else self._legacy(entry)
            # What cannot be told is done with, all the same.
            unconfirmed.append(entry)
            self._unconfirmed_size += entry.size
            if frame is not None:
                frames.append(frame)
                size += len(frame)
        self.sent += size
        if not frames:
            return
        leaving = writer.write(frames)
        if leaving is not None:
            self._in_flight += size
            leaving.add_done_callback(functools.partial(self._left, writer, size))
        if self._deaf:
            while self._unconfirmed_size > WINDOW and len(unconfirmed) > 1:
                self._confirm(1)

    def _left(self, writer: Writer, size: int, leaving: asyncio.Future[None]) -> None:
        if not leaving.cancelled():
            leaving.exception()
        if writer is self._writer:
            self._in_flight -= size
            self._schedule()

    def _made(self, taken: object) -> Entry:
        """What stands in a queue for several messages, as one."""
        number = 0
        if isinstance(taken, Notice):
            self.left_out += taken.count
            parts = taken.parts(self._key, REASON)
            return Entry(int(Channel.IOPUB), parts[3:], "stream").keep()
        assert isinstance(taken, StreamRun)
        if isinstance(taken, _NumberedRun):
            number = taken.number
        return Entry(int(Channel.IOPUB), taken.parts(self._key)[3:], "stream", number)

    def _legacy(self, entry: Entry) -> bytes | None:
        frame = entry.legacy()
        if frame is None:
            self.malformed += 1
            if self.malformed == 1:
                text = "[sandbox] a message was left out: it is not what Jupyter's protocol says\n"
                told = Entry(int(Channel.IOPUB), messages.stderr_notice(self._key, text)[3:], "stream")
                return told.legacy()
        return frame

    # Confirmation

    def _ask(self, writer: Writer) -> None:
        """Ping behind what was written, if it is time."""
        if self._ping_mark >= 0:
            return
        now = self._loop.time()
        wait = self._pinged_at + PING_INTERVAL - now
        if wait > 0 and self._unconfirmed_size < _EAGER:
            if self._ping_timer is None:
                self._ping_timer = self._loop.call_later(wait, self._ask_later)
            return
        if self._patience is None and not self._heard:
            self._patience = self._loop.call_later(PATIENCE, self._give_up)
        self._pinged_at = now
        self._ping += 1
        self._ping_mark = len(self._unconfirmed)
        writer.ping(_NUMBER.pack(b"sg", self._ping))

    def _ask_later(self) -> None:
        self._ping_timer = None
        if self._writer is not None and self._unconfirmed:
            try:
                self._ask(self._writer)
            except ConnectionLost:
                log.debug("a WebSocket has ended")

    def pong(self, data: bytes) -> None:
        """The client answered a ping; anybody's, with any data."""
        if self._ping_mark < 0 or data != _NUMBER.pack(b"sg", self._ping):
            return
        self._heard = True
        self._deaf = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        mark, self._ping_mark = self._ping_mark, -1
        self._confirm(mark)
        self._schedule()

    def last_ping(self) -> None:
        """Ask for confirmation of all that was written, now: nothing more will be."""
        if self._writer is None or not self._unconfirmed:
            return
        self._ping += 1
        self._ping_mark = len(self._unconfirmed)
        try:
            self._writer.ping(_NUMBER.pack(b"sg", self._ping))
        except ConnectionLost:
            log.debug("a WebSocket has ended")

    def _give_up(self) -> None:
        self._patience = None
        if self._in_flight:
            # Our ping has not even left: it is slow, not deaf.
            self._patience = self._loop.call_later(PATIENCE, self._give_up)
            return
        log.info("a WebSocket client does not answer pings")
        self._deaf = True
        self._schedule()

    def _confirm(self, count: int) -> None:
        """The client has the first ``count`` of what is unconfirmed."""
        unconfirmed, confirmed = self._unconfirmed, self._confirmed
        for _ in range(min(count, len(unconfirmed))):
            entry = unconfirmed.popleft()
            self._unconfirmed_size -= entry.size
            if entry.number > confirmed[entry.channel]:
                confirmed[entry.channel] = entry.number
            if self._ping_mark > 0:
                self._ping_mark -= 1
        if not unconfirmed and not self._queue.entries:
            for channel, number in enumerate(self._queued):
                if number > confirmed[channel]:
                    confirmed[channel] = number
        self._moved()
