"""``prune``: what goes, what stays, and that user's snapshots go only when that was asked for."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_harness import Run, record
from snapshot_helpers import LAYER, RUNSC, make, make_layer

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import State
from sandbox_gateway.snapshots import Kind, Snapshot, SnapshotStore
from sandbox_gateway.store import Store

OTHER = f"sha256:{'c' * 64}"


@pytest.fixture
def snapshots(paths: Paths) -> SnapshotStore:
    paths.ensure()
    return SnapshotStore(paths)


def made(snapshots: SnapshotStore, *arguments: Any, **changes: Any) -> Snapshot:
    return asyncio.run(make(snapshots, *arguments, **changes))


CRASH = """
import asyncio, os
from snapshot_helpers import save_image
from sandbox_gateway.host.paths import discover
from sandbox_gateway.snapshots import SnapshotStore
draft = asyncio.run(SnapshotStore(discover()).begin())
save_image(draft.image)
os._exit(0)
"""


def crashed_draft(snapshots: SnapshotStore) -> str:
    """The draft of a process that ended half-way."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", CRASH], env=environment, check=True, timeout=60)
    return next(path.name for path in snapshots.directory.iterdir() if path.name.endswith(".new"))


def install(paths: Paths, digest: str, *, current: bool = False) -> Path:
    """A runsc in the form that set-up documents."""
    folder = paths.bin / digest
    folder.mkdir(parents=True)
    (folder / "runsc").write_text("#!/bin/sh\n")
    (folder / "runsc").chmod(0o755)
    if current:
        data = {"schema": 1, "sha256": digest, "origin": "x", "pin": "p", "files": {"runsc": digest}}
        (paths.bin / "runsc.json").write_text(json.dumps(data))
    return folder


def old_layer(paths: Paths, digest: str) -> Path:
    layer = make_layer(paths, digest)
    os.utime(layer.with_suffix(".json"), (1, 1))
    return layer


def test_on_a_fresh_installation_there_is_nothing_to_do_and_nothing_is_made(run: Run, paths: Paths) -> None:
    done = run("prune")
    assert done.status == 0 and done.stdout == "0 B freed\n"
    assert [path.name for path in paths.home.iterdir()] == []


def test_what_nobody_needs_goes_and_everything_else_stays(
    run: Run, paths: Paths, store: Store, snapshots: SnapshotStore
) -> None:
    kept_layer, lost_layer = old_layer(paths, LAYER), old_layer(paths, OTHER)
    kept = [install(paths, RUNSC), install(paths, "1" * 64, current=True)]
    lost_runsc = install(paths, "2" * 64)
    saved, template = made(snapshots, name="mine", layers=(LAYER,)), made(snapshots, Kind.TEMPLATE)
    suspended, orphan = made(snapshots, Kind.SUSPENDED), made(snapshots, Kind.SUSPENDED, layers=(OTHER,))
    store.put(record("a-kernel", State.SUSPENDED, snapshot=suspended.id))
    draft = crashed_draft(snapshots)
    paths.logs.mkdir()
    for name in ("a-kernel", "forgotten"):
        (paths.logs / f"{name}.log").write_text("x" * 10)

    looked = run("prune", "--dry-run", "--json")
    assert looked.json["removed"] is False
    done = run("prune", "--json")
    assert done.status == 0 and done.json["removed"] is True
    assert done.json["items"] == looked.json["items"] and done.json["bytes"] == looked.json["bytes"] > 4096
    assert [(item["what"], item["id"]) for item in done.json["items"]] == [
        ("snapshot", draft),
        ("snapshot", orphan.id),
        ("layer", OTHER.removeprefix("sha256:")),
        ("runsc", "2" * 64),
        ("log", "forgotten"),
    ]
    assert all(item["reason"] for item in done.json["items"])
    assert {snapshot.id for snapshot in snapshots.list()} == {saved.id, template.id, suspended.id}
    assert kept_layer.exists() and not lost_layer.exists()
    assert all(folder.exists() for folder in kept) and not lost_runsc.exists()
    assert [path.name for path in paths.logs.iterdir()] == ["a-kernel.log"]
    assert run("prune", "--json").json == {"removed": True, "items": [], "bytes": 0}


