"""What :meth:`Endpoint.feed <sandbox_gateway.wire.endpoint.Endpoint.feed>` reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_gateway.wire.frames import WireError
from sandbox_gateway.wire.handshake import Attach, Hello


@dataclass(slots=True)
class Message:
    """A message, exactly once and in order."""

    channel: int
    seq: int
    parts: list[bytes | memoryview]


@dataclass(slots=True)
class Dropped:
    """The other side dropped ``count`` messages of a channel here (``bytes`` of them, as far as known)."""

    channel: int
    first: int
    last: int
    count: int
    bytes: int


@dataclass(slots=True)
class Attached:
    """The handshake is done. All byte streams of before are gone (each was reported closed). ``attach`` is set at the
    agent, ``hello`` at the host."""

    attach: Attach | None = None
    hello: Hello | None = None


@dataclass(slots=True)
class Detached:
    """At the agent: the host asked for silence. Everything is kept for the next one."""


@dataclass(slots=True)
class Lost:
    """The protocol was broken. The agent waits for the next ATTACH by itself; the host must attach again."""

    error: WireError


@dataclass(slots=True)
class Pinged:
    """The other side lives (the answer is on its way already)."""


@dataclass(slots=True)
class Ponged:
    """The answer to a ping."""

    token: bytes


@dataclass(slots=True)
class StreamOpened:
    """The other side opened a byte stream."""

    stream: int
    kind: str
    params: Mapping[str, Any]


@dataclass(slots=True)
class StreamData:
    """Bytes of a stream. Call ``stream_consumed`` when they have been used, else no more will come."""

    stream: int
    data: bytes


@dataclass(slots=True)
class StreamWritable:
    """There is credit again after :meth:`stream_write` took less than it was given."""

    stream: int


@dataclass(slots=True)
class StreamEnded:
    """The other side will send no more on this stream; it may still be written to."""

    stream: int


@dataclass(slots=True)
class StreamClosed:
    """The stream is gone: both sides have ended it, or one aborted it (``error`` says why)."""

    stream: int
    error: str | None = None


Event = (
    Message
    | Dropped
    | Attached
    | Detached
    | Lost
    | Pinged
    | Ponged
    | StreamOpened
    | StreamData
    | StreamWritable
    | StreamEnded
    | StreamClosed
)
