"""How far long operations are: told to whoever asked the owner for them.

A report is ``{"message": str, "done": bytes, "total": bytes}``; what is not known is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from sandbox_gateway.owner import report_progress

INTERVAL: Final = 0.25
"""Seconds between two reports; what takes less is not reported at all."""


@contextlib.asynccontextmanager
async def growing(directory: Path, message: str) -> AsyncIterator[None]:
    """While the block runs, report how many bytes have been written into ``directory``."""

    async def watch() -> None:
        done = 0
        while True:
            await asyncio.sleep(INTERVAL)
            found = await asyncio.to_thread(_written, directory)
            done = max(done, found)
            if not report_progress({"message": message, "done": done}):
                return

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def _written(directory: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total
