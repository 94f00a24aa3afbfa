"""A manifest is read strictly: whatever is not as we write it is refused, with the reason."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snapshot_helpers import LAYER, make

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.snapshots import FileIdentity, SnapshotStore, WorkspaceFile
from sandbox_gateway.snapshots.manifest import (
    MANIFEST_LIMIT,
    NewerFormat,
    manifest_bytes,
    read_manifest,
    references_in,
)


@pytest.fixture
async def content(store: SnapshotStore) -> bytes:
    """A manifest with something in every field."""
    file = WorkspaceFile("/home/u/data.csv", FileIdentity(1, 2, 3, 4), "d" * 64)
    made = await make(store, name="n", layers=(LAYER,), parent="template:x", workspace=(file,), template_key="k")
    assert manifest_bytes(made.manifest) == (made.directory / "manifest.json").read_bytes()
    return manifest_bytes(made.manifest)


def refused(content: bytes, snapshot_id: str = "") -> SandboxGatewayError:
    with pytest.raises(SandboxGatewayError) as error:
        read_manifest(content, snapshot_id or json.loads(content)["id"])
    assert error.value.code == "snapshot_damaged"
    return error.value


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda data: [data],
    "a field more": lambda data: data | {"more": 1},
    "a field less": lambda data: data.pop("runtime"),
    "no format": lambda data: data.update(format="1"),
    "format true": lambda data: data.update(format=True),
    "format 0": lambda data: data.update(format=0),
    "an id that leads elsewhere": lambda data: data.update(id="../../etc"),
    "a kind of its own": lambda data: data.update(kind="mine"),
    "a name that leads elsewhere": lambda data: data.update(name="../x"),
    "no sandbox": lambda data: data.update(sandbox=""),
    "a long text": lambda data: data.update(profile="x" * 5000),
    "an owner that is true": lambda data: data.update(owner=True),
    "a negative owner": lambda data: data.update(owner=-1),
    "a huge number": lambda data: data.update(epoch=2**70),
    "an infinite time": lambda data: data.update(created=math.inf),
    "no time": lambda data: data.update(created=math.nan),
    "a time as text": lambda data: data.update(created="now"),
    "layers as text": lambda data: data.update(layers=LAYER),
    "a digest that leads elsewhere": lambda data: data.update(layers=["sha256:../../x"]),
    "requirements as a list": lambda data: data.update(requirements=["runsc"]),
    "a requirement that is no text": lambda data: data.update(requirements={"runsc": 1}),
    "a cursor that is no number": lambda data: data.update(cursors={"shell": "1"}),
    "too many cursors": lambda data: data.update(cursors={str(n): n for n in range(1000)}),
    "launch as text": lambda data: data.update(launch="x"),
    "no files": lambda data: data.update(files=[]),
    "a file twice": lambda data: data.update(files=data["files"] * 2),
    "a file elsewhere": lambda data: data["files"][0].update(path="../../etc/passwd"),
    "an absolute file": lambda data: data["files"][0].update(path="/etc/passwd"),
    "a file with a zero byte": lambda data: data["files"][0].update(path="a\0b"),
    "a negative size": lambda data: data["files"][0].update(size=-1),
    "a size as a float": lambda data: data["files"][0].update(size=1.0),
    "a checksum too short": lambda data: data["files"][0].update(sha256="ab"),
    "a file with a field more": lambda data: data["files"][0].update(mode=1),
    "a workspace file that is relative": lambda data: data["workspace"][0].update(path="data.csv"),
    "too many files": lambda data: data.update(files=[{}] * 20_000),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_that_we_never_wrote_is_refused(content: bytes, what: str) -> None:
    data = json.loads(content)
    changed = CHANGES[what](data)
    refused(json.dumps(changed if what in ("no object", "a field more") else data).encode(), json.loads(content)["id"])


def test_any_field_of_any_other_type_is_refused(content: bytes) -> None:
    for name in json.loads(content):
        for wrong in (None, [], {}, "\udc80" * 3, 1.5, True, [[]], -(2**80)):
            data = json.loads(content)
            if data[name] == wrong or (name in ("parent", "template_key") and wrong is None):
                continue
            data[name] = wrong
            try:
                found = read_manifest(json.dumps(data).encode(), json.loads(content)["id"])
            except SandboxGatewayError as error:
                assert error.code == "snapshot_damaged"
            else:  # what is taken can be written again
                assert read_manifest(manifest_bytes(found), found.id) == found


def test_bytes_that_changed_on_the_disk_never_raise_anything_but_damage(content: bytes) -> None:
    chance = random.Random(1)
    snapshot_id = json.loads(content)["id"]
    for _ in range(400):
        broken = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        for candidate in (bytes(broken), bytes(broken[: chance.randrange(len(broken))])):
            try:
                read_manifest(candidate, snapshot_id)
            except SandboxGatewayError as error:
                assert error.code == "snapshot_damaged"
            references_in(candidate)


@pytest.mark.parametrize("text", [b"", b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"1" * 10_000])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    refused(text, "0" * 32)
    assert references_in(text) == (frozenset(), frozenset())


def test_a_newer_version_is_told_from_damage(content: bytes) -> None:
    error = refused(content.replace(b'"format": 1', b'"format": 2'))
    assert isinstance(error, NewerFormat) and "newer version" in error.message and "Upgrade" in error.hint


def test_a_manifest_of_another_snapshot_is_refused(content: bytes) -> None:
    assert "another snapshot" in refused(content, "f" * 32).message


async def test_a_manifest_of_a_gigabyte_is_refused_without_being_read(store: SnapshotStore) -> None:
    made = await make(store)
    with open(made.directory / "manifest.json", "r+b") as file:
        file.truncate(2**30)
    with pytest.raises(SandboxGatewayError) as error:
        store.get(made.id)
    assert error.value.code == "snapshot_damaged" and "too large" in error.value.message
    assert store.list() == () and [entry.id for entry in store.entries()] == [made.id]


async def test_facts_that_no_reader_would_take_are_not_committed(store: SnapshotStore) -> None:
    for wrong in ({"launch": {"x": "y" * MANIFEST_LIMIT}}, {"epoch": -1}, {"launch": {"x": object()}}, {"runtime": ""}):
        with pytest.raises(SandboxGatewayError) as error:
            await make(store, **wrong)
        assert error.value.code == "snapshot_failed"
    assert store.entries() == () and store.leftovers() == ()


async def test_a_launch_that_cannot_be_used_is_damage(store: SnapshotStore) -> None:
    made = await make(store, launch={"spec": {}})
    with pytest.raises(SandboxGatewayError) as error:
        await store.verify(made)
    assert error.value.code == "snapshot_damaged" and "launched" in error.value.message


@pytest.mark.parametrize("instead", ["directory", "symlink", "pipe", "nothing"])
async def test_something_else_in_the_manifests_place_is_damage(
    store: SnapshotStore, tmp_path: Path, instead: str
) -> None:
    import os

    made = await make(store)
    path = made.directory / "manifest.json"
    path.rename(tmp_path / "manifest.json")
    if instead == "directory":
        path.mkdir()
    elif instead == "symlink":
        path.symlink_to(tmp_path / "manifest.json")
    elif instead == "pipe":
        os.mkfifo(path)
    with pytest.raises(SandboxGatewayError) as error:
        store.find(made.id[:8])
    assert error.value.code == "snapshot_damaged"
    path.unlink() if instead == "pipe" else None
    store.remove(made.id)
    assert store.entries() == ()
