"""A snapshot while it is made: a directory under a temporary name, until it is whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.snapshots.files import Report, Stopped, Unusable, fsync_path, remove_all
from sandbox_gateway.snapshots.image import image_files, sealed_files, write_manifest
from sandbox_gateway.snapshots.locks import Lease, store_lock
from sandbox_gateway.snapshots.manifest import Facts, Manifest, as_it_reads, checked_name

if TYPE_CHECKING:
    from sandbox_gateway.snapshots.store import SnapshotStore

IMAGE = "image"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole snapshot in the store."""

    directory: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """Its id, 32 hexadecimal digits."""
        return self.manifest.id

    @property
    def name(self) -> str:
        """Its name; empty when it has none."""
        return self.manifest.name

    @property
    def image(self) -> Path:
        """The directory that the runtime restores from."""
        return self.directory / IMAGE

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self.manifest.size


class Draft:
    """A snapshot that is being made, by :meth:`SnapshotStore.begin`.

    Either :meth:`commit` or :meth:`discard` ends it; as an async context manager it is discarded unless it was
    committed. While it is open no other process takes it for a leftover.
    """

    def __init__(self, store: SnapshotStore, snapshot_id: str, directory: Path, lease: Lease) -> None:
        self.id = snapshot_id
        self.snapshot: Snapshot | None = None
        """Set once :meth:`commit` has returned."""
        self._store = store
        self._directory = directory
        self._lease = lease
        self._stop = threading.Event()
        self._serial = asyncio.Lock()

    @property
    def image(self) -> Path:
        """Where the runtime is to save to: it makes this directory itself."""
        return self._directory / IMAGE

    async def commit(
        self,
        facts: Facts,
        *,
        sealed: bool = True,
        keep_lease: bool = False,
        report: Report | None = None,
        among: Collection[str] | None = None,
    ) -> Snapshot:
        """Make it a snapshot of the store, all at once.

        ``sealed=True`` computes the checksums and makes everything survive a power cut before it returns;
        ``sealed=False`` returns at once and leaves both to :meth:`SnapshotStore.seal`. With ``keep_lease`` nobody
        removes the snapshot until :meth:`close`. ``report`` is told the bytes hashed. The name has to be free
        ``among`` the snapshots of these ids (None: all).

        Raises ``invalid_request`` (the name is taken or malformed), ``snapshot_failed``, ``disk_full`` or
        ``data_directory``; the draft is then still there, to be discarded.
        """
        checked_name(facts.name)
        async with self._serial:
            if self.snapshot is not None:
                raise SandboxGatewayError("internal", f"snapshot {self.id} is committed already")
            self.snapshot = await to_its_end(lambda: self._commit(facts, sealed, report, among), self._stop)
            if not keep_lease:
                self._lease.release()
            return self.snapshot

    async def discard(self) -> None:
        """Remove what there is, a commit that a cancelled caller never heard of included. Idempotent; does nothing
        after :meth:`commit` has returned."""
        async with self._serial:
            if self.snapshot is None:
                try:
                    await to_its_end(self._remove, None)
                finally:
                    self._lease.release()

    def close(self) -> None:
        """Give up the lease of a committed snapshot."""
        if self.snapshot is not None:
            self._lease.release()

    async def __aenter__(self) -> Draft:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await self.discard()

    def _remove(self) -> None:
        try:
            remove_all(self._directory)
        except OSError as error:
            raise storage_error(error, f"cannot remove {self._directory}") from error

    def _commit(self, facts: Facts, sealed: bool, report: Report | None, among: Collection[str] | None) -> Snapshot:
        try:
            if facts.name:
                self._store.check_free(facts.name, among=among)  # before the long work; and again under the lock
            files = image_files(self.image)
            if sealed:
                files = sealed_files(self.image, files, report, self._stop)
            said = {name: getattr(facts, name) for name in _FACTS}
            manifest = as_it_reads(Manifest(**said, id=self.id, owner=os.geteuid(), created=time.time(), files=files))
            write_manifest(self._directory, manifest, durable=sealed)
            with store_lock(self._store.directory) if facts.name else contextlib.nullcontext():
                if facts.name:
                    self._store.check_free(facts.name, among=among)
                final = self._store.directory / self.id
                os.rename(self._directory, final)
                self._directory = final
            if sealed:
                fsync_path(self._store.directory)
        except Stopped as error:
            raise SandboxGatewayError("snapshot_failed", "the caller gave up") from error
        except Unusable as error:
            raise SandboxGatewayError("snapshot_failed", f"the saved image {error}") from error
        except FileNotFoundError as error:
            raise SandboxGatewayError("snapshot_failed", "what was saved is gone: " + str(error.filename)) from error
        except OSError as error:
            raise storage_error(error, f"cannot write the snapshot in {self._store.directory}") from error
        return Snapshot(self._directory, manifest)


_FACTS = tuple(Facts.__dataclass_fields__)


async def to_its_end(work: Callable[[], _T], stop: threading.Event | None) -> _T:
    """Run ``work`` on a thread. A caller who is cancelled sets ``stop``, and waits until the thread has come to its
    end: nobody works on files that somebody else is removing."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if stop is not None:
            stop.set()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at: the caller is gone
        raise
