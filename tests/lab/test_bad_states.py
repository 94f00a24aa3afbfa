"""Where there is nothing to show, or nobody to ask: the page goes on working, and says what is the matter."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import Product
from browser import CUT_OFF, Lab, Window, window
from cut_proxy import CutProxy
from lab_page import chip, choose, entry, running
from lab_server import KERNEL, make_lab
from playwright.async_api import Request, expect

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def bare_lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab with the front end, whose server lacks our extension."""
    started = make_lab(tmp_path_factory.mktemp("bare"), server_extension=False)
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


async def test_a_server_without_our_extension_is_asked_nothing_and_nothing_is_shown(
    bare_lab: Lab, browser_path: str, tmp_path: Path
) -> None:
    async with window(bare_lab, browser_path, tmp_path, "bare") as page:
        asked: list[str] = []

        def note(request: Request) -> None:
            asked.append(request.url)

        page.page.on("request", note)
        bare_lab.write("plain.ipynb", "6 * 7", kernel="python3")
        await page.visit("plain.ipynb")
        await page.ready("Python 3 (ipykernel)")
        await page.run(0)
        await page.printed(0, "42")
        await expect(chip(page)).to_have_count(0)
        await page.page.locator(".jp-SideBar .lm-TabBar-tab[data-id='jp-running-sessions']").click()
        await expect(page.page.locator("#jp-running-sessions")).to_contain_text("Kernels")
        await expect(page.page.locator("#jp-running-sessions")).not_to_contain_text("Sandboxes")
        assert not [url for url in asked if "/api/sandboxes" in url or "/api/snapshots" in url]
        assert page.errors() == []
    await bare_lab.end_kernels()


async def test_a_plain_kernel_shows_nothing(page: Window) -> None:
    page.lab.write("plain.ipynb", "6 * 7", kernel="python3")
    await page.visit("plain.ipynb")
    await page.ready("Python 3 (ipykernel)")
    await page.run(0)
    await page.printed(0, "42")
    await expect(chip(page)).to_have_count(0)
    assert page.errors() == []


async def test_a_server_that_is_away_is_told_and_its_return_is_seen(page: Window) -> None:
    page.lab.write("away.ipynb", "1 + 1", kernel=KERNEL)
    proxy = CutProxy(page.lab.port)
    try:
        page.address = proxy.url
        await page.shrug()
        await page.visit("away.ipynb")
        await page.ready()
        await expect(chip(page)).to_have_attribute("data-look", "running")
        proxy.refuse()
        await expect(chip(page)).to_have_attribute("data-look", "unknown")
        assert "does not answer" in str(await chip(page).get_attribute("aria-label"))
        proxy.refuse(False)
        await expect(chip(page)).to_have_attribute("data-look", "running")
        await page.run(0)
        await page.printed(0, "2")
    finally:
        proxy.close()
    assert page.errors(*CUT_OFF) == []


async def test_what_somebody_else_deleted_is_refused_with_the_reason(page: Window) -> None:
    page.lab.write("gone.ipynb", "1 + 1", kernel=KERNEL)
    await page.visit("gone.ipynb")
    await page.ready()
    await choose(page, "Suspend…")
    (sandbox,) = (await page.lab.ask("GET", "sandboxes"))["sandboxes"]
    await page.lab.ask("DELETE", f"sandboxes/{sandbox['id']}?forget=true")
    await page.accept()
    told = page.page.locator(".jp-Dialog", has_text="It could not be suspended")
    await expect(told).to_contain_text("there is no sandbox")
    await told.get_by_role("button", name="Close").click()
    await expect(told).to_have_count(0)
    # The notebook takes another kernel, as soon as JupyterLab knows that it has none.
    await expect(page.notebook.locator(".jp-KernelName")).to_have_text("No Kernel")
    await page.notebook.locator(".jp-KernelName").click()
    await page.page.locator(".sg-Offer", has_text="Python 3 (gVisor)").first.locator("input[type=radio]").check()
    await page.accept()
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await page.run(0)
    await page.printed(0, "2")
    assert page.errors("status of 404") == []


async def test_after_the_server_was_killed_and_came_back_the_notebook_goes_on_with_its_kernel(page: Window) -> None:
    """JupyterLab's server has forgotten the session, and the page attaches the notebook to its sandbox again."""
    page.lab.write("killed.ipynb", "x = 'still there'", "print(x)", kernel=KERNEL)
    await page.shrug()
    await page.visit("killed.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await expect(chip(page)).to_have_attribute("data-look", "running")
    page.lab.kill()
    await expect(chip(page)).to_have_attribute("data-look", "unknown")
    await page.lab.start()
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await page.ready()
    await page.run(1)
    await page.printed(1, "still there")
    assert page.errors(*CUT_OFF) == []


async def test_a_login_that_expired_is_told_and_the_page_keeps_what_was_written(page: Window) -> None:
    page.lab.write("login.ipynb", "x = 1", kernel=KERNEL)
    await page.shrug()
    await page.visit("login.ipynb")
    await page.ready()
    await running(page)
    page.lab.kill()
    page.lab.token = secrets.token_hex(16)
    await page.page.context.clear_cookies()
    await page.lab.start()
    await expect(chip(page)).to_contain_text("Signed out")
    assert "reload the page to sign in" in str(await chip(page).get_attribute("aria-label"))
    await expect(entry(page, "login.ipynb")).to_contain_text("Signed out")
    await page.edit(0, "x = 'written meanwhile'")
    await expect(page.cell(0)).to_contain_text("written meanwhile")
    await chip(page).click()
    await expect(page.page.locator(".sg-Menu .lm-Menu-item", has_text="Suspend…")).to_have_class(re.compile("disabled"))
    await page.page.keyboard.press("Escape")
    page.page.on("dialog", lambda asked: asked.accept())
    await page.page.reload()
    await expect(page.page.locator("#password_input")).to_be_visible()
    assert page.errors(*CUT_OFF, "status of 40[13]", "WebSocket", "Forbidden") == []
