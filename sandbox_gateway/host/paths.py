"""Where the product keeps its things.

``SANDBOX_GATEWAY_HOME`` moves everything; else it is ``$XDG_DATA_HOME/sandbox_gateway`` (``~/.local/share``).
Locks, sockets and FIFOs need a short path on a local filesystem (a unix socket's path ends at 107 bytes), so they
live in ``<home>/run`` when that is short enough, else in a private directory derived from it under the system's
run or temporary directory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import filesystems

RUNTIME_PATH_LIMIT = 52
"""Longest runtime directory that still leaves room for ``/<36-character id>/<socket name>`` in 107 bytes."""


@dataclass(frozen=True, slots=True)
class Paths:
    """The directories of one installation. Nothing is created until :meth:`ensure`."""

    home: Path
    """Data: binaries, layers, snapshots, the store, the profiles."""
    runtime: Path
    """Short-lived things: one directory per sandbox with its lock, sockets and FIFOs."""

    @property
    def bin(self) -> Path:
        """Runtimes' binaries, each under its hash."""
        return self.home / "bin"

    @property
    def layers(self) -> Path:
        """The content-addressed layer store."""
        return self.home / "layers"

    @property
    def snapshots(self) -> Path:
        """Saved sandboxes, each in a directory under its id. They hold kernels' memory: private to this user."""
        return self.home / "snapshots"

    @property
    def database(self) -> Path:
        """The SQLite store."""
        return self.home / "store.sqlite"

    @property
    def profiles(self) -> Path:
        """The administrator's profile file (TOML)."""
        return self.home / "profiles.toml"

    @property
    def logs(self) -> Path:
        """Logs of ended sandboxes."""
        return self.home / "logs"

    @property
    def runsc_root(self) -> Path:
        """``runsc --root``: the runtime's own state."""
        return self.runtime / "runsc"

    def sandbox(self, sandbox_id: str) -> Path:
        """The runtime directory of one sandbox."""
        return self.runtime / sandbox_id

    def ensure(self) -> Paths:
        """Create the directories, private to this user; raise ``data_directory`` with a reason when that fails."""
        for path in (self.home, self.runtime):
            _local(path)
            _private(path)
        return self


def discover(environment: Mapping[str, str] | None = None) -> Paths:
    """The paths that this process's environment asks for."""
    env = os.environ if environment is None else environment
    named = env.get("SANDBOX_GATEWAY_HOME")
    if named:
        home = Path(named).expanduser().absolute()
    else:
        base = env.get("XDG_DATA_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".local", "share")
        home = Path(base).absolute() / "sandbox_gateway"
    return Paths(home=home, runtime=_runtime_directory(home, env))


def _runtime_directory(home: Path, env: Mapping[str, str]) -> Path:
    inside = home / "run"
    if len(os.fsencode(inside)) <= RUNTIME_PATH_LIMIT:
        return inside
    tag = hashlib.sha256(os.fsencode(home)).hexdigest()[:10]
    user_run = env.get("XDG_RUNTIME_DIR")
    if user_run and len(user_run) <= 30 and _own(user_run):
        return Path(user_run) / f"sandbox-gateway-{tag}"
    return Path("/tmp") / f"sandbox-gateway-{os.getuid()}-{tag}"


def _own(directory: str) -> bool:
    """Whether a directory is this user's alone to change: under sudo the variable may name another user's, who could
    put something of his own in the place of what we make there."""
    try:
        found = os.stat(directory)
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022 and os.access(directory, os.W_OK)


def _local(path: Path) -> None:
    kind = filesystems.own_filesystem_of(str(path), filesystems.MOUNTS)
    if filesystems.is_network_filesystem(kind):
        raise SandboxGatewayError(
            "data_directory", f"{path} is on a network filesystem ({kind}): locks and sockets do not hold there"
        )


def _private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat(follow_symlinks=False)
    except OSError as error:
        raise SandboxGatewayError("data_directory", f"cannot create {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise SandboxGatewayError("data_directory", f"{path} is not a directory of this user")
    if not os.access(path, os.W_OK | os.X_OK) or _read_only(path):
        raise SandboxGatewayError("data_directory", f"{path} cannot be written")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
