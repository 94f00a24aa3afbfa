"""The host's end of a link, on asyncio, over any pair of file descriptors.

Everything about the protocol is in :class:`sandbox_gateway.wire.endpoint.HostEndpoint`; this module moves bytes, keeps
the time, and offers calls and streams to the rest of the host. What comes in is hostile: the callbacks get sizes and
types that were checked, nothing more.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link.calls import Calls
from sandbox_gateway.link.stream import LinkStream
from sandbox_gateway.wire.endpoint import HostEndpoint
from sandbox_gateway.wire.events import (
    Attached,
    Dropped,
    Event,
    Lost,
    Message,
    Ponged,
    StreamClosed,
    StreamData,
    StreamEnded,
    StreamOpened,
    StreamWritable,
)
from sandbox_gateway.wire.frames import Buffer, Channel, WireError
from sandbox_gateway.wire.handshake import Hello
from sandbox_gateway.wire.reliable import Outbox
from sandbox_gateway.wire.sizes import ReadSize

log = logging.getLogger(__name__)

WRITE_SIZE = 4 * 1024 * 1024
ACK_DELAY = 0.25
"""Seconds after which received messages are acknowledged at the latest.

An acknowledgement wakes the sandbox, which has other things to do while messages come; much output is acknowledged
earlier, by its amount."""
ATTACH_RETRY = 0.3
"""Seconds until the first repetition of ATTACH; doubled each time, up to ``ATTACH_RETRY_MAX``."""
ATTACH_RETRY_MAX = 3.0
REATTACH_TIMEOUT = 10.0
REATTACH_LIMIT = 3
"""Losses per minute that are repaired silently."""
MAX_LOGGED = 20
"""Failures of callbacks that are logged per link: what comes in must not fill the log either."""
_AGENT = int(Channel.AGENT)


class Link:
    """One attachment to one sandbox. Owns and closes both descriptors. Use it from one event loop only.

    The callbacks run in that loop and must not block: ``on_message(channel, parts)`` for every message of the kernel
    channels, ``on_gap(channel, count, bytes)`` where messages were dropped, ``on_event(event)`` for events of the
    agent, and ``on_lost(error)`` at most once, when the link is gone for good. A message counts as received when
    ``on_message`` has returned.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        epoch: int = 1,
        on_message: Callable[[int, list[bytes | memoryview]], None],
        on_gap: Callable[[int, int, int], None],
        on_event: Callable[[dict[str, Any]], None],
        on_lost: Callable[[Exception], None],
        limit_bytes: int = 64 * 1024 * 1024,
        outbox: Outbox | None = None,
    ) -> None:
        """``outbox`` is that of an earlier link to the same sandbox: what the agent does not have of it yet follows."""
        self._read_fd = read_fd
        self._write_fd = write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._reading = ReadSize()
        self._endpoint = HostEndpoint(outbox or Outbox(limit_bytes, limit_bytes), epoch=epoch)
        self._on_message = on_message
        self._on_gap = on_gap
        self._on_event = on_event
        self._on_lost = on_lost
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner = ""
        self._hello: asyncio.Future[Hello] | None = None
        self._calls = Calls()
        self._pings: dict[bytes, asyncio.Future[None]] = {}
        self._streams: dict[int, LinkStream] = {}
        self._drains: list[tuple[int, asyncio.Future[None]]] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._flush_soon: asyncio.Handle | None = None
        self._writing = False
        self._losses: list[float] = []
        self._recovery: asyncio.Task[None] | None = None
        self._ever_attached = False
        self._failures = 0
        self.number = 0
        """The number of the message that ``on_message`` is being called with."""
        self.closed = False
        """Whether the link is gone: closed by this side, or lost for good."""

    # -- attaching

    def reach(self, received: Mapping[int, int] | None = None, *, owner: str) -> None:
        """Ask for an agent who may not be there yet, once; :meth:`attach`, with the same arguments, then waits for it.
        Whatever comes meanwhile is taken."""
        self._check_open()
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._loop.add_reader(self._read_fd, self._readable)
        self._hello = self._loop.create_future()
        self._send_attach(received, pad=False)

    async def attach(self, received: Mapping[int, int] | None = None, *, owner: str, timeout: float) -> Hello:
        """Find the agent, whatever is left in the pipes; return what it says about itself.

        ``received`` are the last numbers that are already known of each channel; a channel that is not named goes on
        after what the last owner acknowledged. ``owner`` tells the agent who attaches. Raises ``link_failed`` after
        ``timeout`` seconds, or when there is no common version.
        """
        if self._hello is None:
            self.reach(received, owner=owner)
        hello, loop = self._hello, asyncio.get_running_loop()
        assert hello is not None
        deadline = loop.time() + timeout
        delay = ATTACH_RETRY
        try:
            while True:
                wait = min(delay, deadline - loop.time())
                done, _ = await asyncio.wait([hello], timeout=max(wait, 0))
                if done:
                    return (self._hello or hello).result()
                if loop.time() >= deadline:
                    raise SandboxGatewayError("link_failed", f"the agent did not answer within {timeout:g} s")
                delay = min(delay * 2, ATTACH_RETRY_MAX)
                if not self._endpoint.wants_write:
                    # The first ATTACH may have become part of a frame that was torn; padding completes that.
                    self._send_attach(received, pad=True)
        finally:
            self._hello = None
            if hello.done() and not hello.cancelled():
                hello.exception()

    def _send_attach(self, received: Mapping[int, int] | None, pad: bool) -> None:
        self._dispatch(self._endpoint.attach(secrets.token_hex(16), received, owner=self._owner, pad=pad))
        self._flush()

    @property
    def attached(self) -> bool:
        """Whether messages flow now (False also while a loss is being repaired)."""
        return self._endpoint.attached and not self.closed

    @property
    def epoch(self) -> int:
        """The epoch that this link speaks in."""
        return self._endpoint.epoch

    @property
    def outbox(self) -> Outbox:
        """What was sent and may have to be sent again: for the next link, after this one is closed."""
        return self._endpoint.outbox

    @property
    def unread(self) -> int:
        """Bytes that the agent has not yet read from the pipe, where the system can tell."""
        if self.closed:
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(self._write_fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def received(self) -> dict[int, int]:
        """The last number of each channel that was handed to ``on_message``: what a successor has to name."""
        return self._endpoint.inbox.received()

    # -- messages

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        """Queue a message for the agent; return its number. The parts must not be changed any more.

        Raises ``link_failed`` when the link is closed, or the sandbox is so far behind that no more is kept for it.
        """
        self._check_open()
        if not self._ever_attached:
            raise SandboxGatewayError("link_failed", "the link is not attached yet")
        if self._endpoint.full:
            raise SandboxGatewayError("link_failed", "the sandbox does not read its input")
        seq = self._endpoint.send(channel, parts)
        self._schedule_flush()
        return seq

    @property
    def backlog(self) -> int:
        """Bytes queued for the agent that it has not acknowledged."""
        return self._endpoint.outbox.backlog

    async def drain(self, limit: int = 0) -> None:
        """Wait until the backlog is at most ``limit`` bytes. Raises ``link_failed`` if the link goes first."""
        self._check_open()
        if self.backlog <= limit:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (limit, waiter)
        self._drains.append(entry)
        try:
            await waiter
        finally:
            if entry in self._drains:
                self._drains.remove(entry)

    async def call(
        self, op: str, *, timeout: float = 30.0, attachment: Buffer | None = None, **params: Any
    ) -> dict[str, Any]:
        """Ask the agent to do something and return its answer; ``attachment`` are bytes that go with it.

        Raises the agent's error (``kernel_failed``, ``invalid_request``, ``unsupported``; others as ``link_failed``),
        ``timeout`` after that many seconds, or ``link_failed`` when the link is lost for good meanwhile.
        """
        self._check_open()
        request, future = self._calls.begin(op, params)
        try:
            self.send(_AGENT, [request] if attachment is None else [request, attachment])
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise SandboxGatewayError("timeout", f"the agent did not answer {op!r} within {timeout:g} s") from None
        finally:
            self._calls.end(future)

    async def ping(self, timeout: float = 5.0) -> float:
        """Seconds that the agent took to answer; ``timeout`` when it did not."""
        self._check_open()
        loop = asyncio.get_running_loop()
        token = secrets.token_bytes(8)
        future = self._pings[token] = loop.create_future()
        began = loop.time()
        try:
            self._endpoint.ping(token)
            self._schedule_flush()
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            raise SandboxGatewayError("timeout", f"no sign of life from the agent for {timeout:g} s") from None
        finally:
            self._pings.pop(token, None)
        return loop.time() - began

    async def open_stream(self, kind: str, params: Mapping[str, Any] | None = None) -> LinkStream:
        """Open a byte stream of the given kind. The agent may refuse it: then reading raises ``link_failed``."""
        self._check_open()
        try:
            number = self._endpoint.open_stream(kind, params or {})
        except ValueError as error:
            raise SandboxGatewayError("link_failed", f"cannot open a stream: {error}") from None
        stream = self._streams[number] = LinkStream(number, self._endpoint, self._schedule_flush)
        self._schedule_flush()
        return stream

    async def close(self, detach: bool = True, timeout: float = 0.5) -> None:
        """Close the descriptors. With ``detach`` what is queued is written first and the agent asked to go silent,
        for which ``timeout`` seconds are given; it keeps what was not acknowledged."""
        if self.closed:
            return
        loop = asyncio.get_running_loop()
        if detach and self._endpoint.attached:
            deadline = loop.time() + timeout
            await self._written(deadline)
            if not self.closed and self._endpoint.attached:
                self._endpoint.detach()
                self._flush()
                await self._written(deadline)
        self._shut(SandboxGatewayError("link_failed", "the link was closed"))

    async def _written(self, deadline: float) -> None:
        """Wait until everything is written and, in a pipe of ours, read: then the agent has acted on it."""
        loop = asyncio.get_running_loop()
        while not self.closed and loop.time() < deadline:
            self._flush()
            if not self._endpoint.wants_write and not self.unread:
                return
            await asyncio.sleep(0.002)

    # -- reading

    def _readable(self) -> None:
        try:
            # No more than one read for each turn: a busy sandbox holds up the others for no longer than that takes.
            data = os.read(self._read_fd, self._reading.next)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(SandboxGatewayError("link_failed", f"the link cannot be read: {error.strerror}"))
            return
        if not data:
            self._fail(SandboxGatewayError("link_failed", "the sandbox has closed the link"))
            return
        endpoint = self._endpoint
        self._reading.filled(len(data))
        self._dispatch(endpoint.feed(data))
        if self.closed:
            return
        if self._drains:
            self._wake_drains()
        if endpoint.wants_write:
            self._schedule_flush()
        if self._ack_timer is None and endpoint.ack_pending and self._loop is not None:
            self._ack_timer = self._loop.call_later(ACK_DELAY, self._acknowledge)

    def _acknowledge(self) -> None:
        self._ack_timer = None
        self._endpoint.request_ack()
        self._flush()

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if self.closed:
                return
            try:
                if type(event) is Message:
                    if event.channel == _AGENT:
                        self._agent_message(event.parts)
                    else:
                        self.number = event.seq
                        self._on_message(event.channel, event.parts)
                else:
                    self._other(event)
            except WireError as error:
                self._lost(error)
            except Exception:
                self._failures += 1
                if self._failures <= MAX_LOGGED:
                    log.exception("a callback of the link failed")

    def _other(self, event: Event) -> None:
        match event:
            case StreamData(number, data):
                if number in self._streams:
                    self._streams[number]._received(data)
            case StreamWritable(number):
                if number in self._streams:
                    self._streams[number]._granted()
            case StreamEnded(number):
                if number in self._streams:
                    self._streams[number]._finished()
            case StreamClosed(number, error):
                if (stream := self._streams.pop(number, None)) is not None:
                    stream._closed(error)
            case StreamOpened(number, _, _):
                self._endpoint.stream_abort(number, "the host accepts no streams")
            case Ponged(token):
                if (ping := self._pings.get(token)) is not None and not ping.done():
                    ping.set_result(None)
            case Dropped():
                self._on_gap(event.channel, event.count, event.bytes)
            case Attached(_, hello) if hello is not None:
                self._ever_attached = True
                if self._hello is not None and not self._hello.done():
                    self._hello.set_result(hello)
            case Lost(error):
                self._lost(error)
            case _:
                pass

    def _agent_message(self, parts: list[bytes | memoryview]) -> None:
        event = self._calls.handle(parts)
        if event is not None:
            self._on_event(event)

    # -- writing

    def _schedule_flush(self) -> None:
        """Write at the end of this turn of the loop, so that what is sent together is written together."""
        if self._flush_soon is None and not self._writing and not self.closed and self._loop is not None:
            self._flush_soon = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._flush_soon is not None:
            self._flush_soon.cancel()
            self._flush_soon = None
        if self.closed or self._loop is None:
            return
        endpoint = self._endpoint
        if endpoint.wants_write and endpoint.ack_pending:
            endpoint.request_ack()  # it costs little beside other frames, and saves the agent a wake-up
        written = 0
        while endpoint.wants_write and written < WRITE_SIZE:
            buffers = endpoint.output()
            if not buffers:
                break
            try:
                count = os.writev(self._write_fd, buffers)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._fail(SandboxGatewayError("link_failed", f"the link cannot be written: {error.strerror}"))
                return
            endpoint.wrote(count)
            written += count
        if endpoint.wants_write != self._writing:
            self._writing = endpoint.wants_write
            if self._writing:
                self._loop.add_writer(self._write_fd, self._flush)
            else:
                self._loop.remove_writer(self._write_fd)

    def _wake_drains(self) -> None:
        backlog = self.backlog
        for limit, waiter in self._drains:
            if backlog <= limit and not waiter.done():
                waiter.set_result(None)

    # -- losing

    def _lost(self, error: WireError) -> None:
        """The protocol was broken: attach again, unless that happens too often or was under way."""
        if self.closed or self._loop is None:
            return
        failure = SandboxGatewayError("link_failed", f"the agent breaks the protocol: {error}")
        if self._hello is not None:
            if self._hello.done():
                if self._hello.exception() is not None:
                    return
                self._hello = self._loop.create_future()  # an answer that nobody has taken yet is worth nothing
            self._hello.set_exception(failure)
            return
        if self._recovery is not None and not self._recovery.done():
            return
        now = self._loop.time()
        self._losses = [moment for moment in self._losses if now - moment < 60] + [now]
        if len(self._losses) > REATTACH_LIMIT:
            self._fail(failure)
            return
        log.warning("the link of %s is attached again: %s", self._owner, error)
        self._recovery = self._loop.create_task(self._recover())

    async def _recover(self) -> None:
        try:
            await self.attach(owner=self._owner, timeout=REATTACH_TIMEOUT)
        except SandboxGatewayError as error:
            self._fail(error)

    def fail(self, error: SandboxGatewayError) -> None:
        """Give the link up: who waits for an answer is told why. Idempotent; ``on_lost`` is not called."""
        if not self.closed:
            self._shut(error)

    def _fail(self, error: SandboxGatewayError) -> None:
        """The link is gone for good."""
        if self.closed:
            return
        self._shut(error)
        try:
            self._on_lost(error)
        except Exception:
            log.exception("a callback of the link failed")

    def _shut(self, error: SandboxGatewayError) -> None:
        self.closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._read_fd)
            if self._writing:
                self._loop.remove_writer(self._write_fd)
        for handle in (self._ack_timer, self._flush_soon):
            if handle is not None:
                handle.cancel()
        self._ack_timer = self._flush_soon = None
        if self._recovery is not None and self._recovery is not asyncio.current_task():
            self._recovery.cancel()
        os.close(self._read_fd)
        if self._write_fd != self._read_fd:
            os.close(self._write_fd)
        waiting: list[asyncio.Future[Any]] = [*self._calls.waiting(), *self._pings.values()]
        waiting += [waiter for _, waiter in self._drains]
        if self._hello is not None:
            waiting.append(self._hello)
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        if self._hello is not None and not self._hello.cancelled():
            self._hello.exception()  # there may be nobody yet who waits for it
        for stream in self._streams.values():
            stream._closed(error.message)
        self._streams.clear()

    def _check_open(self) -> None:
        if self.closed:
            raise SandboxGatewayError("link_failed", "the link is closed")
