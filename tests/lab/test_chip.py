"""The chip beside the kernel's name."""

from __future__ import annotations

import pytest
from browser import Window
from lab_page import chip, choose, dark, picture
from lab_server import KERNEL
from playwright.async_api import expect

pytestmark = pytest.mark.timeout(300)


async def test_a_notebook_is_suspended_by_its_chip_and_running_a_cell_resumes_it(page: Window) -> None:
    page.lab.write("day.ipynb", "x = 41", "x + 1", kernel=KERNEL)
    await page.visit("day.ipynb")
    await page.ready()
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await expect(chip(page)).to_contain_text("Running")
    await expect(chip(page)).to_contain_text("MiB of")
    await page.run(0)
    await page.done(0, 1)
    around = page.notebook.locator(".jp-KernelName"), chip(page)
    await picture(page, "chip-running", *around, margin=3)
    await chip(page).click()
    await picture(page, "chip-menu", *around, page.page.locator(".sg-Menu"))
    await page.page.keyboard.press("Escape")
    await choose(page, "Suspend…")
    await expect(page.page.locator(".jp-Dialog")).to_contain_text("must not change meanwhile")
    await picture(page, "suspend", page.page.locator(".jp-Dialog-content"))
    await page.accept()
    await expect(chip(page)).to_have_attribute("data-look", "suspended")
    await picture(page, "chip-suspended", *around, margin=3)
    await dark(page)
    await page.run(1)
    await expect(chip(page)).to_contain_text("resumed in")  # for five seconds
    await picture(page, "chip-resumed", *around, margin=3)
    await page.done(1, 2)
    await page.printed(1, "42")
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await picture(page, "notebook", page.notebook.locator(".jp-NotebookPanel-toolbar"), page.cell(1), margin=0)
    assert page.errors() == []


async def test_the_chip_is_worked_with_keys_alone_and_shows_details_and_the_log(page: Window) -> None:
    page.lab.write("keys.ipynb", "import os\n_ = os.write(1, b'<b>past Jupyter</b>\\n')", kernel=KERNEL)
    await page.visit("keys.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    keyboard = page.page.keyboard
    await chip(page).focus()
    await keyboard.press("ArrowDown")
    menu = page.page.locator(".sg-Menu")
    await expect(menu.locator(".lm-mod-active .lm-Menu-itemLabel")).to_have_text("Pause")
    await keyboard.press("Escape")
    await expect(menu).to_have_count(0)
    await expect(chip(page)).to_be_focused()
    await keyboard.press("Enter")
    await keyboard.press("Enter")
    await expect(chip(page)).to_have_attribute("data-look", "paused")
    await picture(page, "chip-paused", page.notebook.locator(".jp-KernelName"), chip(page), margin=3)
    await choose(page, "Resume")
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await choose(page, "Details")
    dialog = page.page.locator(".jp-Dialog")
    for text in ("gvisor", "What happened", "paused", "resumed"):
        await expect(dialog).to_contain_text(text)
    await picture(page, "details", page.page.locator(".jp-Dialog-content"))
    await page.accept()
    await choose(page, "Show Log")
    await expect(dialog.locator("pre")).to_contain_text("<b>past Jupyter</b>")  # as text: it comes from inside
    await picture(page, "log", page.page.locator(".jp-Dialog-content"))
    await page.accept()
    assert page.errors() == []


async def test_the_commands_are_in_the_menu_and_the_palette(page: Window) -> None:
    page.lab.write("menu.ipynb", "1", kernel=KERNEL)
    await page.visit("menu.ipynb")
    await page.ready()
    await page.page.locator(".lm-MenuBar-itemLabel", has_text="Kernel").click()
    await expect(page.page.locator(".lm-Menu-itemLabel", has_text="Suspend Sandbox…")).to_be_visible()
    await page.page.keyboard.press("Escape")
    await page.page.keyboard.press("Control+Shift+C")
    await page.page.keyboard.insert_text("pause sandbox")
    await page.page.keyboard.press("Enter")
    await expect(chip(page)).to_have_attribute("data-look", "paused")
    assert page.errors() == []
