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

    def entry(self, parts: list[Any], magic: bytes = IOPUB) -> Entry:
        """A queue entry for a message; ``magic`` is the channel's."""
        if len(parts) > _MAX_PARTS:
            raise ValueError(f"a message of {len(parts)} parts; at most {_MAX_PARTS} can leave the sandbox")
        views = [part if isinstance(part, bytes) else memoryview(part).cast("B") for part in parts]
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

        Returns the IOPub messages that could not be written because the pipe is gone (normally none). Who sent a
        reply asks :func:`whole`.
        """
        queue = self._queue
        with self._lock:
            while queue:
                entry = queue[0]
                buffers, total, done, _, _ = entry
                written = sum(done)
                if written >= total:
                    # No bytecode between the test and the call lets a signal handler in that would drain as well.
                    if queue and queue[0] is entry:
                        queue.popleft()
                    continue
                try:
                    if len(buffers) == 1:
                        rest = buffers[0] if not written else memoryview(buffers[0])[written:]
                        done.extend(map(os.write, (self.fd,), (rest,)))
                    else:
                        done.extend(map(os.writev, (self.fd,), (_rest(buffers, written),)))
                except BlockingIOError:  # somebody has made it so, perhaps for all descriptors that he found
                    _await_room(self.fd)
                except OSError as error:
                    self.broken = True
                    if sys.__stderr__ is not None:
                        print(f"[sandbox] no more output by the pipe: {error}", file=sys.__stderr__, flush=True)
                    left = [parts for *_, parts, magic in queue if magic == IOPUB]
                    queue.clear()
                    return left
        return []

    def close(self) -> None:
        """The agent sees the end of the pipe and listens to the socket instead."""
        self.broken = True
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            os.close(fd)


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
