"""How the fake runtime "saves" a sandbox: its stopped processes are parked, and the image only refers to them.

Ordinary processes cannot be copied to disk. So an image of the fake runtime holds one small file, and a *warden*
process watches that file by an open descriptor, under whatever name it is moved to. While it is there, the removal of
the sandbox parks its processes instead of ending them: they are stopped, and their named pipes and directory are put
aside. A restore thaws them. When the file is gone, and be it by ``rm -r``, the warden ends what is parked. It follows
that

* only the same id can be restored, only on the same boot of the machine, and only once at a time;
* what a sandbox did after it was saved is not undone by a restore.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host import processes
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.runtimes import launcher, runsc
from sandbox_gateway.runtimes.base import Handle

IMAGE = "fake.json"
"""The one file of an image."""
_WARDEN = "warden"
_RECORD = "parked.json"
_LOOK = 0.05
"""Seconds between the warden's looks: there is no event for the removal of a file that has other names."""
_STOP_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Parking:
    """Where one sandbox's things are put aside: on the filesystem of its runtime directory, outside it."""

    place: Path

    @classmethod
    def of(cls, paths: Paths, sandbox_id: str) -> Parking:
        """The place of one sandbox."""
        return cls(paths.runtime.with_name(f"{paths.runtime.name}-parked") / sandbox_id)

    @property
    def taken(self) -> bool:
        """Whether the sandbox is parked."""
        return (self.place / _RECORD).exists()

    def processes(self) -> set[ProcessRef]:
        """What is parked."""
        try:
            found = json.loads((self.place / _RECORD).read_text())
        except (OSError, ValueError):
            return set()
        return {ref for item in found if (ref := ProcessRef.from_json(item)) is not None}

    def put_if_saved(self, directory: Path, kind: str, find: Callable[[], Collection[ProcessRef]]) -> bool:
        """Stop and put aside the sandbox if it has an image; whether that was so. ``find`` gives its processes."""
        try:
            lock = os.open(directory / kind, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            # From here on the warden sees either nothing parked or all of it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if warden(directory / kind) is None:
                return False
            stop_all(find)
            self._put(directory, kind, {*find(), *self.processes()})
            return True
        finally:
            os.close(lock)

    def _put(self, directory: Path, kind: str, refs: Iterable[ProcessRef]) -> None:
        """Put aside the pipes and the directory ``kind`` of a sandbox whose processes are stopped."""
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.place / _RECORD).write_text(json.dumps([ref.as_json() for ref in refs]))
        for path in (*_pipes(directory), directory / kind):
            if path.exists():
                path.rename(self.place / path.name)

    def take(self, directory: Path, kind: str) -> None:
        """Put everything back. Raises ``runtime_failed`` when nothing is parked."""
        if not self.taken:
            raise SandboxGatewayError("runtime_failed", "the fake runtime's processes of this image are gone")
        # The directory first: it is by this one that a removal in the middle of this sees what to put back.
        for path in (self.place / kind, *_pipes(self.place)):
            path.rename(directory / path.name)
        self.clear()

    def clear(self) -> None:
        """Remove the place."""
        shutil.rmtree(self.place, ignore_errors=True)
        try:
            self.place.parent.rmdir()
        except OSError:
            pass  # others are parked


def _pipes(directory: Path) -> tuple[Path, ...]:
    fifos = launcher.Fifos.inside(directory)
    return fifos.stdin, fifos.stdout, fifos.stderr


def stop_all(find: Callable[[], Collection[ProcessRef]]) -> None:
    """SIGSTOP each process that ``find`` gives until all stand. Raises ``runtime_failed`` when one does not."""
    end = time.monotonic() + _STOP_TIMEOUT
    # Found again each time: one that was not stopped yet may have started another.
    while running := [ref for ref in find() if _runs(ref)]:
        if time.monotonic() > end:
            raise SandboxGatewayError("runtime_failed", f"processes will not stop: {running}")
        for ref in running:
            ref.kill(signal.SIGSTOP)
        time.sleep(0.001)  # there is no event for one who is not the parent


def _runs(ref: ProcessRef) -> bool:
    try:
        with open(f"/proc/{ref.pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in (b"T", b"t", b"Z", b"X") and ref.alive()


def proceed(refs: Iterable[ProcessRef]) -> None:
    """SIGCONT to each process."""
    for ref in refs:
        ref.kill(signal.SIGCONT)


async def save(handle: Handle, kind: str, parking: Parking, image: Path) -> None:
    """Make the image and its warden. Raises ``disk_full`` or ``data_directory``."""
    kinds = handle.directory / kind
    await asyncio.to_thread(_write, image, {"id": handle.id, "data": dict(handle.data)})
    await asyncio.to_thread(dismiss, kinds)
    outcome = await runsc.run(
        [sys.executable, "-P", "-m", "sandbox_gateway.testing.parking", image / IMAGE, parking.place, kinds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    if outcome.code != 0:
        raise SandboxGatewayError("runtime_failed", f"the fake runtime's warden: {outcome.reason}")


def _write(image: Path, content: Mapping[str, Any]) -> None:
    try:
        image.mkdir(mode=0o700)
        with open(os.open(image / IMAGE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file)
    except OSError as error:
        raise storage_error(error, f"cannot make {image}") from error


def saved(image: Path) -> dict[str, Any]:
    """What the image says. Raises ``runtime_failed`` when it cannot be read."""
    try:
        found = json.loads((image / IMAGE).read_text())
        return {"id": str(found["id"]), "data": dict(found["data"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SandboxGatewayError("runtime_failed", f"{image} is no image of the fake runtime: {error}") from error


def warden(kinds: Path) -> ProcessRef | None:
    """Who watches the image of the sandbox with this directory; None where there is no image any more."""
    try:
        ref = ProcessRef.from_json(json.loads((kinds / _WARDEN).read_text()))
    except (OSError, ValueError):
        return None
    return ref if ref is not None and ref.alive() else None


def dismiss(kinds: Path) -> None:
    """End the warden: there is nothing to watch any more, or another image."""
    found = warden(kinds)
    if found is not None:
        processes.kill_all([found], _STOP_TIMEOUT)
    (kinds / _WARDEN).unlink(missing_ok=True)


def _watch(image: Path, parking: Parking, kinds: Path) -> None:
    """Be the warden until the image is gone."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    lock = os.open(kinds, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.fork():
        os._exit(0)
    os.setsid()
    me = ProcessRef.of(os.getpid())
    if me is not None:
        (kinds / _WARDEN).write_text(json.dumps(me.as_json()))
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)  # the caller waits for the end of these
    while os.fstat(fd).st_nlink:
        time.sleep(_LOOK)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_WARDEN, dir_fd=lock)
    # What was stopped cannot fork: one look finds all of it.
    refs = parking.processes()
    if not refs and not kinds.exists():
        # Somebody removes the whole installation, the record of what is parked with it, perhaps at this moment.
        refs = _marked(kinds.parent)
    processes.kill_all(refs, _STOP_TIMEOUT)
    if parking.taken:
        parking.clear()


def _marked(directory: Path) -> set[ProcessRef]:
    marker = f"{launcher.MARKER}={directory}"
    roots = processes.find(lambda argv, environment: marker in environment)
    below = processes.descendants([ref.pid for ref in roots])
    return {ref for pid in below if (ref := ProcessRef.of(pid)) is not None}


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), Parking(Path(sys.argv[2])), Path(sys.argv[3]))
