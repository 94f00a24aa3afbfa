"""Fixtures of the Python API's tests: an installation with real kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import KERNEL, PLAIN, Product, product

from sandbox_gateway.background import background_loop
from sandbox_gateway.keeper import keeper_pid

__all__ = ["product"]


@pytest.fixture
def installation(product: Product) -> Iterator[Product]:
    """The product; what this process's API began for it (its lifecycle, the keeper) ends with the test."""
    if KERNEL == PLAIN:
        pytest.skip("needs a sandbox")
    yield product
    background_loop().shut_down()
    _until_no_keeper()


def _until_no_keeper() -> None:
    from acceptance import until

    from sandbox_gateway.host.paths import discover

    until(lambda: keeper_pid(discover()) is None, 30)
