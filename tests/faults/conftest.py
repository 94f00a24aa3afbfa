"""The product with a runsc that fails on command, and a kernel of it with a client that notices every lost line."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soak"))

from acceptance import KERNEL, PLAIN, Product, environment, installed, let_go, short_directory
from faulty import Faults, Subject, own_kernel, wrapper

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The plain kernel has nothing of what fails here."""
    for item in items:
        if KERNEL == PLAIN and HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="needs a sandbox: not run with the plain kernel"))


@pytest.fixture(scope="session")
def faulty_installation(runsc_binary: Path) -> Iterator[tuple[Product, Path]]:
    """Installed once, with the wrapper as its runsc; used only inside :func:`product`."""
    base = short_directory()
    try:
        with environment(SANDBOX_TEST_RUNSC=str(wrapper(base, runsc_binary))), installed(base) as found:
            pass
        yield found, base
    finally:
        let_go()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def product(faulty_installation: tuple[Product, Path]) -> Iterator[Product]:
    """This installation for one test: the session's other tests have one of their own."""
    found, base = faulty_installation
    kernels = found.prefix / "share" / "jupyter"
    search = os.pathsep.join(filter(None, [str(kernels), os.environ.get("JUPYTER_PATH", "")]))
    with environment(
        SANDBOX_GATEWAY_HOME=str(found.home),
        JUPYTER_PATH=search,
        IPYTHONDIR=str(base / "ipython"),
        JUPYTER_PLATFORM_DIRS="1",
    ):
        yield found


@pytest.fixture
def faults(faulty_installation: tuple[Product, Path]) -> Iterator[Faults]:
    """What goes wrong from now on; nothing does at the test's end."""
    found = Faults(faulty_installation[1] / "faults")
    found.clear()
    yield found
    found.clear()


@pytest.fixture
def subject(product: Product, faults: Faults) -> Iterator[Subject]:
    """A kernel owned by this process, and its client."""
    with own_kernel(product) as found:
        yield found
        faults.clear()
