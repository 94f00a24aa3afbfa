"""What owners that are gone have left is removed with the next start; what the next owner needs is not."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from snapshot_helpers import make

from sandbox_gateway.cursors import NAME
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.housekeeping import tidy
from sandbox_gateway.images.store import HANDED_OUT_FOR, LayerStore, Recipe, StoredLayer
from sandbox_gateway.images.tree import Tree
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.snapshots import Kind
from sandbox_gateway.snapshots.collect import TEMPLATE_GRACE
from sandbox_gateway.templates import TemplateRecord

ID = "a-kernel"


@pytest.fixture
async def lifecycle(paths: Paths) -> AsyncIterator[Lifecycle]:
    found = Lifecycle(paths)
    yield found
    await found.close()


async def test_a_snapshot_that_was_never_finished_goes(lifecycle: Lifecycle) -> None:
    draft = await lifecycle.snapshots.begin()
    directory = draft.image.parent
    draft._lease.release()  # as the death of its process does
    assert directory.exists()
    await lifecycle.sweep()
    assert not directory.exists()


async def test_a_snapshot_that_is_being_made_stays(lifecycle: Lifecycle) -> None:
    async with await lifecycle.snapshots.begin() as draft:
        await lifecycle.sweep()
        assert draft.image.parent.exists()


async def test_a_suspended_sandbox_without_an_owner_keeps_its_directory_and_an_ended_one_does_not(
    lifecycle: Lifecycle,
) -> None:
    now = time.time()
    record = SandboxRecord(ID, State.SUSPENDED, "p", "fake", now, now, boot_id(), snapshot="0" * 32)
    lifecycle.store.put(record)
    directory = lifecycle.paths.sandbox(ID)
    directory.mkdir(mode=0o700)
    (directory / NAME).write_bytes(b"how far the clients have been served")
    await lifecycle.sweep()
    assert (directory / NAME).exists()
    lifecycle.store.put(replace(record, state=State.TERMINATED, snapshot=None))
    await lifecycle.sweep()
    assert not directory.exists()


async def test_a_template_whose_builder_was_killed_before_it_was_written_down_goes_in_time(
    lifecycle: Lifecycle,
) -> None:
    """Else it would keep its room on the disk for as long as there is a budget for it."""
    key, other = "a" * 64, "b" * 64
    built, nobodys = [
        await make(lifecycle.snapshots, Kind.TEMPLATE, template_key=template) for template in (key, other)
    ]
    lifecycle.templates.records.put(TemplateRecord(key, "c" * 64, "p", "fake", snapshot=built.id))
    here = (lifecycle.paths, lifecycle.store, lifecycle.snapshots, lifecycle.images)
    await asyncio.to_thread(tidy, *here)
    assert {snapshot.id for snapshot in lifecycle.snapshots.list()} == {built.id, nobodys.id}
    for snapshot in (built, nobodys):
        os.utime(snapshot.directory / "lock", (time.time() - TEMPLATE_GRACE - 10,) * 2)
    await asyncio.to_thread(tidy, *here)
    assert [snapshot.id for snapshot in lifecycle.snapshots.list()] == [built.id]


def layer(paths: Paths, text: str) -> StoredLayer:
    """A state of one environment, last wanted longer ago than what was just handed out."""

    def build() -> Recipe:
        tree = Tree()
        tree.file("/text", text)
        return Recipe(tree)

    made = LayerStore(paths).ensure("environment", text, build, what="environment")
    then = time.time() - HANDED_OUT_FOR - 1
    os.utime(made.path.with_suffix(".json"), (then, then))
    return made


async def test_the_layer_of_a_former_environment_goes_when_no_sandbox_needs_it(lifecycle: Lifecycle) -> None:
    """Each `pip install` makes an image of a gigabyte or so: nobody has to know `prune` to keep room on the disk."""
    unneeded, needed, present = (layer(lifecycle.paths, text) for text in ("first", "second", "present"))
    now = time.time()
    record = SandboxRecord(ID, State.SUSPENDED, "p", "fake", now, now, boot_id(), snapshot="0" * 32)
    lifecycle.store.put(replace(record, layers=(needed.digest,)))
    (await lifecycle.claim("another")).release()  # which has it look for what others left
    async with asyncio.timeout(20):
        while unneeded.path.exists():
            await asyncio.sleep(0.02)
    assert needed.path.exists() and present.path.exists()


async def test_while_a_snapshot_cannot_be_read_no_layer_goes(lifecycle: Lifecycle) -> None:
    """What it needs is known again when it can be read: too late for a layer of an environment that is no more."""
    former, _ = layer(lifecycle.paths, "former"), layer(lifecycle.paths, "present")
    manifest = lifecycle.paths.snapshots / ("0" * 32) / "manifest.json"
    manifest.mkdir(parents=True)  # a read of it fails, for root too
    here = (lifecycle.paths, lifecycle.store, lifecycle.snapshots, lifecycle.images)
    await asyncio.to_thread(tidy, *here)
    assert former.path.exists()
    manifest.rmdir()
    manifest.parent.rmdir()
    await asyncio.to_thread(tidy, *here)
    assert not former.path.exists()
