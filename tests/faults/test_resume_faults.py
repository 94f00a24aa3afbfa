"""A failed resume leaves the snapshot (DESIGN, invariant 5); once the fault is gone nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from acceptance import until
from faulty import Faults, Subject
from model import Request

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link.host import Link
from sandbox_gateway.suspension import Suspension


def suspended_in_a_cell(subject: Subject) -> Request:
    """Suspend in the middle of a printing cell."""
    cell = subject.long_cell()
    subject.ask("suspend", subject.id)
    assert subject.state == "suspended" and subject.sleeps()
    # Checksums come a moment later; until then any touch of a file counts as damage.
    until(lambda: all(file["sha256"] for file in json.loads(manifest(subject).read_text())["files"]), 60)
    return cell


def goes_on(subject: Subject, cell: Request) -> None:
    """Resume, and everything is there."""
    subject.ask("resume", subject.id)
    assert subject.state == "running"
    subject.works(cell)


@pytest.mark.parametrize("way", ["fails", "is killed", "fails when it has done its work"])
def test_a_resume_whose_runsc_fails_leaves_the_snapshot(subject: Subject, faults: Faults, way: str) -> None:
    cell = suspended_in_a_cell(subject)
    snapshot = subject.snapshot()
    faults.set("restore", way)
    subject.refused("resume", subject.id)
    assert subject.state == "suspended"
    assert subject.snapshot() == snapshot
    assert subject.sleeps(), "nothing of the failed resume is left"
    assert subject.manager.is_alive(), "a suspended kernel stays a kernel"
    faults.clear()
    goes_on(subject, cell)


@pytest.mark.parametrize("deaf", [1, 2])
def test_a_restored_kernel_that_does_not_answer_is_tried_once_more_and_then_given_up(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, deaf: int
) -> None:
    """In an epoch of its own each; what the given-up ones said reaches nobody."""
    cell = suspended_in_a_cell(subject)
    snapshot, heard, heartbeat = subject.snapshot(), [], Suspension.heartbeat

    async def heart(self: Suspension, link: Link) -> None:
        heard.append(link)
        if len(heard) <= deaf:
            await asyncio.sleep(0.3)  # it prints meanwhile
            raise SandboxGatewayError("restore_failed", "nobody answers")
        await heartbeat(self, link)

    monkeypatch.setattr(Suspension, "heartbeat", heart)
    if deaf == 1:
        subject.ask("resume", subject.id)
        assert len(heard) == 2 and subject.state == "running"
        subject.works(cell)
        return
    assert "nobody answers" in subject.refused("resume", subject.id)
    assert len(heard) == 2 and subject.state == "suspended" and subject.sleeps()
    assert subject.snapshot() == snapshot
    goes_on(subject, cell)


def test_a_request_that_could_not_wake_its_kernel_is_told_why_and_the_next_one_wakes_it(
    subject: Subject, faults: Faults
) -> None:
    subject.ask("suspend", subject.id)
    faults.set("restore", "fails")
    request = subject.watcher.execute("print('never')", cut=True)
    subject.watcher.wait(lambda: request.done, "the refusal")
    assert [reply["ename"] for reply in request.replies] == ["SandboxAsleep"]
    assert subject.state == "suspended"
    faults.clear()
    subject.works()


@contextmanager
def truncated(path: Path) -> Iterator[None]:
    """The second half of a file is gone."""
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    yield
    path.write_bytes(content)


@contextmanager
def changed(path: Path) -> Iterator[None]:
    """One byte in the middle of a file is another."""
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    yield
    path.write_bytes(content)


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """A file is gone."""
    elsewhere = path.with_name(f"{path.name}.elsewhere") if path.is_file() else path.parent.parent / "elsewhere"
    os.rename(path, elsewhere)
    yield
    os.rename(elsewhere, path)


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """A directory stands in the place of a file: nobody, not even root, can read it."""
    elsewhere = path.parent.parent / "elsewhere"
    os.rename(path, elsewhere)
    path.mkdir()
    yield
    path.rmdir()
    os.rename(elsewhere, path)


def manifest(subject: Subject) -> Path:
    return subject.snapshot() / "manifest.json"


def pages(subject: Subject) -> Path:
    """The largest file: the kernel's memory."""
    return max((path for path in subject.snapshot().rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def state_file(subject: Subject) -> Path:
    """The second largest: what runsc knows of the kernel's processes."""
    files = [path for path in subject.snapshot().rglob("*.img") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_size)[-2]


def layer(subject: Subject) -> Path:
    """One of the layers that it needs; there may be those of an earlier environment, too."""
    needed = [digest.removeprefix("sha256:") for digest in json.loads(manifest(subject).read_text())["layers"]]
    layers = [subject.product.home / "layers" / f"{digest}.erofs" for digest in needed]
    return max(layers, key=lambda path: path.stat().st_size)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        *((manifest, damage) for damage in (truncated, removed, unreadable)),
        *((what, damage) for what in (pages, state_file) for damage in (truncated, changed, removed, unreadable)),
    ],
    ids=lambda value: value.__name__,
)
def test_a_damaged_snapshot_is_refused_before_anything_is_restored(
    subject: Subject, what: Callable[[Subject], Path], damage: Callable[[Path], Iterator[None]]
) -> None:
    cell = suspended_in_a_cell(subject)
    with damage(what(subject)):  # type: ignore[attr-defined]
        said = subject.refused("resume", subject.id)
        assert "damage" in said or "snapshot" in said, said
        assert subject.state == "suspended"
        assert subject.sleeps()
    goes_on(subject, cell)


def test_a_missing_layer_is_told_and_leaves_the_snapshot(subject: Subject) -> None:
    cell = suspended_in_a_cell(subject)
    with removed(layer(subject)):  # type: ignore[attr-defined]
        said = subject.refused("resume", subject.id)
        assert "layer" in said, said
        assert subject.state == "suspended"
        assert subject.sleeps()
    goes_on(subject, cell)


def test_a_resume_while_the_store_is_locked_leaves_the_snapshot(subject: Subject) -> None:
    cell = suspended_in_a_cell(subject)
    blocker = sqlite3.connect(subject.product.home / "store.sqlite", isolation_level=None)
    try:
        blocker.execute("BEGIN EXCLUSIVE")
        subject.refused("resume", subject.id)
    finally:
        blocker.close()
    assert subject.state == "suspended"
    goes_on(subject, cell)


def test_what_cannot_be_resumed_can_still_be_removed(subject: Subject) -> None:
    suspended_in_a_cell(subject)
    with truncated(pages(subject)):  # type: ignore[attr-defined]
        subject.refused("resume", subject.id)
        path = subject.snapshot()
        subject.ask("rm", subject.id)
        assert not path.exists()
        path.joinpath("image").mkdir(parents=True)  # where `truncated` puts the file back
    for leftover in sorted(path.rglob("*"), reverse=True):
        leftover.unlink() if leftover.is_file() else leftover.rmdir()
    path.rmdir()
