"""``snapshot create``, ``ls``, ``inspect`` and ``rm``: saved sandboxes as things of their own."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.each import Meter
from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import ProgressLine, age, size, write_json, write_line, write_table
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import timestamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandbox_gateway.host.paths import Paths
    from sandbox_gateway.model import SandboxRecord
    from sandbox_gateway.snapshots import Entry, Snapshot

_A_SNAPSHOT = "a snapshot's name, its id, or an unambiguous beginning of the id"


def add(commands: Commands) -> None:
    """Add ``snapshot`` and its commands to the parser."""
    snapshot = commands.add_parser(
        "snapshot",
        help="save sandboxes, list and remove what was saved",
        description="Snapshots: saved memory and files of sandboxes. They are not encrypted.",
    )
    parts = snapshot.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(snapshot))
    create = command(parts, "create", _create, "save a sandbox under a name", "It runs on.")
    create.add_argument("id", metavar="ID", help="a sandbox's id (the kernel's), or an unambiguous beginning of it")
    create.add_argument("--name", required=True, help="letters, digits, dots, underscores and hyphens; unique")
    command(parts, "ls", _ls, "list the snapshots")
    inspect = command(parts, "inspect", _inspect, "show what a snapshot is and needs")
    inspect.add_argument("snapshot", metavar="ID", help=_A_SNAPSHOT)
    inspect.add_argument(
        "--verify", action="store_true", help="read all of it and say whether it can be restored here now"
    )
    rm = command(parts, "rm", _rm, "remove snapshots", "One that a suspended sandbox lives in stays.")
    rm.add_argument("snapshots", nargs="+", metavar="ID", help=_A_SNAPSHOT)


def _create(options: argparse.Namespace) -> None:
    import asyncio

    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.snapshots.manifest import checked_name

    paths = discover()
    if not options.name:
        raise Usage("jupyter sandbox snapshot create", "a name cannot be empty")
    checked_name(options.name)
    record = actions.resolve(paths, options.id)
    with ProgressLine() as line:
        meter = Meter(line, "saving")
        meter.begin(record.id)
        told = functools.partial(meter.update, record.id)
        made = asyncio.run(actions.snapshot(paths, record.id, options.name, told))
    if options.json:
        write_json(summary(made.manifest.public_dict()))
    else:
        write_line(f"{made.name} {made.id} ({size(made.size)})")


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a snapshot in a list: its manifest without what is long."""
    kept = (
        "id", "name", "kind", "sandbox", "profile", "runtime", "parent", "created", "size", "sealed", "template_key",
    )  # fmt: skip
    return {**{key: manifest[key] for key in kept}, "created": timestamp(manifest["created"])}


def records(paths: Paths) -> tuple[SandboxRecord, ...]:
    """The records of all sandboxes."""
    from sandbox_gateway.cli.actions import opened

    with opened(paths) as store:
        return () if store is None else store.list()


def _ls(options: argparse.Namespace) -> None:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.snapshots import SnapshotStore

    paths = discover()
    entries, known = SnapshotStore(paths).entries(), records(paths)
    if options.json:
        write_json([_as_dict(entry, known) for entry in entries])
        return
    write_table(
        ("ID", "NAME", "KIND", "SIZE", "AGE", "PROFILE", "SANDBOX", "STATE"), [_row(entry, known) for entry in entries]
    )
    if entries and sys.stdout.isatty():
        write_line(f"{size(sum(entry.disk() for entry in entries))} in {paths.snapshots}")


def _as_dict(entry: Entry, known: Sequence[SandboxRecord]) -> dict[str, Any]:
    from sandbox_gateway.snapshots import needed_by

    found = entry.snapshot
    return {
        **({"id": entry.id} if found is None else summary(found.manifest.public_dict())),
        "used": timestamp(entry.used),
        "disk": entry.disk(),
        "in_use": entry.in_use,
        "needed_by": list(needed_by(entry.id, known)),
        "damage": None if entry.damage is None else entry.damage.as_dict(),
    }


def _row(entry: Entry, known: Sequence[SandboxRecord]) -> Sequence[str]:
    from sandbox_gateway.snapshots import needed_by

    found = entry.snapshot
    if found is None:
        reason = entry.damage.message.split(": ", 1)[-1] if entry.damage is not None else ""
        return (entry.id[:12], "", "", size(entry.disk()), "", "", "", f"damaged: {reason}")
    needed = needed_by(entry.id, known)
    state = "needed" if needed else "in use" if entry.in_use else ""
    return (
        entry.id[:12],
        found.name,
        str(found.manifest.kind),
        size(found.size),
        age(found.manifest.created),
        found.manifest.profile,
        found.manifest.sandbox[:8],
        state,
    )


