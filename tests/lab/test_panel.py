"""The sandboxes in the panel "Running", forks, snapshots, and what is said of a death."""

from __future__ import annotations

import asyncio

import pytest
from browser import Window
from lab_page import chip, choose, entry, picture, running
from lab_server import KERNEL, TIGHT
from playwright.async_api import expect

pytestmark = pytest.mark.timeout(300)


async def test_a_fork_of_a_notebook_goes_its_own_way_and_stands_under_its_parent(page: Window) -> None:
    await page.page.set_viewport_size({"width": 2200, "height": 900})  # two notebooks side by side
    page.lab.write("try.ipynb", "x = 1", "x += 1\nprint(x)", kernel=KERNEL)
    await page.visit("try.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await choose(page, "Fork This Notebook")
    copy = page.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)", has=page.page.locator(".sg-Chip")).nth(1)
    await expect(copy.locator(".sg-Chip")).to_have_attribute("data-look", "running")
    await picture(page, "fork", page.page.locator("#jp-main-dock-panel"), margin=0, height=170)
    for notebook, expected in ((copy, "2"), (page.notebook.first, "2"), (copy, "3")):
        await notebook.locator(".jp-Cell").nth(1).locator(".cm-content").click()
        await page.page.keyboard.press("Control+Enter")
        await expect(notebook.locator(".jp-Cell-outputArea pre").first).to_have_text(expected)
    assert (page.lab.folder / "try-fork1.ipynb").is_file()
    await running(page)
    child = entry(page, "try-fork1.ipynb")
    await expect(entry(page, "try.ipynb").locator(".sg-RunningItem")).to_have_count(1)
    await expect(child).to_contain_text("Running")
    assert page.errors() == []


async def test_a_snapshot_is_saved_listed_and_started_from(page: Window) -> None:
    page.lab.write("base.ipynb", "x = 'kept'", kernel=KERNEL)
    await page.visit("base.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await choose(page, "Save Snapshot…")
    await picture(page, "snapshot", page.page.locator(".jp-Dialog-content"))
    await page.page.locator(".jp-Dialog input").fill("prepared")
    await page.accept()
    await running(page)
    saved = page.page.locator(".sg-SnapshotItem")
    await expect(saved).to_contain_text("prepared")
    await expect(saved).to_contain_text("MiB")
    await saved.get_by_role("button", name="Start “prepared”").click()
    await expect(page.page.locator(".lm-TabBar-tab", has_text="Untitled.ipynb")).to_be_visible()
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await page.run(0, "print(x)")
    await page.printed(0, "kept")
    assert page.errors() == []


async def test_a_death_is_told_with_its_reason_and_what_to_do(page: Window) -> None:
    page.lab.write("bomb.ipynb", "x = bytearray(2 << 30)", kernel=TIGHT)
    await page.visit("bomb.ipynb")
    await page.ready("Tight limits")
    await page.run(0)
    told = page.page.locator(".Toastify__toast", has_text="“bomb.ipynb” died")
    await expect(told).to_contain_text("out of memory")
    await expect(told).to_contain_text("Hold less at once, or start one with more.")
    await picture(page, "out-of-memory", told)
    await picture(page, "chip-failed", page.notebook.locator(".jp-KernelName"), chip(page), margin=3)
    assert page.errors() == []


async def test_an_idle_sandbox_that_ends_soon_is_told_and_kept(page: Window) -> None:
    await page.visit()
    made = await page.lab.ask(
        "POST", "sandboxes", {"profile": KERNEL, "name": "idle.ipynb", "resources": {"idle": {"expire": 20}}}
    )
    warning = page.page.locator(".Toastify__toast", has_text="“idle.ipynb” is not used")
    await expect(warning).to_contain_text("is lost at")
    await picture(page, "idle", warning)
    await warning.get_by_role("button", name="Keep").click()
    await expect(warning).to_have_count(0)
    await asyncio.sleep(12)  # it would have ended
    assert (await page.lab.ask("GET", f"sandboxes/{made['id']}"))["state"] == "running"
    assert page.errors() == []
