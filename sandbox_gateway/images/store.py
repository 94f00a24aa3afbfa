"""The layer store: content-addressed files, built once, kept while something refers to them.

On disk, below ``Paths.layers``::

    <sha256>.erofs        a layer, mode 0600, never changed once it has this name
    <sha256>.json         what it is: size, created, what it holds, its sources
    index/<hash>.json     slot -> key and digest: the current build of one source
    locks/<hash>.lock     flock of a slot, held while it is built
    tmp/<hash>-*          what is being built; swept by whoever holds the slot's lock next

A *slot* names a source ("the environment at /x"), a *key* fingerprints its present state. When the key of a slot
changes, its old layer is no longer current and goes with the next collection, unless a sandbox or snapshot uses it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.erofs import SourceChanged, Written, write_image
from sandbox_gateway.images.tree import Tree

CURRENT_FOR = 30 * 86400.0
"""Seconds for which an unused slot still keeps its layer."""
HANDED_OUT_FOR = 600.0
"""Seconds for which a layer that was just resolved is kept, so that its user can record it."""
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is."""

    what: str
    """The layer: "environment /home/u/venv"."""
    done_bytes: int
    total_bytes: int
    """0 while it is not known."""
    message: str = ""


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is to be built, when its slot has no current build."""

    tree: Tree
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Kept in the layer's metadata under ``facts`` (JSON)."""
    release: Callable[[], None] | None = None
    """Called when the tree's sources are no longer needed."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer of the store."""

    digest: str
    """``sha256:...``"""
    path: Path
    size: int
    """Bytes of the file."""
    created: float
    """Seconds since the epoch."""
    what: str
    sources: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    current: bool = False
    """Whether a slot names it as its present build (only set by :meth:`LayerStore.list`)."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form for ``image ls --json``."""
        return {
            "digest": self.digest,
            "size": self.size,
            "created": self.created,
            "what": self.what,
            "sources": list(self.sources),
            "current": self.current,
        }


StoredLayers: TypeAlias = list[StoredLayer]
"""Spelled out here because ``list`` is a method below."""


