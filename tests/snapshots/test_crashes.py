"""kill -9 at every step, a disk that is full at every step, and processes that want the same thing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from snapshot_helpers import facts, make, save_image, tree

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.snapshots import Snapshot, SnapshotStore
from sandbox_gateway.snapshots.image import write_manifest
from sandbox_gateway.snapshots.locks import store_lock

HERE = Path(__file__).parent


@pytest.mark.parametrize("operation", ["commit", "seal", "rename", "remove", "sweep"])
def test_a_process_that_is_killed_at_any_step_leaves_a_store_that_is_whole(tmp_path: Path, operation: str) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "kill_driver.py", tmp_path, operation],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] > 10, "it was killed at many steps"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_disk_that_fails_at_any_step_leaves_nothing_and_is_told(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    await make(store)  # the store's directory and lock are there
    before = tree(store.directory)
    real = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "fsync", "chmod")}
    count, failing = 0, 0

    def breaking(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            writes = name != "open" or args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            if writes and "snapshots" in str(args[0] if name != "fsync" else os.readlink(f"/proc/self/fd/{args[0]}")):
                count += 1
                if count == failing:
                    raise OSError(error, os.strerror(error), str(args[0]))
            return real[name](*args, **options)

        return call

    async def attempt() -> Snapshot:
        draft = await store.begin()
        try:
            real["mkdir"](draft.image, 0o700)
            (draft.image / "pages.img").write_bytes(b"x" * 4096)
            return await draft.commit(facts(name="wanted"))
        except BaseException:
            await draft.discard()
            raise

    for name in real:
        monkeypatch.setattr(os, name, breaking(name))
    expected = "data_directory" if error == errno.EIO else "disk_full"
    for failing in range(1, 100):
        count = 0
        try:
            made = await attempt()
        except SandboxGatewayError as raised:
            assert raised.code == expected, (failing, raised)
            assert tree(store.directory) == before, failing
            continue
        if count < failing:  # there is no such step any more
            break
        assert failing == 1, "only that a directory cannot be made which is there already is no failure"
        store.remove(made.id)
    assert 10 < failing < 99
    await store.verify(made, deep=True)


@pytest.fixture
def small(paths: Paths) -> Iterator[SnapshotStore]:
    """A store on a file system of 1 MiB."""
    paths.snapshots.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(paths.snapshots)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield SnapshotStore(paths)
    subprocess.run(["umount", str(paths.snapshots)], check=True)


async def test_a_disk_that_is_really_full_leaves_room_again(small: SnapshotStore) -> None:
    draft = await small.begin()
    save_image(draft.image)
    with pytest.raises(OSError, match="No space"), open(draft.image / "more", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(SandboxGatewayError) as error:
        await draft.commit(facts(launch={"x": "y" * 100_000}))
    assert error.value.code == "disk_full"
    await draft.discard()
    assert tree(small.directory) == set()
    await small.verify(await make(small), deep=True)


CONTEST = """
import asyncio, sys
from snapshot_helpers import make
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.snapshots import SnapshotStore
sys.stdin.readline()
try:
    asyncio.run(make(SnapshotStore(discover()), name="wanted"))
    print("won")
except SandboxGatewayError as error:
    print(error.code)