def test_snapshots_go_only_with_a_budget_and_when_it_was_said_twice(
    run: Run, paths: Paths, snapshots: SnapshotStore
) -> None:
    unnamed, named = made(snapshots), made(snapshots, name="mine")
    refused = run("prune", "--budget", "0")
    assert refused.status == 2 and "--yes" in refused.stderr
    assert run("prune", "--snapshots").status == 2
    assert len(snapshots.list()) == 2
    assert [item["id"] for item in run("prune", "--budget", "0", "--dry-run", "--json").json["items"]] == [unnamed.id]
    assert run("prune", "--budget", "1G", "--yes").stdout == "0 B freed\n"
    done = run("prune", "--budget", "0", "--yes")
    assert unnamed.id[:12] in done.stdout and "beyond the budget" in done.stdout
    assert snapshots.list() == (named,)
    assert run("prune", "--budget", "0", "--snapshots", "--yes").status == 0
    assert snapshots.list() == ()


def test_the_budget_of_the_settings_holds_when_none_is_given(run: Run, paths: Paths, snapshots: SnapshotStore) -> None:
    made(snapshots), made(snapshots, name="mine")
    assert run("prune", "--json").json["items"] == []
    paths.profiles.write_text("[settings]\nsnapshot_budget = 1000\n")
    assert [item["reason"] for item in run("prune", "--json").json["items"]] == [
        "beyond the budget, not used for longest"
    ]
    assert [snapshot.name for snapshot in snapshots.list()] == ["mine"]
    paths.profiles.write_text("[settings]\nsnapshot_budget = 'much'\n")
    done = run("prune")
    assert done.status == 0 and "no budget" in done.stderr


def test_layers_that_only_a_removed_snapshot_needs_go_with_it(run: Run, paths: Paths, snapshots: SnapshotStore) -> None:
    layer = old_layer(paths, LAYER)
    made(snapshots, layers=(LAYER,))
    planned = run("prune", "--budget", "0", "--dry-run", "--json").json["items"]
    assert [item["what"] for item in planned] == ["snapshot", "layer"]
    assert run("prune", "--budget", "0", "--yes", "--json").json["items"] == planned
    assert not layer.exists()


def test_damaged_snapshots_go_when_asked(run: Run, snapshots: SnapshotStore) -> None:
    broken = made(snapshots)
    (broken.directory / "manifest.json").write_text("")
    assert run("prune", "--json").json["items"] == []
    items = run("prune", "--snapshots", "--yes", "--json").json["items"]
    assert [item["id"] for item in items] == [broken.id] and "damaged" in items[0]["reason"]


@pytest.mark.parametrize("size", ["x", "10X", "-1", "1e5", "", "50%", "none"])
def test_a_budget_that_is_no_size_is_wrong_usage(run: Run, size: str) -> None:
    assert run("prune", f"--budget={size}", "--dry-run").status == 2


def test_image_prune_and_rm_keep_what_a_snapshot_needs(run: Run, paths: Paths, snapshots: SnapshotStore) -> None:
    layer = old_layer(paths, LAYER)
    saved = made(snapshots, layers=(LAYER,))
    assert run("image", "ls", "--json").json[0]["in_use"] is True
    assert run("image", "prune", "--json").json == []
    refused = run("image", "rm", LAYER, "--json")
    assert refused.status == 1 and "snapshot" in refused.stderr and layer.exists()
    snapshots.remove(saved.id)
    assert [item["digest"] for item in run("image", "prune", "--json").json] == [LAYER]


@pytest.mark.parametrize(("answer", "status", "left"), [("y", 0, 0), ("n", 1, 1), ("", 1, 1)])
def test_on_a_terminal_it_shows_and_asks_first(
    paths: Paths, snapshots: SnapshotStore, answer: str, status: int, left: int
) -> None:
    made(snapshots)
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "sandbox_gateway.cli", "prune", "--budget", "0"]
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    said = b""
    deadline = time.monotonic() + 60
    answered = False
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        said += piece
        if b"[y/N]" in said and not answered:
            assert b"beyond the budget" in said and len(snapshots.list()) == 1
            os.write(terminal, f"{answer}\n".encode())
            answered = True
    os.close(terminal)
    assert process.wait(60) == status and answered, said
    assert len(snapshots.list()) == left
