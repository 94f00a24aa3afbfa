"""Quotas: who is refused what, what the refusal advises, and that the last place is given only once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.quotas import UNLIMITED, Demand, Live, Quota, Quotas, Stored, Usage, admit, usage_of

GIB = 1024**3


def some(count: int, memory: int | None = GIB, gpus: int = 0) -> Usage:
    return Usage(live=tuple(Live(f"s{number}", memory, gpus) for number in range(count)))


def refusal(quota: Quota, usage: Usage, demand: Demand) -> SandboxGatewayError:
    with pytest.raises(SandboxGatewayError) as caught:
        admit(quota, usage, demand)
    assert caught.value.code == "over_quota" and caught.value.status == 403
    return caught.value


class User:
    """A user whose sandboxes appear when they are put on record."""

    def __init__(self) -> None:
        self.live: list[str] = []
        self.memory: int | None = GIB
        self.reads = 0

    async def read(self) -> Usage:
        self.reads += 1
        found = Usage(live=tuple(Live(it, self.memory) for it in self.live))
        await asyncio.sleep(0)
        return found


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# Decisions


def test_no_limit_is_no_limit() -> None:
    admit(UNLIMITED, some(1000, None), Demand(live=1000, memory=None, suspended=9, disk=1 << 60, gpus=9))


def test_the_last_place_may_be_taken_and_the_next_one_not() -> None:
    admit(Quota(live=4), some(3), Demand(live=1))
    error = refusal(Quota(live=4), some(4), Demand(live=1))
    assert error.message == "you have 4 live sandboxes of at most 4"
    assert error.hint == "Suspend or delete one of your 4 live sandboxes: s0, s1, s2, s3."


def test_a_batch_counts_as_a_whole() -> None:
    admit(Quota(live=5), some(2), Demand(live=3))
    error = refusal(Quota(live=5), some(4), Demand(live=3))
    assert "this would be 3 more" in error.message and error.hint.startswith("Suspend or delete 2 of your 4")


def test_a_batch_that_never_fits_is_told_how_much_would() -> None:
    assert refusal(Quota(live=2), some(0), Demand(live=3)).hint == "Ask for at most 2 at once."


def test_a_hint_names_a_few_ids_only() -> None:
    hint = refusal(Quota(live=100), some(100), Demand(live=1)).hint
    assert hint == "Suspend or delete one of your 100 live sandboxes: s0, s1, s2, s3, s4 and 95 others."


def test_memory_counts_limits_and_advises_the_biggest_first() -> None:
    usage = Usage(live=(Live("small", GIB), Live("big", 4 * GIB)))
    admit(Quota(memory=8 * GIB), usage, Demand(live=1, memory=3 * GIB))
    error = refusal(Quota(memory=8 * GIB), usage, Demand(live=2, memory=2 * GIB))
    assert "5.0 GiB of at most 8.0 GiB" in error.message and "needs 4.0 GiB" in error.message
    assert error.hint == "Suspend or delete some of your 2 live sandboxes: big (4.0 GiB), small (1.0 GiB)."


def test_a_sandbox_without_a_memory_limit_does_not_pass_a_memory_quota() -> None:
    assert "memory limit" in refusal(Quota(memory=8 * GIB), some(0), Demand(live=1, memory=None)).hint
    refusal(Quota(memory=8 * GIB), some(1, None), Demand(live=1, memory=1))
    assert "less memory" in refusal(Quota(memory=GIB), some(0), Demand(live=1, memory=2 * GIB)).hint


def test_gpus_are_counted_only_for_those_who_want_one() -> None:
    usage = Usage(live=(Live("plain"), Live("fast", None, 2)))
    admit(Quota(gpus=2), usage, Demand(live=1))
    assert refusal(Quota(gpus=2), usage, Demand(live=1, gpus=1)).hint == "Suspend or delete your sandbox fast."
    assert "without a GPU" in refusal(Quota(gpus=0), usage, Demand(live=1, gpus=1)).hint


def test_suspended_sandboxes_and_disk_have_limits_of_their_own() -> None:
    usage = Usage(stored=(Stored("a", GIB), Stored("b", 3 * GIB), Stored("snap", 2 * GIB, suspended=False)))
    admit(Quota(suspended=3, disk=7 * GIB), usage, Demand(suspended=1, disk=GIB))
    error = refusal(Quota(suspended=2), usage, Demand(suspended=1))
    assert error.hint == "Delete or resume one of your 2 suspended sandboxes: b (3.0 GiB), a (1.0 GiB)."
    error = refusal(Quota(disk=7 * GIB), usage, Demand(suspended=1, disk=2 * GIB))
    assert error.hint == "Delete some of your 3 snapshots: b (3.0 GiB), snap (2.0 GiB), a (1.0 GiB)."


@given(
    limit=st.integers(0, 20),
    have=st.integers(0, 25),
    pending=st.integers(0, 5),
    wanted=st.integers(1, 25),
)
def test_what_is_admitted_never_exceeds_the_limit(limit: int, have: int, pending: int, wanted: int) -> None:
    try:
        admit(Quota(live=limit), some(have), Demand(live=wanted), Demand(live=pending))
    except SandboxGatewayError as error:
        assert have + pending + wanted > limit and error.hint.endswith(".")
    else:
        assert have + pending + wanted <= limit


# Reading


def test_a_quota_is_read_from_a_table_and_written_back() -> None:
    quota = Quota.read({"live": 4, "memory": "8GiB", "disk": "none", "creates_per_minute": "30"})
    assert quota == Quota(live=4, memory=8 * GIB, creates_per_minute=30)
    assert Quota.read(quota.as_dict()) == quota


@pytest.mark.parametrize(
    "table",
    [{"lives": 1}, {"live": -1}, {"live": True}, {"live": "4GiB"}, {"memory": "50%"}, {"memory": "x"}, {"live": 1.5},
     {"live": []}, {"live": 2**63}, {"memory": "9" * 400}],
)  # fmt: skip
def test_a_wrong_quota_is_refused_with_its_key(table: dict[str, object]) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        Quota.read(table)
    assert caught.value.code == "invalid_request" and next(iter(table)) in str(caught.value)


def test_usage_is_what_is_on_record_of_this_owner() -> None:
    blank = SandboxRecord("x", State.RUNNING, "p", "fake", 0.0, 0.0, "boot", owner="ann")
    records = [
        blank,
        replace(blank, id="going", state=State.TERMINATING),
        replace(blank, id="asleep", state=State.SUSPENDED, snapshot="sn1"),
        replace(blank, id="dead", state=State.FAILED),
        replace(blank, id="other", owner="bob"),
    ]
    usage = usage_of("ann", records, {"x": 5}.get, {"sn1": 10, "sn2": 20, "sn3": 30}, own=["sn1", "sn2", "gone"])
    assert usage == Usage((Live("x", 5),), (Stored("asleep", 10), Stored("sn2", 20, suspended=False)))
    assert usage.disk == 30 and len(usage.suspended) == 1


# Reservations


async def test_of_two_requests_at_once_only_one_gets_the_last_place() -> None:
    user, quotas, going = User(), Quotas(Quota(live=1)), asyncio.Event()

    async def make(name: str) -> str:
        try:
            async with quotas.create("ann", user.read, ids=[name]):
                await going.wait()
                user.live.append(name)
        except SandboxGatewayError as error:
            return error.code
        return "made"

    tasks = [asyncio.create_task(make(name)) for name in "ab"]
    await asyncio.sleep(0.01)
    going.set()
    assert sorted(await asyncio.gather(*tasks)) == ["made", "over_quota"]
    assert len(user.live) == 1


async def test_what_is_being_made_and_is_on_record_already_counts_once() -> None:
    user, quotas = User(), Quotas(Quota(live=2, memory=2 * GIB))
    async with quotas.create("ann", user.read, memory=GIB, ids=["a"]):
        user.live.append("a")
        async with quotas.create("ann", user.read, memory=GIB, ids=["b"]):
            pass
    async with quotas.create("ann", user.read, memory=GIB, count=1) as unnamed:
        user.live.append("child")
        with pytest.raises(SandboxGatewayError):
            async with quotas.create("ann", user.read, memory=GIB):
                pass
        unnamed.made("child")


async def test_one_that_is_made_anew_keeps_its_place_while_it_is_not_on_record() -> None:
    user, quotas = User(), Quotas(Quota(live=1, memory=GIB))
    user.live = ["a"]
    async with quotas.resume("ann", user.read, "a", memory=GIB):
        user.live.clear()  # ended, for another one under its id
        with pytest.raises(SandboxGatewayError):
            async with quotas.create("ann", user.read, memory=GIB):
                pass
        user.live = ["a"]


async def test_two_who_wake_one_sandbox_take_one_place() -> None:
    user, quotas = User(), Quotas(Quota(live=2, memory=2 * GIB))
    user.live = ["other"]
    async with (
        quotas.resume("ann", user.read, "a", memory=GIB),
        quotas.resume("ann", user.read, "a", memory=GIB),
    ):
        with pytest.raises(SandboxGatewayError):
            async with quotas.resume("ann", user.read, "b", memory=GIB):
                pass
        user.live.append("a")
        async with quotas.resume("ann", user.read, "a", memory=GIB):
            pass


async def test_a_fork_that_is_half_done_counts_as_a_whole_and_once() -> None:
    user, quotas = User(), Quotas(Quota(live=4))
    async with quotas.create("ann", user.read, count=2) as fork:
        user.live.append("child1")
        async with quotas.create("ann", user.read, ids=["single"]):
            user.live.append("single")
        # Four: two children (one on record), the single one; the next is the last.
        async with quotas.create("ann", user.read, ids=["last"]):
            with pytest.raises(SandboxGatewayError):
                async with quotas.create("ann", user.read):
                    pass
        user.live.append("child2")
        fork.made("child1", "child2")
    assert len(user.live) == 3


async def test_a_place_is_free_again_when_making_it_failed() -> None:
    user, quotas = User(), Quotas(Quota(live=1))
    with pytest.raises(RuntimeError):
        async with quotas.create("ann", user.read):
            raise RuntimeError
    async with quotas.create("ann", user.read):
        pass


async def test_a_reservation_that_ends_while_the_usage_is_read_still_counts() -> None:
    user, quotas, reading = User(), Quotas(Quota(live=1)), asyncio.Event()
    finish = asyncio.Event()

    async def slow() -> Usage:
        found = await user.read()  # from before the other one was on record
        reading.set()
        await finish.wait()
        return found

    async def second() -> None:
        async with quotas.create("ann", slow):
            pass

    async with quotas.create("ann", user.read, ids=["a"]):
        task = asyncio.create_task(second())
        await reading.wait()
        user.live.append("a")
    finish.set()
    with pytest.raises(SandboxGatewayError):
        await task


async def test_users_do_not_count_for_each_other_and_have_quotas_of_their_own() -> None:
    ann, bob, quotas = User(), User(), Quotas(Quota(live=1), {"bob": Quota(live=2)}.get)
    ann.live = ["a"]
    bob.live = ["b"]
    async with quotas.create("bob", bob.read):
        with pytest.raises(SandboxGatewayError):
            async with quotas.create("ann", ann.read):
                pass


async def test_nothing_is_read_where_nothing_is_limited() -> None:
    user, quotas = User(), Quotas(Quota(suspended=1))
    async with quotas.create("ann", user.read):
        assert user.reads == 0
    async with quotas.suspend("ann", user.read, "a"):
        assert user.reads == 1


async def test_a_suspend_and_a_snapshot_reserve_their_disk() -> None:
    user, quotas = User(), Quotas(Quota(disk=3 * GIB, suspended=1))
    async with quotas.suspend("ann", user.read, "a", disk=2 * GIB):
        with pytest.raises(SandboxGatewayError):
            async with quotas.snapshot("ann", user.read, disk=2 * GIB):
                pass
        async with quotas.snapshot("ann", user.read, disk=GIB):
            pass
        with pytest.raises(SandboxGatewayError):
            async with quotas.suspend("ann", user.read, "b"):
                pass


async def test_a_resume_needs_a_live_place_but_is_no_create() -> None:
    user, quotas = User(), Quotas(Quota(live=1, creates_per_minute=0))
    async with quotas.resume("ann", user.read, "a"):
        with pytest.raises(SandboxGatewayError) as caught:
            async with quotas.resume("ann", user.read, "b"):
                pass
    assert caught.value.code == "over_quota"


# The rate


async def test_creates_per_minute_are_a_sliding_window_that_says_how_long_to_wait() -> None:
    user, clock = User(), Clock()
    quotas = Quotas(Quota(creates_per_minute=3), clock=clock)
    for _ in range(2):
        async with quotas.create("ann", user.read):
            pass
        clock.now += 10
    with pytest.raises(SandboxGatewayError) as caught:
        async with quotas.create("ann", user.read, count=2):
            pass
    assert (caught.value.code, caught.value.status, caught.value.hint) == ("rate_limited", 429, "Try again in 40 s.")
    async with quotas.create("ann", user.read):  # a refused batch took nothing
        pass
    clock.now += 40.5
    async with quotas.create("ann", user.read):
        pass
    with pytest.raises(SandboxGatewayError, match="at most 3 at once"):
        async with quotas.create("ann", user.read, count=4):
            pass


async def test_what_is_refused_for_its_quota_does_not_count_for_the_rate() -> None:
    user, clock = User(), Clock()
    quotas = Quotas(Quota(live=0, creates_per_minute=1), clock=clock)
    for _ in range(3):
        with pytest.raises(SandboxGatewayError) as caught:
            async with quotas.create("ann", user.read):
                pass
        assert caught.value.code == "over_quota"


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 30)), max_size=40))
def test_no_minute_ever_has_more_creates_than_allowed(steps: list[tuple[int, float]]) -> None:
    clock, granted = Clock(), []
    quotas = Quotas(Quota(creates_per_minute=5), clock=clock)

    async def drive() -> None:
        for count, wait in steps:
            clock.now += wait
            try:
                async with quotas.create("ann", User().read, count=count):
                    granted.append((clock.now, count))
            except SandboxGatewayError as error:
                assert error.code == "rate_limited"
            assert sum(each for when, each in granted if when > clock.now - 60) <= 5

    asyncio.run(drive())
