"""One kernel's channels on the host: requests in, replies and output out to every subscriber.

Messages pass through as raw parts. What the host adds are notices on the kernel's stderr stream, attached to the
request that was running: output that was left out at a bound, the reason of a death, and one explanation of a file
that cannot be found because no workspace is mounted; and the answers of :mod:`sandbox_gateway.gate` while the kernel
sleeps.

Everything here runs on one event loop. Order: a subscriber gets the messages in the order in which they came from the
kernel, each channel by itself and all channels among one another; what the host answers in the kernel's place comes
between two of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sandbox_gateway import messages
from sandbox_gateway.former_key import FormerKey
from sandbox_gateway.gate import Gate, Sender
from sandbox_gateway.host_replies import Outgoing
from sandbox_gateway.kernel_cache import KernelCache
from sandbox_gateway.messages import Buffer
from sandbox_gateway.retention import Retention
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

Deliver = Callable[[int, Sequence[Buffer]], None]
"""Takes a channel number and the message's parts; must not block."""

Served = Callable[[], Mapping[int, int]]
"""Tells for channels up to which number all clients of a subscriber have the kernel's messages; a channel that is not
named holds nobody back."""

GRACE: Final = 2.0
"""Seconds after the first listener in which others, who reconnect as it did, get what was kept as well."""
_SETTLE_POLL = 0.005
_IOPUB = int(Channel.IOPUB)


class Subscription:
    """One subscriber, until :meth:`close`."""

    def __init__(
        self,
        channels: KernelChannels,
        deliver: Deliver,
        listening: Callable[[], bool],
        settled: Callable[[], bool],
        served: Served | None,
        identity: bytes | None,
    ) -> None:
        self.deliver = deliver
        self.listening = listening
        self.settled = settled
        self.served = served
        self.identity = identity
        self._channels = channels
        self._closed = False

    def listen(self, deliver: Deliver | None = None) -> None:
        """A listener has come behind this subscriber: hand it what was kept for one, before anything newer.

        ``deliver`` is the listener's own way, where the subscriber has several; it is not used after the return.
        """
        if not self._closed:
            self._channels._catch_up(deliver or self.deliver)

    def close(self) -> None:
        """Nothing is delivered any more."""
        self._closed = True
        self._channels._unsubscribe(self)


