"""Getting the pinned runsc into the product's own data directory, and finding it again (DESIGN 4.13).

``<home>/bin/<sha256>/runsc`` holds a binary under its hash, ``<home>/bin/runsc.json`` names the current one. An older
one stays, since snapshots name the runsc they were made with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.runsc_build import from_source
from sandbox_gateway.host.runsc_changes import recipe as recipe_now
from sandbox_gateway.host.runsc_sources import PIN, Report, WayClosed, from_file, from_release, remove_tree

MANIFEST = "runsc.json"
SCHEMA = 1
_STAGING = ".staging-"
_RELEASE = "release"
_BUILD = "build"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RunscInstall:
    """One installed runsc."""

    path: Path
    sha256: str
    origin: str
    """Where it came from, for people: ``release ...``, ``built with Go ...``, ``file ...``."""
    pin: str
    """The pinned generation it was installed for."""
    files: Mapping[str, str]
    """SHA-256 of each installed file, by its path beside (and including) ``runsc``."""
    recipe: str = ""
    """What was done to gVisor's sources, for one that was built here; empty for any other."""
    fresh: bool = False
    """Whether this call installed it."""

    def as_dict(self) -> dict[str, Any]:
        """The installation as JSON."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "origin": self.origin,
            "pin": self.pin,
            "fresh": self.fresh,
        }


def find_runsc(paths: Paths, environment: Mapping[str, str] | None = None) -> Path | None:
    """The runsc to use: the one that ``SANDBOX_GATEWAY_RUNSC`` names (a path, or a word looked up on ``PATH``), else
    the installed one; None where there is neither. Raises ``runtime_missing`` when the named one is not there.

    Cheap: nothing is hashed or run.
    """
    env = os.environ if environment is None else environment
    named = env.get("SANDBOX_GATEWAY_RUNSC")
    if named:
        found = shutil.which(os.path.expanduser(named), path=env.get("PATH", os.defpath))
        if found is None:
            raise SandboxGatewayError(
                "runtime_missing",
                f"SANDBOX_GATEWAY_RUNSC names {named}, which is not an executable file",
                "Correct the variable, or unset it to use the runsc of `jupyter sandbox setup`.",
            )
        return Path(found).absolute()
    install = installed(paths)
    return install.path if install else None


def installed(paths: Paths) -> RunscInstall | None:
    """The current installation as the manifest names it, or None; nothing is hashed."""
    try:
        data = json.loads((paths.bin / MANIFEST).read_bytes())
        if data["schema"] != SCHEMA:
            return None
        sha256, origin, pin = str(data["sha256"]), str(data["origin"]), str(data["pin"])
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        recipe = str(data.get("recipe") or ("unknown" if origin.startswith("built with") else ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    path = paths.bin / sha256 / "runsc"
    if len(sha256) != 64 or not sha256.isalnum() or not os.access(path, os.X_OK):
        return None
    return RunscInstall(path=path, sha256=sha256, origin=origin, pin=pin, files=files, recipe=recipe)


def verify(install: RunscInstall) -> str:
    """Compare every installed file with its recorded hash; empty when all is well, else what is wrong."""
    folder = install.path.parent
    if install.files.get("runsc") != install.sha256:
        return "its manifest does not match its name"
    for name, wanted in install.files.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        if found != wanted:
            return f"{folder / name} is not what was installed"
    return ""


def ensure_runsc(
    paths: Paths,
    *,
    source: Path | None = None,
    build: bool = False,
    progress: Report | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunscInstall:
    """Install the pinned runsc unless it is there and whole; ``source`` is a file to take instead (offline).

    In order: what is installed; the file; gVisor's release; a build through the Go module proxy. With ``build`` only
    what was built so will do. Where the last one was built, a build comes before the release; and one that was built as
    another version of this application does it is built anew, and goes on being used where that cannot be done. One
    process at a time works, the others wait for it. Raises ``setup_failed`` (naming every way that was tried),
    ``disk_full`` or ``data_directory``; whatever happens, nothing half-made is left behind.
    """
    report: Report = progress or (lambda line: None)
    env = dict(os.environ if environment is None else environment)
    paths.ensure()
    try:
        paths.bin.mkdir(mode=0o700, exist_ok=True)
        with _locked(paths.bin, report) as lock:
            current = installed(paths)
            built = current is not None and current.recipe != ""
            if source is None and current is not None and current.pin == PIN:
                trouble = verify(current)
                if trouble:
                    report(f"the installed runsc is damaged: {trouble}; getting it again")
                elif current.recipe == recipe_now() or not (build or built):
                    return current
                elif not build:
                    return _renew(paths, current, env, report, lock)
            ways = (_BUILD,) if build else (_BUILD, _RELEASE) if built else (_RELEASE, _BUILD)
            return _install(paths, source, ways, env, report, lock)
    except OSError as error:
        raise _storage_error(paths.home, error) from error


@dataclass(frozen=True, slots=True)
class OldRunsc:
    """An installed runsc that is not the current one."""

    sha256: str
    directory: Path
    size: int
    """Bytes of its files."""


def unused_runsc(paths: Paths, needed: Collection[str]) -> tuple[OldRunsc, ...]:
    """Installed binaries that can go: not the current one, not in ``needed`` (hashes that snapshots or records name),
    and not run by any process now."""
    current = installed(paths)
    kept = set(needed) | ({current.sha256} if current is not None else set())
    try:
        names = sorted(os.listdir(paths.bin))
    except OSError:
        return ()
    found = [name for name in names if _HASH.fullmatch(name) and name not in kept]
    if not found:
        return ()
    running = _running_from(paths.bin)
    old = [(name, paths.bin / name) for name in found if name not in running]
    return tuple(OldRunsc(name, path, _size_of(path)) for name, path in old if path.is_dir() and not path.is_symlink())


def remove_unused_runsc(paths: Paths, needed: Callable[[], Collection[str]]) -> tuple[OldRunsc, ...]:
    """Remove what :func:`unused_runsc` finds, and return it; ``needed`` is asked while nothing can be installed.

    Raises ``data_directory``.
    """
    if not unused_runsc(paths, needed()):
        return ()
    try:
        with _locked(paths.bin, lambda line: None):
            gone = unused_runsc(paths, needed())
            for old in gone:
                # Under the name of a staging folder the next set-up removes what a crash leaves of it.
                doomed = old.directory.with_name(f"{_STAGING}{old.sha256}")
                old.directory.rename(doomed)
                remove_tree(doomed)
            return gone
    except OSError as error:
        raise _storage_error(paths.home, error) from error


def _running_from(folder: Path) -> frozenset[str]:
    """Names in ``folder`` below which a process of this user has its program."""
    prefix, found = f"{os.path.realpath(folder)}/", set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                program = os.readlink(f"/proc/{name}/exe")
                if program.startswith(prefix):
                    found.add(program[len(prefix) :].split("/", 1)[0])
    return frozenset(found)


def _files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def _size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _renew(paths: Paths, current: RunscInstall, env: Mapping[str, str], report: Report, lock: int) -> RunscInstall:
    report("the installed runsc was built by another version of this application; building it anew")
    try:
        return _install(paths, None, (_BUILD,), env, report, lock)
    except (SandboxGatewayError, OSError) as error:
        report(f"going on with the one that is installed: {error}")
        return current


def _install(
    paths: Paths, source: Path | None, ways: Sequence[str], env: Mapping[str, str], report: Report, lock: int
) -> RunscInstall:
    # We hold the lock: what is staged belongs to a process that was killed.
    _sweep(paths.bin)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=paths.bin))
    try:
        origin, recipe = (
            (from_file(source, staging, report), "")
            if source is not None
            else _first_way(staging, ways, env, report, lock)
        )
        _check_runs(staging / "runsc")
        files = {name: _sha256(staging / name) for name in sorted(_files_in(staging))}
        sha256 = files["runsc"]
        final = paths.bin / sha256
        got = RunscInstall(final / "runsc", sha256, origin, PIN, files, recipe, fresh=True)
        there = _files_in(final) == set(files) and not verify(got)  # and perhaps in use
        for file in files:
            with (staging / file).open("rb") as handle:
                os.fsync(handle.fileno())
        manifest = paths.bin / f"{_STAGING}{MANIFEST}"
        known = {"schema": SCHEMA, "sha256": sha256, "origin": origin, "pin": PIN, "recipe": recipe, "files": files}
        _write(manifest, known)
        if not there:
            if final.is_dir():
                remove_tree(final)  # damaged, or without the sidecars that this one brings
            staging.rename(final)
        for place in (final, *(final / name for name in files)):
            place.chmod(0o755)  # a trial sandbox sees this folder as another uid; its parents stay private
        manifest.rename(paths.bin / MANIFEST)
    finally:
        _sweep(paths.bin)
    report(f"installed runsc {sha256[:12]} ({origin})")
    return got


def _first_way(
    staging: Path, ways: Sequence[str], env: Mapping[str, str], report: Report, lock: int
) -> tuple[str, str]:
    """The origin of what was got, and its recipe."""
    closed: list[str] = []
    for way in ways:
        try:
            if way == _RELEASE:
                return from_release(staging, env, report), ""
            return from_source(staging, env, report, keep=(lock,)), recipe_now()
        except (WayClosed, SandboxGatewayError, OSError) as why:
            # What is wrong with a release is told; a build that fails in whatever way leaves the next one open.
            if not isinstance(why, WayClosed) and (way == _RELEASE or way == ways[-1]):
                raise
            closed.append(str(why))
            report(str(why))
    raise SandboxGatewayError(
        "setup_failed",
        "runsc could not be had: " + "; ".join(closed),
        "Give a runsc from another machine: `jupyter sandbox setup --file /path/to/runsc`.",
    )


def _check_runs(binary: Path) -> None:
    """A file that is no runsc for this machine is refused before it is installed. Features are the runtime's probe."""
    binary.chmod(0o755)
    try:
        answer = subprocess.run(
            [str(binary), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
        said = answer.stdout if answer.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, OSError) and error.errno == errno.EACCES:
            raise SandboxGatewayError(
                "data_directory",
                f"programs in {binary.parent.parent} cannot be run (a noexec mount?)",
            ) from error
        said = ""
    if not said.startswith("runsc version"):
        raise SandboxGatewayError(
            "setup_failed", "the file is not a runsc that runs on this machine", "Give a Linux runsc of this processor."
        )


def _write(path: Path, data: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(data, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _sweep(folder: Path) -> None:
    for stale in folder.glob(_STAGING + "*"):
        if stale.is_dir():
            remove_tree(stale)
        else:
            stale.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path, report: Report) -> Iterator[int]:
    """Hold the folder's lock. A build inherits the descriptor, so that the lock outlives us as long as it runs."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another set-up to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _storage_error(home: Path, error: OSError) -> SandboxGatewayError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return SandboxGatewayError(
            "disk_full",
            f"no space left in {home}",
            "Free 2 GB for the build (100 MB stay), or move SANDBOX_GATEWAY_HOME.",
        )
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return SandboxGatewayError("data_directory", f"{home} cannot be written: {error.strerror}")
    return SandboxGatewayError("setup_failed", f"set-up in {home} failed: {error}")
