"""The byte streams of one side of a link: their numbers, their credit, and what is to be sent for them.

A stream is opened by either side with a kind and parameters; each direction ends by a CLOSE without payload. A CLOSE
with a payload (``{"error": text}``) aborts both directions at once. Host streams have even numbers, the agent's odd
ones; numbers are reused only after all others, so that late frames of an aborted stream meet nothing.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from sandbox_gateway.wire.credit import ReceiveCredit, SendCredit, decode_grant, encode_grant
from sandbox_gateway.wire.events import (
    Event,
    StreamClosed,
    StreamData,
    StreamEnded,
    StreamOpened,
    StreamWritable,
)
from sandbox_gateway.wire.frames import Buffer, Frame, Kind, WireError
from sandbox_gateway.wire.handshake import load_object

FIRST_STREAM = 16
MAX_STREAM = 0xFFFF
MAX_STREAMS = 64
"""Streams that each side may have open at once."""
MAX_DATA = 64 * 1024
"""Bytes in one DATA frame that we send: small, so that streams and messages share the link fairly."""
_MAX_OBJECT = 64 * 1024
_MAX_QUEUE = 8192
"""Frames waiting for a peer that does not read, beyond which it may not cause more."""


class _Stream:
    __slots__ = ("ended_here", "ended_there", "receive", "send", "spoke", "starved")

    def __init__(self) -> None:
        self.send = SendCredit()
        self.receive = ReceiveCredit()
        self.ended_here = False
        self.ended_there = False
        self.starved = False
        self.spoke = False
        """Whether frames for it were ever queued, which an abort then has to look for."""


class Streams:
    """All byte streams of one endpoint. ``host`` says which numbers are ours."""

    def __init__(self, host: bool) -> None:
        self._parity = 0 if host else 1
        self._next = FIRST_STREAM + self._parity
        self._streams: dict[int, _Stream] = {}
        self._frames: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, stream: int) -> bool:
        return stream in self._streams

    @property
    def ready(self) -> bool:
        """Whether there is something to send."""
        return bool(self._frames)

    def next_frame(self) -> Frame | None:
        """The next frame to send (its epoch is still to be filled in)."""
        return self._frames.popleft() if self._frames else None

    # -- this side

    def open(self, kind: str, params: Mapping[str, Any]) -> int:
        """Open a stream; return its number. ``ValueError`` when there are too many, or the parameters too long."""
        if self._count(self._parity) >= MAX_STREAMS:
            raise ValueError(f"{MAX_STREAMS} streams are open already")
        payload = json.dumps({"kind": kind, "params": dict(params)}, separators=(",", ":")).encode()
        if len(payload) > _MAX_OBJECT:
            raise ValueError("the parameters of the stream are too long")
        while self._next in self._streams:
            self._advance()
        number = self._next
        self._advance()
        self._streams[number] = _Stream()
        self._frames.append(Frame(Kind.OPEN, number, payload=payload))
        return number

    def write(self, number: int, data: Buffer) -> int:
        """Queue as many bytes as there is credit for; return how many (``data`` is copied)."""
        stream = self._mine(number)
        if stream.ended_here:
            raise ValueError(f"stream {number} was ended")
        view = memoryview(data).cast("B")
        size = stream.send.spend(len(view))
        stream.starved = size < len(view)
        stream.spoke = True
        for pos in range(0, size, MAX_DATA):
            self._frames.append(Frame(Kind.DATA, number, payload=bytes(view[pos : min(pos + MAX_DATA, size)])))
        return size

    def consumed(self, number: int, size: int) -> None:
        """The application has used ``size`` received bytes. Nothing happens for a stream that is gone."""
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.receive.consume(size)
        grant = 0 if stream.ended_there else stream.receive.take_grant()
        if grant:
            stream.spoke = True
            self._frames.append(Frame(Kind.CREDIT, number, payload=encode_grant(grant)))

    def end(self, number: int) -> bool:
        """Send no more on this stream; True if that was its end. Nothing happens for a stream that is gone."""
        stream = self._streams.get(number)
        if stream is None or stream.ended_here:
            return False
        stream.ended_here = stream.spoke = True
        self._frames.append(Frame(Kind.CLOSE, number))
        if stream.ended_there:
            del self._streams[number]
            return True
        return False

    def abort(self, number: int, error: str) -> None:
        """End both directions now, telling the other side why."""
        stream = self._streams.pop(number, None)
        if stream is None:
            return
        if stream.spoke:
            self._discard(number)
        payload = json.dumps({"error": error[:1000]}).encode()
        self._frames.append(Frame(Kind.CLOSE, number, payload=payload))

    def reset(self, reason: str) -> Iterator[Event]:
        """Forget all streams: they do not outlive an attachment."""
        numbers = list(self._streams)
        self._streams.clear()
        self._frames.clear()
        for number in numbers:
            yield StreamClosed(number, reason)

    # -- the other side

    def handle(self, frame: Frame, events: list[Event]) -> None:
        """Take one OPEN, DATA, CREDIT or CLOSE frame."""
        number = frame.channel
        if number < FIRST_STREAM:
            raise WireError(f"a byte stream with number {number}")
        if len(self._frames) > _MAX_QUEUE:
            raise WireError("the other side writes on its streams but does not read")
        if frame.kind is Kind.OPEN:
            self._opened(number, frame.payload, events)
            return
        stream = self._streams.get(number)
        if stream is None:
            # Late frames of a stream that this side has aborted: nothing to do.
            return
        if frame.kind is Kind.DATA:
            if stream.ended_there or not frame.payload:
                raise WireError("bytes after the end of a stream, or none")
            stream.receive.received(len(frame.payload))
            events.append(StreamData(number, bytes(frame.payload)))
        elif frame.kind is Kind.CREDIT:
            stream.send.grant(decode_grant(frame.payload))
            if stream.starved:
                stream.starved = False
                events.append(StreamWritable(number))
        else:
            self._closed(number, stream, frame.payload, events)

    def _opened(self, number: int, payload: Buffer, events: list[Event]) -> None:
        if number % 2 == self._parity:
            raise WireError("the other side opens a stream with a number of ours")
        if number in self._streams:
            raise WireError("a stream is opened twice")
        if self._count(1 - self._parity) >= MAX_STREAMS:
            raise WireError("too many streams")
        data = load_object(payload, _MAX_OBJECT)
        kind, params = data.get("kind"), data.get("params")
        if not isinstance(kind, str) or not isinstance(params, dict):
            raise WireError("a stream without kind or parameters")
        self._streams[number] = _Stream()
        events.append(StreamOpened(number, kind, params))

    def _closed(self, number: int, stream: _Stream, payload: Buffer, events: list[Event]) -> None:
        if payload:
            error = load_object(payload, _MAX_OBJECT).get("error")
            if not isinstance(error, str):
                raise WireError("a stream is aborted without a reason")
            del self._streams[number]
            if stream.spoke:
                self._discard(number)
            events.append(StreamClosed(number, error))
            return
        if stream.ended_there:
            raise WireError("a stream is ended twice")
        stream.ended_there = True
        events.append(StreamEnded(number))
        if stream.ended_here:
            del self._streams[number]
            events.append(StreamClosed(number))

    # -- helpers

    def _mine(self, number: int) -> _Stream:
        stream = self._streams.get(number)
        if stream is None:
            raise ValueError(f"stream {number} is not open")
        return stream

    def _count(self, parity: int) -> int:
        return sum(1 for number in self._streams if number % 2 == parity)

    def _advance(self) -> None:
        self._next = self._next + 2 if self._next + 2 <= MAX_STREAM else FIRST_STREAM + self._parity

    def _discard(self, number: int) -> None:
        self._frames = deque(frame for frame in self._frames if frame.channel != number or frame.kind is Kind.OPEN)
