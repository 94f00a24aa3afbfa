"""Notebook 7 loads the same front end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import Product
from browser import Lab, Window, window
from lab_page import chip, choose, picker, picture
from lab_server import KERNEL, make_lab
from playwright.async_api import expect

pytest.importorskip("notebook", reason="the `test` extra brings Notebook 7")
pytestmark = pytest.mark.timeout(300)
STOCK = (
    r"uncaught: TypeError: Cannot read properties of undefined \(reading 'schema'\)",
    "Cannot convert undefined or null to object",  # its language server's settings, by who comes first
    r"Cannot read properties of null \(reading 'updateRenderOption'\)",
    "Canceled future for create_subshell_request",
)
"""What Notebook 7.6 itself says on each notebook's page, without our front end, too."""


@pytest.fixture(scope="module")
def notebook(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A Notebook 7 with the extension."""
    started = make_lab(tmp_path_factory.mktemp("notebook"), application="notebook")
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


async def visit(page: Window, path: str) -> None:
    """Load a page of Notebook 7: ``notebooks/x.ipynb``, or ``tree``."""
    await page.page.goto(f"{page.address}/{path}?token={page.lab.token}")
    await expect(page.page.locator("#main")).to_be_visible()


async def test_a_notebook_is_suspended_and_resumed_in_notebook_7_and_stands_in_its_list(
    notebook: Lab, browser_path: str, tmp_path: Path
) -> None:
    notebook.write("seven.ipynb", "x = 6", "print(x * 7)", kernel=KERNEL)
    async with window(notebook, browser_path, tmp_path, "notebook7") as page:
        await visit(page, "notebooks/seven.ipynb")
        await expect(chip(page)).to_have_attribute("data-look", "running")
        await page.run(0)
        await page.done(0, 1)
        await choose(page, "Suspend…")
        await page.accept()
        await expect(chip(page)).to_have_attribute("data-look", "suspended")
        await choose(page, "Resume")
        await expect(chip(page)).to_have_attribute("data-look", "running")
        await page.run(1)
        await page.done(1, 2)
        await page.printed(1, "42")
        await picture(page, "notebook7", page.page.locator("#top-panel"), page.notebook.locator(".jp-Cell").nth(1))
        await expect(await picker(page)).to_contain_text("New sandbox")
        await expect(page.page.locator(".sg-Picker input:checked")).to_be_focused()
        await page.page.keyboard.press("Escape")
        await choose(page, "Details")
        await expect(page.page.locator(".jp-Dialog")).to_contain_text("What happened")
        await page.accept()
        async with page.page.context.expect_page() as opening:
            await choose(page, "Fork This Notebook")
        copy = Window(await opening.value, notebook, notebook.url)
        await expect(chip(copy)).to_have_attribute("data-look", "running")
        await copy.run(1, "print(x * 10)")
        await copy.printed(1, "60")  # by a copy of the kernel, with what that knew
        await copy.page.close()
        await visit(page, "tree")
        await page.page.locator(".lm-TabBar-tab", has_text="Running").click()
        entry = page.page.locator(".sg-RunningItem").first
        await expect(entry).to_contain_text("seven.ipynb")
        async with page.page.context.expect_page() as opening:
            await entry.locator(".sg-Entry-name").first.click()
        again = Window(await opening.value, notebook, notebook.url)
        await expect(again.page).to_have_url(re.compile("/notebooks/seven.ipynb"))
        await expect(chip(again)).to_have_attribute("data-look", "running")
        alone = await notebook.ask("POST", "sandboxes", {"profile": KERNEL, "name": "alone"})
        await notebook.ask("POST", f"sandboxes/{alone['id']}/execute", {"code": "y = 'of nobody'"})
        async with page.page.context.expect_page() as opening:
            await page.page.locator(".sg-Entry-name", has_text="alone").click()
        new = Window(await opening.value, notebook, notebook.url)
        await expect(chip(new)).to_have_attribute("data-look", "running")
        await new.run(0, "print(y)")
        await new.printed(0, "of nobody")
        assert page.errors(*STOCK) == []
    await notebook.end_kernels()


async def test_scripts_in_output_are_held_back_in_notebook_7_until_the_user_allows_them(
    notebook: Lab, browser_path: str, tmp_path: Path
) -> None:
    attack = "<b>kept</b><img src=x onerror='top.pwned=1'>"
    show = f"from IPython.display import HTML, Javascript\ndisplay(HTML({attack!r}), Javascript('top.run=1'))"
    notebook.write("held.ipynb", show, kernel=KERNEL)
    async with window(notebook, browser_path, tmp_path, "notebook7-held") as page:
        await visit(page, "notebooks/held.ipynb")
        await expect(chip(page)).to_have_attribute("data-look", "running")
        await page.run(0)
        await page.done(0, 1)
        bar = page.page.locator(".sg-Bar")
        await expect(bar).to_contain_text("held back")
        await expect(page.output(0).locator("b")).to_have_text("kept")
        assert await page.page.evaluate("[window.pwned, window.run]") == [None, None]
        await page.picture(tmp_path / "held.png")
        await bar.get_by_role("button", name="Allow active output for this notebook").click()
        await page.page.wait_for_function("window.pwned === 1 && window.run === 1")
        await expect(bar).to_have_count(0)
        assert page.errors(*STOCK, "status of 404") == []
    await notebook.end_kernels()