def _inspect(options: argparse.Namespace) -> int:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.snapshots import SnapshotStore

    paths = discover()
    store = SnapshotStore(paths)
    entry = store.find_entry(options.snapshot)
    found = store.find(options.snapshot) if entry.snapshot is None else entry.snapshot  # raises for a damaged one
    problems = _problems(paths, store, found) if options.verify else None
    shown = {**found.manifest.public_dict(), **_as_dict(entry, records(paths))}
    if options.json:
        if problems is not None:
            shown["problems"] = [problem.as_dict() for problem in problems]
        write_json(shown)
    else:
        _describe(shown)
        if problems == []:
            write_line("verified: it can be restored here now")
    for problem in problems or ():
        fail(problem, options.json)
    return 1 if problems else 0


def _problems(paths: Paths, store: Any, found: Snapshot) -> list[SandboxGatewayError]:
    """Everything that stands against restoring it now."""
    import asyncio

    from sandbox_gateway.snapshots import check_files

    problems = []
    with ProgressLine() as progress:

        def report(done: int, total: int) -> None:
            progress.update(f"reading {found.id[:12]}", f"{size(done)} of {size(total)}")

        async def verified() -> None:
            await store.verify(found, deep=True, report=report)

        async def fitting() -> None:
            await _check_runtime(paths, found)

        for check in (verified, fitting):
            try:
                asyncio.run(check())
            except SandboxGatewayError as error:
                problems.append(error)
        try:
            check_files(found.manifest.workspace)
        except SandboxGatewayError as error:
            problems.append(error)
    return problems


async def _check_runtime(paths: Paths, found: Snapshot) -> None:
    from sandbox_gateway.registry import make_runtime

    runtime: Any = make_runtime(found.manifest.runtime, paths)
    able = (await runtime.probe()).get("snapshots")
    reason = await runtime.unfit(found.manifest.requirements) if able.available else able.reason
    if reason:
        raise SandboxGatewayError("snapshot_unfit", f"snapshot {found.id[:12]}: {reason}", able.hint or None)


def _describe(shown: dict[str, Any]) -> None:
    needs = shown["requirements"]
    lines = [
        ("id", shown["id"]),
        ("name", shown["name"]),
        ("kind", str(shown["kind"])),
        ("created", shown["created"]),
        ("last used", shown["used"]),
        ("size", size(shown["size"])),
        ("of sandbox", shown["sandbox"]),
        ("profile", shown["profile"]),
        ("runtime", shown["runtime"]),
        ("made from", shown["parent"] or ""),
        ("needed by", ", ".join(shown["needed_by"])),
        ("in use", "yes" if shown["in_use"] else ""),
        ("layers", ", ".join(digest.removeprefix("sha256:")[:12] for digest in shown["layers"])),
        *((f"needs {key}", value if len(value) < 100 else f"{value[:97]}...") for key, value in needs.items()),
        *(("file", f"{file['path']} ({size(file['size'])})") for file in shown["files"]),
        *(("open on the host", file["path"]) for file in shown["workspace"]),
    ]
    for name, value in lines:
        if value:
            write_line(f"{name}: {value}")


def _rm(options: argparse.Namespace) -> int:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.snapshots import SnapshotStore, needed_by

    paths = discover()
    store, known = SnapshotStore(paths), records(paths)
    removed, status = [], 0
    with ProgressLine() as progress:
        for wanted in dict.fromkeys(options.snapshots):
            try:
                entry = store.find_entry(wanted)
                if needed := needed_by(entry.id, known):
                    raise SandboxGatewayError(
                        "snapshot_in_use",
                        f"sandbox {needed[0]} is suspended in snapshot {entry.id[:12]}",
                        f"`jupyter sandbox rm {needed[0][:8]}` removes both.",
                    )
                name, disk = entry.snapshot.name if entry.snapshot is not None else "", entry.disk()
                progress.update(f"removing {entry.id}")
                store.remove(entry.id)
                removed.append({"id": entry.id, "name": name, "bytes": disk})
            except SandboxGatewayError as error:
                status = fail(error, options.json)
    if options.json:
        write_json(removed)
    else:
        for item in removed:
            write_line(f"removed {item['name'] or item['id']} ({size(int(str(item['bytes'])))})")
    return status
