"""A failed create leaves nothing (DESIGN, invariant 5)."""

from __future__ import annotations

import pytest
from acceptance import KERNEL, Product, kernel
from faulty import Faults
from jupyter_client import KernelManager


@pytest.mark.parametrize("way", ["fails", "is killed", "fails when it has done its work"])
@pytest.mark.parametrize("command", ["create", "start"])
def test_a_create_whose_runsc_fails_leaves_nothing(product: Product, faults: Faults, command: str, way: str) -> None:
    """Nor does a start from a template hide it: where both ways fail, that is an error."""
    before = product.ids()
    faults.set(command, way)
    faults.set("restore", way)
    manager = KernelManager(kernel_name=KERNEL)
    with pytest.raises(Exception, match=r"."):
        manager.start_kernel()
    manager.cleanup_resources()
    assert product.ids() == before
    faults.clear()
    with kernel(KERNEL) as client:
        assert client.run("print(1)").stdout == "1\n"
