"""Writes ``/etc/ld.so.cache``, so that the loader and ``ctypes.util.find_library`` know the libraries of an image.

``ldconfig`` can only make one for a directory tree as root (it calls chroot). Source of the contract: glibc's
``sysdeps/generic/dl-cache.h`` (``struct cache_file_new``) and ``elf/dl-cache.c``, whose binary search wants the
entries in descending order of ``_dl_cache_libcmp``.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping

_HEADER = struct.Struct("<17s3sIIB3xI12x")
_ENTRY = struct.Struct("<iIIIQ")
_FLAGS = {(2, 62): 0x0303, (2, 183): 0x0A03}
"""ELF class and machine -> the cache's flags: x86-64, AArch64."""


def ld_so_cache(libraries: Mapping[str, str], machine: tuple[int, int] | None) -> bytes | None:
    """The cache for ``libraries`` (name -> absolute path inside); None for machines whose flags are not known."""
    flags = _FLAGS.get(machine) if machine is not None else None
    if flags is None:
        return None
    names = sorted(libraries, key=_order, reverse=True)
    start = _HEADER.size + _ENTRY.size * len(names)
    strings = bytearray()
    entries = bytearray()
    for name in names:
        key = start + len(strings)
        strings += os.fsencode(name) + b"\0"
        value = start + len(strings)
        strings += os.fsencode(libraries[name]) + b"\0"
        entries += _ENTRY.pack(flags, key, value, 0, 0)
    return _HEADER.pack(b"glibc-ld.so.cache", b"1.1", len(names), len(strings), 2, 0) + entries + strings


def _order(name: str) -> list[tuple[int, int]]:
    """Numbers compare as numbers and come after every other character."""
    result: list[tuple[int, int]] = []
    for piece in re.findall(r"[0-9]+|[^0-9]", name):
        result.append((1, int(piece)) if piece[0] in "0123456789" else (0, ord(piece)))
    return result
