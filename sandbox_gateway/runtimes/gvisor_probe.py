"""What this runsc, kernel and user can do, found by trying; versions are shown and never parsed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox_gateway.errors import ERRORS, SandboxGatewayError, program_error, storage_error
from sandbox_gateway.host.cgroups import CgroupTree
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.namespaces import why_no_user_namespace, wrap_user_namespace
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Image, Layer, SandboxSpec
from sandbox_gateway.runtimes import gvisor_bundle, runsc
from sandbox_gateway.runtimes.base import Capability, RuntimeReport
from sandbox_gateway.runtimes.gvisor_files import BUNDLE

FEATURES = (
    ("checkpoint", "exclude-committed-zero-pages"),
    ("restore", "background"),
    ("create", "fs-restore-image-path"),
    ("", "gofer-network-namespace"),
)
"""(subcommand, flag) pairs that the pinned generation has and the distributions' old packages have not."""

TRIAL = "trial-"
"""How the names of trials' directories begin."""
LOCK = "lock"
"""In a trial's directory: held for as long as it is under way, however its process ends."""
RUN = "run"
"""In a trial's directory: what a runtime directory is to other sandboxes."""
SANDBOX = "t"
"""The id of a trial's only sandbox."""
GRACE = 120.0
"""Seconds after which a trial's directory without a lock is left over: longer than a trial takes."""
_SETUP = ERRORS["runtime_missing"].hint
_TRIAL_TIMEOUT = 30.0


async def probe(paths: Paths, binary: Path | None, tree: CgroupTree) -> RuntimeReport:
    """The report of :class:`~sandbox_gateway.runtimes.gvisor.GvisorRuntime` for this binary and user."""
    if binary is None or not os.access(binary, os.X_OK):
        reason = "there is no runsc" if binary is None else f"{binary} is not an executable file"
        return RuntimeReport("gvisor", True, capabilities=(Capability("run", False, f"missing: {reason}", _SETUP),))
    try:
        version, lacking = await _binary(paths, binary)
    except SandboxGatewayError as error:
        return RuntimeReport("gvisor", True, capabilities=(Capability("run", False, error.message, error.hint),))
    if lacking:
        reason = f"{binary} is too old: it lacks {', '.join(lacking)}"
        hint = ERRORS["runtime_too_old"].hint
        return RuntimeReport("gvisor", True, version, (Capability("run", False, reason, hint),))
    run = await _run_capability(paths, binary)
    return RuntimeReport("gvisor", True, version, (run, *limit_capabilities(tree)))


def limit_capabilities(tree: CgroupTree) -> tuple[Capability, ...]:
    """Which limits are held here, by what."""
    advice = "Run as root, or get a delegated control group (systemd: Delegate=yes)."
    why = tree.reason or "no controller"
    memory = (
        Capability("limits.memory", True)
        if "memory" in tree.controllers
        else Capability("limits.memory", True, f"soft: the owner watches and kills ({why})", advice)
    )
    cpu = (
        Capability("limits.cpu", True)
        if "cpu" in tree.controllers
        else Capability("limits.cpu", True, f"soft: bound to whole cores, which others may use too ({why})", advice)
    )
    return (
        memory,
        cpu,
        Capability("limits.processes", True),
        Capability("limits.disk", True),
    )


async def _binary(paths: Paths, binary: Path) -> tuple[str, list[str]]:
    """(version text, flags it lacks), remembered for this very file."""
    cache = Cache(paths, binary, "features")
    known = cache.read()
    if isinstance(known, str):
        return known, []
    outcome = await runsc.run([binary, "--version"], timeout=_TRIAL_TIMEOUT)
    if outcome.code != 0 or not outcome.output.startswith("runsc"):
        why = outcome.reason if outcome.code != 0 else "it is another program"
        raise SandboxGatewayError("runtime_missing", f"{binary} does not run as runsc: {why}")
    version = outcome.output.splitlines()[0].removeprefix("runsc version").strip()
    lacking = []
    for command, flag in FEATURES:
        outcome = await runsc.run([binary, "flags", *([command] if command else [])], timeout=_TRIAL_TIMEOUT)
        text = outcome.output + outcome.error
        if not any(line.strip().split(" ")[0] == f"-{flag}" for line in text.splitlines()):
            lacking.append(f"`{command} -{flag}`" if command else f"`-{flag}`")
    if not lacking:
        cache.write(version)
    return version, lacking


