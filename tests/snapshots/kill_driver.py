"""Runs one operation on a store in a child that kills itself at its n-th file operation, for every n.

A program of its own, since forking from a process with threads is no test of anything but luck.
Prints one JSON line: how many steps the operation took.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snapshot_helpers import facts, make, save_image

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.snapshots import SnapshotStore, collect

STEPS = ("open", "mkdir", "rename", "fsync", "chmod", "unlink", "rmdir", "scandir", "utime", "readv", "close")


async def commit(store: SnapshotStore) -> None:
    """From begin to a sealed, named snapshot."""
    async with await store.begin() as draft:
        save_image(draft.image)
        await draft.commit(facts(name="wanted"))


async def seal(store: SnapshotStore) -> None:
    """An unsealed commit, then the seal."""
    await store.seal(await make(store, sealed=False))


async def rename(store: SnapshotStore) -> None:
    """Another name for a snapshot."""
    store.rename(store.find("old"), "wanted")


async def remove(store: SnapshotStore) -> None:
    """A removal."""
    store.remove(store.find("old").id)


async def sweep(store: SnapshotStore) -> None:
    """Removing what a killed process left: a draft, found because its lock is free."""
    collect(store, list, budget=0, named=True)


OPERATIONS: dict[str, Callable[[SnapshotStore], Any]] = {
    operation.__name__: operation for operation in (commit, seal, rename, remove, sweep)
}


def prepare(store: SnapshotStore, operation: str) -> None:
    """What the operation finds."""

    async def before() -> None:
        if operation in ("rename", "remove", "sweep"):
            await make(store, name="old")
        if operation == "sweep":
            draft = await store.begin()
            save_image(draft.image)

    pid = os.fork()  # the draft's lock ends with this process
    if pid == 0:
        asyncio.run(before())
        os._exit(0)
    os.waitpid(pid, 0)


def run_until(step: int, store: SnapshotStore, operation: str) -> bool:
    """Whether the operation came to its end before its ``step``-th file operation."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for name in STEPS:
            setattr(os, name, dying(getattr(os, name)))
        asyncio.run(OPERATIONS[operation](store))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return True
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    return False


async def check(store: SnapshotStore, operation: str, at: str) -> None:
    """After the crash: what is listed is whole, names are unique, and a sweep leaves nothing else."""
    entries = store.entries()
    assert all(entry.snapshot is not None for entry in entries), f"{at}: damaged"
    for snapshot in store.list():
        await store.verify(snapshot, deep=True)
    names = [snapshot.name for snapshot in store.list()]
    expected: dict[str, list[list[str]]] = {
        "commit": [[], ["wanted"]],
        "seal": [[], [""]],
        "rename": [["old"], ["wanted"]],
        "remove": [["old"], []],
        "sweep": [["old"], []],
    }
    assert names in expected[operation], f"{at}: {names}"
    store.sweep()
    left = {path.name for path in store.directory.iterdir()} if store.directory.exists() else set()
    assert left - {".lock"} == {snapshot.id for snapshot in store.list()}, f"{at}: {left}"
    for snapshot in store.list():
        inside = {path.name for path in snapshot.directory.iterdir()} - {".manifest.json"}
        assert inside == {"image", "lock", "manifest.json"}, f"{at}: {inside}"
        await store.verify(await store.seal(snapshot), deep=True)
        store.remove(snapshot.id)


def main(home: Path, operation: str) -> None:
    """Kill it at every step."""
    step, ended = 0, False
    while not ended:
        step += 1
        paths = Paths(home / str(step), home / str(step) / "run").ensure()
        store = SnapshotStore(paths)
        prepare(store, operation)
        ended = run_until(step, store, operation)
        asyncio.run(check(store, operation, f"{operation}, killed at step {step}"))
    print(json.dumps({"steps": step}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
