"""The snapshots of one installation.

On disk, below ``<home>/snapshots`` (mode 0700)::

    <id>/manifest.json    what it is (:mod:`~sandbox_gateway.snapshots.manifest`)
    <id>/image/           the runtime's files
    <id>/lock             who uses it now (:mod:`~sandbox_gateway.snapshots.locks`); its time: when it was used last
    .<id>.new/            a draft
    .<id>.gone/           what is being removed
    .lock                 the store's own lock, held for moments
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.store import LayerStore
from sandbox_gateway.snapshots.draft import Draft, Snapshot, to_its_end
from sandbox_gateway.snapshots.files import Report, Stopped, Unusable, disk_usage, fsync_path, remove_all
from sandbox_gateway.snapshots.image import manifest_content, sealed_files, write_manifest
from sandbox_gateway.snapshots.locks import Lease, alone, is_used, last_used, store_lock, take_lease
from sandbox_gateway.snapshots.manifest import (
    ID,
    Manifest,
    NewerFormat,
    checked_name,
    damaged,
    read_manifest,
    references_in,
)
from sandbox_gateway.snapshots.verify import check

NEW, GONE = ".new", ".gone"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is under an id, be it whole or not."""

    id: str
    directory: Path
    snapshot: Snapshot | None
    """None when it is damaged."""
    damage: SandboxGatewayError | None = None
    """Why it is none."""

    @property
    def used(self) -> float:
        """When somebody used it last, in seconds since the epoch."""
        return last_used(self.directory)

    @property
    def in_use(self) -> bool:
        """Whether somebody has a lease of it now."""
        try:
            return is_used(self.directory)
        except OSError as error:
            raise storage_error(error, f"cannot use {self.directory.parent}") from error

    def disk(self) -> int:
        """Bytes that it takes on its disk."""
        return disk_usage(self.directory)


Entries: TypeAlias = tuple[Entry, ...]
Listed: TypeAlias = tuple[Snapshot, ...]
"""Spelled out because ``list`` is a method below."""


