"""Requests on their way to a kernel: passed on, kept while it sleeps or is being restarted, or answered here.

While a kernel sleeps (it is paused or suspended) the rule of :mod:`sandbox_gateway.waking` says what each message does.
What waits is bounded, and whoever is turned away gets an answer.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sandbox_gateway import host_replies, messages, waking
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host_replies import ASLEEP, UNAVAILABLE, Outgoing
from sandbox_gateway.kernel_cache import KernelCache
from sandbox_gateway.messages import Buffer, Request
from sandbox_gateway.waking import Effect

log = logging.getLogger(__name__)

MAX_WAITING: Final = 1000
"""Messages that wait for a kernel at most."""
MAX_WAITING_BYTES: Final = 32 << 20
"""Bytes that wait for a kernel at most, half of what a link takes at once; one larger message still waits, alone."""
PATIENT: Final = 0.25
"""Share of both that messages which do not wake may take up: pages that are loaded again and again leave their
questions behind, and must not keep a person's request out."""


class Sender(Protocol):
    """The part of a link that carries requests."""

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        """Queue one message; returns its sequence number."""
        ...


class Gate:
    """One kernel's incoming side. ``out`` takes the messages that the host answers with."""

    def __init__(self, key: bytes, cache: KernelCache, out: Callable[[Outgoing], None]) -> None:
        self._key = key
        self._cache = cache
        self._out = out
        self._sender: Sender | None = None
        self._wake: Callable[[], None] | None = None
        self._called = False
        self._waiting: deque[tuple[int, Sequence[Buffer]]] = deque()
        self._size = 0
        self._patient = 0

    @property
    def asleep(self) -> bool:
        """Whether the kernel sleeps: requests wait, and some wake it."""
        return self._wake is not None

    @property
    def waiting(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    def connect(self, sender: Sender) -> None:
        """Carry requests over ``sender``, beginning with those that wait; ends sleep."""
        self._wake = None
        self._sender = sender
        waiting, self._waiting = self._waiting, deque()
        self._size = self._patient = 0
        for channel, parts in waiting:
            self._pass(sender, channel, parts)

    def disconnect(self) -> None:
        """There is no kernel now; requests wait for the next one (a restart)."""
        self._sender = None
        self._wake = None

    def sleep(self, wake: Callable[[], None]) -> None:
        """The kernel sleeps from now on; ``wake`` is called once, for the first message that wakes it."""
        self._sender = None
        self._wake = wake
        self._called = False
        if any(self._wakes(channel, parts) for channel, parts in self._waiting):
            self._call()

    def asleep_again(self, reason: str) -> None:
        """It could not be woken: who waits for a reply gets ``reason`` in its place. What has no reply (an input, a
        widget's message) goes on waiting; the next message that wakes tries again."""
        self._called = False
        waiting, self._waiting = self._waiting, deque()
        self._size = self._patient = 0
        for channel, parts in waiting:
            request = messages.read_request(self._key, parts)
            if request is None or request.reply_type is None:
                self._keep(channel, parts)
            if request is not None:
                self._fail(channel, request, ASLEEP, reason)

    def request(self, channel: int, parts: Sequence[Buffer]) -> None:
        """Take a client's message, its identity first."""
        if self._sender is not None:
            self._pass(self._sender, channel, parts)
        elif self._wake is not None:
            self._sleeping(channel, parts)
        elif not self._keep(channel, parts):
            self._refuse(channel, parts, UNAVAILABLE, "the kernel is not running, and too many requests wait for it")

    def _pass(self, sender: Sender, channel: int, parts: Sequence[Buffer]) -> None:
        try:
            sender.send(channel, parts)
        except SandboxGatewayError as error:
            self._refuse(channel, parts, UNAVAILABLE, error.message)

    def _sleeping(self, channel: int, parts: Sequence[Buffer]) -> None:
        request = messages.read_request(self._key, parts)
        if request is None:
            log.debug("a message that is malformed or not signed was dropped")
            return
        effect = self._effect(channel, request)
        info = self._cache.info
        if effect is Effect.CACHED and info is not None:
            self._out(host_replies.answer(self._key, channel, request, info, running=self._cache.running))
        elif effect is Effect.UNAVAILABLE:
            self._out(host_replies.unavailable(self._key, channel, request, running=self._cache.running))
        elif not self._keep(channel, parts, patient=effect is Effect.WAIT):
            self._fail(channel, request, ASLEEP, "too many requests wait for the kernel")
        elif effect is Effect.WAKE and not self._called:
            self._call()

    def _effect(self, channel: int, request: Request) -> Effect:
        effect = waking.effect(channel, request.msg_type, request.content)
        return Effect.WAKE if effect is Effect.CACHED and self._cache.info is None else effect

    def _wakes(self, channel: int, parts: Sequence[Buffer]) -> bool:
        request = messages.read_request(self._key, parts)
        return request is not None and self._effect(channel, request) is Effect.WAKE

    def _call(self) -> None:
        assert self._wake is not None
        self._called = True
        try:
            self._wake()
        except Exception as error:
            log.exception("a kernel could not be woken")
            self.asleep_again(str(error))

    def _keep(self, channel: int, parts: Sequence[Buffer], *, patient: bool = False) -> bool:
        size = sum(map(len, parts))
        share = PATIENT if patient else 1.0
        count = self._patient if patient else len(self._waiting)
        if count >= MAX_WAITING * share or (self._waiting and self._size + size > MAX_WAITING_BYTES * share):
            return False
        self._waiting.append((channel, parts))
        self._size += size
        self._patient += patient
        return True

    def _refuse(self, channel: int, parts: Sequence[Buffer], ename: str, reason: str) -> None:
        request = messages.read_request(self._key, parts)
        if request is not None:
            self._fail(channel, request, ename, reason)

    def _fail(self, channel: int, request: Request, ename: str, reason: str) -> None:
        self._out(host_replies.failure(self._key, channel, request, ename, reason, running=self._cache.running))
