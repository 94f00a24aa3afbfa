"""A failed suspend leaves a running kernel (DESIGN, invariant 5), with no line lost."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import until
from faulty import Faults, Subject

from sandbox_gateway import attachment
from sandbox_gateway.runtimes import gvisor_snapshots


@pytest.fixture
def small_disk(subject: Subject) -> Iterator[Path]:
    """Snapshots on a file system of 8 MiB."""
    directory = subject.product.home / "snapshots"
    directory.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(directory)], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr!r}")
    try:
        yield directory
    finally:
        # Lazily: a save that was given up goes on inside the sandbox, and ends with it.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize(
    ("command", "way"),
    [
        ("pause", "fails"),
        ("pause", "is killed"),
        ("pause", "fails when it has done its work"),
        ("checkpoint", "fails"),
        ("checkpoint", "is killed"),
        ("checkpoint", "fails when it has done its work"),
        ("checkpoint", "hangs"),
    ],
)
def test_a_suspend_whose_runsc_fails_leaves_the_kernel_running(
    subject: Subject, faults: Faults, command: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = subject.snapshots()
    cell = subject.long_cell()
    faults.set(command, way)
    with monkeypatch.context() as patched:
        if way == "hangs":
            patched.setattr(gvisor_snapshots, "SAVE_TIMEOUT", 3.0)
        done = subject.product.command("suspend", subject.id)
    if command == "pause" and way == "fails when it has done its work":
        # It is paused, as the runtime finds out by asking: then the suspend goes on.
        assert done.returncode == 0 and subject.state == "suspended"
        faults.clear()
        subject.ask("resume", subject.id)
        subject.works(cell)
        return
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert subject.state == "running"
    subject.no_more_snapshots_than(before)
    subject.works(cell)
    faults.clear()
    subject.ask("suspend", subject.id)
    assert subject.state == "suspended" and subject.sleeps()
    subject.ask("resume", subject.id)
    subject.works()


def test_a_kernel_that_does_not_fall_silent_in_time_is_suspended_all_the_same(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was saying at that moment is neither lost nor said twice."""
    monkeypatch.setattr(attachment, "QUIESCE", 0.0)
    cell = subject.long_cell()
    for _ in range(3):
        subject.ask("suspend", subject.id)
        assert subject.state == "suspended" and subject.sleeps()
        subject.ask("resume", subject.id)
    subject.works(cell)


def test_a_suspend_onto_a_full_disk_leaves_the_kernel_running(subject: Subject, small_disk: Path) -> None:
    cell = subject.long_cell()
    said = subject.refused("suspend", subject.id)
    assert "space" in said or "full" in said, said
    assert subject.state == "running"
    subject.no_more_snapshots_than(set())
    subject.works(cell)


def test_a_suspend_while_the_store_is_locked_leaves_the_kernel_running(subject: Subject) -> None:
    cell = subject.long_cell()
    before = subject.snapshots()
    blocker = sqlite3.connect(subject.product.home / "store.sqlite", isolation_level=None)
    try:
        blocker.execute("BEGIN EXCLUSIVE")
        said = subject.refused("suspend", subject.id)
        assert "store" in said or "locked" in said, said
    finally:
        blocker.close()
    subject.no_more_snapshots_than(before)
    assert subject.state == "running"
    subject.works(cell)
    subject.ask("suspend", subject.id)
    subject.ask("resume", subject.id)
    subject.works()


def test_a_suspend_where_no_snapshot_can_be_made_leaves_the_kernel_running(subject: Subject) -> None:
    directory = subject.product.home / "snapshots"
    kept = subject.product.home / "kept"
    if directory.exists():
        os.rename(directory, kept)
    directory.write_text("a file in the place of the directory")
    cell = subject.long_cell()
    try:
        subject.refused("suspend", subject.id)
    finally:
        directory.unlink()
        if kept.exists():
            os.rename(kept, directory)
    assert subject.state == "running"
    subject.works(cell)


@pytest.mark.parametrize("way", ["fails", "is killed"])
def test_a_fork_whose_snapshot_fails_leaves_its_parent_alone(subject: Subject, faults: Faults, way: str) -> None:
    cell = subject.long_cell()
    ids, before = subject.product.ids(), subject.snapshots()
    faults.set("checkpoint", way)
    subject.refused("fork", subject.id, "-n", "2")
    assert subject.state == "running"
    assert subject.product.ids() == ids, "no child"
    subject.no_more_snapshots_than(before)
    subject.works(cell)


@pytest.mark.parametrize("way", ["fails", "is killed", "fails when it has done its work"])
def test_a_fork_whose_restore_fails_leaves_its_parent_alone_and_no_child(
    subject: Subject, faults: Faults, way: str
) -> None:
    cell = subject.long_cell()
    ids, before = subject.product.ids(), subject.snapshots()
    faults.set("restore", way)
    subject.refused("fork", subject.id, "-n", "2")
    assert subject.state == "running"
    assert subject.product.ids() == ids, "no child"
    subject.no_more_snapshots_than(before)
    faults.clear()
    subject.works(cell)


def test_a_kernel_that_does_not_go_on_after_it_was_saved_is_told_as_dead(subject: Subject, faults: Faults) -> None:
    """A frozen one that counts as running would answer nobody for ever; what was saved is there."""
    subject.long_cell()
    faults.set("resume", "fails")
    try:
        said = subject.refused("snapshot", "create", subject.id, "--name", "last")
        assert "injected fault" in said, said
        until(lambda: subject.state == "failed", found=lambda: subject.state)
    finally:
        faults.clear()
    until(subject.sleeps)
    subject.ask("snapshot", "rm", "last")
