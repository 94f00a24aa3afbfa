"""Watching one sandbox: look, decide, act, sleep until the next decision can fall due."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from typing import Final

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventKind
from sandbox_gateway.idle.world import Reading, Watched, World
from sandbox_gateway.model import Activity, State
from sandbox_gateway.policy import Action, Candidate, CpuMeter, Decision, Facts, Policy, decide

log = logging.getLogger(__name__)

LONGEST_SLEEP: Final = 300.0
"""Seconds after which a sandbox is looked at again whatever was to be expected: clocks are put forward."""
READING_TIMEOUT: Final = 10.0
"""Seconds for a sandbox to tell what it does; one that does not counts as active."""
FIRST_RETRY: Final = 60.0
LONGEST_RETRY: Final = 3600.0
"""Seconds after a step that failed until it is tried again; doubled each time."""
SAVE_INTERVAL: Final = 300.0
"""Seconds of use after which the time of the last use is written down again."""
RECENT: Final = 10.0
"""Seconds since its last use in which a kernel still counts as active when memory is short."""
_ENDED = frozenset({State.TERMINATED, State.FAILED, State.EXPIRED, State.TERMINATING})


class Watch:
    """One sandbox of this process. ``room`` bounds how many are saved to disk at the same time."""

    def __init__(self, world: World, sandbox_id: str, room: asyncio.Semaphore) -> None:
        self.poked = asyncio.Event()
        """Set it to have the sandbox looked at now."""
        self._world = world
        self._id = sandbox_id
        self._room = room
        self._policy = Policy()
        self._activity: Activity | None = None
        self._saved: Activity | None = None
        self._cpu = CpuMeter()
        self._busy_since: float | None = None
        self._waited_until = 0.0
        self._interrupts = 0
        self._interrupted: float | None = None
        self._acting = asyncio.Lock()
        self._failures: dict[Action, int] = {}
        self._not_before: dict[Action, float] = {}

    async def run(self) -> None:
        """Go on until the sandbox has ended or is somebody else's."""
        while (sandbox := self._world.live.get(self._id)) is not None and sandbox.record.state not in _ENDED:
            self.poked.clear()
            self._policy = await asyncio.to_thread(self._world.policy, sandbox.record)
            facts = await self._look(sandbox, reading=self._policy.interval < math.inf)
            if not self._policy.in_force:
                await self._world.wait(self.poked, None)
                continue
            decision = decide(self._policy, facts)
            if decision.action is Action.NOTHING:
                await self._sleep(decision.look - facts.now)
            elif not self._may(decision.action, facts.now):
                await self._sleep(self._not_before[decision.action] - facts.now)
            else:
                await self.act(decision)

    async def _sleep(self, seconds: float) -> None:
        # A millisecond longer is harmless; a moment too early would find nothing due, again and again.
        await self._world.wait(self.poked, min(max(seconds, 0.0) + 0.001, LONGEST_SLEEP))

    # Looking

    async def _look(self, sandbox: Watched, *, reading: bool) -> Facts:
        record = sandbox.record
        if self._activity is None:
            kept = await asyncio.to_thread(self._world.store.activity, self._id)
            self._activity = self._saved = kept or Activity(record.changed)
            if record.state is State.RUNNING:
                # Nobody knows what it did before this process had it.
                self._used(self._world.clock())
        if record.state is State.RUNNING:
            self._used(record.changed)
            if reading:
                await self._read(sandbox)
        else:
            self._cpu.reset()
            self._busy_since = None
        if self._saved is None or self._activity.last - self._saved.last >= SAVE_INTERVAL:
            await self.save()
        facts = self._world.facts(sandbox.record, self._activity)
        able = self._world.abilities(record.runtime)
        return replace(
            facts,
            busy_since=self._busy_since,
            interrupts=self._interrupts,
            interrupted=self._interrupted,
            # What just failed is not decided again: a lesser step may do meanwhile.
            can_pause=able.pause and self._may(Action.PAUSE, facts.now),
            can_suspend=able.suspend and self._may(Action.SUSPEND, facts.now),
        )

    async def _read(self, sandbox: Watched) -> None:
        try:
            async with asyncio.timeout(READING_TIMEOUT):
                reading = await sandbox.activity()
        except (SandboxGatewayError, TimeoutError) as error:
            log.debug("sandbox %s does not tell what it does (%s) and counts as active", self._id, error)
            self._used(self._world.clock())
            return
        now = self._world.clock()
        if reading.since_use is not None:
            self._used(now - reading.since_use)
        rate = self._cpu.rate(self._world.monotonic(), reading.cpu_seconds)
        if rate is not None and rate >= self._policy.cpu:
            self._used(now)
        if reading.busy_for is not None:
            self._used(now)
        self._note_request(reading, now)

    def _note_request(self, reading: Reading, now: float) -> None:
        if reading.waiting:
            # The time that a user takes to answer is not the request's.
            self._waited_until = now
        if reading.busy_for is None:
            self._busy_since = None
            return
        begun = max(now - reading.busy_for, self._waited_until)
        # Another request, if it began clearly later: two clocks never agree to the last digit.
        if self._busy_since is None or begun > self._busy_since + 1.0:
            self._busy_since, self._interrupts, self._interrupted = begun, 0, None

    def _used(self, at: float) -> None:
        at = min(at, self._world.clock())
        if self._activity is None:
            self._activity = Activity(at)
        elif at > self._activity.last:
            self._activity = replace(self._activity, last=at)

    async def candidate(self) -> Candidate | None:
        """What suspending it would free; None where it cannot be suspended now."""
        sandbox = self._world.live.get(self._id)
        if sandbox is None or sandbox.record.state not in {State.RUNNING, State.PAUSED}:
            return None
        facts = await self._look(sandbox, reading=True)
        try:
            async with asyncio.timeout(READING_TIMEOUT):
                memory = (await sandbox.stats()).memory
        except (SandboxGatewayError, TimeoutError):
            return None
        if memory is None or not facts.can_suspend:
            return None
        last = facts.activity.last
        busy = facts.state is State.RUNNING and (facts.busy_since is not None or facts.now - last < RECENT)
        return Candidate(self._id, memory, last, facts.now - facts.since, busy)

    # Acting

    def _may(self, action: Action, now: float) -> bool:
        return now >= self._not_before.get(action, -math.inf)

    async def act(self, decision: Decision) -> bool:
        """Carry one step out; False when it failed, and is tried again later."""
        async with self._acting:
            sandbox = self._world.live.get(self._id)
            if sandbox is None:
                return False
            try:
                await self._carry_out(sandbox, decision)
            except SandboxGatewayError as error:
                self._failed(decision, error)
                return False
            self._failures.pop(decision.action, None)
            self._not_before.pop(decision.action, None)
            return True

    async def _carry_out(self, sandbox: Watched, decision: Decision) -> None:
        match decision.action:
            case Action.PAUSE:
                await self.save()
                await sandbox.pause(decision.reason)
            case Action.SUSPEND:
                await self.save()
                async with self._room:
                    await sandbox.suspend(decision.reason)
            case Action.INTERRUPT:
                self._interrupts += 1
                self._interrupted = self._world.clock()
                self._world.events.note(self._id, EventKind.INTERRUPTED, decision.reason)
                await sandbox.interrupt()
            case Action.ANNOUNCE_EXPIRY | Action.ANNOUNCE_END:
                before = self._activity or Activity(sandbox.record.changed)
                self._activity = self._world.announce(self._id, before, decision)
                await self.save()
            case Action.EXPIRE | Action.END:
                log.info("sandbox %s ends: %s", self._id, decision.reason)
                await sandbox.expire(decision.reason)
            case Action.NOTHING:
                pass

    def _failed(self, decision: Decision, error: SandboxGatewayError) -> None:
        if error.code == "illegal_transition":
            # Somebody else was quicker; another look tells.
            self._not_before[decision.action] = self._world.clock() + 1.0
            return
        count = self._failures[decision.action] = self._failures.get(decision.action, 0) + 1
        pause = min(FIRST_RETRY * 2 ** min(count - 1, 20), LONGEST_RETRY)
        self._not_before[decision.action] = self._world.clock() + pause
        text = f"{decision.action} failed ({decision.reason}): {error.message}"
        log.warning("sandbox %s: %s", self._id, text)
        self._world.events.note(self._id, EventKind.FAILED, text, code=error.code)

    async def save(self) -> None:
        """Write down what was seen, for the next owner."""
        activity = self._activity
        if activity is not None and activity != self._saved:
            await asyncio.to_thread(self._world.store.put_activity, self._id, activity)
            self._saved = activity
