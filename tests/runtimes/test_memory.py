"""The watch over memory where no control group can hold it."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.runtimes import memory
from sandbox_gateway.runtimes.memory import MemoryWatch, memory_file, next_look, sandbox_memory

GIB = 1 << 30
SENTRY = """
import os, sys, time
fd = os.memfd_create('runsc-memory')
print('ready', flush=True)
while True:
    os.write(fd, b'x' * (1 << 20))
    time.sleep(float(sys.argv[1]))
"""


async def stand_in(pause: float) -> asyncio.subprocess.Process:
    """A process with a memory file like the sentry's, which grows by a mebibyte each ``pause`` seconds."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", SENTRY, str(pause), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


def test_looks_come_closer_as_it_gets_tight() -> None:
    """Much room, rare looks; little room, or none, many."""
    assert next_look(0, 4 * GIB) == 1.0
    assert next_look(GIB // 2, GIB) == 0.25
    assert next_look(GIB - 1, GIB) == next_look(2 * GIB, GIB) == 0.05


async def test_growth_beyond_the_limit_is_ended() -> None:
    """The process is killed soon after its memory file passes the limit, and the watch says that it did it."""
    process = await stand_in(0.001)
    ref = ProcessRef.of(process.pid)
    assert ref is not None
    assert await asyncio.wait_for(MemoryWatch(ref, 64 << 20).run(), 30)
    assert await process.wait() == -9


async def test_end_within_the_limit_is_not_the_watchs_doing() -> None:
    """A process that ends otherwise was not killed for its memory."""
    process = await stand_in(100)
    ref = ProcessRef.of(process.pid)
    assert ref is not None
    used = sandbox_memory(ref)
    assert used is not None and 1 << 20 <= used < 64 << 20
    watching = asyncio.create_task(MemoryWatch(ref, GIB).run())
    await asyncio.sleep(0)
    process.kill()
    assert not await asyncio.wait_for(watching, 30)
    await process.wait()
    assert sandbox_memory(ref) is None


async def test_cancelled_watch_kills_nothing() -> None:
    """An owner that gives up its sandbox leaves it running."""
    process = await stand_in(100)
    ref = ProcessRef.of(process.pid)
    assert ref is not None
    watching = asyncio.create_task(MemoryWatch(ref, GIB).run())
    await asyncio.sleep(0)
    watching.cancel()
    await asyncio.wait({watching})
    assert ref.alive()
    process.kill()
    await process.wait()


async def test_alarm_ends_the_process_and_silence_does_not() -> None:
    """A ringing eventfd kills what still runs; after its end, ringing means nothing."""
    process = await stand_in(100)
    ref = ProcessRef.of(process.pid)
    assert ref is not None
    alarm = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        waiting = asyncio.create_task(memory.end_on_alarm(ref, alarm))
        await asyncio.sleep(0)
        os.eventfd_write(alarm, 1)
        assert await asyncio.wait_for(waiting, 30)
        await process.wait()
        assert not await asyncio.wait_for(memory.end_on_alarm(ref, alarm), 30)
    finally:
        os.close(alarm)


def test_process_without_a_memory_file_has_no_answer() -> None:
    """Neither we nor one who is gone is a sentry."""
    assert memory_file(os.getpid()) is None
    assert memory_file(2**22 - 1) is None
    assert sandbox_memory(ProcessRef(2**22 - 1, 1), str(Path("/nonexistent"))) is None