"""


def test_of_two_processes_that_want_one_name_one_gets_it(paths: Paths) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "SANDBOX_GATEWAY_HOME": str(paths.home)}
    for _ in range(3):
        both = [
            subprocess.Popen(
                [sys.executable, "-c", CONTEST],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for process in both:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
        assert said == ["invalid_request", "invalid_request", "won"]
        store = SnapshotStore(paths)
        (found,) = store.list()
        assert tree(store.directory) == {found.id}
        store.remove(found.id)


async def test_a_name_that_is_taken_while_a_snapshot_is_written_is_seen_at_the_end(store: SnapshotStore) -> None:
    other = await make(store)
    draft = await store.begin()
    save_image(draft.image)
    with store_lock(store.directory):  # somebody else is about to give the name
        commit = asyncio.create_task(draft.commit(facts(name="wanted")))
        while not (draft.image.parent / "manifest.json").exists() and not commit.done():
            await asyncio.sleep(0.001)
        write_manifest(other.directory, replace(other.manifest, name="wanted"), durable=False)
    with pytest.raises(SandboxGatewayError) as error:
        await commit
    assert error.value.code == "invalid_request"
    await draft.discard()
    assert tree(store.directory) == {other.id}


HOLD = """
import asyncio, sys
from snapshot_helpers import save_image
from sandbox_gateway.host.paths import discover
from sandbox_gateway.snapshots import SnapshotStore
store = SnapshotStore(discover())
draft = asyncio.run(store.begin())
save_image(draft.image)
lease = store.hold(store.find("held"))
print(draft.id, flush=True)
sys.stdin.readline()
"""


async def test_what_another_process_works_on_is_left_alone_until_it_is_killed(
    store: SnapshotStore, paths: Paths
) -> None:
    held = await make(store, name="held")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "SANDBOX_GATEWAY_HOME": str(paths.home)}
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    draft = (await other.stdout.readline()).decode().strip()
    try:
        assert store.leftovers() == () and store.sweep() == 0
        assert tree(store.directory) == {held.id, f".{draft}.new"}
        with pytest.raises(SandboxGatewayError) as error:
            store.remove(held.id)
        assert error.value.code == "snapshot_in_use"
    finally:
        other.kill()
        await other.wait()
    assert [path.name for path in store.leftovers()] == [f".{draft}.new"]
    assert store.sweep() == 1
    store.remove(held.id)
    assert tree(store.directory) == set()


# Things in the way


@pytest.mark.parametrize("what", ["symlink", "file", "dangling"])
async def test_something_else_in_the_stores_place_is_refused(store: SnapshotStore, tmp_path: Path, what: str) -> None:
    if what == "file":
        store.directory.write_text("")
    else:
        store.directory.symlink_to(tmp_path if what == "symlink" else tmp_path / "nowhere")
    with pytest.raises(SandboxGatewayError) as error:
        await store.begin()
    assert error.value.code == "data_directory"
    assert list(tmp_path.iterdir()) == []


async def test_symlinks_in_the_store_are_neither_snapshots_nor_followed(store: SnapshotStore, tmp_path: Path) -> None:
    made = await make(store)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    linked = "a" * 32
    (store.directory / linked).symlink_to(tmp_path / "precious")
    (store.directory / f".{'b' * 32}.new").symlink_to(tmp_path / "precious")
    (store.directory / f".{'c' * 32}.gone").write_text("")
    assert store.list() == (made,)
    with pytest.raises(SandboxGatewayError) as error:
        store.get(linked)
    assert error.value.code == "snapshot_damaged"
    store.remove(linked)
    assert store.sweep() == 2
    assert (tmp_path / "precious" / "file").read_text() == "x"
    assert tree(store.directory) == {made.id}


async def test_a_lock_that_leads_elsewhere_is_not_used(store: SnapshotStore, tmp_path: Path) -> None:
    made = await make(store)
    (made.directory / "lock").unlink()
    (made.directory / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SandboxGatewayError) as error:
        store.hold(made)
    assert error.value.code == "snapshot_damaged" and not (tmp_path / "elsewhere").exists()
    store.remove(made.id)


async def test_other_things_in_the_store_are_left_alone(store: SnapshotStore) -> None:
    made = await make(store)
    for name in ("notes.txt", ".hidden", "UPPER" * 6 + "AB", "0" * 31, "0" * 33):
        (store.directory / name).mkdir()
    assert store.list() == (made,) and store.sweep() == 0
    assert len(tree(store.directory)) == 6


async def test_a_caller_who_gives_up_at_any_moment_leaves_nothing(store: SnapshotStore) -> None:
    for moment in range(30):

        async def work() -> None:
            async with await store.begin() as draft:
                await asyncio.to_thread(save_image, draft.image, 2**20)
                await draft.commit(facts())

        task = asyncio.create_task(work())
        for _ in range(moment):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            assert tree(store.directory) == set(), moment
        else:
            for snapshot in store.list():
                store.remove(snapshot.id)
