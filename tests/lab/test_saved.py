"""A notebook's state saved with it, several forks at once, and a restart that leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from browser import Window
from lab_page import choose, dark, picture
from lab_server import KERNEL
from notebook_files import remember, until_saved
from playwright.async_api import Locator, expect

pytestmark = pytest.mark.timeout(300)


def bar(page: Window) -> Locator:
    """What a notebook offers above its cells."""
    return page.notebook.locator(".sg-SavedBar")


async def test_a_notebook_with_its_saved_state_offers_to_start_from_it_wherever_it_is_opened(
    page: Window, tmp_path: Path
) -> None:
    page.lab.write("base.ipynb", "x = 'kept'", "print(x)", kernel=KERNEL)
    await page.visit("base.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await choose(page, "Save State with Notebook…")
    await page.page.locator(".jp-Dialog input").fill("prepared")
    await page.accept()
    found = (await until_saved(page.lab, "base.ipynb"))["snapshot"]
    (snapshot,) = (await page.lab.ask("GET", "snapshots"))["snapshots"]
    assert found == {"id": snapshot["id"], "name": "prepared", "created": snapshot["created"]}
    await page.reload()
    await page.ready()
    await expect(bar(page)).to_have_count(0)  # its kernel goes on
    shutil.copy(page.lab.folder / "base.ipynb", page.lab.folder / "copy.ipynb")
    await page.page.goto("about:blank")
    await page.lab.end_kernels()
    await page.visit("copy.ipynb")
    await expect(bar(page)).to_contain_text("A state was saved with this notebook: “prepared”")
    await page.picture(tmp_path / "offer.png")
    await picture(page, "saved-state", bar(page), page.cell(0), margin=3)
    await dark(page)
    await page.picture(tmp_path / "offer-dark.png")
    await page.page.set_viewport_size({"width": 640, "height": 700})
    await page.picture(tmp_path / "offer-narrow.png")
    await page.page.set_viewport_size({"width": 1280, "height": 900})
    await page.ready()
    await bar(page).get_by_role("button", name="Start from It").click()
    await expect(bar(page)).to_have_count(0)
    await page.run(1)
    await page.printed(1, "kept")
    sandboxes = (await page.lab.ask("GET", "sandboxes"))["sandboxes"]
    assert [one["parent"] for one in sandboxes] == [f"snapshot:{snapshot['id']}"]  # the one before has ended
    assert page.errors() == []


async def test_a_saved_state_that_is_gone_is_told_and_the_notebook_goes_on_with_a_fresh_kernel(page: Window) -> None:
    page.lab.write("gone.ipynb", "6 * 7", kernel=KERNEL)
    remember(page.lab, "gone.ipynb", snapshot={"id": "none", "name": "<b>lost</b>", "created": "2025-01-01T00:00:00Z"})
    await page.visit("gone.ipynb")
    await expect(bar(page)).to_contain_text("The state “<b>lost</b>” that was saved with this notebook is gone")
    await page.ready()
    await page.run(0)
    await page.printed(0, "42")
    await bar(page).get_by_role("button", name="Close").click()
    await expect(bar(page)).to_have_count(0)
    assert page.errors() == []


async def test_several_forks_are_made_at_once_and_a_clean_restart_leaves_nothing(page: Window, tmp_path: Path) -> None:
    await page.page.set_viewport_size({"width": 1800, "height": 900})
    code = "import os\nprint('x' in globals(), os.path.exists('file'))"
    page.lab.write("many.ipynb", "x = 1\nopen('file', 'w').close()", code, kernel=KERNEL)
    await page.visit("many.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await choose(page, "Fork Several Times…")
    await page.picture(tmp_path / "count.png")
    await page.accept()
    for number in (1, 2):
        await expect(page.page.locator(".lm-TabBar-tab", has_text=f"many-fork{number}.ipynb")).to_be_visible()
    told = page.page.locator(".Toastify__toast", has_text="Forked: “many-fork1.ipynb”, “many-fork2.ipynb”")
    await expect(told).to_be_visible()
    await page.picture(tmp_path / "forked.png")
    sandboxes = (await page.lab.ask("GET", "sandboxes"))["sandboxes"]
    names = sorted(one["name"].rpartition("/")[2] for one in sandboxes)
    assert names == ["many-fork1.ipynb", "many-fork2.ipynb", "many.ipynb"]
    sessions = await page.lab.ask("GET", "sessions")
    assert len({session["kernel"]["id"] for session in sessions}) == 3
    await page.page.locator(".lm-TabBar-tab", has_text="many.ipynb").first.click()
    first = page.notebook.first
    await first.locator(".sg-Chip").click()
    await page.page.locator(".sg-Menu .lm-Menu-itemLabel", has_text="Restart Clean…").click()
    await expect(page.page.locator(".jp-Dialog")).to_contain_text("all files inside the sandbox")
    await page.picture(tmp_path / "clean.png")
    async with page.page.expect_response(
        lambda answer: answer.request.method == "POST" and answer.url.split("?")[0].endswith("/restart")
    ):
        await page.accept()
    await expect(first.locator(".sg-Chip")).to_have_attribute("data-look", "running")
    await first.locator(".jp-Cell").nth(1).locator(".cm-content").click()
    await page.page.keyboard.press("Control+Enter")
    # Beside it may stand the notice that a new sandbox was made.
    await expect(first.locator(".jp-Cell-outputArea pre", has_text="False False\n")).to_have_count(1)
    own = [session["kernel"]["id"] for session in sessions if session["path"] == "many.ipynb"]
    again = await page.lab.ask("GET", "sessions")
    assert [session["kernel"]["id"] for session in again if session["path"] == "many.ipynb"] == own
    assert page.errors() == []
