"""Whether sandboxes can be paused, saved and restored here: found by doing it once per boot, binary and user."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Image, Layer, SandboxSpec
from sandbox_gateway.runtimes.base import Capability, Handle, Pausable, Runtime, Snapshots
from sandbox_gateway.runtimes.gvisor_probe import RUN, SANDBOX, Cache, forsaken, trial_directory
from sandbox_gateway.runtimes.waiting import to_its_end

log = logging.getLogger(__name__)

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
            Paths(home=paths.home, runtime=place / RUN), (f"/bin/{binary.name}", "umount", "--sync-fd=0", "/home")
        )
        image = Image("trial", (Layer(str(place / "root"), "/", "bind"), Layer(str(binary.parent), "/bin", "bind")))
        spec = SandboxSpec(SANDBOX, "", "gvisor", image, agent_uid=0)
        handle = Handle(spec.id, runtime.name, place / RUN / spec.id)
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
            try:
                await runtime.destroy(handle)
            finally:
                runtime.close()


async def _last(steps: AsyncIterator[Handle]) -> Handle:
    return [step async for step in steps][-1]


@contextlib.asynccontextmanager
async def _directory(paths: Paths) -> AsyncIterator[Path]:
    """:func:`~sandbox_gateway.runtimes.gvisor_probe.trial_directory`, made and removed on a thread."""
    with contextlib.ExitStack() as stack:
        place = await to_its_end(asyncio.to_thread(stack.enter_context, trial_directory(paths)))
        try:
            yield place
        finally:
            await to_its_end(asyncio.to_thread(stack.close))


async def remove_left(paths: Paths, place: Path, make: Callable[[Paths], Runtime]) -> None:
    """End and remove what is left of a trial, of either kind, whose process was killed over it; one that is under way
    is left alone.

    Nothing else finds its sandbox: ``place`` is an installation of its own as far as a runtime can tell, that which
    ``make`` gives one for. Raises ``runtime_failed`` when something will not go; all is then still there to be found.
    """
    with forsaken(place) as gone:
        if gone:
            log.info("removing %s, which was left by a process that ended over it", place)
            runtime = make(Paths(home=paths.home, runtime=place / RUN))
            await runtime.destroy(Handle(SANDBOX, runtime.name, place / RUN / SANDBOX))
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