class SnapshotStore:
    """Snapshots of one installation. Safe across processes and threads.

    What is ``async`` does its work on a thread; the other methods block for moments (:meth:`remove`: as long as the
    file system takes to free the files).
    """

    def __init__(self, paths: Paths) -> None:
        self._home = paths
        self.directory = paths.snapshots
        self._layers = LayerStore(paths)

    # Making

    async def begin(self) -> Draft:
        """Begin a snapshot; raises ``disk_full`` or ``data_directory``."""
        draft: list[Draft] = []
        try:
            return await to_its_end(lambda: self._begin(draft), None)
        except BaseException:
            for made in draft:  # a caller who is gone
                await made.discard()
            raise

    def _begin(self, made: list[Draft]) -> Draft:
        snapshot_id = uuid.uuid4().hex
        self._prepare()
        directory = self.directory / f".{snapshot_id}{NEW}"
        try:
            with store_lock(self.directory):
                directory.mkdir(mode=0o700)
                lease = take_lease(directory, create=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                remove_all(directory)
            raise storage_error(error, f"cannot begin a snapshot in {self.directory}") from error
        if lease is None:
            raise SandboxGatewayError("data_directory", f"{directory} vanished while it was made")
        made.append(Draft(self, snapshot_id, directory, lease))
        return made[0]

    def _prepare(self) -> None:
        self._home.ensure()
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            found = os.lstat(self.directory)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise SandboxGatewayError("data_directory", f"{self.directory} is not a directory of this user")
            if stat.S_IMODE(found.st_mode) != 0o700:
                os.chmod(self.directory, 0o700)
        except OSError as error:
            raise storage_error(error, f"cannot make {self.directory}") from error

    async def seal(self, snapshot: Snapshot, report: Report | None = None) -> Snapshot:
        """Compute the checksums that a commit with ``sealed=False`` left out, and make it survive a power cut.

        A snapshot that is removed meanwhile is no error. Raises ``snapshot_damaged``, ``disk_full`` or
        ``data_directory``; the snapshot is then as it was.
        """
        stop = threading.Event()
        return await to_its_end(lambda: self._seal(snapshot, report, stop), stop)

    def _seal(self, snapshot: Snapshot, report: Report | None, stop: threading.Event) -> Snapshot:
        try:
            files = sealed_files(snapshot.image, snapshot.manifest.files, report, stop)
            sealed = self._rewrite(snapshot, lambda manifest: replace(manifest, files=files))
            fsync_path(self.directory)
        except (FileNotFoundError, Stopped):
            return snapshot
        except Unusable as error:
            raise damaged(snapshot.id, str(error)) from error
        except OSError as error:
            raise storage_error(error, f"cannot seal snapshot {snapshot.id}") from error
        return sealed

    def _rewrite(self, snapshot: Snapshot, change: Callable[[Manifest], Manifest], *, durable: bool = True) -> Snapshot:
        """Change what the manifest says *now*: others may have changed it meanwhile."""
        with store_lock(self.directory):
            manifest = change(read_manifest(manifest_content(snapshot.directory), snapshot.id))
            write_manifest(snapshot.directory, manifest, durable=durable)
        return Snapshot(snapshot.directory, manifest)

    # Finding

    def get(self, snapshot_id: str) -> Snapshot:
        """The snapshot with exactly this id; raises ``unknown_snapshot`` or ``snapshot_damaged``."""
        entry = self._entry(snapshot_id) if ID.fullmatch(snapshot_id) else None
        if entry is None:
            raise _unknown(snapshot_id)
        return _whole(entry)

    def find(self, wanted: str) -> Snapshot:
        """The snapshot with this id or name, else the only one whose id begins so.

        Raises ``unknown_snapshot``, ``ambiguous_id`` with some of the candidates, or ``snapshot_damaged``.
        """
        return _whole(self.find_entry(wanted))

    def find_entry(self, wanted: str) -> Entry:
        """As :meth:`find`, but gives a damaged one too."""
        if ID.fullmatch(wanted) and (entry := self._entry(wanted)) is not None:
            return entry
        entries = self.entries() if wanted else ()
        named = [entry for entry in entries if entry.snapshot is not None and entry.snapshot.name == wanted]
        found = named or [entry for entry in entries if entry.id.startswith(wanted)]
        if not found:
            raise _unknown(wanted)
        if len(found) > 1:
            shown = ", ".join(entry.id[:12] for entry in found[:5]) + (", ..." if len(found) > 5 else "")
            raise SandboxGatewayError("ambiguous_id", f"{wanted!r} could be any of the snapshots {shown}")
        return found[0]

    def list(self) -> Listed:
        """All whole snapshots, oldest first."""
        return tuple(entry.snapshot for entry in self.entries() if entry.snapshot is not None)

    def entries(self) -> Entries:
        """All snapshots, damaged ones too, oldest first (damaged ones last)."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise storage_error(error, f"cannot read {self.directory}") from error
        found = [entry for name in names if ID.fullmatch(name) and (entry := self._entry(name)) is not None]
        return tuple(sorted(found, key=_by_age))

    def _entry(self, snapshot_id: str) -> Entry | None:
        directory = self.directory / snapshot_id
        try:
            if not stat.S_ISDIR(os.lstat(directory).st_mode):
                return Entry(snapshot_id, directory, None, damaged(snapshot_id, "it is no directory"))
            content = manifest_content(directory)
            return Entry(snapshot_id, directory, Snapshot(directory, read_manifest(content, snapshot_id)))
        except FileNotFoundError:
            if not os.path.lexists(directory):
                return None
            return Entry(snapshot_id, directory, None, damaged(snapshot_id, "it has no manifest"))
        except SandboxGatewayError as error:
            return Entry(snapshot_id, directory, None, error)
        except OSError as error:
            raise storage_error(error, f"cannot read {directory}") from error

    # Using

    def hold(self, snapshot: Snapshot) -> Lease:
        """A lease: until it is released (or this process ends) nobody removes the snapshot. Marks it as used.

        Raises ``unknown_snapshot`` when it is gone or being removed.
        """
        try:
            lease = take_lease(snapshot.directory)
        except OSError as error:
            raise damaged(snapshot.id, f"its lock cannot be used: {error.strerror}") from error
        if lease is None:
            raise _unknown(snapshot.id)
        return lease

    async def verify(self, snapshot: Snapshot, *, deep: bool = False, report: Report | None = None) -> Snapshot:
        """Make sure that it can be restored, as far as this store can tell; returns it as its manifest is now.

        Cheap while nobody has written to its files since it was made; else, or with ``deep``, every byte is read.
        Raises ``snapshot_damaged``, ``snapshot_unfit`` (a layer is missing) or ``unknown_snapshot``.
        What the runtime needs is :meth:`Snapshots.unfit`'s to say, workspace files are
        :func:`~sandbox_gateway.snapshots.workspace.check_files`'.
        """
        stop = threading.Event()
        return await to_its_end(lambda: self._verify(snapshot, deep, report, stop), stop)

    def _verify(self, snapshot: Snapshot, deep: bool, report: Report | None, stop: threading.Event) -> Snapshot:
        found = self.get(snapshot.id)
        try:
            known = check(found, self._layers, deep=deep, report=report, stop=stop)
        except Stopped as error:
            raise damaged(found.id, "nobody waited until it was read") from error
        if known == found.manifest.files:
            return found
        try:
            # Its bytes are right though the files are others (a backup was put back): the next look is cheap again.
            return self._rewrite(found, lambda manifest: replace(manifest, files=known), durable=False)
        except (OSError, SandboxGatewayError):
            return found

    def rename(self, snapshot: Snapshot, name: str) -> Snapshot:
        """Give it a name, or take it away (empty). Raises ``invalid_request`` when the name is taken or malformed,
        ``unknown_snapshot``, ``snapshot_damaged``, ``disk_full`` or ``data_directory``."""
        checked_name(name)
        try:
            with store_lock(self.directory):
                if name:
                    self.check_free(name, besides=snapshot.id)
                manifest = replace(self.get(snapshot.id).manifest, name=name)
                write_manifest(snapshot.directory, manifest, durable=True)
        except OSError as error:
            raise storage_error(error, f"cannot rename snapshot {snapshot.id}") from error
        return Snapshot(snapshot.directory, manifest)

    def check_free(self, name: str, *, besides: str = "", among: Collection[str] | None = None) -> None:
        """Raise ``invalid_request`` when a snapshot other than ``besides`` has this name; where ``among`` is given,
        names of others than those ids do not count (they are other users', who must not be told of)."""
        for snapshot in self.list():
            if snapshot.name == name and snapshot.id != besides and (among is None or snapshot.id in among):
                hint = f"`jupyter sandbox snapshot rm {name}` removes that one."
                raise SandboxGatewayError("invalid_request", f"there is a snapshot {name!r} already", hint)

    # Removing

    def remove(self, snapshot_id: str) -> None:
        """Remove a snapshot, damaged or not, by its full id. It is gone at once, its files a moment later.

        Raises ``unknown_snapshot``; ``snapshot_in_use`` while anybody (this process too) has a lease of it;
        ``data_directory``. Whether a suspended sandbox lives in it is the caller's to know
        (:func:`~sandbox_gateway.snapshots.collect.needed_by`).
        """
        directory = self.directory / snapshot_id
        if not ID.fullmatch(snapshot_id):
            raise _unknown(snapshot_id)
        gone = self.directory / f".{snapshot_id}{GONE}"
        try:
            with store_lock(self.directory), alone(directory) as nobody:
                if not nobody:
                    hint = "It is being restored or read; try again when that has ended."
                    raise SandboxGatewayError("snapshot_in_use", f"snapshot {snapshot_id[:12]} is in use", hint)
                os.rename(directory, gone)
            _remove_anything(gone)
        except FileNotFoundError as error:
            raise _unknown(snapshot_id) from error
        except OSError as error:
            raise storage_error(error, f"cannot remove {directory}") from error

    def leftovers(self) -> tuple[Path, ...]:
        """What crashed processes left: drafts and half-removed snapshots that nobody works on."""
        try:
            return tuple(path for path in self._hidden() if not is_used(path))
        except OSError as error:
            raise storage_error(error, f"cannot use {self.directory}") from error

    def _hidden(self) -> tuple[Path, ...]:
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise storage_error(error, f"cannot read {self.directory}") from error
        return tuple(self.directory / name for name in names if name.startswith(".") and name.endswith((NEW, GONE)))

    def sweep(self) -> int:
        """Remove all :meth:`leftovers`; returns how many. Never touches a draft that another process works on."""
        if not self._hidden():
            return 0
        try:
            mine = []
            with store_lock(self.directory):
                for path in self._hidden():
                    with alone(path) as nobody:
                        if nobody:
                            # A draft ends here even if we are killed; the long work comes after the lock.
                            claimed = path.with_name(f".{uuid.uuid4().hex}{GONE}")
                            with contextlib.suppress(FileNotFoundError):  # its remover came to the end
                                os.rename(path, claimed)
                                mine.append(claimed)
            for path in mine:
                _remove_anything(path)
        except OSError as error:
            raise storage_error(error, f"cannot remove what is left in {self.directory}") from error
        return len(mine)

    def references(self, without: Collection[str] = (), *, sure: bool = False) -> tuple[frozenset[str], frozenset[str]]:
        """Digests of layers, and hashes of runsc binaries, that snapshots need; those of a newer program's too.

        ``without`` are ids of snapshots that do not count. One that cannot be read needs nothing; with ``sure`` it
        raises ``snapshot_damaged`` instead, since it may be readable again tomorrow.
        """
        layers: set[str] = set()
        runsc: set[str] = set()
        for entry in self.entries():
            if entry.id in without:
                continue
            if sure and not isinstance(entry.damage, NewerFormat):
                _whole(entry)
            try:
                found = references_in(manifest_content(entry.directory))
            except FileNotFoundError:
                continue  # it was removed meanwhile, or has none
            except SandboxGatewayError:
                if sure:
                    raise
                continue
            layers |= found[0]
            runsc |= found[1]
        return frozenset(layers), frozenset(runsc)


def _whole(entry: Entry) -> Snapshot:
    if entry.snapshot is None:
        raise entry.damage or damaged(entry.id, "it cannot be read")
    return entry.snapshot


def _by_age(entry: Entry) -> tuple[bool, float, str]:
    return (entry.snapshot is None, entry.snapshot.manifest.created if entry.snapshot else 0.0, entry.id)


def _remove_anything(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        remove_all(path)


def _unknown(wanted: str) -> SandboxGatewayError:
    return SandboxGatewayError("unknown_snapshot", f"there is no snapshot {wanted[:80]!r}")