class KernelChannels:
    """Fan-out of one kernel's messages; lives as long as the kernel's id does, whatever happens to its sandbox.

    ``key`` signs what the host writes, and has to be the clients'.
    """

    def __init__(self, key: bytes, *, missing_file_hint: str = "") -> None:
        self._key = key
        self._subscriptions: tuple[Subscription, ...] = ()
        self._by_identity: dict[bytes, Subscription] = {}
        self._cache = KernelCache()
        self._gate = Gate(key, self._cache, self._answered)
        self._retention: Retention | None = None
        self._held = False
        self._former: FormerKey | None = None
        self._parent: Buffer = messages.EMPTY
        self._missing_file_hint = missing_file_hint
        self._logged = 0
        self.number = 0
        """The number on the link of the message that is being delivered; 0 for one of the host's own."""
        self.on_served: Callable[[], object] = _true
        """Called when clients of a subscriber with ``served`` have got further."""

    # The way in

    def connect(self, sender: Sender) -> None:
        """Carry requests over ``sender`` from now on, beginning with those that came while there was none; ends sleep.

        A request that ``sender`` refuses is answered with the error.
        """
        self._gate.connect(sender)

    def disconnect(self) -> None:
        """The kernel is gone; requests wait for the next one (a restart), up to a bound."""
        self._gate.disconnect()
        self._cache.restarted()

    def sleep(self, wake: Callable[[], None]) -> None:
        """The kernel is paused or suspended, or about to be: call it before the link is closed.

        Requests wait in order until :meth:`connect`; ``wake`` is called for the first one that wakes the kernel
        (:mod:`sandbox_gateway.waking`), from within :meth:`request`, and must not block. It is called once for each
        ``sleep`` and each :meth:`asleep_again`; at once if a request that wakes is waiting already. Some are answered
        here. A message that is not signed with the key is dropped, as the kernel would.
        """
        self._gate.sleep(wake)

    def asleep_again(self, reason: str) -> None:
        """What ``wake`` began has failed: waiting requests are answered with the error ``SandboxAsleep: <reason>``.

        The kernel still sleeps, and the next request that wakes tries again.
        """
        self._gate.asleep_again(reason)

    @property
    def asleep(self) -> bool:
        """Whether the kernel sleeps: between :meth:`sleep` and :meth:`connect` or :meth:`disconnect`."""
        return self._gate.asleep

    def request(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Pass a client's message on to the kernel, its identity first."""
        self._gate.request(channel, parts)

    def renew(self, former_key: bytes) -> None:
        """The kernel is a clone: what it signed with ``former_key`` before it got its own is signed anew."""
        self._former = FormerKey(former_key, self._key)

    def facts(self) -> dict[str, Any]:
        """What has to be known to answer for the kernel while it sleeps, as JSON: for :meth:`recall` in the process
        that owns it next, else its first ``kernel_info_request`` wakes it. Some 2 KiB."""
        return self._cache.facts()

    def recall(self, facts: Mapping[str, Any]) -> None:
        """Take over :meth:`facts`; what is malformed is passed over."""
        self._cache.recall(facts)

    # The way out

    def subscribe(
        self,
        deliver: Deliver,
        *,
        listening: bool | Callable[[], bool] = True,
        settled: Callable[[], bool] | None = None,
        served: Served | None = None,
        identity: bytes | None = None,
    ) -> Subscription:
        """Give every message to ``deliver``.

        ``listening``: whether somebody reads what is delivered. With True, output that was retained is delivered
        before this returns; a subscriber that stands for others gives a function, and calls
        :meth:`Subscription.listen` for each that comes. ``settled`` says whether all that was delivered has left this
        process; ``served`` says the same by numbers, for subscribers whose clients may be behind for long. With
        ``identity``, messages that are addressed to exactly that (the first part of what it passes to
        :meth:`request`) go to this subscriber alone, and such to others do not come here.
        """
        answers: Callable[[], bool] = listening if callable(listening) else lambda: listening is True
        made = Subscription(self, deliver, answers, settled or _true, served, identity)
        self._subscriptions += (made,)
        if identity is not None:
            self._by_identity[identity] = made
        if listening is True:
            made.listen()
        return made

    def retain(self) -> None:
        """Keep the kernel's output for the first listener, if there is none now (:mod:`sandbox_gateway.retention`)."""
        if not self._held and not any(known.listening() for known in self._subscriptions):
            self._retention = Retention(self._key)
            self._held = True

    @property
    def retained(self) -> int:
        """Bytes that are kept for the first listener."""
        return self._retention.size if self._retention is not None and self._held else 0

    @property
    def running(self) -> bytes | None:
        """The raw header of the request that the kernel runs, also while its output is retained; None: it is idle."""
        return self._cache.running

    @property
    def settled(self) -> bool:
        """Whether every client was handed everything received so far, in whole messages, and nothing is retained.

        Cheap enough to be polled. A client that does not read keeps it False: be patient for a bounded time only.
        """
        return not self.retained and all(known.settled() for known in self._subscriptions)

    async def settle(self, timeout: float) -> bool:
        """Wait until :attr:`settled`, ``timeout`` seconds at most; returns whether it is."""
        deadline = asyncio.get_running_loop().time() + timeout
        while not self.settled:
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(_SETTLE_POLL)
        return True

    def served(self, received: Mapping[int, int]) -> Mapping[int, int] | None:
        """Up to which number of each channel, of those ``received``, all clients have it all; None: not known now."""
        numbers = dict(received)
        if self.retained:
            return None
        for known in self._subscriptions:
            if known.served is not None:
                for channel, number in known.served().items():
                    numbers[channel] = min(number, numbers.get(channel, number))
            elif not known.settled():
                return None
        return numbers

    def received(self, channel: int, parts: Sequence[Buffer], number: int = 0) -> None:
        """Take a message from the kernel, with its number on the link."""
        self.number = number
        try:
            self._received(channel, parts)
        finally:
            self.number = 0

    def _received(self, channel: int, parts: Sequence[Buffer]) -> None:
        if self._former is not None:
            parts = self._former.renew(parts)
            if self._former.over:
                self._former = None
        if channel == _IOPUB:
            at = messages.delimiter_index(parts)
            if at is None:
                if self._may_log():
                    log.warning("a malformed iopub message of %d parts was dropped", len(parts))
                return
            # It is kept and goes out again with each notice: not at any length.
            self._parent = parts[at + 3] if len(parts[at + 3]) <= _PARENT_BOUND else messages.EMPTY
            if at and parts[at - 1][-6:] == b"status":
                self._cache.saw_status(parts[at + 3], parts[at + 5])
            self._publish(parts)
            if self._missing_file_hint and b'"FileNotFoundError"' in bytes(parts[at + 5][:_HINT_WINDOW]):
                self._explain_missing_file(parts[at + 2])
            return
        if channel != Channel.STDIN:
            self._cache.saw_reply(parts)
        self._reply(channel, parts)

    def dropped(self, channel: int, count: int, size: int) -> None:
        """Say in the stream that the agent left something out at its bound."""
        self.notice(
            f"[sandbox] {count} messages of output ({size} bytes) were left out: they came faster than they were read\n"
        )

    def notice(self, text: str) -> None:
        """Write a line to the kernel's stderr stream, under the request that ran last."""
        self._publish(messages.stderr_notice(self._key, text, parent=self._parent))

    def kernel_died(self, text: str) -> None:
        """Tell clients that the kernel is gone: the reason, then the status every front end knows."""
        self.notice(text)
        status = messages.build(self._key, "status", {"execution_state": "dead"}, topic=b"status", parent=self._parent)
        self._publish(status)

    def _explain_missing_file(self, header: Buffer) -> None:
        # Only an uncaught exception counts; text that merely mentions the name is none.
        if b'"error"' in bytes(header):
            hint, self._missing_file_hint = self._missing_file_hint, ""
            self.number = 0
            self.notice(hint)

    def _answered(self, outgoing: Outgoing) -> None:
        for channel, parts in outgoing:
            if channel == Channel.IOPUB:
                self._publish(parts)
            else:
                self._reply(channel, parts)

    def _publish(self, parts: Sequence[Buffer]) -> None:
        if self._retention is not None:
            self._retention.add(parts)
            if self._held:
                return
        for known in self._subscriptions:
            try:
                known.deliver(_IOPUB, parts)
            except Exception:
                self._failed()

    def _reply(self, channel: int, parts: Sequence[Buffer]) -> None:
        if self._by_identity and parts:
            found = self._by_identity.get(bytes(parts[0]))
            if found is not None:
                self._deliver(found.deliver, channel, parts)
                return
        for known in self._subscriptions:
            if known.identity is None:
                self._deliver(known.deliver, channel, parts)

    def _deliver(self, deliver: Deliver, channel: int, parts: Sequence[Buffer]) -> None:
        try:
            deliver(channel, parts)
        except Exception:
            self._failed()

    def _failed(self) -> None:
        if self._may_log():
            log.exception("a subscriber failed; the others go on")

    def _catch_up(self, deliver: Deliver) -> None:
        retention = self._retention
        if retention is None:
            return
        if self._held:
            self._held = False
            try:
                asyncio.get_running_loop().call_later(GRACE, self._forget, retention)
            except RuntimeError:  # no loop, nobody who could come later
                self._retention = None
        retention.replay(lambda parts: self._deliver(deliver, Channel.IOPUB, parts))

    def _forget(self, retention: Retention) -> None:
        if self._retention is retention and not self._held:
            self._retention = None

    def _unsubscribe(self, gone: Subscription) -> None:
        self._subscriptions = tuple(known for known in self._subscriptions if known is not gone)
        if gone.identity is not None and self._by_identity.get(gone.identity) is gone:
            del self._by_identity[gone.identity]

    def _may_log(self) -> bool:
        """What a kernel can cause as often as it likes must not fill the log."""
        self._logged += 1
        return self._logged <= MAX_LOGGED


def _true() -> bool:
    return True


_PARENT_BOUND = 16 << 10
MAX_LOGGED = 20
"""Lines that one kernel's messages put into the log at most."""
_HINT_WINDOW = 4096
