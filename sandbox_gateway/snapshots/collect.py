"""Which snapshots can go, and what must stay because of those that are kept.

Never removed: what a suspended sandbox lives in, what somebody reads, what a caller wants kept. Always removable: what
nobody can need any more. In between, a budget of bytes: those go first that nobody has used for longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.snapshots.files import disk_usage
from sandbox_gateway.snapshots.manifest import Kind, NewerFormat
from sandbox_gateway.snapshots.store import Entry, SnapshotStore

Records = Callable[[], Iterable[SandboxRecord]]
"""Reads the records of all sandboxes, now."""
Orphaned = Callable[[str, str], bool]
"""Whether a template's snapshot is surely nobody's, now: by the template's key and the snapshot's id."""
FORK_GRACE = 120.0
"""Seconds since its last use after which what was saved for a fork is left over."""
TEMPLATE_GRACE = 3600.0
"""Seconds since its last use after which a template that no record names is left over: its builder has ended."""
_GONE = frozenset({State.TERMINATED, State.EXPIRED})


@dataclass(frozen=True, slots=True)
class Removable:
    """Something that can go."""

    id: str
    """The snapshot's id; of a leftover, the name of its directory."""
    directory: Path
    size: int
    """Bytes on the disk."""
    reason: str
    name: str = ""

    def as_dict(self) -> dict[str, object]:
        """JSON form for ``prune --json``."""
        return {"what": "snapshot", "id": self.id, "name": self.name, "bytes": self.size, "reason": self.reason}


def needed_by(snapshot_id: str, records: Iterable[SandboxRecord]) -> tuple[str, ...]:
    """Ids of the sandboxes that live in this snapshot, or may have to be started from it again."""
    return tuple(record.id for record in records if record.snapshot == snapshot_id and record.state not in _GONE)


def removable(
    store: SnapshotStore,
    records: Records,
    *,
    budget: int | None = None,
    keep: Collection[str] = (),
    named: bool = False,
    damaged: bool = False,
    orphaned: Orphaned | None = None,
) -> tuple[Removable, ...]:
    """What :func:`collect` would remove. Blocks."""
    leftovers = [
        Removable(path.name, path, disk_usage(path), "left by a process that ended half-way")
        for path in store.leftovers()
    ]
    # First the snapshots, then the records: what was committed before we looked is on record by now.
    entries = store.entries()
    known = tuple(records())
    needed, going = [], []
    for entry in entries:
        reason = _reason(entry, known, damaged, orphaned)
        if entry.id in keep or needed_by(entry.id, known) or entry.in_use or isinstance(entry.damage, NewerFormat):
            needed.append(entry)
        elif reason:
            going.append(_removable(entry, reason))
        else:
            needed.append(entry)
    return (*leftovers, *going, *_beyond(needed, known, budget, keep, named))


def collect(
    store: SnapshotStore,
    records: Records,
    *,
    budget: int | None = None,
    keep: Collection[str] = (),
    named: bool = False,
    damaged: bool = False,
    orphaned: Orphaned | None = None,
) -> tuple[Removable, ...]:
    """Remove what nobody needs, and, with a ``budget`` in bytes for all snapshots together, the least recently used
    ones beyond it; returns what went. Blocks.

    ``keep`` are ids to be left alone, ``named`` lets the budget reach snapshots that somebody gave a name, ``damaged``
    takes what cannot be read. Templates that are ``orphaned`` go; where nobody says which are, none does for that.
    """
    gone = []
    for item in removable(store, records, budget=budget, keep=keep, named=named, damaged=damaged, orphaned=orphaned):
        try:
            if not item.id.startswith("."):  # leftovers are swept below, all together
                store.remove(item.id)
        except SandboxGatewayError as error:
            if error.code not in {"unknown_snapshot", "snapshot_in_use"}:
                raise
            continue
        gone.append(item)
    store.sweep()
    return tuple(gone)


def _reason(entry: Entry, records: Sequence[SandboxRecord], damaged: bool, orphaned: Orphaned | None) -> str:
    """Why it can go whatever its size; empty when it cannot."""
    if entry.snapshot is None:
        return f"damaged: {entry.damage.message}" if damaged and entry.damage is not None else ""
    manifest = entry.snapshot.manifest
    if manifest.kind is Kind.FORK:
        # Who saved it and who restores it may be two processes: between them nobody has a lease.
        return "a fork that is over" if time.time() - entry.used > FORK_GRACE else ""
    if manifest.kind is Kind.SUSPENDED:
        coming = any(record.id == manifest.sandbox and _may_come_to_need(record) for record in records)
        return "" if coming else "its sandbox does not need it any more"
    if manifest.kind is Kind.TEMPLATE and manifest.template_key is not None and orphaned is not None:
        left = time.time() - entry.used > TEMPLATE_GRACE and orphaned(manifest.template_key, entry.id)
        return "a template that nobody names" if left else ""
    return ""


def _may_come_to_need(record: SandboxRecord) -> bool:
    """Whether its sandbox is between a commit and the record that names what was committed."""
    unnamed = record.state in {State.SUSPENDED, State.RESUMING} and record.snapshot is None
    return record.state is State.SUSPENDING or unnamed


def _beyond(
    entries: Sequence[Entry],
    records: Sequence[SandboxRecord],
    budget: int | None,
    keep: Collection[str],
    named: bool,
) -> list[Removable]:
    if budget is None:
        return []
    sizes = {entry.id: entry.disk() for entry in entries}
    total, now, gone = sum(sizes.values()), time.time(), []
    # A clock that was ahead once must not keep a snapshot for ever.
    for entry in sorted(entries, key=lambda entry: (min(entry.used, now), entry.id)):
        if total <= budget:
            break
        snapshot = entry.snapshot
        if snapshot is None or snapshot.manifest.kind not in (Kind.SAVED, Kind.TEMPLATE):
            continue
        if entry.id in keep or needed_by(entry.id, records) or entry.in_use or (snapshot.name and not named):
            continue
        gone.append(_removable(entry, "beyond the budget, not used for longest", sizes[entry.id]))
        total -= sizes[entry.id]
    return gone


def _removable(entry: Entry, reason: str, size: int | None = None) -> Removable:
    name = entry.snapshot.name if entry.snapshot is not None else ""
    return Removable(entry.id, entry.directory, entry.disk() if size is None else size, reason, name)


def layers_in_use(
    store: SnapshotStore, records: Records, without: Collection[str] = (), *, sure: bool = False
) -> frozenset[str]:
    """Digests of the layers that sandboxes or snapshots need; snapshots in ``without`` do not count.

    ``sure``: as of :meth:`SnapshotStore.references`.

    The records are read before and after: a sandbox that becomes a snapshot while we look, or a snapshot that becomes
    a sandbox, is seen in one of the two.
    """

    def of_records() -> frozenset[str]:
        return frozenset(digest for record in records() if record.state not in _GONE for digest in record.layers)

    before = of_records()
    saved, _ = store.references(without, sure=sure)
    return before | saved | of_records()


def runsc_in_use(store: SnapshotStore, records: Records, without: Collection[str] = ()) -> frozenset[str]:
    """Hashes of the runsc binaries that snapshots (but those in ``without``) need, or sandboxes were restored with."""
    binaries = (record.handle.get("data") for record in records() if record.state not in _GONE)
    paths = (data.get("binary") for data in binaries if isinstance(data, dict))
    _, saved = store.references(without)
    return saved | frozenset(Path(path).parent.name for path in paths if isinstance(path, str))
