"""A snapshot's image, seen from outside: which files it has, and the manifest beside it."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sandbox_gateway.snapshots.files import (
    Report,
    Unusable,
    fsync_path,
    identity_of,
    open_plain,
    sha256_of,
    walk,
)
from sandbox_gateway.snapshots.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    ImageFile,
    Manifest,
    damaged,
    manifest_bytes,
)


def image_files(image: Path) -> tuple[ImageFile, ...]:
    """The files of an image without their checksums, each made private to this user.

    Raises OSError, or :class:`Unusable` for what no image consists of.
    """
    if not stat.S_ISDIR(os.lstat(image).st_mode):
        raise Unusable("is no directory")
    os.chmod(image, 0o700)
    files = []
    for path, status in walk(image):
        if status.st_uid != os.geteuid():
            raise Unusable(f"holds {path!a}, which belongs to user {status.st_uid}")
        folder = stat.S_ISDIR(status.st_mode)
        os.chmod(image / path, 0o700 if folder else 0o600)
        if not folder:
            found = identity_of(os.lstat(image / path))
            files.append(ImageFile(path, found.size, found))
    if not files:
        raise Unusable("is empty")
    return tuple(sorted(files, key=lambda file: file.path))


def sealed_files(
    image: Path,
    files: Iterable[ImageFile],
    report: Report | None = None,
    stop: threading.Event | None = None,
) -> tuple[ImageFile, ...]:
    """``files`` with their checksums, and safe from a power cut.

    Raises OSError, ``Stopped``, or :class:`Unusable` when a file is not what it was.
    """
    files = tuple(files)
    total, done = sum(file.size for file in files), 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        if report is not None:
            report(min(done, total), total)

    sealed = []
    for file in files:
        fd = open_plain(image / file.path)
        try:
            digest = sha256_of(fd, progress, stop)
            os.fsync(fd)
            if identity_of(os.fstat(fd)) != file.identity:
                raise Unusable(f"was written to ({file.path!a})")
        finally:
            os.close(fd)
        sealed.append(replace(file, sha256=digest))
    for folder in sorted({(image / file.path).parent for file in files} | {image}):
        fsync_path(folder)
    return tuple(sealed)


def write_manifest(directory: Path, manifest: Manifest, *, durable: bool) -> None:
    """Write ``manifest.json``, at once in the place of an older one. Raises OSError; the old one stays then.

    ``durable``: it survives a power cut.
    """
    temporary = directory / f".{MANIFEST}"
    content = manifest_bytes(manifest)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(fd)
        os.rename(temporary, directory / MANIFEST)
        if durable:
            fsync_path(directory)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def manifest_content(directory: Path) -> bytes:
    """The bytes of ``manifest.json``. Raises FileNotFoundError, or ``snapshot_damaged`` with what is wrong."""
    path = directory / MANIFEST
    try:
        fd = open_plain(path)
        with open(fd, "rb") as file:
            content = file.read(MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        raise
    except Unusable as error:
        raise damaged(directory.name, f"its manifest {error}") from error
    except OSError as error:
        raise damaged(directory.name, f"its manifest cannot be read: {error.strerror}") from error
    if len(content) > MANIFEST_LIMIT:
        raise damaged(directory.name, "its manifest is too large")
    return content
