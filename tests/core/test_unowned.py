"""What becomes of a sandbox whose owner is gone, by the state in which it was left."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import processes
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.model import BLANK, STANDBY, Death, DeathKind, SandboxRecord, State
from sandbox_gateway.owner import OwnerLock
from sandbox_gateway.runtimes import gvisor_probe
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.runtimes.gvisor import GvisorRuntime
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


KILLED = """
import asyncio, sys
from pathlib import Path
from sandbox_gateway.host.paths import discover
from sandbox_gateway.runtimes import gvisor_probe, gvisor_trial
from sandbox_gateway.runtimes.gvisor import GvisorRuntime

async def stop_here(*given, **more):
    print("here", flush=True)
    await asyncio.sleep(1000)

class Stopping(GvisorRuntime):
    snapshot = stop_here

async def main():
    home, runsc, trial = sys.argv[1:]
    paths, binary = discover({"SANDBOX_GATEWAY_HOME": home}), Path(runsc)
    if trial == "run":
        gvisor_probe.runsc.run = stop_here
        await gvisor_probe._trial(paths, binary)
    await gvisor_trial.capabilities(paths, binary, lambda place, argv: Stopping(place, binary, argv=argv))

asyncio.run(main())
"""


@pytest.mark.parametrize(("trial", "found"), [("run", True), ("saving", True), ("saving", False)])
async def test_what_a_process_left_that_was_killed_over_a_trial_is_removed(
    lifecycle: Lifecycle, runsc_binary: Path, monkeypatch: pytest.MonkeyPatch, trial: str, found: bool
) -> None:
    """A detached sandbox too, which nothing else would ever end, be its runsc still there or not; while the process is
    alive, all is left alone."""
    paths = lifecycle.paths
    if found:
        monkeypatch.setenv("SANDBOX_GATEWAY_RUNSC", str(runsc_binary))
    else:
        monkeypatch.delenv("SANDBOX_GATEWAY_RUNSC", raising=False)
    command = [sys.executable, "-c", KILLED, str(paths.home), str(runsc_binary), trial]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "here\n"
        (place,) = paths.runtime.glob("trial-*")
        left = GvisorRuntime(Paths(paths.home, place / "run"), runsc_binary)

        def processes_of_it() -> list[ProcessRef]:
            return processes.find(lambda argv, environment: str(place) in " ".join((*argv, *environment)))

        await lifecycle.sweep()
        assert place.exists()
        if trial == "saving":
            assert await left.list() == ["t"] and processes_of_it()
    finally:
        process.kill()
        process.communicate()
    await lifecycle.sweep()
    assert not place.exists()
    assert processes_of_it() == []
    assert not left.tree.names(left.cgroup_parent)
    assert not any((root / left.cgroup_parent).exists() for root in left.tree.roots.values())


async def test_a_trial_under_way_is_left_alone_however_old_its_directory_is(lifecycle: Lifecycle) -> None:
    """A machine may sleep in the middle of it."""
    with gvisor_probe.trial_directory(lifecycle.paths) as place:
        os.utime(place, (0, 0))
        await lifecycle.sweep()
        assert (place / "root").exists()
    assert not place.exists()


@pytest.mark.parametrize("old", [False, True])
async def test_the_directory_of_a_trial_that_nobody_has_locked_is_removed_when_it_is_old(
    lifecycle: Lifecycle, old: bool
) -> None:
    """Its process was killed before it could lock it, or was of an earlier version."""
    directory = lifecycle.paths.runtime / "trial-12345678"
    (directory / "bundle").mkdir(parents=True)
    if old:
        os.utime(directory, (time.time() - gvisor_probe.GRACE - 10,) * 2)
    await lifecycle.sweep()
    assert directory.exists() is not old


async def test_a_trial_whose_sandbox_will_not_end_keeps_its_directory_and_ends_no_sweep(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next sweep has to find it again."""

    async def refuse(self: GvisorRuntime, handle: Handle) -> None:
        raise SandboxGatewayError("runtime_failed", f"processes of sandbox {handle.id} will not end: 1")

    directory = lifecycle.paths.runtime / "trial-12345678"
    directory.mkdir()
    (directory / gvisor_probe.LOCK).touch()
    monkeypatch.setattr(GvisorRuntime, "destroy", refuse)
    await lifecycle.sweep()
    assert directory.exists()
    monkeypatch.undo()
    await lifecycle.sweep()
    assert not directory.exists()


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
