"""When a sandbox is paused, suspended, expired, interrupted or ended: decisions only, from facts and a given time.

Idle is a policy with tiers (DESIGN 4.11): running -> paused -> suspended -> expired, each with its own time, all
counted from the last activity. Activity is a running request, a message that would wake the kernel, or processor use
from a threshold on, threads and subprocesses included. An open WebSocket alone is none. A cell that waits for
``input()`` is idle: nothing is lost when it is suspended, and the answer wakes it. Becoming awake counts as activity,
so that what was just resumed has its whole time again.

Nothing ends unannounced: an end for idleness or age is decided only when it was announced long enough before
(:func:`lead`), and an announcement is void once the sandbox is used. Whoever carries a decision out asks again
afterwards, with the new facts: a decision is one step.

Times are seconds since the epoch, whoever's clock that is; nothing here has a clock.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sandbox_gateway.model import Activity, State
from sandbox_gateway.profiles import Profile

MIN_LEAD: Final = 60.0
"""Seconds before its end that a sandbox's users hear of it, at least; half the time where that is shorter."""
MAX_INTERRUPTS: Final = 3
"""Times that a request which runs too long is interrupted before the kernel is ended."""
INTERRUPT_PATIENCE: Final = 30.0
"""Seconds that an interrupted request has to end before the next interrupt."""
MAX_INTERVAL: Final = 30.0
MIN_INTERVAL: Final = 1.0
"""Seconds between two looks at a running kernel, at most and at least."""
MIN_AWAKE: Final = 60.0
"""Seconds that a resumed kernel has before a shortage of memory may suspend it again."""
STALLED: Final = 10.0
"""Percent of the last 10 s in which all work waited for memory, from which on the machine counts as short of it."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The times of one profile, in seconds; None means never."""

    pause: float | None = None
    suspend: float | None = None
    expire: float | None = None
    cpu: float = 0.02
    """Cores: processor use from which on a kernel is active."""
    max_busy: float | None = None
    max_lifetime: float | None = None

    @classmethod
    def of(cls, profile: Profile) -> Policy:
        """The policy of a profile."""
        idle = profile.idle
        return cls(idle.pause, idle.suspend, idle.expire, idle.cpu, profile.max_busy, profile.max_lifetime)

    @property
    def tiers(self) -> tuple[float, ...]:
        """The times of the idle tiers that there are."""
        return tuple(time for time in (self.pause, self.suspend, self.expire) if time is not None)

    @property
    def in_force(self) -> bool:
        """Whether there is anything to decide at all."""
        return bool(self.tiers) or self.max_busy is not None or self.max_lifetime is not None

    @property
    def interval(self) -> float:
        """Seconds between two looks at a running kernel; infinite where what it does is of no matter."""
        times = [time for time in (*self.tiers, self.max_busy) if time is not None]
        return min(max(min(times) / 4, MIN_INTERVAL), MAX_INTERVAL) if times else math.inf


class Action(enum.StrEnum):
    """What to do now."""

    NOTHING = "nothing"
    PAUSE = "pause"
    SUSPEND = "suspend"
    INTERRUPT = "interrupt"
    ANNOUNCE_EXPIRY = "announce_expiry"
    ANNOUNCE_END = "announce_end"
    EXPIRE = "expire"
    """End it: its idle time is over."""
    END = "end"
    """End it: its longest life is over, or a request does not heed interrupts."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one sandbox."""

    now: float
    state: State
    since: float
    """When it came into this state."""
    created: float
    activity: Activity
    busy_since: float | None = None
    """When the request that runs began; None when none runs, or it waits for ``input()``."""
    interrupts: int = 0
    """Times that this request was interrupted because it ran too long."""
    interrupted: float | None = None
    """When it was interrupted last."""
    can_pause: bool = True
    can_suspend: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """One step, and when to ask again."""

    action: Action
    look: float
    """When something is due next if nothing happens before; infinite where nothing ever is."""
    reason: str = ""
    """For people, in one line."""
    due: float | None = None
    """When what is announced will happen."""


def decide(policy: Policy, facts: Facts) -> Decision:
    """The step that is due now, the gravest where several are; :attr:`Action.NOTHING` where none is."""
    if facts.state in _NOT_YET_OR_OVER:
        return Decision(Action.NOTHING, math.inf)
    steps = [*_lifetime(policy, facts)]
    if facts.state in {State.RUNNING, State.PAUSED, State.SUSPENDED}:
        busy = facts.state is State.RUNNING and facts.busy_since is not None
        steps += _busy(policy, facts) if busy else _idle(policy, facts)
    due = [step for step in steps if step.at <= facts.now]
    later = [step.at for step in steps if step.at > facts.now]
    if facts.state not in {State.PAUSED, State.SUSPENDED}:
        later.append(facts.now + policy.interval)
    look = min(later, default=math.inf)
    if not due:
        return Decision(Action.NOTHING, look)
    step = max(due, key=lambda step: _GRAVITY.index(step.action))
    # What else is due comes with the next question, which follows at once.
    return Decision(step.action, facts.now, step.reason, step.due)


@dataclass(frozen=True, slots=True)
class _Step:
    at: float
    action: Action
    reason: str
    due: float | None = None


