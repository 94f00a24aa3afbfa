"""The bytecode of modules in one file, for the kernel of a template; runs in the kernel's process.

Standard library only. Each file that Python looks at when it imports (a module's source, its bytecode, their folders)
stays known to gVisor from then on, is saved with the sandbox and restored with every clone: two fifths of all that a
clone's restore reads beside memory. So a template's kernel is made twice. The first, which nobody keeps, tells what it
has imported (:func:`tell`); the second imports the same from one file (:class:`Shelf`), which is gone afterwards.

What a program sees of a module is what Python's own finders and loaders make: spec, loader, file, path, code.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from struct import Struct
from types import CodeType, ModuleType
from typing import Any

MESSAGE = "sandbox_modules"
"""The message on IOPub with which the first kernel tells; its only buffer is the file."""
LIMIT = 12 * 1024 * 1024
"""Bytes of compressed code at most, so that it fits into the sandbox's ``/run``; what is too much is found as usual."""
_OWN = "_sandbox_"
_HEAD = Struct("<Q")
"""Bytes of the marshalled table that follows; behind that, the code of one module after the other, compressed."""
_BAD = (OSError, ValueError, EOFError, TypeError, zlib.error)
"""What a file that is none of ours may raise."""

Entry = tuple[str, bool, int, int]
"""Path of the source, whether it is a package, where the code begins behind the table, and its bytes."""


def tell(kernel: Any) -> None:
    """Publish what has been imported so far."""
    kernel.session.send(kernel.iopub_socket, MESSAGE, {}, buffers=[collect(sys.modules)])


def collect(modules: Mapping[str, ModuleType]) -> bytes:
    """The file for a :class:`Shelf` of those modules that Python found as files with sources, by its own finders."""
    table: dict[str, Entry] = {}
    codes: list[bytes] = []
    size = 0
    for name, path, is_package, code in _found(dict(modules)):
        text = zlib.compress(marshal.dumps(code), 1)
        if size + len(text) > LIMIT:
            break
        codes.append(text)
        table[name] = (path, is_package, size, len(text))
        size += len(text)
    head = marshal.dumps(table)
    return b"".join([_HEAD.pack(len(head)), head, *codes])


def _found(modules: Mapping[str, ModuleType]) -> Iterator[tuple[str, str, bool, CodeType]]:
    for name, module in modules.items():
        spec = getattr(module, "__spec__", None)
        loader = getattr(spec, "loader", None)
        if name.startswith(_OWN) or not isinstance(spec, ModuleSpec) or type(loader) is not SourceFileLoader:
            continue
        path = loader.path
        if not spec.name == loader.name == name or not spec.origin == path == getattr(module, "__file__", None):
            continue  # something has been made of it that would not come of itself
        with contextlib.suppress(Exception):  # its files are gone, or no one's to read: found as usual, the next time
            code = loader.get_code(name)
            if code is not None:
                yield name, path, loader.is_package(name), code


class Shelf:
    """A finder (PEP 451) for the modules in such a file, which stands before Python's own for the path."""

    def __init__(self, fd: int) -> None:
        """Read the table; raises one of several errors for what is no such file."""
        (size,) = _HEAD.unpack(os.pread(fd, _HEAD.size, 0).ljust(_HEAD.size, b"\0"))
        if not 0 < size <= os.fstat(fd).st_size:
            raise ValueError("no table")
        table = marshal.loads(os.pread(fd, size, _HEAD.size))
        if not isinstance(table, dict):
            raise ValueError("no table")
        self._table: dict[str, Entry] = table
        self._fd = fd
        self._start = _HEAD.size + size
        sys.meta_path.insert(sys.meta_path.index(PathFinder), self)

    @classmethod
    def open(cls, path: str) -> Shelf | None:
        """The shelf in the file ``path``, from which modules come from now on; None if there is none."""
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return cls(fd)
        except _BAD:
            if fd >= 0:
                os.close(fd)
            return None

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a module, as the path's finder would make it."""
        entry = self._table.get(name)
        if entry is None:
            return None
        place, is_package, at, size = entry
        loader = _Loader(name, place)
        loader.read = lambda: os.pread(self._fd, size, self._start + at)
        folders = [os.path.dirname(place)] if is_package else None
        return spec_from_file_location(name, place, loader=loader, submodule_search_locations=folders)

    def close(self) -> None:
        """Give nothing any more. Python's own finder sees meanwhile what is in the folders of ``sys.path``, as it
        would have by now."""
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        self._table.clear()
        os.close(self._fd)
        with contextlib.suppress(Exception):
            PathFinder.find_spec(f"{_OWN}nothing")


class _Loader(SourceFileLoader):
    """Becomes Python's own before the module's code runs."""

    read: Callable[[], bytes]

    def get_code(self, fullname: str) -> CodeType | None:
        read = self.__dict__.pop("read")
        self.__class__ = SourceFileLoader  # type: ignore[assignment]
        try:
            return marshal.loads(zlib.decompress(read()))  # type: ignore[no-any-return]
        except _BAD:
            return self.get_code(fullname)
