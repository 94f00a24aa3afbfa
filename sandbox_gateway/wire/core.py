"""What both roles of an endpoint share: see :mod:`sandbox_gateway.wire.endpoint`, which is what to import."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from sandbox_gateway.wire.events import (
    Dropped,
    Event,
    Message,
    Pinged,
    Ponged,
)
from sandbox_gateway.wire.frames import (
    Buffer,
    Decoder,
    Frame,
    Kind,
    WireError,
    encode,
)
from sandbox_gateway.wire.messages import MAX_MESSAGE, Assembler, fragments
from sandbox_gateway.wire.reliable import (
    Gap,
    Inbox,
    Outbox,
    decode_ack,
    decode_gap,
    encode_ack,
    encode_gap,
)
from sandbox_gateway.wire.streams import Streams

MAX_OUTPUT = 512 * 1024
"""Bytes prepared for writing at once: bounds what is stale in front of an answer to ATTACH."""
MAX_BUFFERS = 1000
"""Buffers for one ``writev`` (Linux takes 1024)."""
MAX_PONGS = 16
MAX_WAITING = 64
MAX_TOKEN = 64
_SMALL = 4096


class Endpoint:
    """What both roles share. Use :class:`AgentEndpoint` or :class:`HostEndpoint`."""

    _host: bool

    def __init__(self, outbox: Outbox, *, max_message: int = MAX_MESSAGE) -> None:
        self.outbox = outbox
        self.inbox = Inbox()
        self.epoch = 0
        self.attached = False
        """Whether the handshake is done: only then messages and streams flow."""
        self.stale_frames = 0
        """Frames of other epochs, dropped."""
        self._decoder = Decoder()
        self._assembler = Assembler(max_message)
        self._streams = Streams(self._host)
        self._control: deque[Frame] = deque()
        self._pongs = 0
        self._fragments: Any = None
        self._out: deque[Buffer] = deque()
        self._out_bytes = 0

    # -- messages

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        """Queue a message; return its number. The parts must not be changed any more."""
        return self.outbox.append(channel, parts)

    @property
    def full(self) -> bool:
        """Whether the other side is so far behind that the source of messages should be left alone."""
        return self.outbox.full

    @property
    def ack_pending(self) -> bool:
        """Whether received messages await their acknowledgement."""
        return self.attached and self.inbox.ack_pending

    def request_ack(self) -> None:
        """Acknowledge with the next output what has come so far."""
        self.inbox.request_ack()

    def ping(self, token: bytes) -> None:
        """Ask for a sign of life; the answer is a :class:`Ponged` with the same token (at most 64 bytes).

        Nothing is sent when too many wait already: the other side does not read then, which is an answer too.
        """
        if len(self._control) < MAX_WAITING:
            self._control.append(Frame(Kind.PING, payload=token[:MAX_TOKEN]))

    # -- streams

    def open_stream(self, kind: str, params: Mapping[str, Any]) -> int:
        """Open a byte stream; return its number. ``ValueError`` when that is not possible now."""
        if not self.attached:
            raise ValueError("the link is not attached")
        return self._streams.open(kind, params)

    def stream_write(self, stream: int, data: Buffer) -> int:
        """Queue what the credit allows; return how many bytes. :class:`StreamWritable` tells when there is more."""
        return self._streams.write(stream, data)

    def stream_consumed(self, stream: int, size: int) -> None:
        """Received bytes were used: lets the other side send more."""
        self._streams.consumed(stream, size)

    def stream_end(self, stream: int) -> bool:
        """Send no more on the stream; True if it is gone now (the other side had ended it before)."""
        return self._streams.end(stream)

    def stream_abort(self, stream: int, error: str) -> None:
        """End the stream in both directions, now."""
        self._streams.abort(stream, error)

    # -- output

    @property
    def wants_write(self) -> bool:
        """Whether :meth:`output` would return something."""
        return bool(self._out or self._control) or (
            self.attached and bool(self._fragments or self.outbox.ready or self._streams.ready or self.inbox.ack_due)
        )

    @property
    def unwritten(self) -> int:
        """Bytes handed out for writing and not written yet."""
        return self._out_bytes

    def output(self, max_bytes: int = MAX_OUTPUT) -> list[Buffer]:
        """Buffers for ``writev``, whole frames of about ``max_bytes``; the same again until :meth:`wrote` is called."""
        if self._out_bytes < max_bytes // 2:
            self._fill(max_bytes)
        if len(self._out) <= MAX_BUFFERS:
            return list(self._out)
        return [self._out[index] for index in range(MAX_BUFFERS)]

    def wrote(self, size: int) -> None:
        """``size`` bytes of the output have been written."""
        self._out_bytes -= size
        out = self._out
        while size:
            first = out[0]
            if len(first) > size:
                out[0] = memoryview(first)[size:]
                return
            size -= len(first)
            out.popleft()

    def _fill(self, max_bytes: int) -> None:
        small: list[Buffer] = []
        size = self._out_bytes
        while size < max_bytes:
            frames = self._next_frames()
            if not frames:
                break
            for frame in frames:
                for buffer in encode(frame):
                    length = len(buffer)
                    size += length
                    if length <= _SMALL:
                        small.append(buffer)
                        continue
                    if small:
                        self._out.append(small[0] if len(small) == 1 else b"".join(small))
                        small = []
                    self._out.append(buffer)
        if small:
            self._out.append(small[0] if len(small) == 1 else b"".join(small))
        self._out_bytes = size

    def _next_frames(self) -> list[Frame]:
        """The next frames to send: control first, then a fragment of a message and a piece of a stream in turn."""
        frames: list[Frame] = []
        if self._control:
            frames.extend(self._control)
            self._control.clear()
            self._pongs = 0
        if self.attached:
            numbers = self.inbox.take_ack()
            if numbers:
                frames.append(Frame(Kind.ACK, payload=encode_ack(numbers)))
            message = self._next_fragment()
            if message is not None:
                frames.append(message)
            data = self._streams.next_frame()
            if data is not None:
                frames.append(data)
        for frame in frames:
            frame.epoch = self.epoch
        return frames

    def _next_fragment(self) -> Frame | None:
        while True:
            if self._fragments is not None:
                frame: Frame | None = next(self._fragments, None)
                if frame is not None:
                    return frame
                self._fragments = None
            item = self.outbox.next_ready()
            if item is None:
                return None
            if isinstance(item, Gap):
                return Frame(Kind.GAP, item.channel, 0, item.first, payload=encode_gap(item))
            self._fragments = fragments(item.channel, self.epoch, item.seq, item.parts)

    # -- input

    def feed(self, data: Buffer) -> list[Event]:
        """What ``data`` means. Never raises for bad input: that is reported as :class:`Lost`."""
        events: list[Event] = []
        decoder = self._decoder
        while True:
            try:
                frames = decoder.feed(data)
            except WireError as error:
                self._corrupt(error, events)
                if decoder.error is not None:
                    return events
                data = b""
                continue
            for frame in frames:
                try:
                    self._handle(frame, events)
                except WireError as error:
                    self._broken(error, events)
            if decoder.error is None:
                return events
            data = b""

    def _handle(self, frame: Frame, events: list[Event]) -> None:
        kind = frame.kind
        if kind is Kind.MESSAGE:
            if not self.attached:
                return
            if frame.epoch != self.epoch:
                self.stale_frames += 1
                return
            message = self._assembler.add(frame)
            if message is not None:
                channel, seq, parts = message
                if self.inbox.accept(channel, seq, len(frame.payload)):
                    events.append(Message(channel, seq, parts))
            return
        if kind is Kind.ATTACH or kind is Kind.HELLO:
            self._handshake(frame, events)
            return
        if not self.attached:
            return
        if frame.epoch != self.epoch:
            self.stale_frames += 1
        elif kind is Kind.ACK:
            for channel, seq in decode_ack(frame.payload).items():
                self.outbox.ack(channel, seq)
        elif kind is Kind.GAP:
            self._gap(frame, events)
        elif kind is Kind.PING:
            self._pinged(frame, events)
        elif kind is Kind.PONG:
            events.append(Ponged(bytes(frame.payload[:MAX_TOKEN])))
        elif kind is Kind.DETACH:
            self._detach(frame, events)
        else:
            self._streams.handle(frame, events)

    def _gap(self, frame: Frame, events: list[Event]) -> None:
        gap = decode_gap(frame.channel, frame.seq, frame.payload)
        news = self.inbox.gap(gap.channel, gap.first, gap.last)
        if news:
            events.append(Dropped(gap.channel, gap.last - news + 1, gap.last, news, gap.bytes))

    def _pinged(self, frame: Frame, events: list[Event]) -> None:
        if len(frame.payload) > MAX_TOKEN:
            raise WireError("a ping that is too long")
        if self._pongs < MAX_PONGS:
            # More than this are waiting only for a peer that does not read: it will not miss them.
            self._pongs += 1
            self._control.append(Frame(Kind.PONG, payload=bytes(frame.payload)))
        events.append(Pinged())

    def _restart(self, events: list[Event], reason: str) -> None:
        """Forget whatever belongs to the attachment that ends now."""
        self._assembler.reset()
        self._fragments = None
        self._control.clear()
        self._pongs = 0
        events.extend(self._streams.reset(reason))

    def _handshake(self, frame: Frame, events: list[Event]) -> None:
        raise NotImplementedError

    def _detach(self, frame: Frame, events: list[Event]) -> None:
        raise NotImplementedError

    def _corrupt(self, error: WireError, events: list[Event]) -> None:
        """The byte stream makes no sense."""
        raise NotImplementedError

    def _broken(self, error: WireError, events: list[Event]) -> None:
        """The frames are whole but break the protocol."""
        raise NotImplementedError
