"""What one user of a gateway may have: decisions from given numbers, and reservations so that none is given twice.

:func:`admit` decides and says what would free room. :class:`Quotas` applies it for many users: what is under way counts
like what exists already, so that of two requests at the same moment only one gets the last place; a batch of forks is
taken as a whole or not at all. Nothing here reads anything: usage is told, and so is the clock.

Over quota is ``over_quota`` (403): trying again does not help, freeing something does. Too many creates within a minute
are ``rate_limited`` (429): waiting helps.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import LIVE, SandboxRecord, State
from sandbox_gateway.profiles.values import size

WINDOW: Final = 60.0
"""Seconds that ``creates_per_minute`` looks back."""
_SHOWN = 5
"""Ids that a hint names."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one user may have at the same time; None is no limit."""

    live: int | None = None
    """Sandboxes that have processes: running, paused, and whatever is on the way from or to that."""
    suspended: int | None = None
    """Suspended sandboxes."""
    memory: int | None = None
    """Bytes: the memory limits of the live sandboxes together, whatever they use of them."""
    disk: int | None = None
    """Bytes of suspended sandboxes and snapshots."""
    gpus: int | None = None
    """GPUs of the live sandboxes."""
    creates_per_minute: int | None = None
    """Sandboxes made within any 60 seconds, forks and starts from snapshots included."""

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Quota:
        """A quota of a configuration: whole numbers, sizes for ``memory`` and ``disk``, ``"none"`` for no limit.

        Raises ``invalid_request`` with the key that is wrong.
        """
        known = [part.name for part in fields(cls)]
        for key in table:
            if key not in known:
                raise SandboxGatewayError(
                    "invalid_request", f"a quota has no {key!r}", f"Known are {', '.join(known)}."
                )
        return cls(**{key: _read(key, value) for key, value in table.items()})

    def as_dict(self) -> dict[str, int]:
        """JSON form, without what has no limit; :meth:`read` reads it back."""
        return {key: value for key, value in asdict(self).items() if value is not None}


UNLIMITED: Final = Quota()


def _read(key: str, value: object) -> int | None:
    found: int | None = None
    try:
        if value is None or value == "none":
            return None
        if isinstance(value, str) and key in {"memory", "disk"} and "%" not in value:
            found = size(value, 0)
        elif isinstance(value, str):
            found = int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            found = value
    except (ValueError, OverflowError):
        pass
    if found is None or not 0 <= found < 2**63:
        allowed = "a size such as 8GiB" if key in {"memory", "disk"} else "a whole number"
        raise SandboxGatewayError("invalid_request", f"{key} of a quota: {value!r}", f'Give {allowed}, or "none".')
    return found


@dataclass(frozen=True, slots=True)
class Live:
    """A sandbox that has processes."""

    id: str
    memory: int | None = None
    """Bytes, its limit; None where it has none."""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A suspended sandbox, or a snapshot of the user's own."""

    id: str
    size: int = 0
    """Bytes on disk."""
    suspended: bool = True
    """False for a snapshot that no suspended sandbox stands for."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one user has."""

    live: tuple[Live, ...] = ()
    stored: tuple[Stored, ...] = ()

    @property
    def suspended(self) -> tuple[Stored, ...]:
        """The suspended sandboxes."""
        return tuple(item for item in self.stored if item.suspended)

    @property
    def disk(self) -> int:
        """Bytes of all that is stored."""
        return sum(item.size for item in self.stored)


