"""Sandboxes that stand ready in this process, for profiles that want some (``pool`` in the profile file).

Two kinds: *ready* ones are restored and attached, and need only an identity; *created* ones are containers without
memory of their own, onto which the template is restored. Neither has an identity of its own. They are nobody's, and
recorded as being created under ids of their own: whoever finds one without its owner removes it. A sandbox that is
started from one has the kernel's id and record; only the runtime goes on calling it by the id under which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import STANDBY, Launch, SandboxSpec
from sandbox_gateway.owner import OwnerLock
from sandbox_gateway.profiles import Profile
from sandbox_gateway.profiles.profile import Pool as Wanted
from sandbox_gateway.request import BASE_ENVIRONMENT, clone
from sandbox_gateway.seat import Seat
from sandbox_gateway.standby import Standby
from sandbox_gateway.suspension import Saved
from sandbox_gateway.templates.plan import Plan

log = logging.getLogger(__name__)

DELAY = 0.3
"""Seconds after a start until the pool is filled again: the kernel's first cell comes first."""
BACK_OFF = 30.0
"""Seconds after a failure."""


class Maker(Protocol):
    """What a pool needs of :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    async def claim(self, sandbox_id: str) -> OwnerLock:
        """Take the right to an id."""
        ...

    async def blank(self, launch: Launch, profile: Profile, seat: Seat, name: str) -> Standby:
        """Record a sandbox that is nobody's; nothing of it is made yet."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One sandbox that stands ready."""

    sandbox: Standby
    seat: Seat
    saved: Saved
    """The template."""
    spec: SandboxSpec
    """Its specification but for the names: another request's must be the same."""
    ready: bool
    born: float
    """Seconds on the monotonic clock."""

    def serves(self, spec: SandboxSpec, saved: Saved) -> bool:
        """Whether it was made as this one would be."""
        return self.spec == spec and self.saved.snapshot.id == saved.snapshot.id

    async def remove(self) -> None:
        """End it."""
        try:
            await self.sandbox.vanish()
        finally:
            self.seat.release()

    def leave(self) -> None:
        """It was given away: only its place is left."""
        self.seat.release()


@dataclass(frozen=True, slots=True)
class _Order:
    """What is kept ready for one profile: as the last request wanted it."""

    plan: Plan
    saved: Saved
    spec: SandboxSpec
    size: Wanted


class Pool:
    """The sandboxes that stand ready in one process. Use it on one event loop."""

    def __init__(self, maker: Maker, *, delay: float = DELAY) -> None:
        self._maker = maker
        self._delay = delay
        self._orders: dict[str, _Order] = {}
        self._members: list[Member] = []
        self._changed = asyncio.Event()
        self._tender: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def sizes(self) -> Mapping[str, int]:
        """How many stand ready, by profile."""
        names = [member.sandbox.record.profile for member in self._members]
        return {name: names.count(name) for name in names}

    def take(self, plan: Plan, saved: Saved, launch: Launch) -> Member | None:
        """One that can become a sandbox of ``launch``, ready ones and older ones first; None where there is none."""
        spec = nameless(launch.spec)
        fits = [one for one in self._members if one.serves(spec, saved) and self._good(one, plan)]
        if not fits:
            return None
        found = min(fits, key=lambda one: (not one.ready, one.born))
        self._members.remove(found)
        self._changed.set()
        return found

    def _good(self, member: Member, plan: Plan) -> bool:
        limit = plan.profile.pool.max_age
        return member.sandbox.stands and (limit is None or time.monotonic() - member.born < limit)

    def order(self, plan: Plan, saved: Saved, launch: Launch) -> None:
        """From now on keep ready what the profile wants, for requests like this one."""
        size = plan.profile.pool
        if self._closed or (not size.ready and not size.created and plan.profile.name not in self._orders):
            return
        self._orders[plan.profile.name] = _Order(plan, saved, nameless(launch.spec), size)
        self._changed.set()
        if self._tender is None or self._tender.done():
            self._tender = asyncio.create_task(self._tend())

    async def _tend(self) -> None:
        while not self._closed:
            self._changed.clear()
            await asyncio.sleep(self._delay)
            wait = self._next_expiry()
            try:
                await self._fill()
                wait = self._next_expiry()
            except SandboxGatewayError as error:
                log.warning("the pool could not be filled: %s", error.message)
                wait = BACK_OFF
            except Exception:
                log.exception("the pool could not be filled")
                wait = BACK_OFF
            if self._tender is None:  # closed, which cancels; one that was dying has made an error of that
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._changed.wait()

    async def _fill(self) -> None:
        for order in tuple(self._orders.values()):
            mine = [one for one in self._members if one.sandbox.record.profile == order.plan.profile.name]
            current = [one for one in mine if self._serves(one, order)]
            for one in mine:
                if one not in current:
                    await self._drop(one)
            for ready, count in ((True, order.size.ready), (False, order.size.created)):
                have = [one for one in current if one.ready is ready]
                for one in have[count:]:
                    await self._drop(one)
                for _ in range(count - len(have)):
                    member = await self._add(order, ready)
                    if self._closed:
                        await member.remove()
                        return
                    self._members.append(member)

    def _serves(self, member: Member, order: _Order) -> bool:
        return member.serves(order.spec, order.saved) and self._good(member, order.plan)

    def _next_expiry(self) -> float | None:
        ages = {order.plan.profile.name: order.size.max_age for order in self._orders.values()}
        due = [
            member.born + limit
            for member in self._members
            if (limit := ages.get(member.sandbox.record.profile)) is not None
        ]
        return max(0.1, min(due) - time.monotonic()) if due else None

    async def _drop(self, member: Member) -> None:
        if member in self._members:
            self._members.remove(member)
            await member.remove()

    async def _add(self, order: _Order, ready: bool) -> Member:
        plan = order.plan
        sandbox_id = f"{STANDBY}{secrets.token_hex(8)}"
        launch = _nobodys(replace(plan.launch, spec=order.spec), sandbox_id)
        seat = Seat(await self._maker.claim(sandbox_id), launch.key)
        sandbox = None
        try:
            sandbox = await self._maker.blank(launch, plan.profile, seat, f"standing ready for {plan.profile.name}")
            await sandbox.stand_by(order.saved if ready else None)
        except BaseException:
            await asyncio.shield(_undo(sandbox, seat))
            raise
        return Member(sandbox, seat, order.saved, order.spec, ready, time.monotonic())

    async def close(self) -> None:
        """Fill no more, and end all that stand ready."""
        self._closed = True
        tender, self._tender = self._tender, None
        if tender is not None:
            tender.cancel()
            await asyncio.gather(tender, return_exceptions=True)
        members, self._members = self._members, []
        await asyncio.gather(*(member.remove() for member in members), return_exceptions=True)


def nameless(spec: SandboxSpec) -> SandboxSpec:
    """A specification without what is one sandbox's own."""
    return replace(spec, id="", hostname="")


def _nobodys(launch: Launch, sandbox_id: str) -> Launch:
    """``launch`` for a sandbox that is nobody's: without environment and with a key that nobody uses."""
    return clone(
        replace(launch, kernel=replace(launch.kernel, environment=dict(BASE_ENVIRONMENT))),
        sandbox_id,
        secrets.token_hex(32).encode(),
    )


async def _undo(sandbox: Standby | None, seat: Seat) -> None:
    try:
        if sandbox is not None:
            await sandbox.vanish()
    finally:
        seat.release()
