"""Fixtures of the life-cycle tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import KERNEL, PLAIN, Client, Product, kernel, product

__all__ = ["product"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The plain kernel has no sandbox whose life could be followed."""
    here = Path(__file__).resolve().parent
    for item in items:
        if KERNEL == PLAIN and here in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="needs a sandbox: not run with the plain kernel"))


@pytest.fixture
def client(product: Product) -> Iterator[Client]:
    """A fresh sandboxed kernel."""
    with kernel(KERNEL) as found:
        yield found
