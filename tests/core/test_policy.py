"""Idle tiers, longest times and memory: what is decided, and that it is never decided too early."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_gateway.model import Activity, State
from sandbox_gateway.policy import (
    INTERRUPT_PATIENCE,
    MAX_INTERRUPTS,
    MAX_INTERVAL,
    MIN_AWAKE,
    Action,
    Candidate,
    CpuMeter,
    Decision,
    Facts,
    Policy,
    choose_victims,
    decide,
    last_activity,
    lead,
    shortage,
    span,
)
from sandbox_gateway.profiles import Idle, Profile

T0 = 1_000_000.0
TIMES = st.one_of(st.none(), st.floats(1.0, 1e6))
ENDS = {Action.EXPIRE, Action.END}
RESTING = (State.RUNNING, State.PAUSED, State.SUSPENDED)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    tiers = sorted(draw(st.lists(st.floats(1.0, 1e6), min_size=3, max_size=3)))
    pause, suspend, expire = (time if draw(st.booleans()) else None for time in tiers)
    return Policy(pause, suspend, expire, 0.02, draw(TIMES), draw(TIMES))


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    ages = st.floats(0.0, 3e6)
    created = T0 - draw(ages)
    state = draw(st.sampled_from(list(State)))
    announced = draw(st.one_of(st.none(), st.floats(created, T0)))
    ended = draw(st.one_of(st.none(), st.floats(created, T0)))
    interrupts = draw(st.integers(0, 4))
    return Facts(
        now=T0,
        state=state,
        since=draw(st.floats(created, T0)),
        created=created,
        activity=Activity(draw(st.floats(created, T0)), announced, ended),
        busy_since=draw(st.one_of(st.none(), st.floats(created, T0))),
        interrupts=interrupts,
        interrupted=draw(st.floats(created, T0)) if interrupts else None,
        can_pause=draw(st.booleans()),
        can_suspend=draw(st.booleans()),
    )


def idle_facts(state: State = State.RUNNING, **changes: object) -> Facts:
    return replace(Facts(T0, state, T0 - 10_000, T0 - 20_000, Activity(T0 - 1000)), **changes)  # type: ignore[arg-type]


# What must always hold


@given(policies(), facts())
def test_nothing_is_done_before_its_time(policy: Policy, known: Facts) -> None:
    decision = decide(policy, known)
    idle, life = known.now - last_activity(known), known.now - known.created
    match decision.action:
        case Action.PAUSE:
            assert policy.pause is not None and idle >= policy.pause
        case Action.SUSPEND:
            assert policy.suspend is not None and idle >= policy.suspend
        case Action.EXPIRE:
            assert policy.expire is not None and idle >= policy.expire
        case Action.ANNOUNCE_EXPIRY:
            assert policy.expire is not None and idle >= policy.expire - lead(policy.expire) - 1e-6
        case Action.ANNOUNCE_END:
            assert policy.max_lifetime is not None and life >= policy.max_lifetime - lead(policy.max_lifetime) - 1e-6
        case Action.INTERRUPT:
            assert policy.max_busy is not None and known.busy_since is not None
            assert known.now - known.busy_since >= policy.max_busy
        case Action.END:
            over = policy.max_lifetime is not None and life >= policy.max_lifetime
            assert over or known.interrupts >= MAX_INTERRUPTS


@given(policies(), facts())
def test_no_end_comes_without_an_announcement_long_enough_before(policy: Policy, known: Facts) -> None:
    decision = decide(policy, known)
    if decision.action is Action.EXPIRE:
        assert policy.expire is not None and known.activity.expiry_announced is not None
        assert known.activity.expiry_announced >= last_activity(known), "it was used after it was announced"
        assert known.now - known.activity.expiry_announced >= lead(policy.expire) - 1e-6
    if decision.action is Action.END and known.interrupts < MAX_INTERRUPTS:
        assert policy.max_lifetime is not None and known.activity.end_announced is not None
        assert known.now - known.activity.end_announced >= lead(policy.max_lifetime) - 1e-6
    if decision.action in (Action.ANNOUNCE_END, Action.ANNOUNCE_EXPIRY):
        assert decision.due is not None and decision.due > known.now


@given(policies(), facts(), st.floats(0.0, 1e6))
def test_a_busy_kernel_is_neither_paused_nor_suspended_nor_expired(policy: Policy, known: Facts, age: float) -> None:
    known = replace(known, state=State.RUNNING, busy_since=T0 - age)
    assert decide(policy, known).action not in {Action.PAUSE, Action.SUSPEND, Action.EXPIRE, Action.ANNOUNCE_EXPIRY}


@given(facts())
def test_a_policy_without_times_never_does_anything(known: Facts) -> None:
    assert not Policy().in_force
    assert decide(Policy(), known) == Decision(Action.NOTHING, math.inf)


@given(policies(), facts(), st.floats(0.0, 1e6))
def test_as_time_goes_by_only_graver_steps_come(policy: Policy, known: Facts, later: float) -> None:
    order = [
        Action.NOTHING,
        Action.PAUSE,
        Action.SUSPEND,
        Action.INTERRUPT,
        Action.ANNOUNCE_EXPIRY,
        Action.ANNOUNCE_END,
        Action.EXPIRE,
        Action.END,
    ]
    now, then = decide(policy, known), decide(policy, replace(known, now=known.now + later))
    assert order.index(then.action) >= order.index(now.action)


@given(policies(), facts())
def test_what_is_not_possible_is_not_decided(policy: Policy, known: Facts) -> None:
    action = decide(policy, known).action
    if action is Action.PAUSE:
        assert known.can_pause and known.state is State.RUNNING
    if action is Action.SUSPEND:
        assert known.can_suspend and known.state in {State.RUNNING, State.PAUSED}
    if known.state not in RESTING:
        assert action in {Action.NOTHING, Action.ANNOUNCE_END, Action.END}


@given(policies(), facts())
def test_nothing_falls_due_before_the_next_look(policy: Policy, known: Facts) -> None:
    decision = decide(policy, known)
    if decision.action is Action.NOTHING and decision.look < math.inf:
        assert decision.look > known.now
        just_before = known.now + (decision.look - known.now) * 0.999
        assert decide(policy, replace(known, now=just_before)).action is Action.NOTHING
    if decision.action is not Action.NOTHING:
        assert decision.look == known.now, "after a step the question is asked again at once"


def lived(policy: Policy, known: Facts, until: float) -> list[tuple[float, Action]]:
    """What is done to a sandbox that nobody uses any more, by somebody who looks when he is told to."""
    done: list[tuple[float, Action]] = []
    while known.now < until:
        decision = decide(policy, known)
        now = known.now
        if decision.action is Action.NOTHING:
            if decision.look == math.inf:
                break
            known = replace(known, now=decision.look)
            continue
        done.append((now, decision.action))
        match decision.action:
            case Action.PAUSE:
                known = replace(known, state=State.PAUSED, since=now)
            case Action.SUSPEND:
                known = replace(known, state=State.SUSPENDED, since=now)
            case Action.ANNOUNCE_EXPIRY:
                known = replace(known, activity=replace(known.activity, expiry_announced=now))
            case Action.ANNOUNCE_END:
                known = replace(known, activity=replace(known.activity, end_announced=now))
            case _:
                return done
    return done


@settings(deadline=None)
@given(policies())
def test_each_tier_comes_once_in_order_and_in_time(policy: Policy) -> None:
    policy = replace(policy, max_lifetime=None, max_busy=None)
    start = Facts(T0, State.RUNNING, T0, T0, Activity(T0))
    # Each look of a running kernel is one step of this loop: a few days of it are enough.
    done = lived(policy, start, T0 + 200_000)
    actions = [action for _, action in done]
    assert len(set(actions)) == len(actions)
    wanted = [Action.PAUSE, Action.SUSPEND, Action.EXPIRE]
    assert [action for action in actions if action in wanted] == [action for action in wanted if action in actions]
    for action, time in zip(wanted, (policy.pause, policy.suspend, policy.expire), strict=True):
        came = [at for at, done_then in done if done_then is action]
        if time is None:
            assert not came
        elif time < 200_000 - MAX_INTERVAL:
            # Of two equal times the graver step makes the other one needless.
            graver = (policy.suspend, policy.expire) if action is Action.PAUSE else (policy.expire,)
            assert came or any(other is not None and other - time < 1e-3 for other in graver)
            assert all(time - 1e-3 <= at - T0 <= time + 1e-3 for at in came)


@given(policies(), st.floats(0.0, 1e6))
def test_a_sandbox_that_is_used_again_has_its_whole_time_again(policy: Policy, pause: float) -> None:
    resumed = Facts(T0, State.RUNNING, T0, T0 - 2e6, Activity(T0 - pause, expiry_announced=T0 - 1))
    policy = replace(policy, max_lifetime=None)
    assert decide(policy, resumed).action is Action.NOTHING
    shortest = min(policy.tiers, default=math.inf)
    early = min(shortest, lead(policy.expire) if policy.expire else math.inf) * 0.99
    if early < math.inf:
        assert decide(policy, replace(resumed, now=T0 + early)).action is Action.NOTHING


# Examples


def test_the_tiers_of_a_usual_profile() -> None:
    policy = Policy(pause=600, suspend=3600, expire=14 * 86400)
    done = lived(policy, Facts(T0, State.RUNNING, T0, T0, Activity(T0)), math.inf)
    assert [(at - T0, str(action)) for at, action in done] == [
        (600, "pause"),
        (3600, "suspend"),
        (14 * 86400 * 0.9, "announce_expiry"),
        (14 * 86400, "expire"),
    ]


def test_after_a_long_absence_the_announcement_still_comes_first() -> None:
    policy = Policy(suspend=3600, expire=86400)
    gone = Facts(T0 + 10 * 86400, State.SUSPENDED, T0, T0, Activity(T0))
    decision = decide(policy, gone)
    assert decision.action is Action.ANNOUNCE_EXPIRY and decision.due == gone.now + 8640
    told = replace(gone, activity=Activity(T0, expiry_announced=gone.now))
    assert decide(policy, told) == Decision(Action.NOTHING, gone.now + 8640)
    assert decide(policy, replace(told, now=gone.now + 8640)).action is Action.EXPIRE


def test_an_announcement_before_the_last_use_does_not_count() -> None:
    known = idle_facts(State.SUSPENDED, activity=Activity(T0 - 200, expiry_announced=T0 - 300))
    assert decide(Policy(expire=100), known).action is Action.ANNOUNCE_EXPIRY


def test_a_request_that_runs_too_long_is_interrupted_a_few_times_and_then_ended() -> None:
    policy = Policy(max_busy=100)
    known = idle_facts(busy_since=T0 - 99)
    assert decide(policy, known) == Decision(Action.NOTHING, T0 + 1)
    known = replace(known, now=T0 + 1)
    for count in range(MAX_INTERRUPTS):
        decision = decide(policy, known)
        assert decision.action is Action.INTERRUPT and "longer than 100 s" in decision.reason
        known = replace(known, interrupts=count + 1, interrupted=known.now)
        assert decide(policy, known).action is Action.NOTHING
        known = replace(known, now=known.now + INTERRUPT_PATIENCE)
    decision = decide(policy, known)
    assert decision.action is Action.END and "does not heed" in decision.reason


def test_a_longest_life_ends_also_a_suspended_sandbox_and_a_busy_one() -> None:
    policy = Policy(max_lifetime=1000)
    for state, busy in ((State.SUSPENDED, None), (State.RUNNING, T0 - 5), (State.RUNNING, None)):
        known = idle_facts(state, busy_since=busy)
        assert decide(policy, known).action is Action.ANNOUNCE_END
        known = replace(known, activity=replace(known.activity, end_announced=T0 - 100))
        assert decide(policy, known).action is Action.END


def test_what_is_being_made_is_left_alone() -> None:
    known = idle_facts(State.CREATING, activity=Activity(0.0, end_announced=0.0))
    assert decide(Policy(expire=1, max_lifetime=1), known) == Decision(Action.NOTHING, math.inf)


def test_a_running_kernel_is_looked_at_as_often_as_its_times_need() -> None:
    assert Policy(max_lifetime=1000).interval == math.inf
    assert Policy(pause=2).interval == 1 and Policy(pause=40).interval == 10 and Policy(expire=1e6).interval == 30
    assert decide(Policy(max_lifetime=50_000), idle_facts()).look == T0 - 20_000 + 45_000


@pytest.mark.parametrize(("time", "ahead"), [(10, 5), (120, 60), (300, 60), (6000, 600), (864000, 86400)])
def test_an_end_is_announced_a_tenth_ahead_but_at_least_a_minute(time: float, ahead: float) -> None:
    assert lead(time) == ahead


def test_a_policy_is_what_its_profile_says() -> None:
    profile = Profile("x", idle=Idle(1.0, 2.0, None, 0.5), max_busy=3.0, max_lifetime=4.0)
    assert Policy.of(profile) == Policy(1.0, 2.0, None, 0.5, 3.0, 4.0)
    assert not Policy.of(Profile("y")).in_force


@pytest.mark.parametrize(
    ("seconds", "text"), [(90, "90 s"), (600, "10 min"), (5400, "90 min"), (86400, "24 h"), (14 * 86400, "14 days")]
)
def test_times_are_told_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text


# Processor use


def test_processor_use_is_told_in_cores() -> None:
    meter = CpuMeter()
    assert meter.rate(10.0, 5.0) is None
    assert meter.rate(20.0, 6.0) == pytest.approx(0.1)
    assert meter.rate(21.0, 10.0) == pytest.approx(4.0)


def test_what_goes_back_begins_anew() -> None:
    meter = CpuMeter()
    meter.rate(10.0, 5.0)
    assert meter.rate(20.0, 1.0) is None, "a restored or restarted kernel counts from the beginning"
    assert meter.rate(30.0, 2.0) == pytest.approx(0.1)
    assert meter.rate(25.0, 3.0) is None, "a clock that goes back"
    assert meter.rate(35.0, 4.0) == pytest.approx(0.1)
    assert meter.rate(45.0, None) is None
    assert meter.rate(55.0, 100.0) is None
    assert meter.rate(math.nan, 1.0) is None
    meter.rate(60.0, 1.0)
    meter.reset()
    assert meter.rate(70.0, 2.0) is None


def test_samples_that_follow_each_other_closely_are_taken_together() -> None:
    meter = CpuMeter()
    meter.rate(10.0, 0.0)
    assert meter.rate(10.1, 0.01) is None
    assert meter.rate(11.0, 0.02) == pytest.approx(0.02)


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.floats(allow_nan=True)), max_size=20))
def test_no_samples_give_nonsense(samples: list[tuple[float, float]]) -> None:
    meter = CpuMeter()
    for now, used in samples:
        rate = meter.rate(now, used)
        assert rate is None or rate >= 0


# A shortage of memory

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.uuids().map(str),
        st.integers(0, 1000),
        st.floats(0, 1e6),
        st.floats(0, 200),
        st.booleans(),
    ),
    max_size=12,
)


@given(CANDIDATES, st.integers(-10, 5000))
def test_the_longest_idle_go_first_and_no_more_than_it_takes(candidates: list[Candidate], needed: int) -> None:
    chosen = choose_victims(candidates, needed)
    by_id = {candidate.id: candidate for candidate in candidates}
    taken = [by_id[found] for found in chosen]
    assert not any(candidate.busy or candidate.awake < MIN_AWAKE for candidate in taken)
    assert [candidate.last for candidate in taken] == sorted(candidate.last for candidate in taken)
    if taken:
        assert sum(candidate.memory for candidate in taken[:-1]) < needed, "one less would have been enough"
    left = [
        candidate
        for candidate in candidates
        if candidate.id not in chosen and not candidate.busy and candidate.awake >= MIN_AWAKE and candidate.memory
    ]
    if sum(candidate.memory for candidate in taken) < needed:
        assert not left, "all that can go is not spared while memory is short"
    if left and taken:
        assert min(candidate.last for candidate in left) >= taken[-1].last


def test_memory_is_short_below_the_reserve_or_when_all_waits_for_it() -> None:
    assert shortage(100, None) == 0 and shortage(0, None, 90.0) == 0
    assert shortage(100, 100) == 0 and shortage(40, 100) == 60
    assert shortage(150, 100, 50.0) == 1, "one sandbox, and then another look"
    assert shortage(150, 100, 5.0) == 0 and shortage(250, 100, 50.0) == 0