_NOT_YET_OR_OVER = frozenset({State.CREATING, State.TERMINATING, State.TERMINATED, State.FAILED, State.EXPIRED})
"""What is being made is nobody's yet, also where it waits in that state for its user."""
_GRAVITY = (
    Action.PAUSE,
    Action.SUSPEND,
    Action.INTERRUPT,
    Action.ANNOUNCE_EXPIRY,
    Action.ANNOUNCE_END,
    Action.EXPIRE,
    Action.END,
)


def last_activity(facts: Facts) -> float:
    """When the sandbox was used last: becoming awake counts."""
    return max(facts.activity.last, facts.since) if facts.state is State.RUNNING else facts.activity.last


def lead(time: float) -> float:
    """Seconds before an end after ``time`` seconds that it is announced."""
    return min(max(MIN_LEAD, time / 10), time / 2)


def _idle(policy: Policy, facts: Facts) -> Iterable[_Step]:
    last = last_activity(facts)
    if policy.pause is not None and facts.can_pause and facts.state is State.RUNNING:
        yield _Step(last + policy.pause, Action.PAUSE, f"idle for {span(policy.pause)}")
    if policy.suspend is not None and facts.can_suspend and facts.state in {State.RUNNING, State.PAUSED}:
        yield _Step(last + policy.suspend, Action.SUSPEND, f"idle for {span(policy.suspend)}")
    if policy.expire is not None:
        announced = facts.activity.expiry_announced
        if announced is not None and announced < last:
            announced = None
        reason = f"not used for {span(policy.expire)}"
        yield _end(last, policy.expire, announced, Action.ANNOUNCE_EXPIRY, Action.EXPIRE, reason, facts.now)


def _lifetime(policy: Policy, facts: Facts) -> Iterable[_Step]:
    life = policy.max_lifetime
    if life is not None:
        reason = f"its longest life of {span(life)} is over"
        announced = facts.activity.end_announced
        yield _end(facts.created, life, announced, Action.ANNOUNCE_END, Action.END, reason, facts.now)


def _end(
    start: float, time: float, announced: float | None, announce: Action, end: Action, reason: str, now: float
) -> _Step:
    at, ahead = start + time, lead(time)
    if announced is None:
        # Late (nobody looked for a while, or a clock was put forward): there is as much time as ever.
        return _Step(at - ahead, announce, reason, max(at, now + ahead))
    return _Step(max(at, announced + ahead), end, reason)


def _busy(policy: Policy, facts: Facts) -> Iterable[_Step]:
    if policy.max_busy is None or facts.busy_since is None:
        return
    at = facts.busy_since + policy.max_busy
    reason = f"a request runs for longer than {span(policy.max_busy)}"
    if facts.interrupted is not None:
        at = max(at, facts.interrupted + INTERRUPT_PATIENCE)
    if facts.interrupts < MAX_INTERRUPTS:
        yield _Step(at, Action.INTERRUPT, reason)
    else:
        yield _Step(at, Action.END, f"{reason} and does not heed interrupts")


def span(seconds: float) -> str:
    """A time for people: ``90 s``, ``10 min``, ``36 h``, ``14 days``."""
    for limit, step, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / step:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


class CpuMeter:
    """Samples of (time, processor seconds) in, processor use in cores out.

    The time is a monotonic one. Whatever makes a counter or clock go back (a restore, a restart, a process that ended)
    begins anew instead of giving a number that means nothing.
    """

    MIN_SPAN = 0.5
    """Seconds: processor time is counted in steps of 10 ms, so that less says little."""

    def __init__(self) -> None:
        self._sample: tuple[float, float] | None = None

    def rate(self, now: float, cpu_seconds: float | None) -> float | None:
        """Cores used since the sample before; None when that cannot be told."""
        if cpu_seconds is None or not (math.isfinite(now) and math.isfinite(cpu_seconds)):
            self._sample = None
            return None
        before = self._sample
        if before is None:
            self._sample = (now, cpu_seconds)
            return None
        elapsed, used = now - before[0], cpu_seconds - before[1]
        if 0 <= elapsed < self.MIN_SPAN and used >= 0:
            return None
        self._sample = (now, cpu_seconds)
        return used / elapsed if elapsed > 0 and used >= 0 else None

    def reset(self) -> None:
        """Forget what was before: another incarnation counts from now on."""
        self._sample = None


# A shortage of memory


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sandbox whose memory could be released."""

    id: str
    memory: int
    """Bytes that suspending it would free."""
    last: float
    """When it was used last, in seconds since the epoch."""
    awake: float
    """Seconds since it became awake."""
    busy: bool = False


def shortage(available: int, reserve: int | None, stalled: float | None = None) -> int:
    """Bytes that should be freed; 0 when all is well or memory is not watched (``reserve`` None).

    ``stalled`` is the share of time (percent) in which all work waited for memory: from :data:`STALLED` on one sandbox
    is to go while less than twice the reserve is free.
    """
    if reserve is None:
        return 0
    if available < reserve:
        return reserve - available
    return 1 if stalled is not None and stalled >= STALLED and available < 2 * reserve else 0


def choose_victims(candidates: Iterable[Candidate], needed: int) -> tuple[str, ...]:
    """Ids of the sandboxes to suspend so that ``needed`` bytes come free: longest idle first, no more than it takes.

    Never a busy one: its cell would stand still, and nobody would wake it. Never one that just became awake.
    """
    chosen: list[str] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.last, candidate.id)):
        if needed <= 0:
            break
        if not candidate.busy and candidate.awake >= MIN_AWAKE and candidate.memory > 0:
            chosen.append(candidate.id)
            needed -= candidate.memory
    return tuple(chosen)
