"""What a kernel wrote to its raw stdout and stderr: the agent has it while it runs, a file afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from sandbox_gateway.link.host import Link

LOG_LIMIT: Final = 16 << 20
"""Bytes that are taken from the agent, who keeps 1 MiB, at most."""
_PATIENCE = 0.5


async def output(link: Link) -> bytes:
    """What the agent has now; raises ``link_failed``."""
    stream = await link.open_stream("log", {"follow": False})
    try:
        text = bytearray()
        while len(text) < LOG_LIMIT and (chunk := await stream.read()):
            text += chunk
        return bytes(text[:LOG_LIMIT])
    finally:
        await stream.close()


async def keep(link: Link, path: Path) -> None:
    """Keep it for `jupyter sandbox logs`: a short try, never a reason to fail."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_PATIENCE):
            text = await output(link)
        if text:
            await asyncio.to_thread(_write_private, path, text)


def kept(path: Path) -> bytes:
    """What :func:`keep` kept; empty when there is nothing. Blocks."""
    try:
        with open(path, "rb") as file:
            return file.read(LOG_LIMIT)
    except OSError:
        return b""


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
