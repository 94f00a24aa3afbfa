"""``template build``, ``ls`` and ``rm``: ready kernels from which new ones start; and building them on ``install``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import ProgressLine, age, size, write_json, write_line, write_table
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import timestamp

if TYPE_CHECKING:
    from sandbox_gateway.host.paths import Paths
    from sandbox_gateway.images.store import Progress
    from sandbox_gateway.profiles import Profile
    from sandbox_gateway.snapshots import Snapshot
    from sandbox_gateway.templates import TemplateRecord

_SHORT = 12
_NO_RUNTIME = frozenset({"runtime_missing", "runtime_too_old"})


def add(commands: Commands) -> None:
    """Add ``template`` and its commands to the parser."""
    template = commands.add_parser(
        "template",
        help="build, list and remove templates: ready kernels from which new ones start",
        description="Templates: snapshots of ready kernels, without an identity, from which new kernels start.",
    )
    parts = template.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(template))
    build = command(
        parts,
        "build",
        _build,
        "build the templates of profiles now, so that no kernel starts cold",
        "What is current is not built again. Example: `jupyter sandbox template build python3-gvisor`.",
    )
    build.add_argument("profiles", nargs="*", metavar="PROFILE", help="a profile's name")
    build.add_argument("--all", action="store_true", help="those of all profiles")
    build.add_argument("--again", action="store_true", help="also those that are current")
    command(parts, "ls", _ls, "list the templates")
    rm = command(parts, "rm", _rm, "remove templates", "They are built again when a kernel starts.")
    rm.add_argument("keys", nargs="*", metavar="KEY", help="a template's key, or an unambiguous beginning of it")
    rm.add_argument("--all", action="store_true", help="all of them")


@dataclass(frozen=True, slots=True)
class Built:
    """What became of one profile's template."""

    profile: str
    key: str = ""
    snapshot: Snapshot | None = None
    reason: str = ""
    """Why its kernels start cold all the same."""
    error: SandboxGatewayError | None = None
    missing: tuple[str, ...] = ()
    """Modules that could not be imported, with the reason."""

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` shows."""
        made = self.snapshot
        return {
            "profile": self.profile,
            "key": self.key or None,
            "snapshot": None if made is None else made.id,
            "size": None if made is None else made.size,
            "reason": self.reason,
            "missing": list(self.missing),
        }


async def build(
    paths: Paths, profiles: Sequence[Profile], say: Callable[[str, str], None], *, again: bool = False
) -> list[Built]:
    """Build the templates of profiles, one after the other; each has an outcome of its own.

    ``say`` is told what goes on and how far it is, also from other threads.
    """
    from sandbox_gateway.lifecycle import Lifecycle

    lifecycle = Lifecycle(paths)
    try:
        return [await _one(lifecycle, profile, say, again) for profile in profiles]
    finally:
        await lifecycle.close()


async def _one(lifecycle: Any, profile: Profile, say: Callable[[str, str], None], again: bool) -> Built:
    import tempfile
    from pathlib import Path

    from sandbox_gateway import kernelspecs
    from sandbox_gateway.model import KernelSpec
    from sandbox_gateway.request import CreateRequest

    kernel = KernelSpec(kernelspecs.kernel_argv(profile), interrupt_mode=profile.interrupt_mode)
    say(f"looking at the image of {profile.name}", "")
    try:
        # A folder of this user's stands for any notebook's: only its owner counts.
        with tempfile.TemporaryDirectory(prefix="sandbox-template-") as folder:
            wanted = CreateRequest("template", profile, kernel, b"", Path(folder))
            launch, _ = await lifecycle.launch(wanted, lambda step: _show(say, step))
            plan = await lifecycle.templates.plan(wanted, launch, *await lifecycle.runtime(profile.runtime))
            if isinstance(plan, str):
                return Built(profile.name, reason=plan)
            made = await lifecycle.templates.build(plan, lambda text: say(text, ""), again=again)
        record = lifecycle.templates.records.get(plan.key.digest)
        missing = record.preload_failed if record is not None else {}
        return Built(
            profile.name, plan.key.short, made, missing=tuple(f"{name}: {why}" for name, why in missing.items())
        )
    except SandboxGatewayError as error:
        return Built(profile.name, error=error)


def _show(say: Callable[[str, str], None], step: Progress) -> None:
    text = step.message or f"building {step.what}"
    if step.total_bytes:
        say(f"building {step.what}", f"{min(100, 100 * step.done_bytes // step.total_bytes)} %")
    else:
        say(text, size(step.done_bytes) if step.done_bytes else "")


def _build(options: argparse.Namespace) -> int:
    import asyncio

    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.profiles import load_profiles

    if bool(options.profiles) == options.all:
        raise Usage("jupyter sandbox template build", "name profiles, or give --all")
    paths = discover()
    profiles = load_profiles(paths)
    chosen = [profiles.get(name) for name in dict.fromkeys(options.profiles or profiles)]
    with ProgressLine() as progress:
        outcomes = asyncio.run(build(paths, chosen, progress.update, again=options.again))
    if options.json:
        write_json([outcome.as_dict() for outcome in outcomes if outcome.error is None])
    else:
        _tell(outcomes)
    status = 0
    for outcome in outcomes:
        if outcome.error is not None:
            status = fail(outcome.error, options.json)
    return status


def _tell(outcomes: Sequence[Built]) -> None:
    for outcome in outcomes:
        if outcome.snapshot is not None:
            write_line(f"{outcome.profile}: {outcome.key} ({size(outcome.snapshot.size)})")
        elif outcome.reason:
            write_line(f"{outcome.profile}: no template: {outcome.reason}")
        for line in outcome.missing:
            write_line(f"{outcome.profile}: not imported: {line}")


def on_install(paths: Paths, profiles: Sequence[Profile], as_json: bool) -> None:
    """Build the templates of kernelspecs that were installed; where that fails, kernels start cold and say why."""
    import asyncio

    with ProgressLine() as progress:
        outcomes = asyncio.run(build(paths, profiles, progress.update))
    if as_json:
        return
    _tell(outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    # Where there is no runtime yet, `setup` and `doctor` say all there is to say.
    for text in dict.fromkeys(error.message for error in errors if error.code not in _NO_RUNTIME):
        write_line(f"no template, kernels start cold: {text}")


def _ls(options: argparse.Namespace) -> None:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.snapshots import SnapshotStore
    from sandbox_gateway.templates import TemplateRecords

    paths = discover()
    records, store = TemplateRecords(paths).list(), SnapshotStore(paths)
    entries = {entry.id: entry for entry in store.entries()}
    rows = []
    for record in records:
        entry = entries.get(record.snapshot or "")
        state = _state(record, entry is not None and entry.snapshot is not None)
        disk = entry.disk() if entry is not None else None
        used = entry.used if entry is not None else None
        rows.append((record, state, disk, used))
    if options.json:
        write_json([_as_dict(*row) for row in rows])
        return
    write_table(
        ("KEY", "PROFILE", "STATE", "SIZE", "AGE", "USED", "IMPORTED"),
        [
            (
                record.key[:_SHORT],
                record.profile,
                _said(record, state),
                size(disk),
                age(record.built) if record.snapshot else "",
                age(used) if used else "",
                ", ".join(name for name in record.preload if name not in record.preload_failed),
            )
            for record, state, disk, used in rows
        ],
    )
    if rows and sys.stdout.isatty():
        write_line(f"{size(sum(disk or 0 for _, _, disk, _ in rows))} in {paths.snapshots}")


def _state(record: TemplateRecord, there: bool) -> str:
    if there:
        return "suspect" if record.suspicions else "ready"
    return "failed" if record.failures else "gone"


def _said(record: TemplateRecord, state: str) -> str:
    if state == "failed":
        return f"failed: {record.reason}"
    return f"{state}, not rebuilt: {record.reason}" if record.failures else state


def _as_dict(record: TemplateRecord, state: str, disk: int | None, used: float | None) -> dict[str, Any]:
    return {
        "key": record.key,
        "profile": record.profile,
        "runtime": record.runtime,
        "state": state,
        "reason": record.reason,
        "snapshot": record.snapshot,
        "disk": disk,
        "built": timestamp(record.built) if record.built else None,
        "seconds": round(record.took, 3),
        "used": timestamp(used) if used else None,
        "preload": list(record.preload),
        "preload_failed": dict(record.preload_failed),
    }


def _rm(options: argparse.Namespace) -> int:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.snapshots import SnapshotStore
    from sandbox_gateway.templates import TemplateRecords

    if bool(options.keys) == options.all:
        raise Usage("jupyter sandbox template rm", "name templates by their keys, or give --all")
    paths = discover()
    records, store = TemplateRecords(paths), SnapshotStore(paths)
    known = {record.key: record for record in records.list()}
    removed, status = [], 0
    for wanted in dict.fromkeys(options.keys or known):
        try:
            record = _find(known, wanted)
            if record.snapshot is not None:
                _remove(store, record.snapshot)
            records.remove(record.key)
            removed.append({"key": record.key, "profile": record.profile})
        except SandboxGatewayError as error:
            status = fail(error, options.json)
    if options.json:
        write_json(removed)
    for item in removed if not options.json else ():
        write_line(f"removed {item['key'][:_SHORT]} of {item['profile']}")
    return status


def _remove(store: Any, snapshot_id: str) -> None:
    try:
        store.remove(snapshot_id)
    except SandboxGatewayError as error:
        if error.code != "unknown_snapshot":
            raise


def _find(known: dict[str, TemplateRecord], wanted: str) -> TemplateRecord:
    found = [record for key, record in known.items() if key.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(record.key[:_SHORT] for record in found[:5])
        raise SandboxGatewayError("ambiguous_id", f"{wanted!r} could be any of the templates {shown}")
    hint = "`jupyter sandbox template ls` lists the templates."
    raise SandboxGatewayError("unknown_snapshot", f"there is no template {wanted!r}", hint)
