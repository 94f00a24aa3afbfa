"""``prune``: frees the disk of what nobody needs any more."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.failures import Usage
from sandbox_gateway.cli.output import ProgressLine, clean, size, write_json, write_line, write_table
from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.host.paths import Paths
    from sandbox_gateway.model import SandboxRecord

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?(|[KMGT]i?B?|B)")


def add(commands: Commands) -> None:
    """Add it to the parser."""
    prune = command(
        commands,
        "prune",
        _prune,
        "free the disk of what nobody needs any more",
        "What crashed processes left, image layers and runsc binaries that nothing refers to, snapshots whose "
        "sandboxes went on, templates and unnamed snapshots beyond their budget. Suspended sandboxes are never "
        "touched.",
    )
    prune.add_argument(
        "--budget",
        metavar="SIZE",
        type=_size,
        help="bytes that snapshots may take, instead of the settings' snapshot_budget; templates and unnamed snapshots "
        "beyond it go, least recently used first",
    )
    prune.add_argument("--snapshots", action="store_true", help="damaged snapshots too, and with --budget named ones")
    prune.add_argument("-n", "--dry-run", action="store_true", help="only say what would go")
    prune.add_argument("-y", "--yes", action="store_true", help="ask nothing")


def _size(text: str) -> int:
    from sandbox_gateway.profiles.values import size as parsed

    wanted = text.strip().upper().replace("I", "i")
    if not _SIZE.fullmatch(wanted):
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (for example 20G)")
    return parsed(wanted, 0) or 0


@dataclass(frozen=True, slots=True)
class Item:
    """Something that goes."""

    what: str
    """``snapshot``, ``layer``, ``runsc`` or ``log``."""
    id: str
    bytes: int
    reason: str
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The object that ``prune --json`` lists."""
        return {"what": self.what, "id": self.id, "name": self.name, "bytes": self.bytes, "reason": self.reason}


def _prune(options: argparse.Namespace) -> int:
    from sandbox_gateway.host.paths import discover

    paths = discover()
    if not paths.home.exists():  # looking makes nothing
        _show(options, [], removed=False)
        return 0
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not options.json
    if not (options.yes or options.dry_run or asks) and (options.snapshots or options.budget is not None):
        raise Usage("jupyter sandbox prune", "somebody may want these snapshots: give --yes, or --dry-run to look")
    if options.budget is None:
        options.budget = _budget(paths)
    if options.dry_run or (asks and not options.yes):
        found = _planned(paths, options)
        _show(options, found, removed=False)
        if options.dry_run or not found:
            return 0
        if not _agreed():
            sys.stderr.write("nothing was removed\n")
            return 1
        options.shown = True
    with ProgressLine() as progress:
        gone = list(_removed(paths, options, progress))
    _show(options, gone, removed=True)
    return 0


def _budget(paths: Paths) -> int | None:
    from sandbox_gateway.profiles import load_profiles

    try:
        return load_profiles(paths).settings.snapshot_budget
    except SandboxGatewayError as error:  # a mistake in the file is no reason to keep what nobody needs
        sys.stderr.write(f"note: no budget: {clean(error.message)}\n")
        return None


def _agreed() -> bool:
    sys.stderr.write("Remove all of this? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _show(options: argparse.Namespace, items: list[Item], *, removed: bool) -> None:
    total = sum(item.bytes for item in items)
    if options.json:
        shown = [item.as_dict() for item in items]
        write_json({"removed": removed, "items": shown, "bytes": total})
        return
    if items and not getattr(options, "shown", False):
        write_table(
            ("WHAT", "ID", "SIZE", "WHY"),
            [(item.what, item.name or item.id.strip(".")[:12], size(item.bytes), item.reason) for item in items],
        )
    write_line(f"{size(total)} freed" if removed else f"{size(total)} would be freed")


def _records(paths: Paths) -> Callable[[], Iterable[SandboxRecord]]:
    from sandbox_gateway.cli.snapshot_commands import records

    return lambda: records(paths)


def _wanted(paths: Paths, options: argparse.Namespace) -> dict[str, Any]:
    """Which snapshots are to go, as :func:`~sandbox_gateway.snapshots.collect.collect` is told."""
    from sandbox_gateway.templates import TemplateRecords

    return {
        "budget": options.budget,
        "named": options.snapshots,
        "damaged": options.snapshots,
        "orphaned": TemplateRecords(paths).orphaned,
    }


def _planned(paths: Paths, options: argparse.Namespace) -> list[Item]:
    from sandbox_gateway.host.setup import unused_runsc
    from sandbox_gateway.images.store import LayerStore
    from sandbox_gateway.snapshots import SnapshotStore, layers_in_use, removable, runsc_in_use

    store, records = SnapshotStore(paths), _records(paths)
    snapshots = removable(store, records, **_wanted(paths, options))
    without = {item.id for item in snapshots}
    return [
        *(Item("snapshot", item.id, item.size, item.reason, item.name) for item in snapshots),
        *map(_layer, LayerStore(paths).unused(layers_in_use(store, records, without))),
        *(_runsc(old.sha256, old.size) for old in unused_runsc(paths, runsc_in_use(store, records, without))),
        *(_log(path) for path in _lost_logs(paths)),
    ]


def _removed(paths: Paths, options: argparse.Namespace, progress: ProgressLine) -> Iterable[Item]:
    import asyncio

    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.setup import remove_unused_runsc
    from sandbox_gateway.images.store import LayerStore
    from sandbox_gateway.snapshots import SnapshotStore, collect, layers_in_use, runsc_in_use

    store, records = SnapshotStore(paths), _records(paths)
    progress.update("removing snapshots")
    snapshots = collect(store, records, **_wanted(paths, options))
    yield from (Item("snapshot", item.id, item.size, item.reason, item.name) for item in snapshots)
    if paths.database.exists():
        progress.update("cleaning up after processes that ended")
        asyncio.run(actions.sweep(paths))
    progress.update("removing image layers")
    yield from map(_layer, LayerStore(paths).collect(layers_in_use(store, records)))
    progress.update("removing old runsc binaries")
    for old in remove_unused_runsc(paths, lambda: runsc_in_use(store, records)):
        yield _runsc(old.sha256, old.size)
    for path in _lost_logs(paths):
        item = _log(path)
        path.unlink(missing_ok=True)
        yield item


def _layer(layer: Any) -> Item:
    return Item("layer", layer.digest.removeprefix("sha256:"), layer.size, f"nothing uses it: {layer.what}")


def _runsc(sha256: str, count: int) -> Item:
    return Item("runsc", sha256, count, "an older one that nothing needs")


def _log(path: Path) -> Item:
    count = path.stat().st_size if path.exists() else 0
    return Item("log", path.stem, count, "its sandbox is forgotten")


def _lost_logs(paths: Paths) -> list[Path]:
    """Logs without a record: `ps --all` shows none of their sandboxes any more."""
    try:
        found = sorted(paths.logs.glob("*.log"))
    except OSError as error:
        raise SandboxGatewayError("data_directory", f"{paths.logs} cannot be read: {error.strerror}") from error
    known = {record.id for record in _records(paths)()} if found else set()
    return [path for path in found if path.stem not in known]
