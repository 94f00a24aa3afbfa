"""The chip beside the kernel's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Window
from conftest import KERNEL
from lab_page import chip, choose, dark
from playwright.async_api import expect

pytestmark = pytest.mark.timeout(300)


async def test_a_notebook_is_suspended_by_its_chip_and_running_a_cell_resumes_it(page: Window, tmp_path: Path) -> None:
    page.lab.write("day.ipynb", "x = 41", "x + 1", kernel=KERNEL)
    await page.visit("day.ipynb")
    await page.ready()
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await expect(chip(page)).to_contain_text("Running")
    await expect(chip(page)).to_contain_text("MiB of")
    await page.run(0)
    await page.done(0, 1)
    await page.picture(tmp_path / "running.png")
    await chip(page).click()
    await page.picture(tmp_path / "menu.png")
    await page.page.keyboard.press("Escape")
    await choose(page, "Suspend…")
    await expect(page.page.locator(".jp-Dialog")).to_contain_text("must not change meanwhile")
    await page.picture(tmp_path / "asked.png")
    await page.accept()
    await expect(chip(page)).to_have_attribute("data-look", "suspended")
    await page.picture(tmp_path / "suspended.png")
    await dark(page)
    await page.picture(tmp_path / "suspended-dark.png")
    await page.run(1)
    await page.done(1, 2)
    await page.printed(1, "42")
    await expect(chip(page)).to_contain_text("resumed in")
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await page.picture(tmp_path / "resumed-dark.png")
    assert page.errors() == []
