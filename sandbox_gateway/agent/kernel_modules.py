"""The bytecode of modules in one file, for the kernel of a template; runs in the kernel's process.

Standard library only. Each file that Python looks at when it imports (a module's source, its bytecode, their folders)
stays known to gVisor from then on, is saved with the sandbox and restored with every clone: almost a third of all that
a clone's restore reads beside memory. So a template's kernel is made twice. The first, which nobody keeps, tells what
it has imported (:func:`tell`); the second imports the same from one file (:class:`Shelf`), which is gone afterwards.

Kept are modules that Python's own finder of the path finds now, and they are given only where it would look for them.
What a program sees of them is then the same: specification, loader, file, path, code.
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from struct import Struct
from types import CodeType, ModuleType
from typing import Any

MESSAGE = "sandbox_modules"
"""The message on IOPub with which the first kernel tells; its only buffer is the file."""
LIMIT = 12 * 1024 * 1024
"""Bytes of compressed code at most, so that it fits into the sandbox's ``/run``; what is too much is found as usual."""
HIGH_FD = 120
"""Descriptors from here on are in nobody's way (:mod:`sandbox_gateway.agent.kernel_writer`)."""
_OWN = "_sandbox_"
_HEAD = Struct("<Q")
"""Bytes of the marshalled table that follows; behind that, the code of one module after the other, compressed."""

Entry = tuple[str, bool, int, int]
"""Path of the source, whether it is a package, where the code begins behind the table, and its bytes."""


def tell(kernel: Any, since: float) -> None:
    """Publish what a kernel has imported that runs ``since`` (seconds since the epoch)."""
    kernel.session.send(kernel.iopub_socket, MESSAGE, {}, buffers=[collect(sys.modules, since)])


def collect(modules: Mapping[str, ModuleType], since: float) -> bytes:
    """The file for a :class:`Shelf` of those modules that Python finds as files with sources older than ``since``."""
    table: dict[str, Entry] = {}
    codes: list[bytes] = []
    size = 0
    for name, path, is_package, code in _found(dict(modules), since):
        text = zlib.compress(marshal.dumps(code), 1)
        if size + len(text) <= LIMIT:
            codes.append(text)
            table[name] = (path, is_package, size, len(text))
            size += len(text)
    head = marshal.dumps(table)
    return b"".join([_HEAD.pack(len(head)), head, *codes])


def _found(modules: Mapping[str, ModuleType], since: float) -> Iterator[tuple[str, str, bool, CodeType]]:
    for name, module in modules.items():
        # Whatever is wrong with one (its files are gone, it is something strange): found as usual, the next time.
        with contextlib.suppress(Exception):
            loader = _ordinary(name, module, modules)
            if loader is not None and os.stat(loader.path).st_mtime < since:
                code = loader.get_code(name)
                if code is not None:
                    yield name, loader.path, loader.is_package(name), code


def _ordinary(name: str, module: ModuleType, modules: Mapping[str, ModuleType]) -> SourceFileLoader | None:
    """The loader of a module that was found as Python's own finder finds it now; None of any other."""
    if type(module) is not ModuleType or type(name) is not str or name.startswith(_OWN):
        return None  # some load themselves, or run what they like, as soon as one asks them for something
    spec = module.__spec__
    loader = spec.loader if spec is not None else None
    if spec is None or type(loader) is not SourceFileLoader or not spec.name == loader.name == name:
        return None
    above = name.rpartition(".")[0]
    found = PathFinder.find_spec(name, modules[above].__path__ if above else None)
    if found is None or type(found.loader) is not SourceFileLoader:
        return None
    origins = {spec.origin, loader.path, module.__file__, found.origin, found.loader.path}
    folders = found.submodule_search_locations
    usual = [os.path.dirname(loader.path)] if loader.is_package(name) else None
    return loader if len(origins) == 1 and folders == usual else None


class Shelf:
    """A finder (PEP 451) for the modules in such a file, which stands before Python's own for the path."""

    def __init__(self, fd: int) -> None:
        """Read the table; raises one of many errors for what is no such file."""
        (size,) = _HEAD.unpack(os.pread(fd, _HEAD.size, 0))
        if not 0 < size <= os.fstat(fd).st_size:
            raise ValueError("no table")
        table = marshal.loads(os.pread(fd, size, _HEAD.size))
        for place, is_package, at, length in table.values():
            if (type(place), type(is_package), type(at), type(length)) != (str, bool, int, int):
                raise ValueError("no table")
        self._table: dict[str, Entry] = table
        self._start = _HEAD.size + size
        self._lent: list[_Loader] = []
        sys.meta_path.insert(sys.meta_path.index(PathFinder), self)
        self._fd = fd

    @classmethod
    def open(cls, path: str) -> Shelf | None:
        """The shelf in the file ``path``, from which modules come from now on; None if there is none."""
        try:
            low = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        fd = -1
        try:
            fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
            return cls(fd)
        except Exception:  # nothing depends on it
            if fd >= 0:
                os.close(fd)
            return None
        finally:
            os.close(low)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """The specification of a module, as the path's finder would make it, where that would find it."""
        entry = self._table.get(name)
        if entry is None:
            return None
        place, is_package, at, size = entry
        folder = os.path.dirname(place)
        if (os.path.dirname(folder) if is_package else folder) not in (sys.path if path is None else path):
            return None
        loader = _Loader(name, place)
        loader.read = lambda: os.pread(self._fd, size, self._start + at)
        self._lent.append(loader)
        return spec_from_file_location(
            name, place, loader=loader, submodule_search_locations=[folder] if is_package else None
        )

    def close(self) -> None:
        """Give nothing any more. Python's own finder sees meanwhile what is in the folders of ``sys.path``, as it
        would have by now."""
        # Another list: somebody may be walking over this one, and would skip a finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        for loader in self._lent:
            _make_ordinary(loader)
        self._table.clear()
        self._lent.clear()
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # a module may have closed what is none of its own
            os.close(fd)
        with contextlib.suppress(Exception):
            PathFinder.find_spec(f"{_OWN}nothing")


class _Loader(SourceFileLoader):
    """Becomes Python's own before the module's code runs."""

    read: Callable[[], bytes]

    def get_code(self, fullname: str) -> CodeType | None:
        read = self.read
        _make_ordinary(self)
        try:
            return marshal.loads(zlib.decompress(read()))  # type: ignore[no-any-return]
        except Exception:
            return self.get_code(fullname)


def _make_ordinary(loader: SourceFileLoader) -> None:
    """Have it read the module's files from now on, if it does not already."""
    loader.__dict__.pop("read", None)
    loader.__class__ = SourceFileLoader
