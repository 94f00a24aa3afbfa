"""Each plugin can be disabled by itself; the page then works without that part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from acceptance import Product
from browser import Lab, window
from lab_page import chip
from lab_server import KERNEL, NAME, make_lab
from playwright.async_api import expect

pytestmark = pytest.mark.timeout(300)
PLUGINS = (
    "commands",
    "chip",
    "panel",
    "fork",
    "notifications",
    "picker",
    "output",
    "reattach",
    "rejoin",
    "remember",
    "saved",
    "starts",
)
"""All but the core, which the others need."""


@pytest.fixture(scope="module")
def disabling_lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab whose disabled plugins the tests choose."""
    started = make_lab(tmp_path_factory.mktemp("disabled"))
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


@pytest.fixture
async def ended(disabling_lab: Lab) -> AsyncIterator[None]:
    yield
    await disabling_lab.end_kernels()


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_page_works_without_one_of_the_plugins(
    disabling_lab: Lab, browser_path: str, tmp_path: Path, plugin: str, ended: None
) -> None:
    disabling_lab.disable(f"{NAME}:{plugin}")
    disabling_lab.write("part.ipynb", "6 * 7", kernel=KERNEL)
    async with window(disabling_lab, browser_path, tmp_path, plugin) as page:
        await page.visit("part.ipynb")
        await page.ready()
        await page.run(0)
        await page.printed(0, "42")
        gone = plugin == "chip"
        await expect(chip(page)).to_have_count(0 if gone else 1)
        if not gone:
            await chip(page).click()
            await expect(page.page.locator(".sg-Menu")).to_have_count(1)
            await page.page.keyboard.press("Escape")
        await page.notebook.locator(".jp-KernelName").click()
        await expect(page.page.locator(".jp-Dialog")).to_be_visible()
        await expect(page.page.locator(".sg-Picker")).to_have_count(0 if plugin == "picker" else 1)
        assert page.errors() == []