def usage_of(
    owner: str,
    records: Iterable[SandboxRecord],
    memory: Callable[[str], int | None],
    snapshots: Mapping[str, int],
    own: Collection[str] = (),
) -> Usage:
    """What ``owner`` has, by what is on record.

    ``memory`` gives the limit of a sandbox by its id, ``snapshots`` the size of each snapshot on disk (bytes), and
    ``own`` are his besides those that suspended sandboxes stand for. What is being ended is his no more.
    """
    mine = [record for record in records if record.owner == owner]
    live = tuple(Live(it.id, memory(it.id)) for it in mine if it.state in LIVE and it.state is not State.TERMINATING)
    asleep = [it for it in mine if it.state is State.SUSPENDED]
    stored = [Stored(it.id, snapshots.get(it.snapshot or "", 0)) for it in asleep]
    taken = {it.snapshot for it in asleep}
    stored += [Stored(it, snapshots[it], suspended=False) for it in own if it in snapshots and it not in taken]
    return Usage(live, tuple(stored))


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request takes when it is granted."""

    live: int = 0
    """More live sandboxes."""
    memory: int | None = 0
    """Bytes, the memory limit of each of them; None where it has none."""
    gpus: int = 0
    """GPUs of each of them."""
    suspended: int = 0
    """More suspended sandboxes."""
    disk: int = 0
    """More bytes on disk, altogether."""
    creates: int = 0
    """Sandboxes that it makes, for the rate."""


def admit(quota: Quota, usage: Usage, demand: Demand, pending: Demand | None = None) -> None:
    """Raise ``over_quota`` with what would free room, unless ``quota`` has room for ``demand`` beside ``usage``.

    ``pending`` is what was granted and is not in ``usage`` yet; its ``memory`` and ``gpus`` are totals.
    """
    pending = Demand() if pending is None else pending
    if demand.live:
        _admit_live(quota, usage, demand, pending)
        _admit_memory(quota, usage, demand, pending)
        _admit_gpus(quota, usage, demand, pending)
    if demand.suspended:
        _admit_suspended(quota, usage, demand, pending)
    if demand.disk:
        _admit_disk(quota, usage, demand, pending)


def _admit_live(quota: Quota, usage: Usage, demand: Demand, pending: Demand) -> None:
    if quota.live is None:
        return
    have = len(usage.live) + pending.live
    excess = have + demand.live - quota.live
    if excess <= 0:
        return
    text = f"you have {have} live sandboxes of at most {quota.live}{_wanted(demand.live)}"
    if demand.live > quota.live:
        raise _over(text, f"Ask for at most {quota.live} at once.")
    raise _over(text, _free("Suspend or delete", excess, "live sandboxes", [(it.id, None) for it in usage.live]))


def _admit_memory(quota: Quota, usage: Usage, demand: Demand, pending: Demand) -> None:
    if quota.memory is None:
        return
    if demand.memory is None or pending.memory is None:
        text = f"your live sandboxes may have {_bytes(quota.memory)} of memory together, and this one has no limit"
        raise _over(text, "Choose a profile with a memory limit, or ask for one.")
    # One without a limit (older than this quota) may use all that there is.
    have = sum(quota.memory if it.memory is None else it.memory for it in usage.live) + pending.memory
    wanted = demand.live * demand.memory
    excess = have + wanted - quota.memory
    if excess <= 0:
        return
    text = f"your live sandboxes have {_bytes(have)} of at most {_bytes(quota.memory)} of memory, and this needs "
    if wanted > quota.memory:
        raise _over(text + _bytes(wanted), "Ask for less memory, or for fewer at once.")
    found = sorted(((it.id, it.memory) for it in usage.live), key=lambda it: -(it[1] or 0))
    raise _over(text + _bytes(wanted), _free("Suspend or delete", None, "live sandboxes", found))


def _admit_gpus(quota: Quota, usage: Usage, demand: Demand, pending: Demand) -> None:
    wanted = demand.live * demand.gpus
    if quota.gpus is None or not wanted:
        return
    have = sum(it.gpus for it in usage.live) + pending.gpus
    if have + wanted <= quota.gpus:
        return
    text = f"you use {have} GPUs of at most {quota.gpus}{_wanted(wanted)}"
    if wanted > quota.gpus:
        raise _over(text, f"Ask for at most {quota.gpus} GPUs." if quota.gpus else "Choose a profile without a GPU.")
    found = [(it.id, None) for it in usage.live if it.gpus]
    raise _over(text, _free("Suspend or delete", None, "sandboxes with a GPU", found))


def _admit_suspended(quota: Quota, usage: Usage, demand: Demand, pending: Demand) -> None:
    if quota.suspended is None:
        return
    have = len(usage.suspended) + pending.suspended
    excess = have + demand.suspended - quota.suspended
    if excess <= 0:
        return
    text = f"you have {have} suspended sandboxes of at most {quota.suspended}{_wanted(demand.suspended)}"
    if demand.suspended > quota.suspended:
        raise _over(text, "Delete the sandbox instead, or leave it running.")
    raise _over(text, _free("Delete or resume", excess, "suspended sandboxes", _by_size(usage.suspended)))


def _admit_disk(quota: Quota, usage: Usage, demand: Demand, pending: Demand) -> None:
    if quota.disk is None:
        return
    have = usage.disk + pending.disk
    if have + demand.disk <= quota.disk:
        return
    text = f"your snapshots take {_bytes(have)} of at most {_bytes(quota.disk)} of disk, and this needs up to "
    if demand.disk > quota.disk:
        raise _over(text + _bytes(demand.disk), "Free some of its memory first, or ask for more disk.")
    raise _over(text + _bytes(demand.disk), _free("Delete", None, "snapshots", _by_size(usage.stored)))


def _over(text: str, hint: str) -> SandboxGatewayError:
    return SandboxGatewayError("over_quota", text, hint)


def _wanted(count: int) -> str:
    return f", and this would be {count} more" if count > 1 else ""


def _free(verb: str, excess: int | None, what: str, found: Sequence[tuple[str, int | None]]) -> str:
    """``Suspend or delete one of your 4 live sandboxes: a, b, c, ...``"""
    if not found:
        return "Wait until those that are being made are ready."
    many = "some" if excess is None else "one" if excess == 1 else str(min(excess, len(found)))
    shown = [name if not held else f"{name} ({_bytes(held)})" for name, held in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} others" if len(found) > _SHOWN else ""
    if len(found) == 1:
        return f"{verb} your sandbox {shown[0]}." if "sandbox" in what else f"{verb} {shown[0]}."
    return f"{verb} {many} of your {len(found)} {what}: {', '.join(shown)}{more}."


def _by_size(stored: Iterable[Stored]) -> list[tuple[str, int | None]]:
    return [(it.id, it.size) for it in sorted(stored, key=lambda it: -it.size)]


def _bytes(count: int) -> str:
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 10 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


class CreateRate:
    """How many sandboxes one user made in the last minute: a sliding window, bounded by the limit itself."""

    def __init__(self) -> None:
        self._made: deque[tuple[float, int]] = deque()

    def made(self, now: float) -> int:
        """How many were granted within the minute before ``now`` (seconds)."""
        while self._made and self._made[0][0] <= now - WINDOW:
            self._made.popleft()
        return sum(each for _, each in self._made)

    def admit(self, limit: int | None, count: int, now: float) -> None:
        """Raise ``rate_limited``, with how long to wait, unless ``count`` more may be made at ``now`` (seconds)."""
        made = self.made(now)
        if limit is None or not count:
            return
        if made + count <= limit:
            return
        text = f"you made {made} sandboxes in the last minute, of at most {limit}{_wanted(count)}"
        if count > limit:
            raise SandboxGatewayError("rate_limited", text, f"Ask for at most {limit} at once.")
        gone, wait = 0, WINDOW
        for when, each in self._made:
            gone += each
            if made - gone + count <= limit:
                wait = when + WINDOW - now
                break
        raise SandboxGatewayError("rate_limited", text, f"Try again in {max(1, math.ceil(wait))} s.")

    def add(self, count: int, now: float) -> None:
        """Note that ``count`` were granted at ``now``."""
        if count:
            self._made.append((now, count))


@dataclass(slots=True, eq=False)
class Reservation:
    """What was granted and is under way. It ends with the block it was made for."""

    demand: Demand
    before: set[str]
    """Ids that are somebody else's: those that there were, and those that others made meanwhile."""
    ids: set[str] = field(default_factory=set)
    """What is known to be its own."""

    def made(self, *ids: str) -> None:
        """These are its sandboxes (or its snapshot). Tell it before the block ends, for all that exist then."""
        self.ids.update(ids)


