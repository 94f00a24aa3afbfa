"""What this runsc, kernel and user can do, found by trying; versions are shown and never parsed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from sandbox_gateway.errors import ERRORS, SandboxGatewayError, program_error, storage_error
from sandbox_gateway.host.cgroups import CgroupTree
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.namespaces import why_no_user_namespace, wrap_user_namespace
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Image, Layer, SandboxSpec
from sandbox_gateway.runtimes import gvisor_bundle, runsc
from sandbox_gateway.runtimes.base import Capability, RuntimeReport

FEATURES = (
    ("checkpoint", "exclude-committed-zero-pages"),
    ("restore", "background"),
    ("create", "fs-restore-image-path"),
    ("", "gofer-network-namespace"),
)
"""(subcommand, flag) pairs that the pinned generation has and the distributions' old packages have not."""

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
    paths.ensure()
    binary = await asyncio.to_thread(binary.resolve)
    directory = Path(tempfile.mkdtemp(prefix="trial-", dir=paths.runtime))
    try:
        root = directory / "root"
        (directory / "bundle").mkdir()
        root.mkdir()
        (root / "home").mkdir()
        image = Image("trial", (Layer(str(root), "/", "bind"), Layer(str(binary.parent), "/bin", "bind")))
        # As guest uid 0, which is this user: the binary may be for its owner only.
        spec = SandboxSpec(directory.name, "", "gvisor", image, agent_uid=0)
        config = gvisor_bundle.config(spec, (f"/bin/{binary.name}", "--version"), empty_root=str(root))
        (directory / "bundle" / "config.json").write_text(json.dumps(config))
        command = runsc.Runsc(binary, directory / "state").argv(
            [*gvisor_bundle.flags(spec, rootless=os.geteuid() != 0), "--ignore-cgroups"],
            "run",
            f"--bundle={directory / 'bundle'}",
            directory.name,
        )
        outcome = await runsc.run(wrap_user_namespace(command) if os.geteuid() else command, timeout=_TRIAL_TIMEOUT)
        if outcome.code != 0 or "runsc" not in outcome.output:
            raise program_error("runtime_failed", outcome.reason)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)


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
