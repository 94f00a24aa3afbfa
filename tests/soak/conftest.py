"""Fixtures of the soak test: the installed product."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import KERNEL, PLAIN, product

__all__ = ["product"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The plain kernel can be neither suspended nor forked; the model's own tests need no kernel."""
    here = Path(__file__).resolve().parent
    for item in items:
        if KERNEL == PLAIN and here in Path(item.path).parents and "product" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="needs a sandbox: not run with the plain kernel"))