Read = Callable[[], Awaitable[Usage]]
"""Measures what the user has now. A sandbox must be in it from the moment it is on record."""


@dataclass(slots=True)
class _Account:
    held: list[Reservation] = field(default_factory=list)
    rate: CreateRate = field(default_factory=CreateRate)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Quotas:
    """The quotas of all users of one gateway. Use it on one event loop.

    ``default`` holds for users for whom ``of(owner)`` is None; ``clock`` gives seconds. Each method is a context
    manager for the whole time of the operation::

        async with quotas.create(owner, read, memory=limit, ids=[sandbox_id]):
            ...  # make it: what it takes is reserved until here

        async with quotas.create(owner, read, count=8, memory=limit) as reservation:
            outcomes = ...  # forks: their ids are known afterwards
            reservation.made(*(outcome.id for outcome in outcomes))

    Entering raises ``over_quota`` or ``rate_limited``, and then nothing was taken. ``read`` is called when it is
    this request's turn; those of one user are admitted one after the other, those of different users do not wait for
    each other. Leaving the block ends the reservation: what was made is in the next ``read``.
    """

    def __init__(
        self,
        default: Quota = UNLIMITED,
        of: Callable[[str], Quota | None] = lambda owner: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default = default
        self._of = of
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def quota(self, owner: str) -> Quota:
        """What holds for ``owner``."""
        found = self._of(owner)
        return self._default if found is None else found

    def made(self, owner: str) -> int:
        """Sandboxes that ``owner`` made in the last minute."""
        account = self._accounts.get(owner)
        return 0 if account is None else account.rate.made(self._clock())

    def create(
        self,
        owner: str,
        read: Read,
        *,
        count: int = 1,
        memory: int | None = None,
        gpus: int = 0,
        ids: Collection[str] = (),
    ) -> AbstractAsyncContextManager[Reservation]:
        """For ``count`` new sandboxes (a create, forks, starts from a snapshot), all or none.

        ``memory`` is the limit of each in bytes, None where it has none; ``ids`` are theirs where known before.
        """
        demand = Demand(live=count, memory=memory, gpus=gpus, creates=count)
        return self.reserve(owner, read, demand, ids)

    def resume(
        self, owner: str, read: Read, sandbox_id: str, *, memory: int | None = None, gpus: int = 0
    ) -> AbstractAsyncContextManager[Reservation]:
        """For a suspended sandbox that becomes live again; also for one that a client's request wakes."""
        return self.reserve(owner, read, Demand(live=1, memory=memory, gpus=gpus), [sandbox_id])

    def suspend(
        self, owner: str, read: Read, sandbox_id: str, *, disk: int = 0
    ) -> AbstractAsyncContextManager[Reservation]:
        """For a live sandbox that becomes suspended; ``disk`` is what it will take at most (bytes): its memory now.

        For a user's own wish. A suspend that the gateway decides on (idle, shortage of memory, its own end) frees
        memory for everybody and is not refused.
        """
        return self.reserve(owner, read, Demand(suspended=1, disk=disk), [sandbox_id])

    def snapshot(self, owner: str, read: Read, *, disk: int) -> AbstractAsyncContextManager[Reservation]:
        """For a snapshot of ``disk`` bytes at most; tell ``made`` its id."""
        return self.reserve(owner, read, Demand(disk=disk))

    @asynccontextmanager
    async def reserve(
        self, owner: str, read: Read, demand: Demand, ids: Collection[str] = ()
    ) -> AsyncIterator[Reservation]:
        """What the other methods are made of."""
        account = self._accounts.setdefault(owner, _Account())
        quota = self.quota(owner)
        async with account.lock:
            # What ends while the usage is read counts too: the reading may be from before it was on record.
            held = tuple(account.held)
            usage = await read() if _matters(quota, demand) else Usage()
            admit(quota, usage, _beyond(demand, ids, usage, held), _pending(usage, held))
            now = self._clock()
            account.rate.admit(quota.creates_per_minute, demand.creates, now)
            if quota.creates_per_minute is not None:
                account.rate.add(demand.creates, now)
            reservation = Reservation(demand, _ids(usage), set(ids))
            account.held.append(reservation)
        try:
            yield reservation
        finally:
            account.held.remove(reservation)
            for other in account.held:
                other.before |= reservation.ids


def _matters(quota: Quota, demand: Demand) -> bool:
    """Whether what the user has can make a difference: reading it costs something."""
    kinds: list[int | None] = [*([quota.live, quota.memory] if demand.live else [])]
    kinds += [quota.gpus] if demand.live and demand.gpus else []
    kinds += [quota.suspended] if demand.suspended else []
    kinds += [quota.disk] if demand.disk else []
    return any(limit is not None for limit in kinds)


def _beyond(demand: Demand, ids: Collection[str], usage: Usage, held: Sequence[Reservation]) -> Demand:
    """What ``demand`` takes more than what counts already: a sandbox that is live, or that somebody has reserved the
    place of, has it (two requests may wake one, and one that is made anew keeps its place)."""
    counted = {it.id for it in usage.live}.union(*(each.ids for each in held if each.demand.live))
    return replace(demand, live=max(0, demand.live - len(counted.intersection(ids))))


def _ids(usage: Usage) -> set[str]:
    return {it.id for it in usage.live} | {it.id for it in usage.stored}


def _pending(usage: Usage, held: Sequence[Reservation]) -> Demand:
    """What ``held`` takes that is not in ``usage``: a sandbox that is being made may be on record already.

    An id that is in the usage now and was not when a reservation began, and that nobody else made, is its own.
    """
    live, stored = {it.id for it in usage.live}, {it.id for it in usage.stored}
    counted = set(live)
    named: set[str] = set().union(*(each.ids for each in held))
    strange = [it for it in (*live, *stored) if it not in named]
    sandboxes = gpus = suspended = disk = 0
    memory: int | None = 0
    for each in held:
        wanted = each.demand
        more = wanted.live - len(each.ids & counted)
        if wanted.live:
            counted |= each.ids
        unknown = [it for it in strange if it not in each.before and it in live][: max(0, wanted.live - len(each.ids))]
        strange = [it for it in strange if it not in unknown]
        more = max(0, more - len(unknown))
        sandboxes += more
        gpus += more * wanted.gpus
        if more:
            memory = None if memory is None or wanted.memory is None else memory + more * wanted.memory
        if not each.ids & stored:
            suspended += wanted.suspended
            disk += wanted.disk
    return Demand(sandboxes, memory, gpus, suspended, disk)
