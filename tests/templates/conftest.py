"""Fixtures of the template tests: the installed product, and kernels driven through a lifecycle of the test's own."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import KERNEL, PLAIN, Product, product
from templating import Driver

__all__ = ["product"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The plain kernel has no template."""
    here = Path(__file__).resolve().parent
    for item in items:
        if KERNEL == PLAIN and here in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="needs a sandbox: not run with the plain kernel"))


@pytest.fixture
async def driver(product: Product) -> AsyncIterator[Driver]:
    """Kernels of the installed product, made here; everything they leave ends with the test."""
    made = Driver(product.home)
    try:
        yield made
    finally:
        await made.close()
