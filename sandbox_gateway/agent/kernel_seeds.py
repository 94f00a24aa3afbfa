"""Fresh state for every random number generator that this process shares with its clones.

Runs in the kernel's process, beside :mod:`sandbox_gateway.agent.kernel_identity`; standard library only, nothing is
imported that the program has not imported itself. ``os.urandom``, ``secrets`` and ``uuid.uuid4`` ask the operating
system each time and need nothing. Generators that a program made for itself (``random.Random()``,
``numpy.random.default_rng()``) are its own and stay as they are.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

PATIENCE = 3.0
"""Seconds to wait for a library that is busy drawing numbers in a long call."""
_STATIC = ("tensorflow", "cupy", "grpc._cython.cygrpc")
"""Modules with generators of their own that cannot be reached from here."""

_found: dict[str, int | None] = {}
_known: tuple[tuple[int, int], frozenset[int]] | None = None
"""How often libraries had been loaded and unloaded, and the ``RAND_add`` functions of those that there were."""

# Taken now: programs replace names in modules.
_seed_random = random.seed


class Seeds:
    """Draws from the entropy given and the operating system's; notes what was seeded and what could not be."""

    def __init__(self, entropy: bytes) -> None:
        if len(entropy) < 32:
            raise ValueError("too little entropy was given")
        self._entropy = entropy + os.urandom(64)
        self.seeded: list[str] = []
        self.missing: list[str] = []

    def draw(self, purpose: str, size: int = 64) -> bytes:
        """Bytes for one purpose; those for another tell nothing of them."""
        return hashlib.shake_256(purpose.encode() + b"\0" + self._entropy).digest(size)

    def number(self, purpose: str, bits: int) -> int:
        """The same as a number of so many bits."""
        return int.from_bytes(self.draw(purpose, 16), "big") >> (128 - bits)

    def sow(self) -> None:
        """Seed everything there is. A library that is in the middle of a long call is waited for a moment only."""
        locked: dict[str, Callable[[], object]] = {"numpy": self._numpy, "torch": self._torch}
        # A thread takes milliseconds to begin in a sandbox: theirs do beside the rest.
        ends = [self._bounded(name, locked[name]) for name in filter(sys.modules.__contains__, locked)]
        self._try("random", lambda: _seed_random(self.draw("random")))
        self._try("libc", self._libc)
        self._try("openssl", self._openssl)
        if "cryptography.hazmat.bindings._rust" in sys.modules:
            self._try("cryptography", self._cryptography)
        quick = {"tempfile": _tempfile, "uuid": _uuid, "multiprocessing": self._multiprocessing}
        for name in filter(sys.modules.__contains__, quick):
            self._try(name, quick[name])
        for end in ends:
            end()
        self.missing.extend(name for name in _STATIC if name in sys.modules)

    def _try(self, name: str, step: Callable[[], object]) -> None:
        try:
            done = step() is not False
        except Exception:  # a module that the program has changed, or one of an unknown version
            done = False
        (self.seeded if done else self.missing).append(name)

    def _bounded(self, name: str, step: Callable[[], object]) -> Callable[[], None]:
        """Begin to seed a generator with a lock, which may be held for as long as a call lasts: the thread then seeds
        as soon as it can. What is returned waits for it, and notes how far it is."""
        done: list[bool] = []

        def run() -> None:
            try:
                done.append(step() is not False)
            except Exception:
                done.append(False)

        thread = threading.Thread(target=run, name=f"sandbox-seed-{name}", daemon=True)
        thread.start()

        def end() -> None:
            thread.join(PATIENCE)
            (self.seeded if done and done[0] else self.missing).append(name)

        return end

    # -- what there is

    def _libc(self) -> None:
        libc = ctypes.CDLL(None)
        libc.srandom(ctypes.c_uint(self.number("srandom", 32)))
        libc.srand48(ctypes.c_long(self.number("srand48", 32)))

    def _openssl(self) -> None:
        """Every OpenSSL in the process; its primary generator is reseeded, and those of the threads follow it."""
        own: Any = sys.modules.get("_ssl")
        if own is not None:  # the interpreter's, which may be a part of it and export nothing
            own.RAND_add(self.draw("ssl", 128), 128.0)
        for number, address in enumerate(_rand_adds()):
            fresh = self.draw(f"openssl {number}", 128)
            add = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_double)(address)
            add(fresh, len(fresh), 128.0)

    def _cryptography(self) -> None:
        """It brings an OpenSSL of its own, which exports nothing but through its binding."""
        from cryptography.hazmat.bindings.openssl.binding import Binding  # type: ignore[import-not-found]

        fresh = self.draw("cryptography", 128)
        Binding().lib.RAND_add(fresh, len(fresh), float(len(fresh)))

    def _numpy(self) -> bool:
        module: Any = sys.modules.get("numpy.random.mtrand")
        if module is None:
            return True  # it asks the operating system when it is imported
        words = self.draw("numpy", 64)
        module.seed([int.from_bytes(words[at : at + 4], "big") for at in range(0, len(words), 4)])
        return True

    def _torch(self) -> None:
        sys.modules["torch"].manual_seed(self.number("torch", 63))  # CUDA's at once or when it is initialized

    def _multiprocessing(self) -> None:
        module: Any = sys.modules.get("multiprocessing.process")
        if module is None or module._children:
            return  # children that live know the key and would be shut out
        module.current_process().authkey = self.draw("multiprocessing", 32)


def _tempfile() -> None:
    sys.modules["tempfile"]._name_sequence = None  # type: ignore[attr-defined]


def _uuid() -> None:
    module: Any = sys.modules["uuid"]
    module._node = module._last_timestamp = None


def _rand_adds() -> frozenset[int]:
    """The ``RAND_add`` of every OpenSSL in the process.

    The list of what is mapped takes milliseconds in a kernel with many libraries, and is read again only where one was
    loaded or unloaded since.
    """
    global _known
    loads = _loads()
    if _known is None or _known[0] != loads:
        found = frozenset(address for path in mapped_libraries() if (address := _rand_add(path)) is not None)
        _known = (loads, found) if loads is not None else None
        return found
    return _known[1]


class _Loaded(ctypes.Structure):
    """The beginning of ``struct dl_phdr_info`` (dl_iterate_phdr(3))."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("header_count", ctypes.c_uint16),
        ("loaded", ctypes.c_ulonglong),
        ("unloaded", ctypes.c_ulonglong),
    )


def _loads() -> tuple[int, int] | None:
    """How often libraries were loaded and unloaded so far; None where the C library does not count."""
    counts: list[tuple[int, int]] = []

    def first(info: Any, size: int, _: object) -> int:
        if size >= ctypes.sizeof(_Loaded):
            counts.append((info.contents.loaded, info.contents.unloaded))
        return 1  # which ends the iteration

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)(first)
    try:
        ctypes.CDLL(None).dl_iterate_phdr(callback, None)
    except AttributeError:
        return None
    return counts[0] if counts else None


def _rand_add(path: str) -> int | None:
    """Where a library's ``RAND_add`` is, its own or that of an OpenSSL which it is linked to; looked up once."""
    if path not in _found:
        try:
            function = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).RAND_add
            _found[path] = ctypes.cast(function, ctypes.c_void_p).value
        except (OSError, AttributeError):
            _found[path] = None
    return _found[path]


def mapped_libraries() -> list[str]:
    """Paths of the shared libraries in this process."""
    found: dict[str, None] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and "x" in fields[1] and ".so" in fields[5]:
                found[fields[5]] = None
    return list(found)
