"""Importing modules before a kernel is ready, for a template; runs in the kernel's process.

Beside :mod:`sandbox_gateway.agent.kernel_identity`, standard library only. What counts is that the program finds the
same as after an import in its first cell: ``sys.argv``, the working directory, ``__main__``, counts and history are as
they were, and a module that looks for IPython or a matplotlib backend finds what it would have found.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any


def preload(names: Sequence[str], mute: Callable[[bool], None]) -> tuple[list[str], dict[str, str]]:
    """Import modules; returns those that are there, and why the others are not.

    ``mute`` silences the kernel's streams: they stay in their places, since a module may keep a reference to them.
    """
    loaded: list[str] = []
    failed: dict[str, str] = {}
    for name in names:
        with _undisturbed(), _muted(mute):
            try:
                import_module(name)
                loaded.append(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:500]
            except BaseException as error:  # SystemExit: a module that ends the program must not end this one
                failed[name] = f"{type(error).__name__} while it was imported"
    return loaded, failed


async def rehearse(kernel: Any, identity: Callable[[], None]) -> None:
    """Walk the ways that every clone takes first, so that it finds them warm; silently, and without a trace."""
    with contextlib.suppress(Exception):
        identity()
    with contextlib.suppress(Exception):
        await kernel.do_execute("pass", True, store_history=False)
        kernel.shell.last_execution_result = None


def settle() -> None:
    """Make what is there small and still: no garbage, nothing for later collections to walk through, no free heap."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _muted(mute: Callable[[bool], None]) -> Iterator[None]:
    mute(True)
    try:
        yield
    finally:
        mute(False)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    main, argv, here = sys.modules.get("__main__"), list(sys.argv), os.getcwd()
    try:
        yield
    finally:
        if main is not None:
            sys.modules["__main__"] = main
        sys.argv[:] = argv
        os.chdir(here)
