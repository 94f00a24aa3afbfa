"""A real JupyterLab with the built extension, and its page in a headless Chromium."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "server"), str(TESTS / "lab")]

from acceptance import Product, product, profile_kernelspec  # noqa: E402
from browser import PATIENCE, Lab, Window, chromium, window  # noqa: E402
from cut_proxy import CutProxy  # noqa: E402
from lab_server import make_lab  # noqa: E402
from playwright.async_api import expect  # noqa: E402
from served import Served, running  # noqa: E402

__all__ = ["product"]

OPEN = """
[profiles.open]
active_output = true
"""
"""A profile whose administrator lets its output act."""
HERE = Path(__file__).resolve().parent
expect.set_options(timeout=PATIENCE * 1000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser, a JupyterLab and a busy machine: what fails is tried once more, which the summary tells."""
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session")
def browser_path() -> str:
    return chromium()


@pytest.fixture(scope="module")
def lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab with the extension and with sandboxes of its own."""
    profiles = product.home / "profiles.toml"
    before = profiles.read_text()
    profiles.write_text(before + OPEN)
    try:
        with profile_kernelspec(product, "tight"), profile_kernelspec(product, "open"):
            started = make_lab(tmp_path_factory.mktemp("lab"))
            try:
                asyncio.run(started.start())
                yield started
            finally:
                started.stop()
    finally:
        profiles.write_text(before)


@pytest.fixture(scope="module")
def gateway(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A headless gateway."""
    served = Served(tmp_path_factory.mktemp("gateway") / "gateway.log")
    with running(served):
        yield served


@pytest.fixture(scope="module")
def line(gateway: Served) -> Iterator[CutProxy]:
    """The network between a JupyterLab and the gateway."""
    found = CutProxy(gateway.port)
    yield found
    found.close()


@pytest.fixture(scope="module")
def remote_lab(
    browser_path: str, gateway: Served, line: CutProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """A JupyterLab whose kernels are on the gateway, with our extension."""
    started = make_lab(
        tmp_path_factory.mktemp("remote"),
        f"--gateway-url={line.url}",
        environment={"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token},
    )
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()
    assert "Task was destroyed" not in started.log.read_text()


@pytest.fixture
async def page(lab: Lab, browser_path: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Window]:
    """A fresh browser; what was started is ended after it."""
    async with window(lab, browser_path, tmp_path, request.node.name) as opened:
        yield opened
    lab.forget_settings()
    await lab.end_terminals()
    await lab.end_kernels()
    for sandbox in (await lab.ask("GET", "sandboxes?state=all&limit=1000"))["sandboxes"]:
        await lab.ask("DELETE", f"sandboxes/{sandbox['id']}?forget=true")
    for snapshot in (await lab.ask("GET", "snapshots"))["snapshots"]:
        await lab.ask("DELETE", f"snapshots/{snapshot['id']}")
