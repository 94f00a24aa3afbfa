"""The attachment to one running incarnation of a sandbox: its link, a look at its heart, a watch for its end.

A sandbox that is suspended and resumed has one attachment after the other, each in an epoch of its own (DESIGN 4.3).
Until :meth:`Attachment.release` nothing of an epoch reaches anybody: an incarnation that fails its first heartbeat is
given up without a trace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link.host import Link
from sandbox_gateway.messages import Buffer
from sandbox_gateway.model import Death, DeathKind
from sandbox_gateway.runtimes.base import Handle, Runtime
from sandbox_gateway.wire.reliable import Outbox

log = logging.getLogger(__name__)

ATTACH_TIMEOUT = 30.0
"""Seconds for PID 1 to answer the first attach; a cold start on a busy machine takes a few."""
HEARTBEAT = 5.0
"""Seconds between two signs of life to the agent."""
SILENCE = 60.0
"""Seconds without an answer after which a sandbox counts as dead."""
QUIESCE = 0.5
"""Seconds that an agent is given to go silent at a frame's boundary; one that does not is left as it is."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Where things of an incarnation go. They run on the event loop and must not block."""

    message: Callable[[int, Sequence[Buffer], int], None]
    """Takes a channel, the message's parts and its number."""
    gap: Callable[[int, int, int], None]
    event: Callable[[Mapping[str, Any]], None]
    ended: Callable[[Death], None]
    """The sandbox died, or does not speak any more; at most once, and never after :meth:`Attachment.close`.

    Not before :meth:`Attachment.release` either: until then it shows in the calls, which fail."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What the next attachment to the same sandbox goes on with."""

    received: Mapping[int, int]
    """The last number of each channel that was taken."""
    outbox: Outbox | None = None
    """What this side has sent; None when an earlier process sent it."""


class Attachment:
    """One incarnation, from :meth:`open` to :meth:`close`."""

    def __init__(
        self, runtime: Runtime, handle: Handle, callbacks: Callbacks, *, epoch: int, outbox: Outbox | None = None
    ) -> None:
        self.handle = handle
        self._runtime = runtime
        self._callbacks = callbacks
        self._epoch = epoch
        self._outbox = outbox
        self._held: list[Callable[[], None]] | None = []
        self._link: Link | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = False
        self._death: Death | None = None
        self._frozen = False

    @property
    def link(self) -> Link:
        """The link; raises ``link_failed`` before :meth:`open`."""
        if self._link is None:
            raise SandboxGatewayError("link_failed", f"sandbox {self.handle.id} is not attached")
        return self._link

    @property
    def holding(self) -> bool:
        """Whether what comes is kept until :meth:`release`."""
        return self._held is not None

    async def reach(self, *, owner: str, received: Mapping[int, int]) -> None:
        """Open the link and ask for the agent, before it runs: then it finds the question. :meth:`open`, with the same
        arguments, goes on from there. Raises ``link_failed`` where there are no pipes."""
        fds = await self._runtime.attach(self.handle)
        self._link = Link(
            fds.read_fd,
            fds.write_fd,
            epoch=self._epoch,
            on_message=self._message,
            on_gap=self._gap,
            on_event=self._event,
            on_lost=lambda error: self._end(Death(DeathKind.AGENT_DIED, f"the sandbox stopped speaking: {error}")),
            outbox=self._outbox,
        )
        self._link.reach(received, owner=owner)

    async def open(
        self, *, owner: str, received: Mapping[int, int], timeout: float = ATTACH_TIMEOUT
    ) -> Mapping[str, Any]:
        """Attach; returns what the agent tells about itself. ``received`` as for :meth:`Link.attach`.

        Raises ``runtime_failed`` when the sandbox ends meanwhile, ``link_failed`` when nobody answers; nothing is then
        left open.
        """
        if self._link is None:
            await self.reach(owner=owner, received=received)
        link = self.link
        death = asyncio.ensure_future(self._runtime.wait(self.handle))
        attached = asyncio.ensure_future(link.attach(received, owner=owner, timeout=timeout))
        try:
            await asyncio.wait({death, attached}, return_when=asyncio.FIRST_COMPLETED)
            if not attached.done():
                text = f"the sandbox ended while starting: {death.result().describe()}"
                raise SandboxGatewayError("runtime_failed", text)
            hello = attached.result()
        except BaseException:
            self._ended = True
            for future in (death, attached):
                future.cancel()
            await asyncio.gather(death, attached, return_exceptions=True)
            await link.close(detach=False)
            raise
        self._tasks = [asyncio.create_task(self._watch(death)), asyncio.create_task(self._beat())]
        return hello.agent

    def serve(self, callbacks: Callbacks) -> None:
        """Belong to another sandbox's owner from now on. What came before was for nobody."""
        self._callbacks = callbacks

    def hold(self) -> None:
        """Keep what comes from now on until :meth:`release`."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Hand out what has come so far, and everything from now on as it comes."""
        held, self._held = self._held, None
        for give in held or ():
            give()
        if self._death is not None:
            self._callbacks.ended(self._death)

    def freeze(self) -> None:
        """The sandbox is paused: its silence means nothing."""
        self._frozen = True

    def thaw(self) -> None:
        """The sandbox goes on."""
        self._frozen = False

    async def close(self, *, silence: bool = False) -> Remains:
        """End the watch and the link; returns what the next one goes on with.

        With ``silence`` the agent is asked to stop at a frame's boundary and to keep what it has, and is given
        :data:`QUIESCE` seconds for it.
        """
        self._ended = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        link = self.link
        with contextlib.suppress(SandboxGatewayError, OSError):
            await link.close(detach=silence, timeout=QUIESCE)
        return Remains(link.received(), link.outbox)

    # What comes in

    def _message(self, channel: int, parts: list[bytes | memoryview]) -> None:
        number = self.link.number
        if self._held is None:
            self._callbacks.message(channel, parts, number)
        else:
            self._held.append(lambda: self._callbacks.message(channel, parts, number))

    def _gap(self, channel: int, count: int, size: int) -> None:
        if self._held is None:
            self._callbacks.gap(channel, count, size)
        else:
            self._held.append(lambda: self._callbacks.gap(channel, count, size))

    def _event(self, event: Mapping[str, Any]) -> None:
        if self._held is None:
            self._callbacks.event(event)
        else:
            self._held.append(lambda: self._callbacks.event(event))

    # The watch

    async def _watch(self, death: asyncio.Future[Death]) -> None:
        try:
            self._end(await death)
        finally:
            death.cancel()

    async def _beat(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT)
            if self._frozen:
                last = time.monotonic()
                continue
            try:
                await self.link.ping(HEARTBEAT)
                last = time.monotonic()
            except (TimeoutError, SandboxGatewayError):
                if time.monotonic() - last > SILENCE:
                    text = f"the sandbox stopped speaking: no sign of life for {SILENCE:.0f} seconds"
                    self._end(Death(DeathKind.AGENT_DIED, text))
                    return

    def _end(self, death: Death) -> None:
        if self._ended:
            return
        self._ended = True
        # Nothing tells it to who waits for an answer: named pipes have no end.
        self.link.fail(SandboxGatewayError("link_failed", f"the sandbox has ended: {death.describe()}"))
        if self._held is None:
            self._callbacks.ended(death)
        else:
            self._death = death
