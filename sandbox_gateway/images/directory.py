"""Any root filesystem tree as an image: one EROFS layer, with our ``/etc`` files and mount points added.

Nothing in the tree is run: the interpreter is found by looking at files. Owners become root, set-uid bits and what
the kernel must not see (password hashes, host keys) go; see :mod:`sandbox_gateway.images.tree`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images import base_layer
from sandbox_gateway.images.elf import read_elf
from sandbox_gateway.images.host_env import SECRET_NAMES
from sandbox_gateway.images.store import Recipe
from sandbox_gateway.images.tree import Tree

RECIPE = "directory-2"
_EMPTIED = frozenset({"proc", "sys", "dev", "run", "tmp", "var/tmp", "var/run", "var/cache/apt/archives", "lost+found"})
_LEFT_OUT = (
    "etc/shadow*",
    "etc/gshadow*",
    "etc/passwd-",
    "etc/group-",
    "etc/security/opasswd",
    "etc/ssh/ssh_host_*",
    "etc/ssl/private/*",
    "etc/krb5.keytab",
    "etc/pip.conf",
    "etc/netrc",
    "etc/sudoers*",
    "root/.*",
    *(f"home/*/{name}" for name in sorted(SECRET_NAMES)),
    "home/*/.config/pip",
    ".dockerenv",
)
_LINKS = 40
_TEXT_LIMIT = 1 << 20
"""Bytes that are read of a list of accounts."""


def check(path: Path, private: tuple[Path, ...]) -> Path:
    """The real path of a root directory. Raises ``image_source`` for what cannot be one.

    ``private`` are directories that must not become part of an image: our data.
    """
    if not path.is_absolute():
        raise SandboxGatewayError("image_source", f"directory:{path} is not an absolute path")
    real = path.resolve()
    if not real.is_dir():
        raise SandboxGatewayError("image_source", f"there is no directory {path}")
    if real == Path("/"):
        raise SandboxGatewayError(
            "image_source", "directory:/ would show the whole machine to a sandbox", "Use `host`, or another tree."
        )
    for place in private:
        if place.resolve().is_relative_to(real):
            raise SandboxGatewayError("image_source", f"{path} contains the data directory {place}")
    if not any((real / name).is_dir() for name in ("usr", "bin")):
        raise SandboxGatewayError(
            "image_source", f"{path} is not a root filesystem: it has no usr and no bin", "Make one with debootstrap."
        )
    return real


def fingerprint(root: Path, kernel_uid: int) -> str:
    """A digest of the metadata of every file; 10,000 files take about 50 ms."""
    found = hashlib.sha256(f"{RECIPE} {root} {kernel_uid} {base_layer.RECIPE}\n".encode())
    stack = [(os.fspath(root), "")]
    while stack:
        folder, relative = stack.pop()
        try:
            with os.scandir(folder) as entries:
                items = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in items:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if not _keep(path, False):
                continue
            state = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(state.st_mode):
                found.update(os.fsencode(f"{path}/\n"))
                stack.append((entry.path, path))
            else:
                found.update(os.fsencode(f"{path} {state.st_mode} {state.st_size} {state.st_mtime_ns}\n"))
    return found.hexdigest()


def build(root: Path, kernel_uid: int) -> Recipe:
    """The tree of the root layer. Raises ``image_source`` where our files have no place in it."""
    try:
        return _build(root, kernel_uid)
    except ValueError as error:
        raise SandboxGatewayError("image_source", f"{root} is no root filesystem for a sandbox: {error}") from None


def _build(root: Path, kernel_uid: int) -> Recipe:
    tree = Tree()
    tree.host_tree("/", os.fspath(root), _keep)
    accounts = {name: _read(root, f"/etc/{name}") for name in ("passwd", "group")}
    base_layer.skeleton(tree, kernel_uid)
    generated = base_layer.etc_files(kernel_uid)
    for name, old in accounts.items():
        tree.file(f"/etc/{name}", _merged(generated[f"/etc/{name}"], old))
    if (root / "etc/os-release").exists():
        tree.remove("/etc/os-release")
        tree.host_file("/etc/os-release", _real(root, "/etc/os-release") or os.fspath(root / "etc/os-release"))
    return Recipe(tree)


def find_python(root: Path) -> tuple[str | None, bool]:
    """The tree's Python (path inside, None: no Python) and whether it has ipykernel; one with ipykernel wins."""
    first: str | None = None
    for inside in _candidates(root):
        real = _real(root, inside)
        if real is None or read_elf(real) is None:
            continue
        if _has_ipykernel(root, inside):
            return inside, True
        first = first or inside
    return first, False


