"""One kernel's channels on the host: requests in, replies and output out to every subscriber.

Messages pass through as raw parts. What the host adds are notices on the kernel's stderr stream, attached to the
request that was running: output that was left out at a bound, the reason of a death, and one explanation of a file
that cannot be found because no workspace is mounted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from sandbox_gateway import messages
from sandbox_gateway.messages import Buffer
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

Deliver = Callable[[int, Sequence[Buffer]], None]
"""Takes a channel number and the message's parts; must not block."""


class Sender(Protocol):
    """The part of a link that carries requests."""

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        """Queue one message; returns its sequence number."""
        ...


class KernelChannels:
    """Fan-out of one kernel's messages; lives as long as the kernel's id does, whatever happens to its sandbox."""

    def __init__(self, key: bytes, *, missing_file_hint: str = "") -> None:
        self._key = key
        self._subscribers: list[Deliver] = []
        self._sender: Sender | None = None
        self._wake: Callable[[], None] | None = None
        self._waiting: list[tuple[int, Sequence[Buffer]]] = []
        self._parent: Buffer = messages.EMPTY
        self._missing_file_hint = missing_file_hint
        self._logged = 0

    def connect(self, sender: Sender) -> None:
        """Carry requests over ``sender`` from now on, beginning with those that came while there was none."""
        self._sender = sender
        self._wake = None
        waiting, self._waiting = self._waiting, []
        for channel, parts in waiting:
            sender.send(channel, parts)

    def disconnect(self) -> None:
        """The sandbox is gone; requests wait for the next one (a restart), up to a bound."""
        self._sender = None

    def sleep(self, wake: Callable[[], None]) -> None:
        """The kernel is paused or suspended: requests wait, and the first that needs it calls ``wake`` once."""
        self._sender = None
        self._wake = wake

    def asleep_again(self, reason: str) -> None:
        """It could not be woken; what waits, waits for the next try."""
        self.notice(f"[sandbox] The kernel could not be woken: {reason}\n")

    def retain(self) -> None:
        """Keep what comes until somebody listens."""

    @property
    def settled(self) -> bool:
        """Whether everything received was handed to every client."""
        return True

    def subscribe(self, deliver: Deliver) -> Callable[[], None]:
        """Give every message to ``deliver``; the returned function ends that."""
        self._subscribers.append(deliver)

        def unsubscribe() -> None:
            if deliver in self._subscribers:
                self._subscribers.remove(deliver)

        return unsubscribe

    def request(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Pass a client's message on to the kernel."""
        if self._sender is not None:
            self._sender.send(channel, parts)
        elif len(self._waiting) < _WAITING_BOUND:
            self._waiting.append((channel, parts))
            if self._wake is not None:
                self._wake()
        else:
            log.warning("a request was refused: the kernel is down and %d others wait", _WAITING_BOUND)

    def received(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Take a message from the kernel."""
        if channel == Channel.IOPUB:
            at = messages.delimiter_index(parts)
            if at is None:
                if self._may_log():
                    log.warning("a malformed iopub message of %d parts was dropped", len(parts))
                return
            # It is kept and goes out again with each notice: not at any length.
            self._parent = parts[at + 3] if len(parts[at + 3]) <= _PARENT_BOUND else messages.EMPTY
            self._deliver(channel, parts)
            if self._missing_file_hint and b'"FileNotFoundError"' in bytes(parts[at + 5][:_HINT_WINDOW]):
                self._explain_missing_file(parts[at + 2])
            return
        self._deliver(channel, parts)

    def dropped(self, channel: int, count: int, size: int) -> None:
        """Say in the stream that the agent left something out at its bound."""
        self.notice(
            f"[sandbox] {count} messages of output ({size} bytes) were left out: they came faster than they were read\n"
        )

    def notice(self, text: str) -> None:
        """Write a line to the kernel's stderr stream, under the request that ran last."""
        self._deliver(Channel.IOPUB, messages.stderr_notice(self._key, text, parent=self._parent))

    def kernel_died(self, text: str) -> None:
        """Tell clients that the kernel is gone: the reason, then the status every front end knows."""
        self.notice(text)
        status = messages.build(self._key, "status", {"execution_state": "dead"}, topic=b"status", parent=self._parent)
        self._deliver(Channel.IOPUB, status)

    def _explain_missing_file(self, header: Buffer) -> None:
        # Only an uncaught exception counts; text that merely mentions the name is none.
        if b'"error"' in bytes(header):
            hint, self._missing_file_hint = self._missing_file_hint, ""
            self.notice(hint)

    def _deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        for deliver in tuple(self._subscribers):
            try:
                deliver(channel, parts)
            except Exception:
                if self._may_log():
                    log.exception("a subscriber failed; the others go on")

    def _may_log(self) -> bool:
        """What a kernel can cause as often as it likes must not fill the log."""
        self._logged += 1
        return self._logged <= MAX_LOGGED


_WAITING_BOUND = 1000
_PARENT_BOUND = 16 << 10
MAX_LOGGED = 20
"""Lines that one kernel's messages put into the log at most."""
_HINT_WINDOW = 4096
