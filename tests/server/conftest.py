"""Fixtures of the gateway's tests: a real gateway with real sandboxes, shared by a module's tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import Product, product
from served import Served, running

__all__ = ["product"]


@pytest.fixture(scope="module")
def _gateway(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("gateway") / "gateway.log")
    with running(served):
        yield served


@pytest.fixture
async def gateway(_gateway: Served) -> AsyncIterator[Served]:
    """A running gateway; what a test makes there is ended after it."""
    if _gateway.process is None or _gateway.process.poll() is not None:
        await _gateway.start()
    yield _gateway
    await _gateway.hang_up()
    if _gateway.process is not None and _gateway.process.poll() is None:
        await _gateway.clear()
