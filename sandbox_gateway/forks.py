"""What must not be in the middle of anything when this process forks.

A fork copies what other threads are doing, and none of the threads. What is registered here is quieted by the thread
that forks, before it does, and goes on in parent and child after it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final, Protocol


class Quieted(Protocol):
    """Something with a lock of its own, which only the forking thread may hold while it forks."""

    def before_fork(self) -> None:
        """Wait until no thread is at work in it, keep them out, and give up what must not cross a fork."""
        ...

    def after_fork(self) -> None:
        """Let threads in again: in the parent, and in the child, whose only thread is as the one that forked."""
        ...


_all: Final[weakref.WeakSet[Quieted]] = weakref.WeakSet()
_lock: Final = threading.RLock()
_quiet: Final[list[Quieted]] = []


def quiet(one: Quieted) -> None:
    """Have ``one`` quieted at each fork of this process, for as long as somebody else holds it."""
    with _lock:
        _all.add(one)


def _before() -> None:
    _lock.acquire()
    _quiet.extend(_all)
    for one in _quiet:
        one.before_fork()


def _after() -> None:
    for one in _quiet:
        one.after_fork()
    _quiet.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows, where no process forks
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
