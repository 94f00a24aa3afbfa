"""Fixtures of the attacks: a kernel inside, another one that has to go on working, and traps on the host."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance import KERNEL, PLAIN, Bystander, Client, Product, kernel, product

__all__ = ["product"]

CANARY = "SG_CANARY"
"""Name of an environment variable of the host that nobody inside may see."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Never run an attack in a kernel that is not isolated."""
    here = Path(__file__).resolve().parent
    for item in items:
        if KERNEL == PLAIN and here in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="attacks need a sandbox: not run in the plain kernel"))


@pytest.fixture(scope="module")
def canary() -> Iterator[str]:
    """A secret in this process's environment and in a file of the user's home directory; gives the secret."""
    secret = f"canary-{secrets.token_hex(12)}"
    os.environ[CANARY] = secret
    file = Path.home() / f".sg-{secret}"
    file.write_text(secret)
    try:
        yield secret
    finally:
        file.unlink()
        del os.environ[CANARY]


@pytest.fixture(scope="module")
def bystander_kernel(product: Product, canary: str) -> Iterator[Client]:
    """A second sandbox that lives through all attacks."""
    with kernel(KERNEL) as client:
        yield client


@pytest.fixture
def bystander(bystander_kernel: Client) -> Iterator[Bystander]:
    """The second sandbox at work during one test; checked once more when the test is over."""
    working = Bystander(bystander_kernel)
    try:
        yield working
        working.check()
    finally:
        working.close()


@pytest.fixture(scope="module")
def inside(product: Product, canary: str) -> Iterator[Client]:
    """A sandbox for attacks that only look."""
    with kernel(KERNEL) as client:
        yield client


SandboxClient = Callable[..., AbstractContextManager[Client]]


@pytest.fixture
def sandbox_client(product: Product, canary: str) -> SandboxClient:
    """``sandbox_client(kernel_name, **start_options)``: a context manager with a fresh sandbox for a rough attack."""

    def make(name: str = KERNEL, **options: Any) -> AbstractContextManager[Client]:
        return kernel(name, **options)

    return make


@pytest.fixture
def attacker(sandbox_client: SandboxClient, bystander: Bystander) -> Iterator[Client]:
    """A fresh sandbox to be ruined, with another one working beside it."""
    with sandbox_client() as client:
        yield client
