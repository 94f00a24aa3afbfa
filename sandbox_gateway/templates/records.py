"""What is known of each template, below ``<home>/templates``::

    <key>.json    which snapshot it is, when it was built, or why that failed
    <key>.lock    held by who builds it

The files are an index and a memory; the snapshots themselves are in the snapshot store. What cannot be read counts as
not there: the template is then built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.paths import Paths

RETRY: Final = 600.0
"""Seconds until a build that failed is tried again without being asked for; twice as long after each failure."""
RETRY_MAX: Final = 24 * 3600.0
SUSPICIONS: Final = 2
"""Failed starts after which a template is given up and built anew."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class TemplateRecord:
    """One template, built or not."""

    key: str
    slot: str
    profile: str
    runtime: str
    preload: tuple[str, ...] = ()
    snapshot: str | None = None
    """Its snapshot's id; None while there is none."""
    built: float = 0.0
    """Seconds since the epoch."""
    took: float = 0.0
    """Seconds that the build took."""
    preload_failed: Mapping[str, str] = field(default_factory=dict)
    """Modules that could not be imported, and why."""
    suspicions: int = 0
    """Starts from it that failed since it was built."""
    failures: int = 0
    """Builds that failed since one succeeded."""
    failed: float = 0.0
    """When the last of them failed, in seconds since the epoch."""
    reason: str = ""
    """Why it failed, or why a start from it did."""

    @property
    def retry_at(self) -> float:
        """When a build that nobody asks for may be tried next, in seconds since the epoch."""
        return self.failed + min(RETRY * 2.0 ** (self.failures - 1), RETRY_MAX) if self.failures else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "preload": list(self.preload), "preload_failed": dict(self.preload_failed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TemplateRecord:
        """Read what :meth:`as_dict` wrote; raises ValueError, TypeError or KeyError."""
        known = {item.name: data[item.name] for item in fields(cls)}
        texts = ("key", "slot", "profile", "runtime", "reason")
        numbers = ("built", "took", "suspicions", "failures", "failed")
        if not all(isinstance(known[name], str) for name in texts) or not all(
            isinstance(known[name], int | float) for name in numbers
        ):
            raise ValueError("a field is of the wrong kind")
        known["preload"] = tuple(str(name) for name in known["preload"])
        known["preload_failed"] = {str(name): str(why) for name, why in known["preload_failed"].items()}
        return cls(**known)


class TemplateRecords:
    """The records of one installation. Safe across processes: each file is replaced at once. Methods block for
    moments."""

    def __init__(self, paths: Paths) -> None:
        self.directory = paths.home / "templates"

    def get(self, key: str) -> TemplateRecord | None:
        """What is known of the template with this key."""
        try:
            with open(self._path(key), "rb") as file:
                data = file.read(_LIMIT)
            found = TemplateRecord.from_dict(json.loads(data))
            return found if found.key == key else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def list(self) -> tuple[TemplateRecord, ...]:
        """All of them, by profile and age."""
        try:
            names = os.listdir(self.directory)
        except OSError:
            return ()
        found = [self.get(name.removesuffix(".json")) for name in names if name.endswith(".json")]
        known = [record for record in found if record is not None]
        return tuple(sorted(known, key=lambda record: (record.profile, record.built, record.key)))

    def put(self, record: TemplateRecord) -> None:
        """Write what is known; raises ``disk_full`` or ``data_directory``."""
        path = self._path(record.key)
        fresh = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
                json.dump(record.as_dict(), file)
            os.replace(fresh, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise storage_error(error, f"cannot write in {self.directory}") from error

    def failed(self, record: TemplateRecord, reason: str) -> TemplateRecord:
        """Note that it could not be built; never raises. One that was there before goes on being used."""
        known = self.get(record.key) or record
        known = replace(known, failures=known.failures + 1, failed=time.time(), reason=reason[:1000])
        with contextlib.suppress(SandboxGatewayError):
            self.put(known)
        return known

    def suspected(self, key: str, snapshot: str, reason: str, *, useless: bool = False) -> TemplateRecord | None:
        """Note that a start from it failed; never raises. None when it is not this one any more.

        It is given up when that happens again, or at once when it is ``useless``.
        """
        known = self.get(key)
        if known is None or known.snapshot != snapshot:
            return None
        known = replace(known, suspicions=known.suspicions + 1, reason=reason[:1000])
        if useless or known.suspicions >= SUSPICIONS:
            # Builds that failed while it was good must not keep it from being built anew.
            known = replace(known, snapshot=None, suspicions=0, failures=0)
        with contextlib.suppress(SandboxGatewayError):
            self.put(known)
        return known

    def orphaned(self, key: str, snapshot: str) -> bool:
        """Whether a snapshot of the template with this key is surely not the one that its record names: what cannot be
        read now may name it, what makes no sense does not, since that template is built again."""
        try:
            with open(self._path(key), "rb") as file:
                data = file.read(_LIMIT)
        except FileNotFoundError:
            return True
        except (OSError, ValueError):
            return False
        try:
            return bool(json.loads(data)["snapshot"] != snapshot)
        except (ValueError, TypeError, KeyError, RecursionError):
            return True

    def remove(self, key: str) -> None:
        """Forget it; the snapshot is the caller's."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[bool]:
        """Whether nobody else builds this template; while the context lasts, nobody does."""
        fd = self._lock(key)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                # While it is still ours: who waits for it then finds that it is another file now.
                with contextlib.suppress(OSError):
                    self._path(key).with_suffix(".lock").unlink()
                os.close(fd)

    def _lock(self, key: str) -> int | None:
        path = self._path(key).with_suffix(".lock")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(fd, path):
                        return fd
                except BlockingIOError:
                    os.close(fd)
                    return None
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
        except OSError as error:
            raise storage_error(error, f"cannot write in {self.directory}") from error

    def _path(self, key: str) -> Path:
        if not _DIGEST.fullmatch(key):
            raise ValueError("a template's key is 64 hexadecimal digits")
        return self.directory / f"{key}.json"


def _is_at(fd: int, path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
