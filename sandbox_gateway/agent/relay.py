"""What the relay knows of messages, and the private directory of the kernel's connection file and sockets.

Nothing of a message is parsed but where its header begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

DELIMITER: Final = b"<IDS|MSG>"

NAMES: Final = ("shell", "control", "stdin", "iopub", "hb")
_MAX_GREETING: Final = 256 * 1024
_MAX_HEADER: Final = 1024 * 1024
_DROPPABLE = re.compile(rb'"msg_type"\s*:\s*"(?:stream|display_data|update_display_data)"')
_KIND = re.compile(rb'"msg_type"\s*:\s*"(iopub_welcome|status)"')
WELCOME: Final = b"iopub_welcome"
"""The greeting that an XPUB kernel (ipykernel 7.2 and later, and our application) sends to a new subscriber."""
STATUS: Final = b"status"


def header_of(parts: Sequence[bytes | memoryview]) -> bytes:
    """The raw header of a Jupyter message (protocol 5: behind delimiter and signature); empty if there is none."""
    for index, part in enumerate(parts[:16]):
        if part == DELIMITER:
            header = parts[index + 2] if len(parts) > index + 2 else b""
            return bytes(header) if len(header) <= _MAX_HEADER else b""
    return b""


def droppable(parts: Sequence[bytes | memoryview]) -> bool:
    """Whether a bounded buffer may let go of this IOPub message first: streams and displays, nothing else."""
    return _DROPPABLE.search(header_of(parts)) is not None


def kind_of(parts: Sequence[bytes | memoryview]) -> bytes:
    """:data:`WELCOME`, :data:`STATUS`, or empty for any other IOPub message."""
    found = _KIND.search(header_of(parts))
    return found[1] if found is not None else b""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What our ipykernel application says in its greeting. The process that says it may be anything: checked."""

    identity: bool = False
    """It takes another identity when it is told to."""
    preloaded: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Sequence[bytes | memoryview]) -> Greeting:
        """Read the content of an ``iopub_welcome``; what makes no sense in it counts as not said."""
        try:
            text = parts[next(at for at, part in enumerate(parts[:16]) if part == DELIMITER) + 5]
            content = json.loads(bytes(text)) if len(text) <= _MAX_GREETING else {}
        except (ValueError, IndexError, RecursionError, StopIteration):
            content = {}
        if not isinstance(content, dict):
            return cls()
        loaded, failed = content.get("preloaded"), content.get("preload_failed")
        return cls(
            content.get("identity") is True,
            tuple(name for name in loaded if isinstance(name, str)) if isinstance(loaded, list) else (),
            {name: str(why)[:500] for name, why in failed.items()} if isinstance(failed, dict) else {},
        )

    def preloads(self, asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Of the modules asked for: those that were imported, and why the others were not."""
        loaded = [name for name in asked if name in self.preloaded]
        why = "this kernel imports nothing beforehand"
        return loaded, {name: self.failed.get(name, why) for name in asked if name not in loaded}


class KernelDirectory:
    """Where one agent's kernels find their connection file and put their sockets.

    The top belongs to the agent, so that nothing of the kernel's can be put in the place of the connection file. Each
    generation of the kernel has a folder of its own below, which it may write (by its group) and the agent owns:
    the agent has no capability to override permissions, only to change owners.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self._created = not top.exists()
        top.mkdir(mode=0o711, parents=True, exist_ok=True)
        if top.stat().st_uid != os.geteuid():
            os.chown(top, os.geteuid(), -1)
        top.chmod(0o711)

    @property
    def connection_file(self) -> Path:
        """The file whose path a kernelspec calls ``{connection_file}``."""
        return self.top / "connection.json"

    def sockets(self, generation: int) -> dict[str, Path]:
        """The path of each socket of a generation."""
        folder = self.top / str(generation)
        return {name: folder / f"k-{number}" for number, name in enumerate(NAMES, 1)}

    def prepare(self, generation: int, key: str, uid: int, gid: int) -> None:
        """Make the folder of a generation and the connection file, readable by the kernel alone (OSError)."""
        folder = self.top / str(generation)
        folder.mkdir(mode=0o700)
        self.draft_connection_file(generation, key, uid, gid)
        self.publish_connection_file()
        if uid != os.geteuid():
            os.chown(folder, -1, gid)
            folder.chmod(0o770)

    def draft_connection_file(self, generation: int, key: str, uid: int, gid: int) -> None:
        """Write the connection file of a generation, for :meth:`publish_connection_file` (OSError)."""
        folder = self.top / str(generation)
        path = self._draft
        path.unlink(missing_ok=True)
        info = {f"{name}_port": number for number, name in enumerate(NAMES, 1)}
        text = json.dumps(
            {
                "transport": "ipc",
                "ip": str(folder / "k"),
                "key": key,
                "signature_scheme": "hmac-sha256",
                "kernel_name": "",
                **info,
            }
        )
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            file.write(text)
            if uid != os.geteuid():
                os.fchown(fd, uid, gid)

    def publish_connection_file(self) -> None:
        """Put what was drafted in its place (OSError)."""
        self._draft.rename(self.connection_file)

    @property
    def _draft(self) -> Path:
        return self.top / "connection.new"

    @property
    def modules(self) -> Path:
        """The file with the bytecode of modules that a template's kernel imports; it is here until that is ready."""
        return self.top / "modules"

    def add_modules(self, data: bytes | memoryview) -> None:
        """Write more of that file. Raises OSError, and then there is none."""
        try:
            fd = os.open(self.modules, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                while data:
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)
        except OSError:
            self.forget_modules()
            raise

    def forget_modules(self) -> None:
        """Remove that file, if it is there."""
        self.modules.unlink(missing_ok=True)

    def present(self, generation: int) -> bool:
        """Whether the kernel has made all its sockets; takes over their ownership, so that the agent may connect."""
        # The last one that ipykernel makes comes first: one look tells while it boots.
        for path in reversed(self.sockets(generation).values()):
            try:
                status = path.lstat()
            except OSError:
                return False
            if not stat.S_ISSOCK(status.st_mode):
                return False
            if status.st_uid != os.geteuid() and os.geteuid() != 0:
                # Not followed: a link put there meanwhile changes its own owner only.
                with contextlib.suppress(OSError):
                    os.chown(path, os.geteuid(), -1, follow_symlinks=False)
        return True

    def forget(self, generation: int) -> None:
        """Remove what is there of a generation, as far as that is permitted; what a kernel hid stays, unused."""
        with contextlib.suppress(OSError):
            self.forget_modules()
        _remove(self.top / str(generation))

    def remove(self) -> None:
        """Remove everything, when this object made it."""
        for path in (self._draft, self.connection_file, self.modules):
            with contextlib.suppress(OSError):
                path.unlink()
        if self._created:
            _remove(self.top)


def _remove(folder: Path) -> None:
    """Remove a folder of files, and what else a kernel has put there as far as that is permitted.

    ``shutil`` is left for that: it loads every compression there is, which took each sandbox's end 15 ms.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in os.listdir(fd):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError:
        import shutil

        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
