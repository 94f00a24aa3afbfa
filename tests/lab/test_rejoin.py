"""A page that is loaded anew while a cell runs: the rest of its output comes into the cell."""

from __future__ import annotations

import asyncio
import re

import pytest
from browser import COUNT, PATIENCE, Window
from lab_page import chip, choose
from lab_server import KERNEL
from playwright.async_api import expect

pytestmark = pytest.mark.timeout(300)


async def interrupt(page: Window) -> None:
    """Interrupt the one kernel past the page."""
    (session,) = await page.lab.ask("GET", "sessions")
    await page.lab.ask("POST", f"kernels/{session['kernel']['id']}/interrupt")


def counted(number: int) -> str:
    return "".join(f"{n}\n" for n in range(number))


async def test_a_cell_that_is_suspended_in_the_middle_is_complete_after_a_reload_and_a_resume(page: Window) -> None:
    page.lab.write("long.ipynb", COUNT.format(800), "print(n)", "later = n", kernel=KERNEL)
    await page.visit("long.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("19")
    await page.run(1)  # waits for the first
    await choose(page, "Suspend…")
    await page.accept()
    await expect(chip(page)).to_have_attribute("data-look", "suspended")
    page.page.once("dialog", lambda asked: asked.accept())  # what is not saved is lost
    await page.reload()
    await expect(chip(page)).to_have_attribute("data-look", "suspended")
    await expect(page.output(0)).to_contain_text("19")  # it was not saved: the server kept it
    await expect(page.prompt(0)).to_have_text("[*]:")
    await page.run(2)
    await expect(chip(page)).to_contain_text("resumed in")
    await interrupt(page)
    await page.done(2, 3)
    await page.done(0, 1)
    await page.done(1, 2)
    assert await page.text(0) == counted(800)
    await page.printed(1, "799")
    assert await page.page.evaluate("Object.keys(localStorage).filter(key => key.includes(':runs:'))") == []
    await page.reload()  # nothing is left to be followed
    await page.ready()
    await expect(page.prompt(0)).to_have_text(re.compile(r"\[[ 1]\]:"))
    assert page.errors() == []


async def test_a_display_that_is_changed_an_error_and_a_second_run_are_shown_as_without_a_reload(page: Window) -> None:
    code = (
        "import time\nfrom IPython.display import clear_output, display, update_display\n"
        "print('was', 'gone'); clear_output()\n"
        "try:\n    display('was ' + 'first', display_id='one')\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    update_display('is ' + 'second', display_id='one')\n"
        "print('was', 'said')\n1 / 0"
    )
    page.lab.write("kinds.ipynb", code, kernel=KERNEL)
    await page.visit("kinds.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("was first")
    await page.save()
    async with asyncio.timeout(PATIENCE):
        while "'was first'" not in (page.lab.folder / "kinds.ipynb").read_text():
            await asyncio.sleep(0.05)
    await page.reload()
    await expect(page.prompt(0)).to_have_text("[*]:")
    await interrupt(page)
    await expect(page.output(0)).to_contain_text("ZeroDivisionError")
    await page.done(0, 1)
    for text, times in (("was first", 0), ("is second", 1), ("was said", 1), ("was gone", 0)):
        await expect(page.output(0).locator("pre", has_text=text)).to_have_count(times)
    await page.run(0, "print('anew')")
    await page.done(0, 2)
    await page.printed(0, "anew")
    assert page.errors() == []


async def test_the_copy_of_a_cell_that_runs_goes_on_in_the_fork_of_its_notebook(page: Window) -> None:
    await page.page.set_viewport_size({"width": 2200, "height": 900})  # two notebooks side by side
    page.lab.write("going.ipynb", COUNT.format(200), kernel=KERNEL)
    await page.visit("going.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("19")
    await choose(page, "Fork This Notebook")
    copy = page.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)", has=page.page.locator(".sg-Chip")).nth(1)
    for notebook in (copy, page.notebook.first):
        await expect(notebook.locator(".jp-Cell-outputArea").first).to_contain_text("199")
    assert page.errors() == []
