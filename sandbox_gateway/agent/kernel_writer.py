"""Whole frames on a pipe, in order, from any thread; runs in the kernel's process.

Beside :mod:`sandbox_gateway.agent.ipykernel_app`, which says why and what must hold; standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import sys
import threading
from collections import deque
from typing import Any

IOPUB = b"SGio"
SHELL = b"SGsh"
HIGH_FD = 120
"""Out of the way of code that closes or reuses low numbers."""
_MAX_PARTS = 1024
_MAX_MESSAGE = 512 * 1024 * 1024
"""As on the link; more would cost the kernel the pipe, and with it its life."""
_JOIN = 64 * 1024
_WRITEV = 512


Entry = tuple[list[Any], int, list[int], list[Any], bytes]
"""Buffers to write, their length, bytes written so far (each write's), the message, and its channel's magic."""


def whole(entry: Entry) -> bool:
    """Whether all of an entry is in the pipe."""
    return sum(entry[2]) >= entry[1]


class Writer:
    """Frames on the pipe, in order, each whole. See :mod:`sandbox_gateway.agent.outpipe` for the format."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.broken = False
        self._queue: deque[Entry] = deque()
        self._lock = threading.RLock()
        self._writing: Any = None  # the frame of the call that is inside a write

    def entry(self, parts: list[Any], magic: bytes = IOPUB) -> Entry:
        """A queue entry for a message; ``magic`` is the channel's."""
        if len(parts) > _MAX_PARTS:
            raise ValueError(f"a message of {len(parts)} parts; at most {_MAX_PARTS} can leave the sandbox")
        views = [part if isinstance(part, bytes) else _octets(memoryview(part)) for part in parts]
        lengths = [len(view) for view in views]
        total = 4 + 4 * len(lengths) + sum(lengths)
        if total > _MAX_MESSAGE:
            raise ValueError(f"a message of {total} bytes; at most {_MAX_MESSAGE} can leave the sandbox")
        head = struct.pack(f"!4sII{len(lengths)}I", magic, total, len(lengths), *lengths)
        if total <= _JOIN:
            whole = b"".join([head, *views])
            return [whole], len(whole), [], parts, magic
        return [head, *views], total + 8, [], parts, magic

    def put(self, entry: Entry, done: list[Any]) -> None:
        """Queue an entry; ``done`` gets an item in the same instant, so that an interrupt cannot come between."""
        done.extend(map(self._queue.append, (entry,)))

    def drain(self) -> list[list[Any]]:
        """Write everything that is queued; waits while the pipe is full.

        The interpreter may call a signal's handler inside a write, and goes on with the same bytes when that returns.
        A handler that comes here meanwhile gets back at once: the call that it has interrupted writes, in its turn,
        what the handler has queued.

        Returns the IOPub messages that could not be written because the pipe is gone (normally none). Who sent a
        reply asks :func:`whole`.
        """
        lost: list[list[Any]] = []
        with self._lock:
            if self._writing is not None and _runs(self._writing):
                return lost
            frame = sys._getframe()
            # The queue is looked at while the mark is off: nothing is left behind that was queued while it was on.
            while self._queue:
                try:
                    self._writing = frame
                    lost += self._write_some()
                finally:
                    self._writing = None
        return lost

    def _write_some(self) -> list[list[Any]]:
        """Write what fits into the pipe of the first entry, or remove that; what is lost where the pipe is gone."""
        if not self._queue:  # a handler has written it all, just before the mark was on
            return []
        buffers, total, done, _, _ = self._queue[0]
        written = sum(done)
        try:
            if written >= total:
                self._queue.popleft()
            elif len(buffers) == 1:
                rest = buffers[0] if not written else memoryview(buffers[0])[written:]
                done.extend(map(os.write, (self.fd,), (rest,)))
            else:
                done.extend(map(os.writev, (self.fd,), (_rest(buffers, written),)))
        except OSError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # not the write's: a signal's handler, called inside it, has raised that (a TimeoutError, say)
            if not isinstance(error, BlockingIOError):
                return self._give_up(error)
            _await_room(self.fd)  # somebody has made it so, perhaps for all descriptors that he found
        return []

    def _give_up(self, error: OSError) -> list[list[Any]]:
        self.broken = True
        if sys.__stderr__ is not None:
            print(f"[sandbox] no more output by the pipe: {error}", file=sys.__stderr__, flush=True)
        left = []
        while self._queue:
            *_, parts, magic = self._queue.popleft()
            if magic == IOPUB:
                left.append(parts)
        return left

    def close(self) -> None:
        """The agent sees the end of the pipe and listens to the socket instead."""
        self.broken = True
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)


def _runs(frame: Any) -> bool:
    """Whether a frame of this thread has not ended: where it has, an error that a trace function raised kept its mark
    from being taken back."""
    caller: Any = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _octets(view: memoryview) -> memoryview | bytes:
    """What lies in memory, as ZMQ would send it; only views without gaps, in C's order, can be cast."""
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes("A")


def _await_room(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def _rest(buffers: list[Any], written: int) -> list[Any]:
    found: list[Any] = []
    for buffer in buffers:
        size = len(buffer)
        if written >= size:
            written -= size
            continue
        found.append(memoryview(buffer)[written:] if written else buffer)
        written = 0
        if len(found) == _WRITEV:
            break
    return found


class Pipe:
    """What all streams and threads of this process share: the writer, and whether this is a forked child."""

    def __init__(self, fd: int) -> None:
        self.writer = Writer(fd)
        self.flush_lock = threading.RLock()
        self.child = False
        os.register_at_fork(after_in_child=self._forked)

    @property
    def usable(self) -> bool:
        """False in forked children, and once the pipe is gone."""
        return not self.child and not self.writer.broken

    def _forked(self) -> None:
        self.child = True
        self.flush_lock = threading.RLock()  # another thread may have held it
