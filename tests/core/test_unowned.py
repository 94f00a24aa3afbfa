"""What becomes of a sandbox whose owner is gone, by the state in which it was left."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.model import BLANK, STANDBY, Death, DeathKind, SandboxRecord, State
from sandbox_gateway.owner import OwnerLock
from sandbox_gateway.snapshots import Facts, Kind, Snapshot

ID = "a-kernel"
DEAD = {"id": ID, "runtime": "fake", "directory": "/nowhere", "step": "started", "data": {}}
"""A handle whose processes are gone."""


@pytest.fixture
async def lifecycle(paths: Paths) -> AsyncIterator[Lifecycle]:
    found = Lifecycle(paths)
    yield found
    await found.close()


def left(lifecycle: Lifecycle, state: State, **changes: Any) -> SandboxRecord:
    now = time.time()
    record = SandboxRecord(ID, state, "p", "fake", now, now, boot_id(), handle=DEAD)
    record = replace(record, **changes)
    lifecycle.store.put(record)
    return record


async def saved(lifecycle: Lifecycle) -> Snapshot:
    async with await lifecycle.snapshots.begin() as draft:
        draft.image.mkdir(mode=0o700)
        (draft.image / "pages").write_bytes(b"memory")
        return await draft.commit(Facts(kind=Kind.SUSPENDED, sandbox=ID, profile="p", runtime="fake", link_version=1))


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.RESTARTING])
async def test_what_ran_when_the_machine_restarted_says_so(lifecycle: Lifecycle, state: State) -> None:
    left(lifecycle, state, boot_id="another boot")
    await lifecycle.sweep()
    record = lifecycle.store.get(ID)
    assert record.state is State.FAILED
    assert record.death is not None and record.death.describe() == "machine restarted"


async def test_what_was_suspended_is_there_after_a_restart_of_the_machine(lifecycle: Lifecycle) -> None:
    snapshot = await saved(lifecycle)
    left(lifecycle, State.SUSPENDED, boot_id="another boot", snapshot=snapshot.id, handle={})
    await lifecycle.sweep()
    assert lifecycle.store.get(ID).state is State.SUSPENDED
    assert lifecycle.snapshots.get(snapshot.id).id == snapshot.id


async def test_a_resume_that_was_cut_off_leaves_it_suspended(lifecycle: Lifecycle) -> None:
    snapshot = await saved(lifecycle)
    left(lifecycle, State.RESUMING, snapshot=snapshot.id)
    await lifecycle.sweep()
    record = lifecycle.store.get(ID)
    assert record.state is State.SUSPENDED and record.snapshot == snapshot.id and not record.handle


async def test_a_suspend_that_was_cut_off_behind_its_snapshot_counts(lifecycle: Lifecycle) -> None:
    snapshot = await saved(lifecycle)
    left(lifecycle, State.SUSPENDING)
    await lifecycle.sweep()
    record = lifecycle.store.get(ID)
    assert record.state is State.SUSPENDED and record.snapshot == snapshot.id


async def test_a_suspend_that_was_cut_off_before_its_snapshot_and_died_has_ended(lifecycle: Lifecycle) -> None:
    left(lifecycle, State.SUSPENDING)
    await lifecycle.sweep()
    assert lifecycle.store.get(ID).state is State.TERMINATED


async def test_a_creation_that_was_cut_off_leaves_no_record(lifecycle: Lifecycle) -> None:
    left(lifecycle, State.CREATING)
    await lifecycle.sweep()
    with pytest.raises(SandboxGatewayError) as caught:
        lifecycle.store.get(ID)
    assert caught.value.code == "unknown_sandbox"


@pytest.mark.parametrize("state", [State.CREATING, State.TERMINATING, State.TERMINATED])
@pytest.mark.parametrize("prefix", [BLANK, STANDBY])
async def test_what_was_never_anybodys_leaves_no_record_however_far_its_end_was(
    lifecycle: Lifecycle, state: State, prefix: str
) -> None:
    left(lifecycle, state, id=f"{prefix}1234")
    await lifecycle.sweep()
    assert lifecycle.store.list() == ()


async def test_a_sandbox_whose_lock_is_held_is_left_alone(lifecycle: Lifecycle) -> None:
    left(lifecycle, State.RESUMING)
    with OwnerLock(lifecycle.paths.sandbox(ID)):
        await lifecycle.sweep()
        assert lifecycle.store.get(ID).state is State.RESUMING


async def test_a_suspended_sandbox_is_stopped_without_an_owner_and_its_snapshot_goes(lifecycle: Lifecycle) -> None:
    snapshot = await saved(lifecycle)
    left(lifecycle, State.SUSPENDED, snapshot=snapshot.id, handle={})
    assert (await lifecycle.stop(ID)).state is State.TERMINATED
    assert not lifecycle.snapshots.list()


async def test_one_that_has_ended_cannot_be_adopted_and_the_reason_is_told(lifecycle: Lifecycle) -> None:
    left(lifecycle, State.TERMINATED, death=Death(DeathKind.OUT_OF_MEMORY))
    with pytest.raises(SandboxGatewayError, match="out of memory") as caught:
        await lifecycle.adopt(ID)
    assert caught.value.code == "illegal_transition"
    assert not lifecycle.live


async def test_the_directory_of_a_probe_under_way_is_left_alone(lifecycle: Lifecycle) -> None:
    """It has a bundle, as a sandbox has."""
    directory = lifecycle.paths.runtime / "trial-12345678"
    (directory / "bundle").mkdir(parents=True)
    (lifecycle.paths.sandbox(ID) / "bundle").mkdir(parents=True)
    await lifecycle.sweep()
    assert (directory / "bundle").exists()
    assert not lifecycle.paths.sandbox(ID).exists()


async def test_what_another_sweep_has_brought_back_to_its_snapshot_meanwhile_is_left_alone(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes look at the same time; the second acts on what it saw before the first had the lock."""
    snapshot = await saved(lifecycle)
    stale = left(lifecycle, State.RESUMING, snapshot=snapshot.id, handle={})
    left(lifecycle, State.SUSPENDED, snapshot=snapshot.id, handle={})
    monkeypatch.setattr(lifecycle.store, "list", lambda *states: (stale,))
    await lifecycle._unowned.sweep()
    assert lifecycle.store.get(ID).state is State.SUSPENDED
    assert lifecycle.snapshots.get(snapshot.id).id == snapshot.id


async def test_what_was_removed_meanwhile_does_not_end_a_sweep(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = left(lifecycle, State.RESUMING, handle={})
    lifecycle.store.delete(ID)
    monkeypatch.setattr(lifecycle.store, "list", lambda *states: (stale,))
    assert await lifecycle._unowned.sweep() == []


async def test_what_is_brought_back_to_its_snapshot_keeps_its_directory(lifecycle: Lifecycle) -> None:
    snapshot = await saved(lifecycle)
    left(lifecycle, State.RESUMING, snapshot=snapshot.id, handle={})
    directory = lifecycle.paths.sandbox(ID)
    directory.mkdir(mode=0o700)
    (directory / "owner.cursors").write_bytes(b"how far the clients have been served")
    await lifecycle.sweep()
    assert lifecycle.store.get(ID).state is State.SUSPENDED
    assert (directory / "owner.cursors").exists()
