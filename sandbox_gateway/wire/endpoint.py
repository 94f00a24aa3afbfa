"""One end of a link as a state machine without I/O, clock or threads; both sides' loops only move bytes.

The agent's loop::

    endpoint = AgentEndpoint(info={"pid": 1}, outbox=Outbox(64 << 20, 256 << 20, droppable, keep_acked=True))
    # readable:
    for event in endpoint.feed(os.read(fd, 1 << 20)):
        ...                                   # Message, Attached, Detached, Lost, StreamOpened... (see events.py)
    # something to say, any time, attached or not:
    endpoint.send(Channel.IOPUB, parts)       # returns the number; look at endpoint.full before reading more input
    # when endpoint.wants_write and the pipe is writable (buffers stay the same until wrote() is called):
    endpoint.wrote(os.writev(fd, endpoint.output()))
    # about 20 ms after endpoint.ack_pending became true (a timer of the loop's):
    endpoint.request_ack()

The host's end is the same, but begins with ``endpoint.attach(nonce, ...)`` and does so again after :class:`Lost`.

Rules of attaching. A writer that was killed leaves half a frame in the pipe, and a reader that was killed has taken
half a frame out of it. So the new host *searches* for the HELLO with its nonce, whatever comes before; and the agent,
whose decoder finds a corrupt frame, searches for an ATTACH, also inside that frame. Should that wait for more bytes,
the host's second ATTACH comes after :func:`~sandbox_gateway.wire.frames.padding`, which completes any frame. Every
ATTACH is answered; the host heeds only the answer to its latest one. Between ATTACH and HELLO the host sends no
messages, hence the numbers in HELLO are final. After it both sides send again what the other does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sandbox_gateway.wire.core import Endpoint
from sandbox_gateway.wire.events import Attached, Detached, Dropped, Event, Lost
from sandbox_gateway.wire.frames import CHANNELS, MAX_SEQ, Frame, Kind, WireError, padding
from sandbox_gateway.wire.handshake import SUPPORTED, Attach, Hello, choose_version
from sandbox_gateway.wire.messages import MAX_MESSAGE
from sandbox_gateway.wire.reliable import Outbox, encode_ack

__all__ = ["AgentEndpoint", "Endpoint", "HostEndpoint"]


class AgentEndpoint(Endpoint):
    """The end inside the sandbox: keeps everything until a host attaches, and again after the host is gone."""

    _host = False

    def __init__(
        self,
        outbox: Outbox,
        *,
        info: Mapping[str, Any] | None = None,
        versions: tuple[int, ...] = SUPPORTED,
        max_message: int = MAX_MESSAGE,
    ) -> None:
        super().__init__(outbox, max_message=max_message)
        self.info: dict[str, Any] = dict(info or {})
        """What HELLO tells about the agent: small JSON values."""
        self._versions = versions
        self.version = 0

    def _handshake(self, frame: Frame, events: list[Event]) -> None:
        if frame.kind is not Kind.ATTACH:
            raise WireError("a HELLO from the host")
        attach = Attach.from_payload(frame.payload)
        self._restart(events, "another host attached")
        self.epoch = attach.epoch
        try:
            self.version = choose_version(attach.versions, self._versions)
        except WireError as error:
            self.attached = False
            self._say_hello(Hello(attach.nonce, 0, attach.epoch, agent={"versions": list(self._versions)}))
            events.append(Lost(error))
            return
        resumes = self.outbox.rewind(attach.received)
        received = self.inbox.received()
        self._say_hello(
            Hello(attach.nonce, self.version, attach.epoch, received, self.outbox.last(), self.info, resumes)
        )
        self.attached = True
        events.append(Attached(attach=attach))

    def _say_hello(self, hello: Hello) -> None:
        self._control.append(Frame(Kind.HELLO, payload=hello.to_payload()))

    def _detach(self, frame: Frame, events: list[Event]) -> None:
        self.attached = False
        self._restart(events, "the host detached")
        events.append(Detached())

    def _corrupt(self, error: WireError, events: list[Event]) -> None:
        self._decoder.hunt(Kind.ATTACH)
        self._broken(error, events)

    def _broken(self, error: WireError, events: list[Event]) -> None:
        if not self.attached:
            return
        self.attached = False
        self._restart(events, "the link lost the thread")
        self._control.append(Frame(Kind.DETACH, payload=str(error)[:200].encode()))
        events.append(Lost(error))


class HostEndpoint(Endpoint):
    """The host's end: attaches, and after :class:`Lost` must attach again."""

    _host = True

    def __init__(self, outbox: Outbox, *, epoch: int = 1, max_message: int = MAX_MESSAGE) -> None:
        super().__init__(outbox, max_message=max_message)
        self.epoch = epoch
        self._nonce = ""
        self._named: dict[int, int] = {}
        self._first = True
        self._lost = True

    def attach(
        self,
        nonce: str,
        received: Mapping[int, int] | None = None,
        *,
        owner: str = "",
        pad: bool = False,
    ) -> list[Event]:
        """Queue an ATTACH with a *fresh* nonce (8 to 64 characters); return the streams that this closes.

        ``received`` are the numbers to go on after (default: what this endpoint has received itself). ``pad`` puts
        :func:`padding` in front, in case a frame was torn on the way to the agent.
        """
        if not (nonce.isascii() and nonce.isalnum() and 8 <= len(nonce) <= 64):
            raise ValueError("a nonce has 8 to 64 letters and digits")
        events: list[Event] = []
        self.attached = self._lost = False
        self._restart(events, "the link is attached anew")
        if received is not None:
            self._named = dict(received)
        elif not self._first:
            had = self.inbox.received()
            self._named = {channel: had.get(channel, 0) for channel in range(CHANNELS)}
        self._nonce = nonce
        if pad:
            self._out.append(padding())
            self._out_bytes += len(self._out[-1])
        attach = Attach(nonce, SUPPORTED, self.epoch, self._named, owner[:256])
        self._control.append(Frame(Kind.ATTACH, payload=attach.to_payload()))
        self._decoder.hunt(Kind.HELLO, nonce.encode())
        return events

    def detach(self) -> None:
        """Acknowledge what has come and queue a DETACH: the agent goes silent and keeps everything."""
        self.inbox.request_ack()
        numbers = self.inbox.take_ack()
        if numbers and self.attached:
            self._control.append(Frame(Kind.ACK, payload=encode_ack(numbers)))
        self._control.append(Frame(Kind.DETACH))

    def _handshake(self, frame: Frame, events: list[Event]) -> None:
        if frame.kind is not Kind.HELLO or self.attached or not self._nonce:
            raise WireError("a handshake that was not asked for")
        hello = Hello.from_payload(frame.payload)
        if hello.nonce != self._nonce or hello.epoch != self.epoch or frame.epoch != self.epoch:
            raise WireError("an answer to another ATTACH")
        self._nonce = ""
        if hello.version not in SUPPORTED:
            theirs = hello.agent.get("versions")
            raise WireError(
                f"no common link version: the host speaks {', '.join(map(str, SUPPORTED))}, the agent {theirs!r:.100}"
            )
        if self._first:
            self.outbox.number_after(hello.received)
            self._first = False
        elif any(number > self.outbox.last().get(channel, 0) for channel, number in hello.received.items()):
            raise WireError("the agent claims messages that were never sent")
        self.outbox.rewind({channel: hello.received.get(channel, 0) for channel in range(CHANNELS)})
        self.attached = True
        events.append(Attached(hello=hello))
        self._resume(hello, events)

    def _resume(self, hello: Hello, events: list[Event]) -> None:
        """Go on where the agent does. What it skips although we asked for it is reported, never swallowed."""
        for channel in range(CHANNELS):
            start = hello.resumes.get(channel, 0)
            if start > MAX_SEQ:
                raise WireError("a number out of range")
            asked = self._named.get(channel)
            if asked is not None and start > asked:
                events.append(Dropped(channel, asked + 1, start, start - asked, 0))
            self.inbox.resume({channel: start})

    def _detach(self, frame: Frame, events: list[Event]) -> None:
        reason = bytes(frame.payload[:200]).decode("utf-8", "replace")
        raise WireError(f"the agent lost the thread: {reason}")

    def _corrupt(self, error: WireError, events: list[Event]) -> None:
        self._broken(error, events)

    def _broken(self, error: WireError, events: list[Event]) -> None:
        if self._lost:
            return
        self._lost = True
        self.attached = False
        self._nonce = ""
        events.append(Lost(error))