def interpreter(root: Path) -> str:
    """:func:`find_python`, or ``image_source`` saying what is missing."""
    found, has_ipykernel = find_python(root)
    if found is None:
        raise SandboxGatewayError(
            "image_source", f"there is no Python in the root directory {root}", "Install python3 in it."
        )
    real = _real(root, found)
    elf, own = read_elf(real or ""), read_elf(os.path.realpath("/proc/self/exe"))
    if elf is not None and own is not None and elf.machine != own.machine:
        raise SandboxGatewayError("image_source", f"{root} is made for another kind of processor")
    if not has_ipykernel:
        raise SandboxGatewayError(
            "image_source", f"{found} in {root} has no ipykernel", "Install it there, with pip or as python3-ipykernel."
        )
    return found


def _candidates(root: Path) -> Iterator[str]:
    folders = ["/opt/conda", "/opt/venv", "/venv", "/usr/local", "/usr"]
    for parent in ("opt", "srv", "home/jovyan"):
        try:
            folders += [f"/{parent}/{name}" for name in sorted(os.listdir(root / parent))]
        except OSError:
            continue
    for folder in dict.fromkeys(folders):
        for name in ("python3", "python"):
            if (root / f"{folder[1:]}/bin/{name}").is_symlink() or (root / f"{folder[1:]}/bin/{name}").is_file():
                yield f"{folder}/bin/{name}"
                break


def _has_ipykernel(root: Path, python: str) -> bool:
    prefix = os.path.dirname(os.path.dirname(python))
    name = os.path.basename(_real(root, python) or "")
    minor = re.fullmatch(r"python(3\.\d+)", name)
    wanted = f"python{minor[1]}" if minor else "python3*"
    prefixes = [prefix, "/usr/local"] if prefix == "/usr" else [prefix]
    for place in prefixes:
        for lib in ("lib", "lib64"):
            base = _real(root, f"{place}/{lib}") or ""
            for version in [*fnmatch.filter(_names(base), wanted), "python3"]:
                for site in ("site-packages", "dist-packages"):
                    if os.path.isfile(os.path.join(base, version, site, "ipykernel", "__init__.py")):
                        return True
    return False


def _real(root: Path, inside: str) -> str | None:
    """Where ``inside`` is on the host, links followed as a process in that root would; None when it is nowhere."""
    todo = [part for part in inside.split("/") if part]
    done: list[str] = []
    for _ in range(_LINKS * 8):
        if not todo:
            path = os.path.join(root, *done)
            return path if os.path.lexists(path) else None
        part = todo.pop(0)
        if part == "..":
            done = done[:-1]
            continue
        try:
            target = os.readlink(os.path.join(root, *done, part))
        except OSError:
            done.append(part)
            continue
        if target.startswith("/"):
            done = []
        todo[:0] = [piece for piece in target.split("/") if piece not in ("", ".")]
    return None


def _keep(path: str, is_dir: bool) -> bool:
    parent = os.path.dirname(path)
    if parent in _EMPTIED or path in _EMPTIED:
        return False
    return not any(fnmatch.fnmatchcase(path, pattern) for pattern in _LEFT_OUT)


def _merged(ours: str, theirs: str) -> str:
    """Our accounts first, then the tree's own whose name and number are not taken."""
    lines = ours.splitlines()
    names = {line.split(":")[0] for line in lines}
    numbers = {line.split(":")[2] for line in lines}
    for line in theirs.splitlines():
        fields = line.split(":")
        if len(fields) >= 3 and fields[0] not in names and fields[2] not in numbers:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _read(root: Path, inside: str) -> str:
    """The text of a small regular file of the tree, links followed inside it only; empty when there is none."""
    real = _real(root, inside)
    if real is None:
        return ""
    try:
        # Not blocking: opening a FIFO would wait for a writer.
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return file.read(_TEXT_LIMIT).decode("utf-8", "replace")


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
