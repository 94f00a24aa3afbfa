"""What the tests of the front end look for in the page."""

from __future__ import annotations

from browser import Window
from playwright.async_api import Locator, expect


def chip(page: Window) -> Locator:
    """The chip of the notebook in front."""
    return page.notebook.locator(".sg-Chip")


async def choose(page: Window, item: str) -> None:
    """Open the chip's menu and choose from it."""
    await chip(page).click()
    await page.page.locator(".sg-Menu .lm-Menu-itemLabel", has_text=item).click()


async def dark(page: Window) -> None:
    """Change to the dark theme."""
    await page.page.locator(".lm-MenuBar-itemLabel", has_text="Settings").click()
    await page.page.locator(".lm-Menu-itemLabel", has_text="Theme").first.hover()
    await page.page.locator(".lm-Menu-itemLabel", has_text="JupyterLab Dark").first.click()
    await expect(page.page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    await expect(page.page.locator("#jupyterlab-splash")).to_have_count(0)


async def running(page: Window) -> None:
    """Open the panel "Running"."""
    await page.page.locator(".jp-SideBar .lm-TabBar-tab[data-id='jp-running-sessions']").click()
    await expect(page.page.locator("#jp-running-sessions")).to_be_visible()


def entry(page: Window, name: str) -> Locator:
    """A sandbox in that panel, with those below it."""
    found = page.page.locator(".sg-Entry-name", has_text=name).first
    return page.page.locator(".sg-RunningItem", has=found).first
