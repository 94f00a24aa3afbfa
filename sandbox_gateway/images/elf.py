"""Reads what ELF files need, without running anything: interpreter, libraries, search paths.

Source of the contract: the System V gABI (program headers, the dynamic section) and ld.so(8).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_LIMIT = 1 << 20
"""Longest dynamic section or string that is believed."""


@dataclass(frozen=True, slots=True)
class Elf:
    """What the loader must know of one file."""

    machine: tuple[int, int]
    """Class (1: 32 bit, 2: 64 bit) and machine number: libraries must agree with their user."""
    interpreter: str | None
    needed: tuple[str, ...]
    search: tuple[str, ...]
    """RPATH and RUNPATH entries, ``$ORIGIN`` not expanded."""


def read_elf(path: str) -> Elf | None:
    """The facts of an ELF file; None for anything else and for what is damaged or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _parse(fd)
    except (struct.error, OSError, ValueError, OverflowError):
        return None
    finally:
        os.close(fd)


def _parse(fd: int) -> Elf | None:
    ident = os.pread(fd, 64, 0)
    if ident[:4] != b"\x7fELF" or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        return None
    wide, order = ident[4] == 2, "<" if ident[5] == 1 else ">"
    machine = struct.unpack_from(order + "H", ident, 18)[0]
    if wide:
        (phoff,) = struct.unpack_from(order + "Q", ident, 32)
        phentsize, phnum = struct.unpack_from(order + "HH", ident, 54)
    else:
        (phoff,) = struct.unpack_from(order + "I", ident, 28)
        phentsize, phnum = struct.unpack_from(order + "HH", ident, 42)
    table = os.pread(fd, phentsize * min(phnum, 512), phoff)
    loads: list[tuple[int, int, int]] = []
    dynamic: tuple[int, int] | None = None
    interpreter = None
    for at in range(0, len(table) - phentsize + 1, phentsize):
        if wide:
            kind, _, offset, address, _, size = struct.unpack_from(order + "IIQQQQ", table, at)
        else:
            kind, offset, address, _, size = struct.unpack_from(order + "IIIII", table, at)
        if kind == _PT_LOAD:
            loads.append((address, size, offset))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, min(size, _LIMIT))
        elif kind == _PT_INTERP:
            interpreter = os.fsdecode(os.pread(fd, min(size, 4096), offset).split(b"\0")[0])
    if dynamic is None:
        return Elf((ident[4], machine), interpreter, (), ())
    section = os.pread(fd, dynamic[1], dynamic[0])
    pair = struct.Struct(order + ("QQ" if wide else "II"))
    entries = list(pair.iter_unpack(section[: len(section) // pair.size * pair.size]))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if strings is None:
        return Elf((ident[4], machine), interpreter, (), ())
    placed = [offset + strings - address for address, size, offset in loads if address <= strings < address + size]
    if not placed:
        return None
    base = placed[0]

    def text(value: int) -> str:
        return os.fsdecode(os.pread(fd, 4096, base + value).split(b"\0")[0])

    needed = tuple(text(value) for tag, value in entries if tag == _DT_NEEDED)
    search = [p for tag, value in entries if tag in (_DT_RPATH, _DT_RUNPATH) for p in text(value).split(":") if p]
    return Elf((ident[4], machine), interpreter, needed, tuple(search))


@lru_cache(maxsize=4)
def library_directories(root: str = "/") -> tuple[str, ...]:
    """Where this machine's loader looks: ``ld.so.conf`` and the built-in places, existing ones, real paths once."""
    found: list[str] = []
    _read_conf(os.path.join(root, "etc/ld.so.conf"), found, 0)
    for base in ("/lib64", "/usr/lib64", "/lib", "/usr/lib"):
        found.append(base)
        try:
            found += [f"{base}/{name}" for name in sorted(os.listdir(base)) if name.endswith("-linux-gnu")]
        except OSError:
            continue
    seen: dict[str, None] = {}
    for path in found:
        if os.path.isdir(path):
            seen.setdefault(os.path.realpath(path))
    return tuple(seen)


def _read_conf(path: str, found: list[str], depth: int) -> None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        line = line.split("#")[0].strip()
        if line.startswith("include") and depth < 4:
            folder = os.path.dirname(line.split()[-1])
            folder = folder if folder.startswith("/") else os.path.join(os.path.dirname(path), folder)
            if os.path.isdir(folder):
                for name in sorted(os.listdir(folder)):
                    if name.endswith(".conf"):
                        _read_conf(os.path.join(folder, name), found, depth + 1)
        elif line.startswith("/"):
            found.append(line)


@dataclass(slots=True)
class Closure:
    """Libraries that a set of files needs, directly or not."""

    files: dict[str, str]
    """Library name as it is asked for -> its path on the host (maybe a symbolic link)."""
    missing: set[str]
    """Names found nowhere."""


def closure(paths: Iterable[str], names: Iterable[str] = (), machine: tuple[int, int] | None = None) -> Closure:
    """All libraries that ``paths`` (and libraries called ``names``) need, found as the loader would."""
    result = Closure({}, set())
    pending: list[str] = list(paths)
    for name in names:
        _find(name, (), machine, result, pending)
    seen: set[str] = set()
    while pending:
        path = pending.pop()
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        elf = read_elf(real)
        if elf is None:
            continue
        origin = os.path.dirname(real)
        search = tuple(p.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", origin) for p in elf.search)
        for name in elf.needed:
            _find(name, search, elf.machine, result, pending)
    return result


def _find(
    name: str, search: tuple[str, ...], machine: tuple[int, int] | None, result: Closure, pending: list[str]
) -> None:
    if name in result.files or "/" in name:
        return
    for directory in (*search, *library_directories()):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            elf = read_elf(path)
            if elf is not None and (machine is None or elf.machine == machine):
                result.files[name] = path
                result.missing.discard(name)
                pending.append(path)
                return
    result.missing.add(name)
