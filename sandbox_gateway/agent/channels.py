"""One generation's ways in and out: its sockets, its output pipe if it has one, and when it is ready.

Replies and requests for input come over ZMQ, and IOPub messages too; our ipykernel application writes IOPub messages
and replies on shell to a pipe instead. Outputs that were published before a reply are handed on before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandbox_gateway.agent import relay
from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.agent.outpipe import PipeError, PipeReader
from sandbox_gateway.agent.sources import Source
from sandbox_gateway.wire.sizes import ReadSize

if TYPE_CHECKING:
    from sandbox_gateway.agent.sockets import KernelSockets

BATCH: Final = 512
"""Messages taken from one socket before the link gets its turn."""
_PIPE_SIZE: Final = 1024 * 1024
_LOOKS: Final = 64
"""Looks in a row at a pipe that a kernel may go on filling."""
_WELCOME_WAIT: Final = 0.25
_QUIET: Final = 0.03


@dataclass(frozen=True, slots=True)
class ChannelHooks:
    """Where messages and news of the channels go."""

    message: Callable[[str, Sequence[bytes | memoryview]], None]
    """Channel name and parts."""
    ready: Callable[[], None]
    """The kernel can be spoken to and heard; called once."""
    broken: Callable[[str], None]
    """The output pipe carried garbage, with the reason; it is closed."""
    status: Callable[[Sequence[bytes | memoryview]], None]
    """A status message, which is handed on as well."""
    hungry: Callable[[], bool]
    """False while the buffer towards the host takes no more of what could wait in the kernel."""


class KernelChannels:
    """Made when the kernel was spawned; :meth:`connect` when its sockets are there; :meth:`close` after its end.

    ``pipe`` is the read end of the kernel's output pipe and is closed here. ``welcome`` says whether the kernel
    greets subscribers on IOPub, None if that is not known: readiness then waits for the greeting, or a moment.
    """

    def __init__(self, loop: Loop, hooks: ChannelHooks, pipe: int | None, welcome: bool | None) -> None:
        self._loop = loop
        self._hooks = hooks
        self._welcome = welcome
        self._sockets: KernelSockets | None = None
        self._pipe = pipe
        self._reading = ReadSize()
        self._reader: PipeReader | None = None
        self._output: Source | None = None
        self._heard = self._loop.now()
        self._welcomed = self._beating = self._is_ready = self._closed = False
        self._pings = 0
        self._echoes: dict[bytes, Callable[[], None]] = {}
        self._asking = False
        self._replies: dict[str, Callable[[dict[str, Any]], None]] = {}
        self.greeting = relay.Greeting()
        """What the kernel has said of itself through the pipe."""
        if pipe is not None:
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            self._reader = PipeReader()
            self._output = Source(loop, pipe, self._look_at_pipe, hooks.hungry)

    def connect(self, paths: Mapping[str, Path]) -> None:
        """Speak to the kernel, whose sockets exist."""
        from sandbox_gateway.agent.sockets import KernelSockets

        self._sockets = sockets = KernelSockets(paths)
        for socket in sockets.all():
            if socket is not sockets.iopub:
                self._loop.watch(sockets.descriptor(socket), self._service)
        if self._pipe is None:
            self._subscribe()
        sockets.ping()
        self._service()
        self._check_ready()

    def send(self, channel: str, parts: Sequence[bytes | memoryview]) -> None:
        """Hand a message to the kernel, if it can be spoken to."""
        if self._sockets is None:
            return
        if self._output is not None:
            self._output.relax()
        self._sockets.send(channel, parts)
        # A send may swallow the signal of a message that has just come in: look.
        self._loop.soon(self._service)

    def ask(
        self, key: str, msg_type: str, content: Mapping[str, Any], reply: Callable[[dict[str, Any]], None] | None = None
    ) -> bool:
        """Send a request of the agent's own on control; False while there is nobody to send it to."""
        if self._sockets is None:
            return False
        from sandbox_gateway.agent.own_requests import signed_request

        msg_id, parts = signed_request(key, msg_type, content)
        self._asking = True
        if reply is not None:
            self._replies[msg_id] = reply
        self.send("control", parts)
        return True

    def ping(self, heard: Callable[[], None]) -> None:
        """Ask the kernel's heartbeat; ``heard`` is called when it echoes."""
        if self._sockets is not None:
            self._pings += 1
            payload = b"ping %d" % self._pings  # echoes of earlier ones may still be on their way
            self._echoes[payload] = heard
            self._sockets.ping(payload)

    def look(self) -> None:
        """Take what is there, whether or not anything said so."""
        if self._output is not None:
            self._output.relax()
            self._output.look()
        self._service()

    def last_words(self) -> bool:
        """Take what a kernel that has ended left behind; False while more may be on its way."""
        for _ in range(_LOOKS):
            if self._pipe is None or not self._look_at_pipe()[0]:
                break
        if self._pipe is None and self._output is not None:
            self._output.relax()
            self._output.look()
        self._service()
        if self._pipe is not None or self._sockets is None:
            return True
        return self._loop.now() - self._heard >= _QUIET

    def close(self) -> None:
        """Give everything back."""
        self._closed = True
        self._close_pipe()
        if self._output is not None:
            self._output.close()
            self._output = None
        if self._sockets is not None:
            for socket in self._sockets.all():
                self._loop.forget(self._sockets.descriptor(socket))
            self._sockets.close()
            self._sockets = None

    # -- readiness

    def _check_ready(self) -> None:
        if self._is_ready or self._closed or self._sockets is None:
            return
        if self._welcomed or (self._beating and self._welcome is False and self._pipe is None):
            self._is_ready = True
            self._hooks.ready()

    def _greeted(self) -> None:
        self._welcomed = True
        self._check_ready()

    def _await_welcome(self) -> None:
        """A kernel whose heart beats and that does not greet is ready after a moment, in which it hears us."""
        if self._beating and self._welcome is None and self._pipe is None and self._sockets is not None:
            self._loop.later(_WELCOME_WAIT, self._greeted)

    # -- taking

    def _service(self) -> None:
        """Take replies, requests for input and heartbeats."""
        sockets = self._sockets
        if sockets is None:
            return
        more = False
        for name, socket in sockets.requests.items():
            messages, rest = sockets.receive(socket, BATCH)
            more = more or rest
            if messages:
                self._take_outputs()
            for parts in messages:
                if name != "control" or not self._own_reply(parts):
                    self._hooks.message(name, parts)
        for echo in sockets.receive(sockets.heartbeat, BATCH)[0]:
            heard = self._echoes.pop(bytes(echo[-1]), None)
            if heard is not None:
                heard()
            if not self._beating:
                self._beating = True
                self._check_ready()
                self._await_welcome()
        if more:
            self._loop.soon(self._service)

    def _take_outputs(self) -> None:
        """Everything that was published before what came on another channel: it is in the pipe."""
        for _ in range(_LOOKS):
            if self._output is None:
                return
            self._output.relax()
            if not self._output.look():
                return

    def _look_at_iopub(self) -> tuple[int, bool]:
        if self._sockets is None:
            return 0, False
        messages, more = self._sockets.receive(self._sockets.iopub, BATCH)
        for parts in messages:
            self._publish(parts)
        if messages:
            self._heard = self._loop.now()
        return len(messages), more

    def _look_at_pipe(self) -> tuple[int, bool]:
        if self._pipe is None or self._reader is None:
            return 0, False
        room = self._reader.room()
        data = b""
        try:
            if room is None:
                data = os.read(self._pipe, self._reading.next)
                size = len(data)
            else:
                size = os.readv(self._pipe, [room])
        except BlockingIOError:
            return 0, False
        try:
            messages = self._reader.feed(data) if room is None else self._reader.filled(size)
        except PipeError as error:
            self._close_pipe()
            self._hooks.broken(str(error))
            return 0, False
        if not size:
            self._close_pipe()
            if self._sockets is not None:
                self._subscribe()
            return 0, False
        full = self._reading.filled(size) or (room is not None and size == len(room))
        for channel, parts in messages:
            if channel == "iopub":
                self._publish(parts)
            else:
                self._hooks.message(channel, parts)
        if messages:
            self._heard = self._loop.now()
        return max(len(messages), 1), self._reader.waiting or full

    def _close_pipe(self) -> None:
        """Go on without the pipe: a kernel that closed it, or never used it, publishes on its socket."""
        if self._pipe is None:
            return
        if self._output is not None:
            self._output.close()
            self._output = None
        os.close(self._pipe)
        self._pipe = None
        self._reader = None

    def _subscribe(self) -> None:
        assert self._sockets is not None
        self._sockets.subscribe()
        self._output = Source(self._loop, self._sockets.descriptor(self._sockets.iopub), self._look_at_iopub)
        self._output.look()
        self._await_welcome()

    def _publish(self, parts: Sequence[bytes | memoryview]) -> None:
        kind = relay.kind_of(parts)
        if kind == relay.STATUS:
            self._hooks.status(parts)
        if kind == relay.WELCOME:  # the host greets its own subscribers
            if self._pipe is not None and not self._welcomed:
                self.greeting = relay.Greeting.of(parts)
            self._loop.soon(self._greeted)
        else:
            self._hooks.message("iopub", parts)

    def _own_reply(self, parts: list[bytes]) -> bool:
        """Whether this control reply answers a request of the agent's own (those carry no client's identity)."""
        if not self._asking or not parts or parts[0] != relay.DELIMITER:
            return False
        if self._replies:
            from sandbox_gateway.agent.own_requests import answered

            msg_id, content = answered(parts)
            reply = self._replies.pop(msg_id, None)
            if reply is not None:
                reply(content)
        return True
