"""``snapshot ls``, ``inspect``, ``rm`` and ``create`` on a store with small snapshots."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from cli_harness import Run, record
from snapshot_helpers import KEY, LAYER, SECRET, make, make_layer

from sandbox_gateway.cli import actions
from sandbox_gateway.cli.actions import OnProgress
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import State
from sandbox_gateway.runtimes.base import Capability, RuntimeReport
from sandbox_gateway.snapshots import Kind, Snapshot, SnapshotStore, describe_files
from sandbox_gateway.store import Store


@pytest.fixture
def snapshots(paths: Paths) -> SnapshotStore:
    paths.ensure()
    return SnapshotStore(paths)


def made(snapshots: SnapshotStore, *arguments: Any, **changes: Any) -> Snapshot:
    return asyncio.run(make(snapshots, *arguments, **changes))


def test_ls_of_a_fresh_installation_is_empty_and_makes_nothing(run: Run, paths: Paths) -> None:
    assert run("snapshot", "ls", "--json").json == []
    assert list(paths.home.iterdir()) == []


def test_ls_tells_what_there_is_what_it_is_for_and_what_is_damaged(
    run: Run, store: Store, snapshots: SnapshotStore
) -> None:
    saved = made(snapshots, name="before-lunch")
    suspended = made(snapshots, Kind.SUSPENDED)
    store.put(record("a-kernel", State.SUSPENDED, snapshot=suspended.id))
    broken = made(snapshots)
    (broken.directory / "manifest.json").write_text("{")
    with snapshots.hold(saved):
        done = run("snapshot", "ls", "--json")
        lines = run("snapshot", "ls").stdout.splitlines()
    one, two, three = done.json
    assert (one["id"], one["name"], one["kind"], one["in_use"], one["needed_by"]) == (
        saved.id, "before-lunch", "saved", True, [],
    )  # fmt: skip
    assert one["size"] == 4101 and one["disk"] > 4101 and one["created"].endswith("Z") and one["damage"] is None
    assert two["needed_by"] == ["a-kernel"] and two["in_use"] is False
    assert three["id"] == broken.id and three["damage"]["code"] == "snapshot_damaged"
    assert lines[0].split() == ["ID", "NAME", "KIND", "SIZE", "AGE", "PROFILE", "SANDBOX", "STATE"]
    assert "in use" in lines[1] and "needed" in lines[2] and "damaged: its manifest" in lines[3]


def test_inspect_shows_everything_but_what_is_private(run: Run, paths: Paths, snapshots: SnapshotStore) -> None:
    saved = made(snapshots, name="mine", layers=(LAYER,), parent="template:x")
    for done in (run("snapshot", "inspect", "mine"), run("snapshot", "inspect", saved.id[:8], "--json")):
        assert done.status == 0
        assert SECRET not in done.stdout and KEY.decode() not in done.stdout
        assert saved.id in done.stdout and "template:x" in done.stdout and "pages.img" in done.stdout
    assert run("snapshot", "inspect", "mine", "--json").json["layers"] == [LAYER]


def test_inspect_verify_tells_everything_that_stands_against_a_restore(
    run: Run, paths: Paths, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runtime:
        reason = ""

        async def probe(self) -> RuntimeReport:
            return RuntimeReport("fake", False, capabilities=(Capability("snapshots", True),))

        async def unfit(self, requirements: Any) -> str:
            return self.reason

    runtime = Runtime()
    monkeypatch.setattr("sandbox_gateway.registry.make_runtime", lambda name, where: runtime)
    layer = make_layer(paths)
    data = paths.home / "data.csv"
    data.write_text("x")
    saved = made(snapshots, name="mine", layers=(LAYER,), workspace=describe_files([str(data)]))
    done = run("snapshot", "inspect", "mine", "--verify")
    assert done.status == 0 and "verified" in done.stdout
    assert run("snapshot", "inspect", "mine", "--verify", "--json").json["problems"] == []

    layer.unlink()
    data.write_text("y")
    runtime.reason = "this processor lacks avx"
    done = run("snapshot", "inspect", "mine", "--verify", "--json")
    assert done.status == 1
    assert [problem["code"] for problem in done.json["problems"]] == [
        "snapshot_unfit",
        "snapshot_unfit",
        "workspace_changed",
    ]
    make_layer(paths)
    os.truncate(saved.image / "pages.img", 1)
    done = run("snapshot", "inspect", "mine", "--verify")
    assert done.status == 1 and "verified" not in done.stdout
    assert "truncated: 1 bytes instead of 4096\n" in done.stderr


def test_inspect_of_a_damaged_one_says_why(run: Run, snapshots: SnapshotStore) -> None:
    broken = made(snapshots)
    (broken.directory / "manifest.json").unlink()
    done = run("snapshot", "inspect", broken.id, "--json")
    assert done.status == 1 and done.error["code"] == "snapshot_damaged" and "snapshot rm" in done.error["hint"]


def test_rm_removes_by_name_and_id_refuses_what_is_needed_and_does_the_rest(
    run: Run, store: Store, snapshots: SnapshotStore
) -> None:
    named, broken = made(snapshots, name="mine"), made(snapshots)
    (broken.directory / "manifest.json").write_text("")
    needed = made(snapshots, Kind.SUSPENDED)
    store.put(record("a-kernel", State.SUSPENDED, snapshot=needed.id))
    done = run("snapshot", "rm", "mine", needed.id, "nothing", broken.id, "--json")
    assert done.status == 1
    assert [(item["id"], item["name"]) for item in done.json] == [(named.id, "mine"), (broken.id, "")]
    assert "snapshot_in_use" in done.stderr and "unknown_snapshot" in done.stderr
    assert "jupyter sandbox rm a-kernel" in run("snapshot", "rm", needed.id).stderr
    assert snapshots.list() == (needed,)
    store.transition("a-kernel", State.EXPIRED, 1.0)
    assert run("snapshot", "rm", needed.id).status == 0 and snapshots.list() == ()


def test_rm_refuses_what_is_being_read(run: Run, snapshots: SnapshotStore) -> None:
    saved = made(snapshots, name="mine")
    with snapshots.hold(saved):
        done = run("snapshot", "rm", "mine", "--json")
    assert done.status == 1 and done.error["code"] == "snapshot_in_use" and snapshots.list() == (saved,)


def test_create_saves_a_sandbox_under_a_name(
    run: Run, paths: Paths, store: Store, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    async def snapshot(where: Paths, sandbox_id: str, name: str, on_progress: OnProgress) -> Snapshot:
        asked.append((sandbox_id, name))
        return await make(snapshots, name=name)

    monkeypatch.setattr(actions, "snapshot", snapshot)
    store.put(record("a-kernel-of-mine"))
    done = run("snapshot", "create", "a-kernel", "--name", "mine", "--json")
    assert done.status == 0 and asked == [("a-kernel-of-mine", "mine")]
    assert done.json["name"] == "mine" and done.json["id"] == snapshots.find("mine").id
    again = run("snapshot", "create", "a-kernel", "--name", "mine")
    assert again.status == 1 and "already" in again.stderr


def test_create_refuses_a_wrong_name_before_anything_is_saved(run: Run, store: Store) -> None:
    store.put(record("a-kernel"))
    assert run("snapshot", "create", "a-kernel").status == 2
    assert run("snapshot", "create", "a-kernel", "--name", "").status == 2
    for name in ("a/b", "..", "x" * 65):
        done = run("snapshot", "create", "a-kernel", "--name", name, "--json")
        assert done.status == 1 and done.error["code"] == "invalid_request"
    assert run("snapshot", "create", "nothing", "--name", "x", "--json").error["code"] == "unknown_sandbox"


def test_create_of_a_suspended_sandbox_says_what_can_be_done(run: Run, store: Store) -> None:
    store.put(record("a-kernel", State.SUSPENDED))
    error = run("snapshot", "create", "a-kernel", "--name", "x", "--json").error
    assert error["code"] == "illegal_transition" and "resume a-kernel" in error["hint"] and "fork" in error["hint"]
