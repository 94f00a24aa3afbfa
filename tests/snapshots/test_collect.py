"""What goes by need and by a budget, and what stays whatever happens."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from snapshot_helpers import LAYER, RUNSC, make, save_image, tree

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.snapshots import (
    Kind,
    Snapshot,
    SnapshotStore,
    collect,
    layers_in_use,
    needed_by,
    removable,
    runsc_in_use,
)
from sandbox_gateway.snapshots.collect import FORK_GRACE, TEMPLATE_GRACE


def record(sandbox_id: str = "a-kernel", state: State = State.RUNNING, **changes: Any) -> SandboxRecord:
    values: dict[str, Any] = {"profile": "p", "runtime": "fake", "created": 1.0, "changed": 2.0, "boot_id": boot_id()}
    return SandboxRecord(**{"id": sandbox_id, "state": state, **values, **changes})


def used(snapshot: Snapshot, ago: float) -> None:
    """Somebody used it so many seconds ago."""
    os.utime(snapshot.directory / "lock", (time.time() - ago,) * 2)


def ids(items: Any) -> list[str]:
    return [item.id for item in items]


async def test_a_snapshot_that_a_sandbox_lives_in_stays_even_beyond_the_budget(store: SnapshotStore) -> None:
    made = await make(store, Kind.SUSPENDED)
    for state in (State.SUSPENDED, State.RESUMING, State.FAILED):
        sandbox = record(state=state, snapshot=made.id)
        assert needed_by(made.id, [sandbox]) == ("a-kernel",)
        assert collect(store, lambda sandbox=sandbox: [sandbox], budget=0, named=True, damaged=True) == ()
    (made.image.parent / "manifest.json").write_text("damage")
    assert collect(store, lambda: [record(state=State.SUSPENDED, snapshot=made.id)], budget=0, damaged=True) == ()
    assert tree(store.directory) == {made.id}


async def test_a_snapshot_whose_record_is_not_yet_written_stays(store: SnapshotStore) -> None:
    made = await make(store, Kind.SUSPENDED)
    for state in (State.SUSPENDING, State.SUSPENDED):
        assert collect(store, lambda state=state: [record(state=state)], budget=0) == ()
    assert ids(removable(store, lambda: [record(state=State.SUSPENDED, snapshot="another")])) == [made.id]
    assert ids(removable(store, lambda: [record(state=State.RUNNING)])) == [made.id]
    assert ids(removable(store, lambda: [record("another", State.SUSPENDING)])) == [made.id]


async def test_records_are_read_after_the_snapshots(store: SnapshotStore) -> None:
    """Else a snapshot that was committed in between would look like one that nobody needs."""
    made = await make(store, Kind.SUSPENDED)

    class Watching(SnapshotStore):
        read = False

        def entries(self) -> Any:
            self.read = True
            return super().entries()

    watching = Watching(store._home)

    def records() -> list[SandboxRecord]:
        return [record(state=State.SUSPENDED, snapshot=made.id)] if watching.read else []

    assert removable(watching, records) == ()


@pytest.mark.parametrize("state", [State.TERMINATED, State.EXPIRED])
async def test_what_belongs_to_an_ended_sandbox_goes(store: SnapshotStore, state: State) -> None:
    made = await make(store, Kind.SUSPENDED)
    gone = collect(store, lambda: [record(state=state, snapshot=made.id)])
    assert ids(gone) == [made.id] and gone[0].size > 4096 and tree(store.directory) == set()


async def test_a_fork_goes_when_nobody_has_held_it_for_a_while(store: SnapshotStore) -> None:
    made = await make(store, Kind.FORK)
    with store.hold(made):
        assert collect(store, list, budget=0) == ()
    assert collect(store, list) == (), "who restores it may be about to begin"
    used(made, FORK_GRACE + 10)
    assert ids(collect(store, list)) == [made.id]


async def test_a_template_that_no_record_names_goes_when_nobody_has_held_it_for_a_while(store: SnapshotStore) -> None:
    named, nobodys, keyless = [await make(store, Kind.TEMPLATE, template_key=key) for key in ("n" * 64, "o" * 64, None)]
    for snapshot in (named, nobodys, keyless):
        used(snapshot, TEMPLATE_GRACE + 10)

    def orphaned(key: str, snapshot: str) -> bool:
        return snapshot != named.id

    with store.hold(nobodys):
        assert collect(store, list, orphaned=orphaned) == ()
    assert collect(store, list, orphaned=orphaned) == (), "who builds it may be about to write it down"
    used(nobodys, TEMPLATE_GRACE + 10)
    assert collect(store, list) == (), "nobody has said which are named"
    assert collect(store, list, orphaned=orphaned, keep={nobodys.id}) == ()
    assert ids(removable(store, list, orphaned=orphaned)) == [nobodys.id]
    gone = collect(store, list, orphaned=orphaned)
    assert ids(gone) == [nobodys.id] and "nobody names" in gone[0].reason


async def test_without_a_budget_saved_snapshots_and_templates_stay(store: SnapshotStore) -> None:
    for kind in (Kind.SAVED, Kind.TEMPLATE):
        await make(store, kind)
    assert collect(store, list) == () and len(store.list()) == 2


async def test_the_least_recently_used_go_first_and_no_more_than_needed(store: SnapshotStore) -> None:
    old, older, new = [await make(store, Kind.TEMPLATE, size=2**20) for _ in range(3)]
    for snapshot, ago in ((old, 1000), (older, 2000), (new, 10)):
        used(snapshot, ago)
    assert ids(collect(store, list, budget=int(2.5 * 2**20))) == [older.id]
    with store.hold(old):
        pass  # using it counts
    assert ids(collect(store, list, budget=int(1.5 * 2**20))) == [new.id]
    assert collect(store, list, budget=10 * 2**20) == ()


async def test_the_budget_spares_what_is_used_named_or_wanted(store: SnapshotStore) -> None:
    held, named, wanted, other = [
        await make(store, Kind.TEMPLATE),
        await make(store, name="mine"),
        await make(store),
        await make(store),
    ]
    with store.hold(held):
        assert ids(collect(store, list, budget=0, keep={wanted.id})) == [other.id]
        assert ids(collect(store, list, budget=0, keep={wanted.id}, named=True)) == [named.id]
    assert {snapshot.id for snapshot in store.list()} == {held.id, wanted.id}


async def test_a_clock_that_jumps_changes_the_order_at_most(store: SnapshotStore) -> None:
    future, past = await make(store), await make(store)
    used(future, -10 * 365 * 86400)
    used(past, 365 * 86400 * 40)
    running = await store.begin()
    save_image(running.image)
    os.utime(running.image.parent, (0, 0))
    os.utime(running.image.parent / "lock", (0, 0))
    assert ids(collect(store, list, budget=0)) == [past.id, future.id], "a time in the future protects nothing"
    assert tree(store.directory) == {running.image.parent.name}, "a draft is known by its lock, not by its age"
    await running.discard()


async def test_damaged_ones_go_when_asked_but_never_a_newer_programs(store: SnapshotStore) -> None:
    broken, newer = await make(store), await make(store)
    (broken.directory / "manifest.json").write_text("{")
    manifest = newer.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 7'))
    assert collect(store, list, budget=0, named=True) == ()
    gone = collect(store, list, budget=0, named=True, damaged=True)
    assert ids(gone) == [broken.id] and "damaged" in gone[0].reason
    assert tree(store.directory) == {newer.id}


async def test_layers_stay_for_records_and_snapshots_and_for_what_changes_from_one_to_the_other(
    store: SnapshotStore,
) -> None:
    saved = await make(store, layers=(LAYER,))
    others = [f"sha256:{digit * 64}" for digit in "cdef"]
    live, ended = record(layers=(others[0],)), record("e", State.TERMINATED, layers=(others[1],))
    assert layers_in_use(store, lambda: [live, ended]) == {LAYER, others[0]}
    assert layers_in_use(store, lambda: [live, ended], without={saved.id}) == {others[0]}

    answers = iter([[], [record(layers=(LAYER,))]])

    def restored_meanwhile() -> list[SandboxRecord]:
        found = next(answers)
        if not found:
            store.remove(saved.id)  # between the two looks a sandbox was made from it
        return found

    assert LAYER in layers_in_use(store, restored_meanwhile)


async def test_who_has_to_be_sure_is_told_of_a_snapshot_that_cannot_be_read_but_not_of_a_newer_programs(
    store: SnapshotStore,
) -> None:
    await make(store, layers=(LAYER,))
    newer = (await make(store)).directory / "manifest.json"
    newer.write_text(newer.read_text().replace('"format": 1', '"format": 99'))
    assert LAYER in layers_in_use(store, list, sure=True)
    broken = await make(store)
    (broken.directory / "manifest.json").write_text("{")
    with pytest.raises(SandboxGatewayError) as error:
        layers_in_use(store, list, sure=True)
    assert error.value.code == "snapshot_damaged"
    assert LAYER in layers_in_use(store, list, sure=True, without={broken.id})
    assert LAYER in layers_in_use(store, list)


async def test_a_runsc_stays_for_snapshots_and_for_sandboxes_that_were_restored_with_it(store: SnapshotStore) -> None:
    await make(store)
    restored = record(handle={"data": {"binary": f"/home/u/bin/{'d' * 64}/runsc"}})
    ended = record("e", State.TERMINATED, handle={"data": {"binary": f"/home/u/bin/{'e' * 64}/runsc"}})
    odd = record("o", handle={"data": "x"})
    assert runsc_in_use(store, lambda: [restored, ended, odd]) == {RUNSC, "d" * 64}
