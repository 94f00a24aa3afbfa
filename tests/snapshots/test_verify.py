"""Verification refuses whatever is not what was saved, or what others could have changed."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from snapshot_helpers import LAYER, make, make_layer

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.snapshots import Snapshot, SnapshotStore


async def refused(store: SnapshotStore, snapshot: Snapshot, *, deep: bool = False) -> SandboxGatewayError:
    with pytest.raises(SandboxGatewayError) as error:
        await store.verify(snapshot, deep=deep)
    assert "\n" not in error.value.message
    return error.value


async def test_what_is_as_it_was_saved_passes(store: SnapshotStore, paths: Paths) -> None:
    make_layer(paths)
    made = await make(store, layers=(LAYER,))
    assert await store.verify(made) == made
    assert await store.verify(made, deep=True) == made


def _truncate(pages: Path) -> None:
    os.truncate(pages, 100)


def _append(pages: Path) -> None:
    with open(pages, "ab") as file:
        file.write(b"x")


def _flip(pages: Path) -> None:
    content = bytearray(pages.read_bytes())
    content[1000] ^= 1
    pages.write_bytes(content)


def _flip_with_old_times(pages: Path) -> None:
    was = pages.stat()
    _flip(pages)
    os.utime(pages, ns=(was.st_atime_ns, was.st_mtime_ns))


def _replace(pages: Path) -> None:
    other = pages.with_name("other")
    other.write_bytes(b"y" * pages.stat().st_size)
    os.rename(other, pages)


def _link(pages: Path) -> None:
    shutil.copy(pages, pages.parent.parent / "copy")
    pages.unlink()
    pages.symlink_to(pages.parent.parent / "copy")


def _pipe(pages: Path) -> None:
    pages.unlink()
    os.mkfifo(pages)


def _extra_pipe(pages: Path) -> None:
    os.mkfifo(pages.with_name("more"))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated: 100 bytes instead of 4096"),
    "longer": (_append, "too long"),
    "one bit": (_flip, "not what was saved"),
    "one bit, times set back": (_flip_with_old_times, "not what was saved"),
    "another file": (_replace, "not what was saved"),
    "missing": (Path.unlink, "is missing"),
    "extra": (lambda pages: pages.with_name("more").write_bytes(b""), "does not belong"),
    "an extra pipe": (_extra_pipe, "neither a file"),
    "a symlink to the same bytes": (_link, "neither a file"),
    "a pipe": (_pipe, "neither a file"),
    "the whole image": (lambda pages: shutil.rmtree(pages.parent), "cannot be read"),
    "writable by others": (lambda pages: pages.chmod(0o666), "written by other users"),
    "the image writable by the group": (lambda pages: pages.parent.chmod(0o770), "written by other users"),
    "the store writable by others": (lambda pages: pages.parents[2].chmod(0o777), "written by other users"),
    "the manifest writable by others": (
        lambda pages: (pages.parents[1] / "manifest.json").chmod(0o606),
        "written by other users",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_what_changed_is_refused_with_the_reason(store: SnapshotStore, what: str) -> None:
    made = await make(store)
    change, reason = CHANGES[what]
    change(made.image / "pages.img")
    error = await refused(store, made)
    assert error.code == "snapshot_damaged" and reason in error.message and error.hint
    for pipe in (path for path in made.image.glob("*") if path.is_fifo()):
        pipe.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", ["image/pages.img", "image", "manifest.json", "."])
async def test_a_snapshot_of_which_a_part_belongs_to_somebody_else_is_refused(store: SnapshotStore, part: str) -> None:
    made = await make(store)
    os.chown(made.directory / part, 12345, -1)
    error = await refused(store, made)
    assert error.code == "snapshot_damaged" and "belongs to user 12345" in error.message


async def test_a_snapshot_that_somebody_else_made_is_refused(store: SnapshotStore) -> None:
    made = await make(store)
    manifest = made.directory / "manifest.json"
    text = manifest.read_text()
    said = f'"owner": {os.geteuid()}'
    assert said in text
    manifest.write_text(text.replace(said, '"owner": 54321'))
    assert "user 54321" in (await refused(store, made)).message


async def test_a_missing_or_truncated_layer_makes_it_unfit(store: SnapshotStore, paths: Paths) -> None:
    made = await make(store, layers=(LAYER,))
    error = await refused(store, made)
    assert error.code == "snapshot_unfit" and LAYER[:19] in error.message
    layer = make_layer(paths)
    await store.verify(made)
    os.truncate(layer, 10)
    assert (await refused(store, made)).code == "snapshot_unfit"


async def test_an_equal_copy_is_taken_after_reading_it_and_then_known_again(store: SnapshotStore) -> None:
    """As after a backup was put back."""
    made = await make(store, name="kept")
    pages = made.image / "pages.img"
    shutil.copy(pages, pages.with_name("copy"))
    os.rename(pages.with_name("copy"), pages)
    pages.chmod(0o600)
    again = await store.verify(made)
    assert again.manifest.files != made.manifest.files and again.name == "kept"
    assert store.get(made.id) == again
    read: list[int] = []
    await store.verify(again, report=lambda done, total: read.append(done))
    assert read == [], "its identity is known again: nothing is read"


async def test_damage_that_leaves_the_identity_alone_is_found_by_reading_all(store: SnapshotStore) -> None:
    """A disk that gives other bytes: imitated by another checksum."""
    made = await make(store)
    manifest = made.directory / "manifest.json"
    digest = made.manifest.files[1].sha256 or ""
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    await store.verify(made)
    assert "not what was saved" in (await refused(store, made, deep=True)).message


async def test_an_unsealed_snapshot_stands_by_its_identity_alone(store: SnapshotStore) -> None:
    made = await make(store, sealed=False)
    await store.verify(made, deep=True)
    (made.image / "pages.img").chmod(0o600)  # only the change time moves
    os.utime(made.image / "pages.img")
    assert "before it had a checksum" in (await refused(store, made)).message
    with pytest.raises(SandboxGatewayError) as error:
        await store.seal(made)
    assert error.value.code == "snapshot_damaged"


async def test_a_snapshot_that_is_gone_is_unknown(store: SnapshotStore) -> None:
    made = await make(store)
    store.remove(made.id)
    assert (await refused(store, made)).code == "unknown_snapshot"


async def test_reading_ends_soon_when_nobody_waits_any_more(store: SnapshotStore) -> None:
    made = await make(store, size=64 * 2**20)
    pieces: list[int] = []
    begun, cancelled = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def report(done: int, total: int) -> None:
        pieces.append(done)
        loop.call_soon_threadsafe(begun.set)
        cancelled.wait(60)

    task = asyncio.create_task(store.verify(made, deep=True, report=report))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)  # it is told before this goes on
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pieces[-1] < made.size
