"""Whether sandboxes can be paused, saved and restored here: found by doing it once per boot, binary and user."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Image, Layer, SandboxSpec
from sandbox_gateway.runtimes.base import Capability, Handle, Pausable, Runtime, Snapshots
from sandbox_gateway.runtimes.gvisor_probe import Cache

NAMES = ("pause", "snapshots", "prepared")
_TIMEOUT = 60.0


class Saving(Runtime, Pausable, Snapshots, Protocol):
    """What is tried."""


async def capabilities(
    paths: Paths, binary: Path, make: Callable[[Paths, tuple[str, ...]], Saving]
) -> tuple[Capability, ...]:
    """What can be done with a sandbox that runs, each with the reason where it cannot.

    ``make`` gives a runtime for a directory of the trial's own, whose PID 1 is the given command. Raises ``disk_full``
    or ``data_directory``, which say nothing about the runtime.
    """
    if not await asyncio.to_thread(_is_static_program, binary):
        return tuple(Capability(name, True, f"not tried: {binary} is a script around runsc") for name in NAMES)
    cache = Cache(paths, binary, f"saving-{boot_id()}-{os.geteuid()}")
    if cache.read() == "ok":
        return tuple(Capability(name, True) for name in NAMES)
    done: list[str] = []
    try:
        async with asyncio.timeout(_TIMEOUT):
            await _try(paths, binary, make, done)
    except TimeoutError:
        return _as_far_as(done, f"it did not end within {_TIMEOUT:.0f} s")
    except SandboxGatewayError as error:
        if error.code in ("disk_full", "data_directory"):
            raise
        return _as_far_as(done, error.message)
    except OSError as error:
        raise storage_error(error, f"a trial sandbox failed in {paths.runtime}") from error
    cache.write("ok")
    return tuple(Capability(name, True) for name in NAMES)


def _is_static_program(binary: Path) -> bool:
    """Whether it can run in the trial's empty root, as runsc itself can and a script in its place cannot."""
    with binary.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _as_far_as(done: list[str], reason: str) -> tuple[Capability, ...]:
    return tuple(
        Capability(name, name in done, "" if name in done else f"a trial of it failed: {reason}") for name in NAMES
    )


async def _try(paths: Paths, binary: Path, make: Callable[[Paths, tuple[str, ...]], Saving], done: list[str]) -> None:
    """Pause, save and restore a sandbox whose program waits for a byte; names of what worked are added to ``done``.

    The removal needs no more than the id, so that of a step that failed is as complete.
    """
    binary = await asyncio.to_thread(binary.resolve)
    async with _directory(paths) as place:
        # runsc itself is the one static program that is at hand; this command of it reads its standard input.
        runtime = make(
            Paths(home=paths.home, runtime=place / "run"), (f"/bin/{binary.name}", "umount", "--sync-fd=0", "/home")
        )
        image = Image("trial", (Layer(str(place / "root"), "/", "bind"), Layer(str(binary.parent), "/bin", "bind")))
        spec = SandboxSpec("t", "", "gvisor", image, agent_uid=0)
        handle = Handle(spec.id, runtime.name, place / "run" / spec.id)
        try:
            handle = await runtime.start(await _last(runtime.create(spec, handle.directory)))
            await runtime.pause(handle)
            await runtime.resume(handle)
            done.append("pause")
            await runtime.pause(handle)
            await runtime.snapshot(handle, place / "image")
            await runtime.destroy(handle)
            handle = await _last(runtime.restore(spec, handle.directory, place / "image"))
            await runtime.loaded(handle)
        finally:
            await runtime.destroy(handle)


async def _last(steps: AsyncIterator[Handle]) -> Handle:
    return [step async for step in steps][-1]


@contextlib.asynccontextmanager
async def _directory(paths: Paths) -> AsyncIterator[Path]:
    """A directory for one trial, with an empty root in it."""

    def make() -> Path:
        paths.ensure()
        place = Path(tempfile.mkdtemp(prefix="trial-", dir=paths.runtime))
        (place / "root" / "home").mkdir(parents=True)
        (place / "run" / "t").mkdir(parents=True)
        return place

    place = await asyncio.to_thread(make)
    try:
        yield place
    finally:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
