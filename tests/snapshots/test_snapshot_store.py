"""Making, finding, naming and removing snapshots."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest
from snapshot_helpers import LAYER, RUNSC, SECRET, facts, launch, make, save_image, tree

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.snapshots import Draft, Kind, SnapshotStore


async def test_a_committed_snapshot_is_found_again_with_all_it_was_told(store: SnapshotStore) -> None:
    made = await make(store, Kind.SUSPENDED, name="before-lunch", layers=(LAYER,), parent="template:k", epoch=3)
    again = SnapshotStore(store._home).get(made.id)
    assert again == made
    assert again.manifest.saved_launch() == launch()
    assert (again.manifest.kind, again.manifest.epoch, again.manifest.cursors) == (
        Kind.SUSPENDED,
        3,
        {"iopub": 12, "shell": 3},
    )
    assert again.size == 4096 + 5 and again.manifest.sealed
    assert sorted(path.name for path in again.image.iterdir()) == ["checkpoint.img", "pages.img"]


async def test_nothing_of_a_snapshot_can_be_read_by_others_whatever_the_runtime_wrote(store: SnapshotStore) -> None:
    old = os.umask(0)
    try:
        made = await make(store)
    finally:
        os.umask(old)
    found = [store.directory, made.directory, *made.directory.rglob("*")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in found}
    assert modes == {
        "snapshots": 0o700,
        made.id: 0o700,
        "image": 0o700,
        "checkpoint.img": 0o600,
        "pages.img": 0o600,
        "manifest.json": 0o600,
        "lock": 0o600,
    }


async def test_a_draft_is_no_snapshot_and_discarding_leaves_nothing(store: SnapshotStore) -> None:
    draft = await store.begin()
    save_image(draft.image)
    assert store.list() == () and store.entries() == ()
    await draft.discard()
    await draft.discard()
    assert tree(store.directory) == set()


async def test_a_failure_between_begin_and_commit_discards_the_draft(store: SnapshotStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with await store.begin() as draft:
            save_image(draft.image)
            raise ZeroDivisionError
    assert tree(store.directory) == set()


async def test_an_error_after_the_commit_leaves_the_snapshot(store: SnapshotStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with await store.begin() as draft:
            save_image(draft.image)
            await draft.commit(facts())
            raise ZeroDivisionError
    assert len(store.list()) == 1


async def test_an_unsealed_commit_has_no_checksums_until_it_is_sealed(store: SnapshotStore) -> None:
    made = await make(store, sealed=False)
    assert not made.manifest.sealed
    assert await store.verify(made) == made, "its identity answers for it"
    sealed = await store.seal(made)
    assert sealed.manifest.sealed and store.get(made.id) == sealed
    await store.verify(sealed, deep=True)


async def test_sealing_keeps_a_name_that_was_given_meanwhile(store: SnapshotStore) -> None:
    made = await make(store, sealed=False)
    store.rename(made, "later")
    assert (await store.seal(made)).name == "later"


async def test_sealing_what_was_removed_meanwhile_is_no_error_and_makes_nothing(store: SnapshotStore) -> None:
    made = await make(store, sealed=False)
    store.remove(made.id)
    assert await store.seal(made) == made
    assert tree(store.directory) == set()


@pytest.mark.parametrize("kind", ["empty", "absent", "symlink", "pipe", "link inside"])
async def test_an_image_that_no_runtime_makes_is_not_committed(store: SnapshotStore, tmp_path: Path, kind: str) -> None:
    async with await store.begin() as draft:
        if kind == "empty":
            draft.image.mkdir()
        elif kind == "symlink":
            save_image(tmp_path / "elsewhere")
            draft.image.symlink_to(tmp_path / "elsewhere")
        elif kind != "absent":
            save_image(draft.image)
            if kind == "pipe":
                os.mkfifo(draft.image / "pipe")
            else:
                (draft.image / "link").symlink_to("/etc/passwd")
        with pytest.raises(SandboxGatewayError) as error:
            await draft.commit(facts())
        assert error.value.code == "snapshot_failed"
    assert tree(store.directory) == set()


# Names


async def test_a_snapshot_is_found_by_id_by_name_and_by_a_beginning(store: SnapshotStore) -> None:
    one, other = await make(store, name="one"), await make(store, name="other")
    assert store.find(one.id) == one
    assert store.find("other") == other
    assert store.find(one.id[:10]) == one
    for wanted in ("", "nothing", "on", "../x", "/", "\0"):
        with pytest.raises(SandboxGatewayError) as error:
            store.find(wanted)
        assert error.value.code == ("ambiguous_id" if wanted == "" else "unknown_snapshot") or wanted == ""


async def test_a_beginning_that_fits_several_is_refused_and_a_name_goes_first(store: SnapshotStore) -> None:
    made = [await make(store) for _ in range(17)]  # more than there are digits
    first = sorted(snapshot.id[0] for snapshot in made)
    double = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(SandboxGatewayError) as error:
        store.find(double)
    assert error.value.code == "ambiguous_id"
    named = await make(store, name=double)
    assert store.find(double) == named


@pytest.mark.parametrize("name", ["a/b", "..", ".", "../../etc", "x" * 65, "a b", "a\n", "ä", "0" * 32, "\0"])
async def test_a_name_that_could_be_taken_for_something_else_is_refused(store: SnapshotStore, name: str) -> None:
    with pytest.raises(SandboxGatewayError) as error:
        await make(store, name=name)
    assert error.value.code == "invalid_request"
    made = await make(store)
    with pytest.raises(SandboxGatewayError):
        store.rename(made, name)
    assert tree(store.directory) == {made.id}


async def test_a_name_belongs_to_one_snapshot(store: SnapshotStore) -> None:
    first, second = await make(store, name="same"), await make(store)
    with pytest.raises(SandboxGatewayError) as error:
        await make(store, name="same")
    assert error.value.code == "invalid_request" and "already" in error.value.message
    with pytest.raises(SandboxGatewayError):
        store.rename(second, "same")
    store.rename(first, "same")
    store.rename(first, "")
    assert store.rename(second, "same").name == "same"
    assert tree(store.directory) == {first.id, second.id}


async def test_of_many_who_want_one_name_at_once_one_gets_it(store: SnapshotStore) -> None:
    outcomes = await asyncio.gather(*(make(store, name="wanted") for _ in range(8)), return_exceptions=True)
    assert len([x for x in outcomes if not isinstance(x, BaseException)]) == 1
    assert len(store.list()) == 1 and len(tree(store.directory)) == 1


# Leases and removal


async def test_removing_leaves_nothing_and_is_refused_while_somebody_reads(store: SnapshotStore) -> None:
    made = await make(store)
    with store.hold(made), store.hold(made):
        assert store.entries()[0].in_use
        with pytest.raises(SandboxGatewayError) as error:
            store.remove(made.id)
        assert error.value.code == "snapshot_in_use"
    assert not store.entries()[0].in_use
    store.remove(made.id)
    assert tree(store.directory) == set()
    for again in (made.id, "x", "../" + made.id):
        with pytest.raises(SandboxGatewayError) as error:
            store.remove(again)
        assert error.value.code == "unknown_snapshot"
    with pytest.raises(SandboxGatewayError) as error:
        store.hold(made)
    assert error.value.code == "unknown_snapshot"


async def test_a_commit_can_keep_its_lease_until_the_draft_is_closed(store: SnapshotStore) -> None:
    async with await store.begin() as draft:
        save_image(draft.image)
        made = await draft.commit(facts(Kind.FORK), keep_lease=True)
        with pytest.raises(SandboxGatewayError):
            store.remove(made.id)
    store.remove(made.id)


async def test_looking_whether_a_snapshot_is_used_never_makes_anybody_else_fail(store: SnapshotStore) -> None:
    made = await make(store)

    def look() -> None:
        for _ in range(200):
            assert not store.entries()[0].in_use

    async def use() -> None:
        for _ in range(200):
            await asyncio.to_thread(lambda: store.hold(made).release())

    looking = [asyncio.to_thread(look) for _ in range(2)]
    await asyncio.gather(use(), return_exceptions=False)
    await asyncio.gather(*looking)


async def test_references_are_those_of_all_snapshots_a_newer_programs_included(store: SnapshotStore) -> None:
    await make(store, layers=(LAYER,))
    other = await make(store, requirements={"cpu": "x"}, layers=(f"sha256:{'c' * 64}",))
    path = other.directory / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    assert store.references() == ({LAYER, f"sha256:{'c' * 64}"}, {RUNSC})


async def test_what_is_private_shows_neither_in_a_repr_nor_in_what_people_see(store: SnapshotStore) -> None:
    made = await make(store)
    assert SECRET in (made.directory / "manifest.json").read_text()
    for shown in (repr(made), repr(made.manifest), repr(facts()), str(made.manifest.public_dict())):
        assert SECRET not in shown and "a-kernels-key" not in shown


async def test_a_fresh_installation_has_no_snapshots_and_looking_makes_nothing(paths: Paths) -> None:
    store = SnapshotStore(paths)
    assert (store.list(), store.leftovers(), store.sweep()) == ((), (), 0)
    assert store.references() == (frozenset(), frozenset())
    with pytest.raises(SandboxGatewayError) as error:
        store.find("x")
    assert error.value.code == "unknown_snapshot"
    assert not paths.snapshots.exists()


async def test_a_draft_cannot_be_committed_twice(store: SnapshotStore) -> None:
    draft: Draft = await store.begin()
    save_image(draft.image)
    made = await draft.commit(facts())
    with pytest.raises(SandboxGatewayError):
        await draft.commit(facts())
    await draft.discard()
    assert store.get(made.id) == made