async def _run_capability(paths: Paths, binary: Path) -> Capability:
    if os.geteuid() != 0 and (why := why_no_user_namespace()) is not None:
        return Capability("run", False, *why)
    # A boot of this machine and its settings, for this user: what worked is not tried again.
    cache = Cache(paths, binary, f"trial-{boot_id()}-{os.geteuid()}")
    if cache.read() == "ok":
        return Capability("run", True)
    try:
        await _trial(paths, binary)
    except SandboxGatewayError as error:
        if error.code in ("disk_full", "data_directory"):
            raise  # says nothing about what can run here
        return Capability("run", False, f"a trial sandbox failed: {error.message}", error.hint)
    except OSError as error:
        raise storage_error(error, f"a trial sandbox failed in {paths.runtime}") from error
    cache.write("ok")
    return Capability("run", True)


async def _trial(paths: Paths, binary: Path) -> None:
    """Boot a sandbox whose only program is runsc itself, a static binary."""
    binary = await asyncio.to_thread(binary.resolve)
    with trial_directory(paths) as directory:
        root = directory / "root"
        run = Paths(paths.home, directory / RUN)
        bundle = run.sandbox(SANDBOX) / BUNDLE
        bundle.mkdir()
        image = Image("trial", (Layer(str(root), "/", "bind"), Layer(str(binary.parent), "/bin", "bind")))
        # As guest uid 0, which is this user: the binary may be for its owner only.
        spec = SandboxSpec(SANDBOX, "", "gvisor", image, agent_uid=0)
        config = gvisor_bundle.config(spec, (f"/bin/{binary.name}", "--version"), empty_root=str(root))
        (bundle / "config.json").write_text(json.dumps(config))
        command = runsc.Runsc(binary, run.runsc_root).argv(
            [*gvisor_bundle.flags(spec, rootless=os.geteuid() != 0), "--ignore-cgroups"],
            "run",
            f"--bundle={bundle}",
            SANDBOX,
        )
        outcome = await runsc.run(wrap_user_namespace(command) if os.geteuid() else command, timeout=_TRIAL_TIMEOUT)
        if outcome.code != 0 or "runsc" not in outcome.output:
            raise program_error("runtime_failed", outcome.reason)


@contextlib.contextmanager
def trial_directory(paths: Paths) -> Iterator[Path]:
    """A directory for one trial, with an empty root in it, and room for its sandbox as every trial has it: what a
    killed process leaves is found there (:func:`forsaken`). Removed at the end. Blocks for a moment."""
    paths.ensure()
    place = Path(tempfile.mkdtemp(prefix=TRIAL, dir=paths.runtime))
    lock = None
    try:
        lock = _locked(place)
        (place / "root" / "home").mkdir(parents=True)
        (place / RUN / SANDBOX).mkdir(parents=True)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(place: Path) -> int:
    # Under its name only when it is held: whoever finds one that is free knows that its holder is gone.
    fresh = place / f"{LOCK}.new"
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.rename(fresh, place / LOCK)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def forsaken(place: Path) -> Iterator[bool]:
    """Whether the process that made this trial's directory is gone; within the context nobody else learns that."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(place / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = True
        except FileNotFoundError:
            gone = _is_old(place)
        except OSError:  # it is held; what cannot be looked at is nobody's business either
            gone = False
        yield gone


def _is_old(place: Path) -> bool:
    try:
        return time.time() - place.stat(follow_symlinks=False).st_mtime > GRACE
    except OSError:
        return False


class Cache:
    """One remembered answer about one binary file. Damaged or unwritable caches only cost time.

    Raises OSError when there is no such file.
    """

    def __init__(self, paths: Paths, binary: Path, topic: str) -> None:
        status = binary.stat()
        # Not the time of its last change: a link to it or a backup moves that.
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        key = f"{binary.resolve()}|{identity}|{topic}|{FEATURES}"
        self._path = paths.home / "cache" / f"runsc-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def read(self) -> object:
        """What was written; None for nothing."""
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None

    def write(self, value: object) -> None:
        """Remember a JSON value."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(value))
            temporary.replace(self._path)
