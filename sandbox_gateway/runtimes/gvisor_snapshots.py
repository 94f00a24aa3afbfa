"""Pausing, saving and restoring gVisor sandboxes: the calls of runsc and what lies in an image's directory.

Sources: ``reference/GVISOR.md``; gVisor's ``runsc/boot/restore.go`` and ``pkg/sentry/kernel/kernel.go`` (what a save
holds), ``runsc/specutils/restore.go`` (what may differ between the saved and the restored specification).

* gVisor counts stops: a save adds one of its own and takes it back, so what was paused before is paused after.
* A save goes on inside the sandbox when the runsc that asked for it is killed; a resume waits for its end.
* The image's files are opened by runsc and handed over: nothing looks for them by name after a restore has returned.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.runtimes.runsc import TIMEOUT, Runsc
from sandbox_gateway.runtimes.waiting import to_its_end

MANIFEST = "runtime.json"
"""Our own file in an image's directory: what restoring needs, the saved sandbox's shape, the sizes of runsc's files."""

SAVE_TIMEOUT = 1800.0
"""Seconds: a save writes all memory of the sandbox, to a slow disk if need be."""
RESTORE_TIMEOUT = 300.0
"""Seconds until runsc gives the sandbox back; the memory itself is read while it runs."""


async def pause(runsc: Runsc, handle: Handle) -> None:
    """Stop all tasks; no error when they are stopped already. Raises ``runtime_failed``."""
    await to_its_end(_change(runsc, handle, "pause", "paused", TIMEOUT))


async def resume(runsc: Runsc, handle: Handle) -> None:
    """Let all tasks go on; no error when they run. Waits for a save under way. Raises ``runtime_failed``."""
    await to_its_end(_change(runsc, handle, "resume", "running", SAVE_TIMEOUT))


async def _change(runsc: Runsc, handle: Handle, command: str, wanted: str, timeout: float) -> None:
    try:
        await runsc.call(_flags(handle), command, handle.id, timeout=timeout)
    except SandboxGatewayError:
        # runsc refuses what is done already, and stops are counted: so it is asked only after a refusal.
        if await status(runsc, handle) != wanted:
            raise


async def status(runsc: Runsc, handle: Handle) -> str:
    """``created``, ``running``, ``paused`` or ``stopped`` by runsc's own record; empty when there is none."""
    try:
        found = json.loads(await runsc.call(_flags(handle), "state", handle.id))
    except (SandboxGatewayError, ValueError):
        return ""
    return str(found.get("status", "")) if isinstance(found, dict) else ""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an image says of itself."""

    requirements: Mapping[str, str]
    shape: Mapping[str, str]
    """:func:`~sandbox_gateway.runtimes.gvisor_bundle.shape` of the sandbox that was saved."""

    def check_shape(self, shape: Mapping[str, str]) -> None:
        """Raise ``snapshot_unfit`` when a sandbox of another shape is to be made from the image."""
        other = [name for name in shape if shape[name] != self.shape.get(name)]
        if other:
            raise SandboxGatewayError("snapshot_unfit", f"the image was saved with other {', '.join(other)}", "")


async def save(runsc: Runsc, handle: Handle, image: Path, needs: Needs) -> None:
    """Save a paused sandbox, which stays paused, into the new directory ``image``, and what it needs with it.

    Raises ``runtime_failed``, ``disk_full``, or ``data_directory`` when the directory is there already or cannot be
    made. What is in ``image`` after a failure is the caller's to remove, and so is a save that was given up: it goes
    on inside the sandbox, into files that nobody can find any more.
    """
    try:
        await asyncio.to_thread(image.mkdir, mode=0o700)
    except OSError as error:
        raise storage_error(error, f"cannot make {image}") from error
    # Left running in any case: a save that fails and was not told so ends the sandbox.
    await runsc.call(
        _flags(handle),
        "checkpoint",
        "--leave-running",
        "--compression=none",
        f"--image-path={image}",
        handle.id,
        timeout=SAVE_TIMEOUT,
    )
    await asyncio.to_thread(_seal, image, needs)


def _seal(image: Path, needs: Needs) -> None:
    try:
        sizes = {}
        for path in sorted(image.iterdir()):
            path.chmod(0o600)
            sizes[path.name] = path.stat().st_size
        text = json.dumps({"requirements": dict(needs.requirements), "shape": dict(needs.shape), "sizes": sizes})
        with open(os.open(image / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    except OSError as error:
        raise storage_error(error, f"cannot write in {image}") from error


def read_image(image: Path) -> Needs:
    """What restoring the image needs, as :func:`save` was told.

    Raises ``runtime_failed`` for what is no whole image: runsc itself notices a missing end only after the restore.
    """
    try:
        found: Any = json.loads((image / MANIFEST).read_text())
        requirements, shape, sizes = found["requirements"], found["shape"], found["sizes"]
        for name, size in sizes.items():
            there = (image / str(name)).stat().st_size
            if there != size:
                raise SandboxGatewayError("runtime_failed", f"{image / name} is damaged: {there} of {size} bytes")
        return Needs(*({str(name): str(value) for name, value in part.items()} for part in (requirements, shape)))
    except OSError as error:
        reason = f"{error.filename or image}: {error.strerror}"
        raise SandboxGatewayError("runtime_failed", f"the image cannot be read: {reason}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SandboxGatewayError("runtime_failed", f"{image / MANIFEST} is damaged") from error


def restore_command(image: Path) -> tuple[str, ...]:
    """The words of ``runsc restore``, up to what ``create`` has too."""
    # In the background: the kernel answers before all of its memory is read.
    return ("restore", "--detach", "--background", f"--image-path={image}")


async def restore_into(runsc: Runsc, handle: Handle, image: Path) -> None:
    """Restore onto a container that was created and not started. Raises ``runtime_failed``: it is of no use then."""
    await runsc.call(_flags(handle), *restore_command(image), handle.id, timeout=RESTORE_TIMEOUT)


async def loaded(runsc: Runsc, handle: Handle) -> None:
    """Return when a restored sandbox has read all of its image. Raises ``runtime_failed`` when that failed."""
    await runsc.call(_flags(handle), "wait", "-restore", handle.id, timeout=SAVE_TIMEOUT)


def _flags(handle: Handle) -> Sequence[str]:
    flags: Sequence[str] = handle.data.get("flags", ())
    return flags
