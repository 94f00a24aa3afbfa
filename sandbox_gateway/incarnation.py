"""The processes in which a sandbox lives now, and our attachment to the agent in them.

A sandbox has one incarnation after the other, each in an epoch of its own (DESIGN 4.3): a restore makes one, a suspend
ends it. What the sandbox is meanwhile, and whether it may become something else, is :mod:`sandbox_gateway.live`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sandbox_gateway.attachment import Attachment, Callbacks, Remains
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.ledger import Ledger
from sandbox_gateway.link.host import Link
from sandbox_gateway.model import Death, SandboxRecord, SandboxSpec
from sandbox_gateway.runtimes.base import Handle, Runtime, Stats
from sandbox_gateway.seat import Seat
from sandbox_gateway.suspension import Saved, Suspension

log = logging.getLogger(__name__)

_PROMPT = 0.5
"""Seconds in which a restored kernel normally takes its identity."""


class Incarnation:
    """What one sandbox is made of, or nothing yet, or nothing now. Each step is recorded before it is taken."""

    def __init__(
        self,
        spec: SandboxSpec,
        seat: Seat,
        callbacks: Callbacks,
        *,
        runtime: Runtime,
        suspension: Suspension,
        ledger: Ledger,
    ) -> None:
        self.handle = Handle.of(ledger.record.handle)
        self.attachment: Attachment | None = None
        self._reaching: Attachment | None = None
        self.policy_told = False
        """Whether the agent knows what becomes of the sandbox when its owner is gone."""
        self._spec = spec
        self._seat = seat
        self._callbacks = callbacks
        self._runtime = runtime
        self._suspension = suspension
        self._ledger = ledger

    @property
    def _record(self) -> SandboxRecord:
        return self._ledger.record

    def _not_running(self) -> SandboxGatewayError:
        return SandboxGatewayError("link_failed", f"sandbox {self._record.id} is {self._record.state}, not running")

    @property
    def link(self) -> Link:
        """The link; raises ``link_failed`` while there is none."""
        if self.attachment is None:
            raise self._not_running()
        return self.attachment.link

    @property
    def made(self) -> Handle:
        """Its handle; raises ``link_failed`` while there is none."""
        if self.handle is None:
            raise self._not_running()
        return self.handle

    # Made new

    async def make(self) -> None:
        """Take the runtime's steps towards a sandbox that can be started or restored into."""
        async for handle in self._runtime.create(self._spec, self._seat.directory):
            await self._is(handle)

    async def start(self) -> None:
        """Start what was made, and attach to its agent."""
        await self._ledger.save(step="start")
        self.handle = await self._runtime.start(self.made)
        await self._ledger.save(step="attach", handle=self.made.as_json())
        await self.attach(self._record.epoch)

    async def _is(self, handle: Handle, **changes: Any) -> None:
        self.handle = handle
        await self._ledger.save(step=handle.step, handle=handle.as_json(), **changes)

    # Made from a snapshot

    async def restore(self, saved: Saved, identity: Mapping[str, Any] | None = None) -> None:
        """Make one from what was saved and see that it lives; one retry in a new epoch. Nothing is handed out yet.

        With an ``identity`` it has become that, too, by which it answers.
        """
        epoch = max(self._record.epoch, saved.epoch)
        for attempt in (1, 2):
            epoch += 1
            try:
                first_of_it = {"epoch": epoch, "boot_id": boot_id()}
                remains = saved.remains or Remains(saved.received, None)
                async for handle in self._suspension.restore(self._spec, self._seat.directory, saved):
                    await self._is(handle, **first_of_it)
                    first_of_it = {}
                    if handle.linked and self._reaching is None:
                        await self._reach(epoch, remains)
                await self.attach(epoch, remains, hold=True, then=lambda: self._answers(identity))
                return
            except BaseException as error:
                await self.drop()
                if not isinstance(error, SandboxGatewayError) or attempt == 2 or error.code == "disk_full":
                    raise
                log.warning("sandbox %s: restored, but %s; trying once more", self._record.id, error.message)

    async def restore_into(self, saved: Saved, identity: Mapping[str, Any]) -> None:
        """As :meth:`restore`, once, into what was made already."""
        await self._ledger.save(epoch=saved.epoch + 1, step="restore")
        self.handle = await self._suspension.restore_into(self.made, saved)
        await self._ledger.save(step="started", handle=self.made.as_json())
        remains = Remains(saved.received, None)
        await self.attach(self._record.epoch, remains, hold=True, then=lambda: self._identify(identity))

    async def take(self, attachment: Attachment, identity: Mapping[str, Any]) -> None:
        """Go on with what another one of this process's has :meth:`surrendered <surrender>`."""
        attachment.serve(self._callbacks)
        self.attachment = attachment
        self._seat.restored.set()
        await asyncio.gather(self.tell_policy(), self._identify(identity))

    async def _answers(self, identity: Mapping[str, Any] | None) -> None:
        if identity is None:
            await self._suspension.heartbeat(self.link)
        else:
            self._seat.restored.set()
            await self._identify(identity)

    async def _identify(self, identity: Mapping[str, Any]) -> None:
        told = asyncio.create_task(self.link.call("identify", timeout=30.0, **identity))
        try:
            await asyncio.wait({told}, timeout=_PROMPT)
            if not told.done():
                # This looks at the kernel's sockets, whose signals may have been lost (GVISOR.md).
                await self._suspension.heartbeat(self.link)
            await told
        except SandboxGatewayError as error:
            text = f"the clone did not take its identity: {error.message}"
            raise SandboxGatewayError("identity_failed", text) from error
        finally:
            told.cancel()
            await asyncio.gather(told, return_exceptions=True)

    # The attachment

    async def attach(
        self,
        epoch: int,
        remains: Remains | None = None,
        *,
        hold: bool = False,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Attach to the running processes; with ``hold`` nothing of them is handed out before :meth:`release`.

        ``then`` asks the agent for something more, without waiting for its answer to what it is told first.
        """
        remains = remains or Remains({}, None)
        if self._reaching is None:
            await self._reach(epoch, remains)
        attachment, self._reaching = self._reaching, None
        assert attachment is not None
        attachment.handle = self.made
        await attachment.open(owner=str(self._seat.lock.pid), received=remains.received)
        self.attachment = attachment
        if not hold:
            attachment.release()
        await asyncio.gather(self.tell_policy(), *([then()] if then is not None else ()))

    async def _reach(self, epoch: int, remains: Remains) -> None:
        """Ask for the agent, whether it runs already or not."""
        reaching = Attachment(self._runtime, self.made, self._callbacks, epoch=epoch, outbox=remains.outbox)
        await reaching.reach(owner=str(self._seat.lock.pid), received=remains.received)
        self._reaching = reaching

    def release(self) -> None:
        """Hand out what has come, and what comes."""
        assert self.attachment is not None
        self.attachment.release()

    def hold(self) -> None:
        """Keep what comes from now on until the next :meth:`release`."""
        assert self.attachment is not None
        self.attachment.hold()

    def let_go(self) -> Attachment | None:
        """The attachment, which is the caller's to close from now on."""
        attachment, self.attachment = self.attachment, None
        return attachment

    async def tell_policy(self) -> None:
        """Tell the agent what becomes of the sandbox when its owner is gone."""
        await self.link.call("policy", on_owner_exit=str(self._record.on_owner_exit), grace=self._record.grace)
        self.policy_told = True

    async def ended(self) -> Death | None:
        """Why its processes are gone, where they are."""
        if await self._runtime.alive(self.made):
            return None
        return await self._runtime.wait(self.made)

    async def stats(self) -> Stats:
        """Resource use now."""
        return await self._runtime.stats(self.handle) if self.handle is not None else Stats()

    # Its end

    async def drop(self) -> None:
        """End processes and files; the sandbox itself goes on without."""
        attachment = self.let_go()
        if attachment is not None:
            await attachment.close()
        await self.remove()
        await self._ledger.save(step="", handle={})

    async def remove(self) -> None:
        """End the processes and remove what they had on this machine; what cannot be removed is swept later."""
        reaching, self._reaching = self._reaching, None
        if reaching is not None:
            await reaching.close()
        handle, self.handle = self.handle, None
        if handle is None:
            return
        await self._runtime.destroy(handle)
        if handle.directory != self._seat.directory:  # where it stood by
            with contextlib.suppress(OSError):
                handle.directory.rmdir()

    def surrender(self) -> Attachment | None:
        """Give everything to the sandbox whose record has the handle by now."""
        self.handle = None
        return self.let_go()
