"""Whether a snapshot is what was saved, before anything is restored from it.

Restoring runs the memory that is in the image: who can write it can run code as this user's kernel. So it is refused
when anybody else could have. That the bytes are those that were saved is known from the files' identity as long as it
is the one of the commit (writing to a file changes its ctime, which no program can set back), else from the checksums.
"""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import replace

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.store import LayerStore
from sandbox_gateway.snapshots.draft import Snapshot
from sandbox_gateway.snapshots.files import Report, Unusable, identity_of, open_plain, sha256_of, strangers, walk
from sandbox_gateway.snapshots.manifest import MANIFEST, ImageFile, damaged


def check(
    snapshot: Snapshot,
    layers: LayerStore,
    *,
    deep: bool = False,
    report: Report | None = None,
    stop: threading.Event | None = None,
) -> tuple[ImageFile, ...]:
    """Check everything; returns the files with their present identities. Blocks.

    Raises ``snapshot_damaged``, ``snapshot_unfit`` or ``Stopped``.
    """
    try:
        found = _look(snapshot)
        _check_manifest(snapshot)
        _check_layers(snapshot, layers)
        return _check_files(snapshot, found, deep, report, stop)
    except Unusable as error:
        raise damaged(snapshot.id, f"its image {error}") from error
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise damaged(snapshot.id, f"its files cannot be read: {what}") from error


def _look(snapshot: Snapshot) -> dict[str, os.stat_result]:
    """The image's files as they are now; refuses what others could have changed."""
    hint = "Do not restore it: its files could have been changed by somebody else. `jupyter sandbox snapshot rm` it."
    for path in (snapshot.directory.parent, snapshot.directory, snapshot.directory / MANIFEST, snapshot.image):
        if reason := strangers(os.lstat(path)):
            raise damaged(snapshot.id, f"{path.name} {reason}", hint)
    if snapshot.image.is_symlink():
        raise damaged(snapshot.id, "its image is a symlink", hint)
    found = {}
    for name, status in walk(snapshot.image):
        if reason := strangers(status):
            raise damaged(snapshot.id, f"image/{name!a} {reason}", hint)
        if stat.S_ISREG(status.st_mode):
            found[name] = status
    return found


def _check_manifest(snapshot: Snapshot) -> None:
    if snapshot.manifest.owner != os.geteuid():
        text = f"it was made by user {snapshot.manifest.owner}, whose memory it would run"
        raise damaged(snapshot.id, text, "Only who made a snapshot may restore it.")
    snapshot.manifest.saved_launch()


def _check_layers(snapshot: Snapshot, layers: LayerStore) -> None:
    for digest in snapshot.manifest.layers:
        if layers.get(digest) is None:
            raise SandboxGatewayError(
                "snapshot_unfit",
                f"snapshot {snapshot.id[:12]} needs the layer {digest[:19]}, which is missing or damaged",
                "`jupyter sandbox image build` makes it again if the environment is still what it was.",
            )


def _check_files(
    snapshot: Snapshot,
    found: dict[str, os.stat_result],
    deep: bool,
    report: Report | None,
    stop: threading.Event | None,
) -> tuple[ImageFile, ...]:
    files = snapshot.manifest.files
    wanted = {file.path for file in files}
    if missing := sorted(wanted - found.keys()):
        raise damaged(snapshot.id, f"image/{missing[0]!a} is missing")
    if extra := sorted(found.keys() - wanted):
        raise damaged(snapshot.id, f"image/{extra[0]!a} does not belong to it")
    for file in files:
        if (size := found[file.path].st_size) != file.size:
            how = "is truncated" if size < file.size else "is too long"
            raise damaged(snapshot.id, f"image/{file.path!a} {how}: {size} bytes instead of {file.size}")
    total, done = sum(file.size for file in files), 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(min(done, total), total)

    known = []
    for file in files:
        now = identity_of(found[file.path])
        if now != file.identity and file.sha256 is None:
            raise damaged(snapshot.id, f"image/{file.path!a} was changed before it had a checksum")
        if file.sha256 is not None and (deep or now != file.identity):
            fd = open_plain(snapshot.image / file.path)
            try:
                now = identity_of(os.fstat(fd))
                if sha256_of(fd, progress, stop) != file.sha256:
                    raise damaged(snapshot.id, f"image/{file.path!a} is not what was saved")
            finally:
                os.close(fd)
        known.append(replace(file, identity=now))
    return tuple(known)