class LayerStore:
    """The layers of one installation. Methods block; call them on a thread of their own. Safe across processes."""

    def __init__(self, paths: Paths) -> None:
        self._home = paths
        self.directory = paths.layers
        self._index = self.directory / "index"
        self._locks = self.directory / "locks"
        self._tmp = self.directory / "tmp"

    def ensure(
        self,
        slot: str,
        key: str,
        build: Callable[[], Recipe],
        *,
        what: str,
        sources: tuple[str, ...] = (),
        progress: ProgressCallback | None = None,
    ) -> StoredLayer:
        """The layer of ``slot`` for ``key``; built by ``build`` if there is none yet.

        One process builds, others wait for it and reuse. Raises ``disk_full``, ``data_directory``, ``image_failed``,
        and what ``build`` raises; nothing is left behind then.
        """
        found = self._current(slot, key)
        if found is not None:
            return found
        with _mapped(self.directory, what):
            self._home.ensure()
            for directory in (self.directory, self._index, self._locks, self._tmp):
                directory.mkdir(mode=0o700, exist_ok=True)
            with self._locked(slot, what, progress):
                found = self._current(slot, key)
                if found is not None:
                    return found
                self._sweep_slot(slot)
                return self._build(slot, key, build, what, sources, progress)

    def get(self, digest: str) -> StoredLayer | None:
        """The layer with this digest; None when it is absent or has lost bytes."""
        name = digest.removeprefix("sha256:")
        path = self.directory / f"{name}.erofs"
        meta = _read_json(self.directory / f"{name}.json")
        if meta is None or _size(path) != meta.get("size"):
            return None  # absent, or damaged: as good as absent
        return StoredLayer(
            f"sha256:{name}",
            path,
            int(meta["size"]),
            float(meta["created"]),
            str(meta["what"]),
            tuple(meta["sources"]),
            meta.get("facts", {}),
        )

    def list(self) -> StoredLayers:
        """All layers, oldest first."""
        current = self._current_digests()
        found = [self.get(path.stem) for path in self.directory.glob("*.erofs")] if self.directory.is_dir() else []
        layers = [layer for layer in found if layer is not None]
        marked = [
            StoredLayer(x.digest, x.path, x.size, x.created, x.what, x.sources, x.facts, x.digest in current)
            for x in layers
        ]
        return sorted(marked, key=lambda layer: (layer.created, layer.digest))

    def remove(self, digest: str, referenced: Collection[str] = ()) -> int:
        """Remove one layer by digest or unique prefix and return its bytes.

        Raises ``invalid_request`` when it is in ``referenced`` or unknown, ``ambiguous_id`` when several match.
        """
        wanted = digest.removeprefix("sha256:")
        matches = [x for x in self.list() if wanted and x.digest.removeprefix("sha256:").startswith(wanted)]
        if not matches:
            raise SandboxGatewayError("invalid_request", f"no layer {digest}", "`jupyter sandbox image ls` lists them.")
        if len(matches) > 1:
            raise SandboxGatewayError("ambiguous_id", f"{len(matches)} layers begin with {digest}")
        layer = matches[0]
        if layer.digest in referenced:
            raise SandboxGatewayError(
                "invalid_request",
                f"layer {layer.digest[:19]} is in use by a sandbox or a snapshot",
                "Remove that one first.",
            )
        self._unlink(layer.digest)
        return layer.size

    def unused(self, referenced: Collection[str], *, handed_out_for: float = HANDED_OUT_FOR) -> StoredLayers:
        """The layers that nothing refers to and that are not current for a slot, oldest first."""
        kept = set(referenced) | self._current_digests()
        return [
            layer
            for layer in self.list()
            if layer.digest not in kept and time.time() - _mtime(layer.path.with_suffix(".json")) >= handed_out_for
        ]

    def collect(self, referenced: Collection[str], *, handed_out_for: float = HANDED_OUT_FOR) -> StoredLayers:
        """Remove and return the :meth:`unused` layers; sweep leftovers.

        ``referenced`` are the digests that sandboxes and snapshots need
        (:func:`sandbox_gateway.snapshots.layers_in_use`).
        """
        self.sweep()
        removed = self.unused(referenced, handed_out_for=handed_out_for)
        for layer in removed:
            self._unlink(layer.digest)
        return removed

    def sweep(self) -> int:
        """Remove what killed builders left; returns how many files. Builds that go on are not touched."""
        removed = 0
        if not self._tmp.is_dir():
            return 0
        try:
            for path in list(self._tmp.iterdir()):
                lock = self._try_lock(self._locks / f"{path.name.split('-')[0]}.lock")
                if lock is None:
                    continue
                try:
                    path.unlink(missing_ok=True)
                    removed += 1
                finally:
                    os.close(lock)
        except OSError:
            # A data directory that cannot be written is reported by what wants to write there.
            return removed
        return removed

    def _build(
        self,
        slot: str,
        key: str,
        build: Callable[[], Recipe],
        what: str,
        sources: tuple[str, ...],
        progress: ProgressCallback | None,
    ) -> StoredLayer:
        report = progress or (lambda _: None)
        report(Progress(what, 0, 0, f"reading {what}"))
        temporary = self._tmp / f"{_name(slot)}-{os.getpid()}"
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    written, recipe = _write(temporary, build, lambda done, total: report(Progress(what, done, total)))
                    break
                except SourceChanged as error:
                    if attempt == _ATTEMPTS:
                        hint = "Try again when nothing writes there."
                        raise SandboxGatewayError("image_failed", f"{what}: {error}", hint) from error
            name = written.digest.removeprefix("sha256:")
            meta = {
                "size": written.size,
                "inodes": written.inodes,
                "created": time.time(),
                "what": what,
                "sources": list(sources),
                "facts": dict(recipe.facts),
                "skipped": recipe.tree.skipped[:100],
            }
            self._write_json(self.directory / f"{name}.json", meta)
            os.rename(temporary, self.directory / f"{name}.erofs")
            _fsync_directory(self.directory)
            self._write_json(self._index / f"{_name(slot)}.json", {"slot": slot, "key": key, "digest": written.digest})
            _fsync_directory(self._index)
        finally:
            temporary.unlink(missing_ok=True)
        report(Progress(what, written.size, written.size, f"built {what}"))
        stored = self.get(written.digest)
        if stored is None:
            raise SandboxGatewayError("image_failed", f"{what}: the layer vanished while it was built")
        return stored

    def _current(self, slot: str, key: str) -> StoredLayer | None:
        path = self._index / f"{_name(slot)}.json"
        entry = _read_json(path)
        if entry is None or entry.get("key") != key or entry.get("slot") != slot:
            return None
        found = self.get(str(entry.get("digest")))
        if found is not None:
            # The times of both files say when they were last wanted: see CURRENT_FOR and HANDED_OUT_FOR.
            for used in (path, found.path.with_suffix(".json")):
                with contextlib.suppress(OSError):
                    os.utime(used)
        return found

    def _current_digests(self) -> set[str]:
        digests = set()
        oldest = time.time() - CURRENT_FOR
        for path in self._index.glob("*.json") if self._index.is_dir() else ():
            entry = _read_json(path)
            if entry is None or _mtime(path) < oldest:
                continue
            digests.add(str(entry.get("digest")))
        return digests

    @contextlib.contextmanager
    def _locked(self, slot: str, what: str, progress: ProgressCallback | None) -> Iterator[None]:
        path = self._locks / f"{_name(slot)}.lock"
        delay = 0.02
        while (lock := self._try_lock(path)) is None:
            if progress is not None:
                done = sum(_size(tmp) for tmp in self._tmp.glob(f"{_name(slot)}-*"))
                progress(Progress(what, done, 0, f"another process is building {what}"))
            time.sleep(delay)
            delay = min(delay * 1.5, 0.25)
        try:
            yield
        finally:
            os.close(lock)

    def _try_lock(self, path: Path) -> int | None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _sweep_slot(self, slot: str) -> None:
        for path in self._tmp.glob(f"{_name(slot)}-*"):
            path.unlink(missing_ok=True)

    def _unlink(self, digest: str) -> None:
        name = digest.removeprefix("sha256:")
        # The image goes first: metadata without an image is nothing, an image without metadata is unknown bytes.
        (self.directory / f"{name}.erofs").unlink(missing_ok=True)
        (self.directory / f"{name}.json").unlink(missing_ok=True)
        for path in self._index.glob("*.json"):
            entry = _read_json(path)
            if entry is not None and entry.get("digest") == digest:
                path.unlink(missing_ok=True)

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        temporary = self._tmp / f"{path.stem}-{os.getpid()}.json"
        try:
            with open(temporary, "w", encoding="utf-8", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write(path: Path, build: Callable[[], Recipe], report: Callable[[int, int], None]) -> tuple[Written, Recipe]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        recipe = build()
        try:
            written = write_image(fd, recipe.tree, report)
        finally:
            if recipe.release is not None:
                recipe.release()
        os.fsync(fd)
    finally:
        os.close(fd)
    return written, recipe


@contextlib.contextmanager
def _mapped(directory: Path, what: str) -> Iterator[None]:
    """Turn system errors of a build into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SandboxGatewayError("disk_full", f"no space left for {what} in {directory}") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise SandboxGatewayError("data_directory", f"{directory} cannot be written: {error.strerror}") from error
        raise SandboxGatewayError("image_failed", f"{what}: {error}") from error


def _name(slot: str) -> str:
    return hashlib.sha256(os.fsencode(slot)).hexdigest()[:32]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
