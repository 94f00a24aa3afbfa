"""Progress of long operations, as who asked for them hears it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway import operations
from sandbox_gateway.operations import growing
from sandbox_gateway.owner import progress_to


async def test_what_is_written_is_reported_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "INTERVAL", 0.02)
    told: list[Mapping[str, Any]] = []
    enough = asyncio.Event()

    def listen(progress: Mapping[str, Any]) -> None:
        told.append(progress)
        if progress["done"] >= 3 << 20:
            enough.set()

    with progress_to(listen):
        async with growing(tmp_path, "writing memory"):
            for number in range(3):
                (tmp_path / str(number)).write_bytes(bytes(range(256)) * 4096)
                await asyncio.sleep(0.03)
            async with asyncio.timeout(10):
                await enough.wait()
    count = len(told)
    await asyncio.sleep(0.1)
    assert len(told) == count, "it ends with the operation"
    assert [report["done"] for report in told] == sorted(report["done"] for report in told)
    assert {report["message"] for report in told} == {"writing memory"}


async def test_nobody_listens_and_nothing_is_there_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "INTERVAL", 0.01)
    async with growing(tmp_path / "missing", "writing"):
        await asyncio.sleep(0.05)
    with progress_to(lambda progress: None):
        async with growing(tmp_path / "missing", "writing"):
            await asyncio.sleep(0.05)
