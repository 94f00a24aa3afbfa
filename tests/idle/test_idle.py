"""The driver of the idle policy: made-up sandboxes, a clock that jumps from one deadline to the next."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind, EventLog
from sandbox_gateway.host.pressure import MemoryPressure
from sandbox_gateway.idle import Abilities, IdleDriver, Policies, Reading, World
from sandbox_gateway.model import Activity, Idle, SandboxRecord, State
from sandbox_gateway.policy import INTERRUPT_PATIENCE, Policy
from sandbox_gateway.runtimes.base import Stats
from sandbox_gateway.store import Store

T0 = 1_000_000.0
DAY = 86400.0
USUAL = Policy(pause=600, suspend=3600, expire=2 * DAY)


class Clock:
    """Time that goes on only when everything waits."""

    def __init__(self) -> None:
        self.now = T0
        self.waiting: dict[asyncio.Event, float] = {}

    def __call__(self) -> float:
        return self.now

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        self.waiting[event] = math.inf if seconds is None else self.now + seconds
        try:
            await event.wait()
        finally:
            del self.waiting[event]
            event.clear()


@dataclass
class Sandbox:
    """What a LiveSandbox does for the driver, with a log of what was done to it and when."""

    clock: Clock
    record: SandboxRecord
    reading: Reading = field(default_factory=Reading)
    memory: int = 100
    done: list[tuple[str, float]] = field(default_factory=list)
    readings: int = 0
    fails: dict[str, SandboxGatewayError] = field(default_factory=dict)
    busy_until: float = 0.0
    cpu: float = 0.0

    async def activity(self) -> Reading:
        self.readings += 1
        now = self.clock()
        busy = replace(self.reading, busy_for=now - T0) if now < self.busy_until else self.reading
        return replace(busy, cpu_seconds=self.cpu * (now - T0)) if self.cpu else busy

    async def stats(self) -> Stats:
        return Stats(memory=self.memory)

    async def pause(self, reason: str = "") -> None:
        self._do("pause", State.PAUSED)

    async def suspend(self, reason: str = "") -> None:
        self._do("suspend", State.SUSPENDED)

    async def resume(self) -> None:
        self._do("resume", State.RUNNING)

    async def interrupt(self) -> None:
        self._do("interrupt", self.record.state)

    async def expire(self, reason: str) -> None:
        self._do("expire", State.EXPIRED)

    def _do(self, what: str, state: State) -> None:
        self.done.append((what, self.clock() - T0))
        if what in self.fails:
            raise self.fails[what]
        if state is not self.record.state:
            self.record = replace(self.record, state=state, changed=self.clock())


class Scene:
    """A driver and what it watches."""

    def __init__(self, store: Store) -> None:
        self.clock = Clock()
        self.store = store
        self.live: dict[str, Sandbox] = {}
        self.policies: dict[str, Policy] = {"p": USUAL}
        self.abilities = Abilities()
        self.pressure = MemoryPressure(None)
        self.events = EventLog(store, clock=self.clock)
        self.heard: list[Event] = []
        self.events.listen(self.heard.append)
        self.driver = IdleDriver(
            World(
                self.live,
                store,
                self.events,
                lambda record: self.policies.get(record.profile, Policy()),
                lambda _runtime: self.abilities,
                clock=self.clock,
                monotonic=self.clock,
                wait=self.clock.wait,
                pressure=lambda: self.pressure,
            )
        )

    def add(self, sandbox_id: str = "a", state: State = State.RUNNING, **changes: Any) -> Sandbox:
        """A sandbox that came into its state just now."""
        now = self.clock()
        record = SandboxRecord(sandbox_id, state, "p", "fake", now, now, "boot")
        self.store.put(record)
        sandbox = self.live[sandbox_id] = Sandbox(self.clock, record, **changes)
        self.driver.poke(sandbox_id)
        return sandbox

    async def settle(self) -> None:
        """Return when every watch waits for something that has not come."""
        while True:
            await self.events.flush()
            calm = len(self.clock.waiting) == len(self.driver._tasks) and not any(
                event.is_set() or until <= self.clock.now for event, until in self.clock.waiting.items()
            )
            if calm:
                return
            await asyncio.sleep(0.001)

    async def pass_(self, seconds: float) -> None:
        """Let time go by, from deadline to deadline."""
        end = self.clock.now + seconds
        while True:
            await self.settle()
            due = min(self.clock.waiting.values(), default=math.inf)
            if due > end:
                self.clock.now = end
                return
            self.clock.now = max(due, self.clock.now)
            for event, until in tuple(self.clock.waiting.items()):
                if until <= self.clock.now:
                    event.set()
            await asyncio.sleep(0)

    def kinds(self) -> list[str]:
        return [str(event.kind) for event in self.heard]


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    with Store(tmp_path / "store.sqlite") as store:
        made = Scene(store)
        yield made
        await made.driver.stop()


def times(sandbox: Sandbox) -> list[tuple[str, int]]:
    return [(what, round(at)) for what, at in sandbox.done]


async def test_a_kernel_that_nobody_uses_goes_down_tier_by_tier(scene: Scene) -> None:
    sandbox = scene.add()
    await scene.pass_(3 * DAY)
    assert times(sandbox) == [("pause", 600), ("suspend", 3600), ("expire", 2 * DAY)]
    (warned,) = scene.heard
    assert warned.kind is EventKind.WARNED and round(warned.time - T0) == round(1.8 * DAY)
    assert warned.data == {"due": pytest.approx(T0 + 2 * DAY), "idle": True}
    assert warned.text == "it expires in 4.8 h unless it is used: not used for 2 days"
    assert not scene.driver._tasks, "what has ended is not watched"


async def test_a_running_request_is_activity_and_its_end_begins_the_idle_time(scene: Scene) -> None:
    sandbox = scene.add(busy_until=T0 + 5000)
    await scene.pass_(7000)
    ((what, at),) = sandbox.done
    assert what == "pause" and 5000 + 600 - 30 <= at <= 5000 + 600 + 30


async def test_processor_use_is_activity_without_any_request(scene: Scene) -> None:
    sandbox = scene.add(cpu=0.03)
    await scene.pass_(5000)
    assert sandbox.done == []
    sandbox.cpu = 0.01
    await scene.pass_(700)
    assert [what for what, _ in sandbox.done] == ["pause"]


async def test_a_cell_that_waits_for_input_is_idle(scene: Scene) -> None:
    sandbox = scene.add(reading=Reading.of({"busy": True, "busy_for": 50.0, "input": True}))
    await scene.pass_(700)
    assert times(sandbox) == [("pause", 600)]


async def test_a_message_that_would_wake_it_is_activity_when_it_came(scene: Scene) -> None:
    sandbox = scene.add()
    await scene.pass_(100)
    sandbox.reading = Reading(since_use=20.0)
    await scene.pass_(30)
    sandbox.reading = Reading(since_use=None)
    await scene.pass_(700)
    ((what, at),) = sandbox.done
    assert what == "pause" and 680 <= at <= 730


async def test_without_a_time_in_the_profile_nothing_is_asked_and_nothing_runs(scene: Scene) -> None:
    scene.policies.clear()
    sandbox = scene.add()
    await scene.pass_(30 * DAY)
    assert sandbox.readings == 0 and sandbox.done == []
    assert list(scene.clock.waiting.values()) == [math.inf]


async def test_a_longest_life_alone_asks_no_kernel_what_it_does(scene: Scene) -> None:
    scene.policies["p"] = Policy(max_lifetime=DAY)
    sandbox = scene.add(busy_until=math.inf)
    await scene.pass_(2 * DAY)
    assert sandbox.readings == 0 and times(sandbox) == [("expire", DAY)]
    assert (
        scene.kinds() == ["warned"] and "longest life" in scene.heard[0].text and scene.heard[0].data["idle"] is False
    )


async def test_what_is_resumed_has_its_whole_time_again(scene: Scene) -> None:
    sandbox = scene.add()
    await scene.pass_(5000)
    await sandbox.resume()
    scene.driver.poke("a")
    await scene.pass_(590)
    assert sandbox.record.state is State.RUNNING
    await scene.pass_(20)
    assert times(sandbox) == [("pause", 600), ("suspend", 3600), ("resume", 5000), ("pause", 5600)]


async def test_a_resume_that_nobody_told_of_is_seen_all_the_same(scene: Scene) -> None:
    sandbox = scene.add()
    await scene.pass_(5000)
    await sandbox.resume()
    await scene.pass_(1000)
    ((what, at),) = sandbox.done[3:]
    assert what == "pause" and 5600 <= at <= 5600 + 300


async def test_an_announced_end_does_not_come_once_it_was_used(scene: Scene) -> None:
    scene.policies["p"] = Policy(expire=1000)
    sandbox = scene.add()
    await scene.pass_(950)
    assert scene.kinds() == ["warned"]
    sandbox.reading = Reading(since_use=0.0)
    await scene.pass_(60)
    sandbox.reading = Reading()
    await scene.pass_(800)
    assert sandbox.done == []
    await scene.pass_(300)
    assert scene.kinds() == ["warned", "warned"] and [what for what, _ in sandbox.done] == ["expire"]


async def test_a_step_that_fails_is_tried_again_ever_more_rarely_and_a_lesser_one_comes_meanwhile(scene: Scene) -> None:
    sandbox = scene.add(fails={"suspend": SandboxGatewayError("snapshot_failed", "no room")})
    await scene.pass_(DAY)
    tries = [at for what, at in sandbox.done if what == "suspend"]
    assert times(sandbox)[0] == ("pause", 600) and 20 < len(tries) < 40
    waits = [round(later - sooner) for sooner, later in pairwise(tries)]
    assert waits[0] < 400 and waits == sorted(waits) and 3600 <= waits[-1] < 3600 + 301
    failures = [event for event in scene.heard if event.kind is EventKind.FAILED]
    assert len(failures) == len(tries) and failures[0].data == {"code": "snapshot_failed"}
    assert "no room" in failures[0].text
    del sandbox.fails["suspend"]
    await scene.pass_(2 * 3600)
    assert sandbox.record.state is State.SUSPENDED


async def test_what_the_runtime_cannot_do_is_not_tried(scene: Scene) -> None:
    scene.abilities = Abilities(pause=False, suspend=False)
    scene.policies["p"] = replace(USUAL, expire=None)
    sandbox = scene.add()
    await scene.pass_(2 * 3600)
    assert sandbox.done == []


async def test_a_request_that_runs_too_long_is_interrupted_and_in_the_end_the_kernel_ends(scene: Scene) -> None:
    scene.policies["p"] = Policy(max_busy=100)
    sandbox = scene.add(busy_until=math.inf)
    await scene.pass_(400)
    gaps = [round(at) for _, at in sandbox.done]
    assert [what for what, _ in sandbox.done] == ["interrupt"] * 3 + ["expire"]
    assert gaps[0] == 100 and all(
        INTERRUPT_PATIENCE <= later - sooner < INTERRUPT_PATIENCE + 26 for sooner, later in pairwise(gaps)
    )
    assert scene.kinds() == ["interrupted"] * 3


async def test_a_request_that_heeds_the_interrupt_costs_the_next_one_nothing(scene: Scene) -> None:
    scene.policies["p"] = Policy(max_busy=100)
    sandbox = scene.add(reading=Reading(busy_for=99.0))
    for _ in range(8):
        sandbox.reading = Reading(busy_for=101.0)
        await scene.pass_(30)
        sandbox.reading = Reading()
        await scene.pass_(30)
    assert {what for what, _ in sandbox.done} == {"interrupt"}


async def test_the_time_that_a_user_takes_to_answer_is_not_the_requests(scene: Scene) -> None:
    scene.policies["p"] = Policy(max_busy=100)
    sandbox = scene.add(reading=Reading(waiting=True))
    await scene.pass_(1000)
    sandbox.reading = Reading(busy_for=1000.0)
    await scene.pass_(60)
    assert sandbox.done == []
    await scene.pass_(200)
    assert sandbox.done and sandbox.done[0][0] == "interrupt"


async def test_a_kernel_that_does_not_tell_what_it_does_counts_as_active(scene: Scene) -> None:
    class Mute(Sandbox):
        async def activity(self) -> Reading:
            raise SandboxGatewayError("link_failed", "it does not speak")

    record = SandboxRecord("a", State.RUNNING, "p", "fake", T0, T0, "boot")
    sandbox = scene.live["a"] = Mute(scene.clock, record)
    scene.driver.poke("a")
    await scene.pass_(2 * 3600)
    assert sandbox.done == []


async def test_the_next_owner_goes_on_counting_for_what_sleeps_and_begins_anew_for_what_runs(scene: Scene) -> None:
    scene.store.put_activity("a", Activity(T0 - 1.9 * DAY))
    sleeping = scene.add("a", State.SUSPENDED)
    scene.store.put_activity("b", Activity(T0 - 1.9 * DAY))
    running = scene.add("b")
    await scene.pass_(500)
    assert scene.kinds() == ["warned"] and running.done == []
    assert scene.heard[0].sandbox == "a" and sleeping.done == []


async def test_what_was_seen_is_kept_at_the_end(scene: Scene) -> None:
    scene.add(reading=Reading(busy_for=5.0))
    await scene.pass_(1000)
    await scene.driver.stop()
    kept = scene.store.activity("a")
    assert kept is not None and kept.last >= T0 + 1000 - 30


async def test_a_shortage_suspends_the_longest_idle_and_no_more_than_needed(scene: Scene) -> None:
    scene.policies["p"] = Policy()
    old, busy = scene.add("old"), scene.add("busy", reading=Reading(busy_for=1.0))
    await scene.settle()
    await scene.pass_(500)
    middle, young = scene.add("middle"), scene.add("young")
    await scene.settle()
    young.reading = Reading(since_use=100.0)
    await scene.pass_(200)
    scene.pressure = MemoryPressure(850, 0.0)
    assert await scene.driver.relieve(1000) == ("old", "middle")
    assert not young.done and not busy.done and middle.record.state is State.SUSPENDED
    assert await scene.driver.relieve(800) == () and await scene.driver.relieve(None) == ()
    scene.pressure = MemoryPressure(None)
    assert await scene.driver.relieve(1000) == ()
    assert [what for what, _ in old.done] == ["suspend"]


async def test_what_nobody_owns_is_announced_and_ended_by_whoever_comes(scene: Scene) -> None:
    scene.store.put(SandboxRecord("x", State.SUSPENDED, "p", "fake", T0, T0, "boot"))
    scene.store.put(SandboxRecord("y", State.SUSPENDED, "other", "fake", T0, T0, "boot"))
    ended: list[tuple[str, str]] = []

    async def expire(sandbox_id: str, reason: str) -> None:
        ended.append((sandbox_id, reason))

    scene.clock.now = T0 + 30 * DAY
    await scene.driver.sweep(expire)
    await scene.driver.sweep(expire)
    await scene.events.flush()
    assert scene.kinds() == ["warned"] and ended == []
    scene.clock.now += 0.2 * DAY
    await scene.driver.sweep(expire)
    assert ended == [("x", "not used for 2 days")]


async def test_a_watch_that_breaks_is_told_and_begins_anew_with_the_next_event(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox = scene.add()
    await scene.settle()
    broken, scene.policies = scene.policies, None  # type: ignore[assignment]
    scene.driver.poke("a")
    while scene.driver._tasks:
        await asyncio.sleep(0.001)
    assert "are not watched until it changes" in caplog.text
    scene.policies = broken
    scene.driver.poke("a")
    await scene.pass_(700)
    assert [what for what, _ in sandbox.done] == ["pause"]


NUMBERS = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(), st.lists(st.integers()))


@given(st.dictionaries(st.sampled_from(["busy", "busy_for", "since_use", "cpu_seconds", "input"]), NUMBERS))
def test_whatever_comes_from_inside_is_a_reading(told: dict[str, Any]) -> None:
    reading = Reading.of(told)
    for value in (reading.busy_for, reading.since_use, reading.cpu_seconds):
        assert value is None or (isinstance(value, float) and 0 <= value < math.inf)


@dataclass(frozen=True)
class Places:
    home: Path
    runtime: Path
    profiles: Path


def of(profile: str, idle: Idle | None = None) -> SandboxRecord:
    """A sandbox of a profile."""
    return SandboxRecord("a", State.RUNNING, profile, "fake", T0, T0, "boot", idle=idle)


def test_idle_times_that_were_chosen_for_a_sandbox_count_more_than_its_profiles(tmp_path: Path) -> None:
    places = Places(tmp_path, tmp_path / "run", tmp_path / "profiles.toml")
    places.profiles.write_text('[profiles.x]\nidle = { pause = "10m" }\nmax_busy = "1h"\n')
    policies = Policies(places)
    chosen = Idle(suspend=30.0, cpu=0.1)
    assert policies.of(of("x", chosen)) == Policy(suspend=30.0, cpu=0.1, max_busy=3600.0)
    assert policies.of(of("gone", chosen)) == Policy(suspend=30.0, cpu=0.1)


def test_policies_follow_the_profile_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = Places(tmp_path, tmp_path / "run", tmp_path / "profiles.toml")
    policies = Policies(places)
    assert policies.of(of("python3-gvisor")) == Policy() and policies.of(of("gone")) == Policy()
    assert policies.reserve() is None
    places.profiles.write_text('[profiles.x]\nidle = { pause = "10m" }\n[settings]\nmemory_reserve = "1GiB"\n')
    assert policies.of(of("x")) == Policy(pause=600.0) and policies.reserve() == 2**30
    places.profiles.write_text("[profiles.x\n")
    assert policies.of(of("x")) == Policy(pause=600.0), "a file that is being edited changes nothing"
    assert policies.of(of("x")) == Policy(pause=600.0) and caplog.text.count("cannot be read") == 1
    places.profiles.unlink()
    assert policies.of(of("x")) == Policy()
