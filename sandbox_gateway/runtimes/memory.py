"""Memory of a gVisor sandbox without a control group, and a limit held by looking.

The sentry keeps all of the guest's memory (heaps, files in memory, pipes) in one memfd called ``runsc-memory``; the
blocks that it has are what the guest uses, exactly, for the price of one ``stat``. The sentry's own private memory
comes on top. Everything else (stubs, gofer) is small and shared.
"""

from __future__ import annotations

import asyncio
import os

from sandbox_gateway.host import processes
from sandbox_gateway.host.processes import ProcessRef

_BLOCK = 512
_PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_file(pid: int) -> str | None:
    """Path (below ``/proc``) of the sentry's memory file; None when it cannot be seen."""
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            path = f"{directory}/{name}"
            try:
                if os.readlink(path).startswith("/memfd:runsc-memory"):
                    return path
            except OSError:
                continue
    except OSError:
        pass
    return None


def sandbox_memory(sandbox: ProcessRef, file: str | None = None) -> int | None:
    """Bytes that the sandbox uses now; None when it is gone or cannot be looked at."""
    file = file or memory_file(sandbox.pid)
    if file is None:
        return None
    try:
        guest = os.stat(file).st_blocks * _BLOCK
        with open(f"/proc/{sandbox.pid}/statm", "rb") as stream:
            _, resident, shared = (int(word) for word in stream.read().split()[:3])
    except (OSError, ValueError):
        return None
    return guest + max(resident - shared, 0) * _PAGE


def next_look(used: int, limit: int) -> float:
    """Seconds until the next look: often when it gets tight, rarely when there is much room.

    With 256 MiB left even a guest that fills a gigabyte in a second is seen in time to matter.
    """
    room = limit - used
    if room > 1 << 30:
        return 1.0
    return 0.25 if room > 256 << 20 else 0.05


async def end_on_alarm(sandbox: ProcessRef, alarm: int) -> bool:
    """Return when the sandbox has ended; end it when ``alarm`` (an eventfd, not closed here) rings, True if we did.

    A control group of version 1 kills only the one process it finds the biggest, which may be a guest's process: the
    kernel would die by an unexplained SIGKILL in a sandbox that lives on. Out of memory is the end of the sandbox.
    """
    rang = asyncio.Event()
    loop = asyncio.get_running_loop()
    ended = asyncio.ensure_future(processes.wait_exit(sandbox))
    ringing = asyncio.ensure_future(rang.wait())
    loop.add_reader(alarm, rang.set)
    try:
        await asyncio.wait({ended, ringing}, return_when=asyncio.FIRST_COMPLETED)
        # It rings at the removal of the group as well: then there is nothing left to end.
        killed = rang.is_set() and sandbox.kill()
        await ended
        return killed
    finally:
        loop.remove_reader(alarm)
        ringing.cancel()
        ended.cancel()


class MemoryWatch:
    """Kills a sandbox that uses more than its limit (DESIGN 4.14: the owner watches and kills; a soft limit)."""

    def __init__(self, sandbox: ProcessRef, limit: int) -> None:
        """``limit`` in bytes."""
        self.sandbox = sandbox
        self.limit = limit

    async def run(self) -> bool:
        """Watch until the sandbox has ended; True when it was killed for its memory."""
        killed = False
        ended = asyncio.ensure_future(processes.wait_exit(self.sandbox))
        try:
            file = None
            while not ended.done():
                file = file or memory_file(self.sandbox.pid)
                used = sandbox_memory(self.sandbox, file) if file else None
                if used is not None and used > self.limit:
                    killed = self.sandbox.kill() or killed
                pause = 0.25 if used is None else next_look(used, self.limit)
                await asyncio.wait({ended}, timeout=pause)
            ended.result()
            return killed
        finally:
            ended.cancel()
