"""What the tests of the front end look for in the page."""

from __future__ import annotations

import asyncio
import io
import os
import re
from pathlib import Path

from browser import Window
from playwright.async_api import FloatRect, Locator, expect


def chip(page: Window) -> Locator:
    """The chip of the notebook in front."""
    return page.notebook.locator(".sg-Chip")


async def picker(page: Window) -> Locator:
    """Open the kernel picker by the kernel's name, once more where a chip that grew has moved that under the mouse."""
    shown = page.page.locator(".sg-Picker")
    for _ in range(3):
        await page.notebook.locator(".jp-KernelName").click()
        try:
            await expect(shown).to_be_visible(timeout=20_000)
            break
        except AssertionError:
            continue
    await expect(shown).to_be_visible()
    return shown


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


PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
"""The manual's screenshots, which `make pictures` makes anew."""
_MARGIN = 10
_MOST = 1500
"""Pixels of a picture's width."""


async def theme(page: Window, name: str) -> None:
    """Change the theme, whatever is open: ``Light`` or ``Dark``."""
    await page.page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", f"JupyterLab {name}"
    )
    await expect(page.page.locator("body")).to_have_attribute("data-jp-theme-light", str(name == "Light").lower())
    await expect(page.page.locator("#jupyterlab-splash")).to_have_count(0)


async def _boxes(shown: tuple[Locator, ...]) -> list[FloatRect]:
    await asyncio.sleep(0.3)
    boxes = [box for part in shown if (box := await part.first.bounding_box()) is not None]
    assert len(boxes) == len(shown), "not all of it is there"
    return boxes


def section(page: Window, name: str) -> Locator:
    """The title of a section of the panel "Running"."""
    label = page.page.locator(".lm-AccordionPanel-titleLabel", has_text=re.compile(f"^{name}$"))
    return page.page.locator("#jp-running-sessions .lm-AccordionPanel-title", has=label)


async def alone(page: Window, name: str) -> None:
    """Fold all of the panel "Running" but this section."""
    for title in await page.page.locator("#jp-running-sessions .lm-AccordionPanel-title").all():
        text = str(await title.locator(".lm-AccordionPanel-titleLabel").text_content())
        if (text == name) != ("lm-mod-expanded" in str(await title.get_attribute("class"))):
            await title.locator(".lm-AccordionPanel-titleCollapser").click()
    await page.page.mouse.move(700, 500)  # what it points at has buttons of JupyterLab's, which have no names


async def picture(page: Window, name: str, *shown: Locator, margin: int = _MARGIN, height: int | None = None) -> None:
    """The screenshots ``<name>.png`` and ``<name>-dark.png`` of what ``shown`` covers, for the manual; only where
    ``SANDBOX_TEST_PICTURES`` is set. ``height``: pixels of the page at most."""
    if not os.environ.get("SANDBOX_TEST_PICTURES"):
        return
    from PIL import Image  # matplotlib brings it

    PICTURES.mkdir(exist_ok=True)
    for kind, suffix in (("Light", ""), ("Dark", "-dark")):
        await theme(page, kind)
        boxes = await _boxes(shown)
        while boxes != (boxes := await _boxes(shown)):  # something slides in
            pass
        size = page.page.viewport_size
        assert size is not None
        left = max(0, min(box["x"] for box in boxes) - margin)
        top = max(0, min(box["y"] for box in boxes) - margin)
        right = min(size["width"], max(box["x"] + box["width"] for box in boxes) + margin)
        bottom = min(size["height"], max(box["y"] + box["height"] for box in boxes) + margin)
        if height is not None:
            bottom = min(bottom, top + height)
        shot = await page.page.screenshot(
            clip={"x": left, "y": top, "width": right - left, "height": bottom - top}, animations="disabled"
        )
        with Image.open(io.BytesIO(shot)) as taken:
            full = taken.convert("RGB")
            if full.width > _MOST:
                full = full.resize((_MOST, round(full.height * _MOST / full.width)))
            few = full.quantize(256, dither=Image.Dither.NONE)
            few.save(PICTURES / f"{name}{suffix}.png", optimize=True)
    await theme(page, "Light")
