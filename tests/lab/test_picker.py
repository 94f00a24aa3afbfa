"""The kernel picker."""

from __future__ import annotations

import pytest
from browser import Window
from lab_page import chip, picker, picture
from lab_server import KERNEL, TIGHT
from playwright.async_api import Locator, expect

pytestmark = pytest.mark.timeout(300)


def offer(page: Window, text: str) -> Locator:
    """One of the picker's offers."""
    return page.page.locator(".sg-Offer", has=page.page.get_by_text(text, exact=True))


async def chosen_with_less_memory(page: Window, profile: Locator) -> None:
    """Take the profile "Tight limits" with 300 MiB in the open picker, and find that the limit holds."""
    await profile.locator("input[type=radio]").click()
    await profile.locator("[data-field=memory]").fill("300")
    await picture(page, "picker-limits", page.page.locator(".jp-Dialog-content"))
    await page.accept()
    await page.ready("Tight limits")
    await expect(chip(page)).to_contain_text("of 300 MiB")
    await page.run(0)
    await page.printed(0, "1")
    await page.run(1)
    await expect(page.page.locator(".Toastify__toast", has_text="died")).to_contain_text("out of memory at 300 MiB")
    assert page.errors() == []


async def test_a_profile_is_chosen_with_less_memory_and_the_limit_holds(page: Window) -> None:
    page.lab.write("pick.ipynb", "print(1)", "x = bytearray(400 << 20)", kernel="python3")
    await page.visit("pick.ipynb")
    await page.ready("Python 3 (ipykernel)")
    await picker(page)
    tight = offer(page, "Tight limits")
    await expect(tight).to_contain_text("image host · 512 MiB · 1 core · 128 MiB of files · no network")
    await expect(offer(page, "Python 3 (ipykernel)")).to_contain_text("Runs on the server itself")
    await chosen_with_less_memory(page, tight)


async def test_a_suspended_sandbox_of_no_notebook_is_gone_on_with(page: Window) -> None:
    made = await page.lab.ask("POST", "sandboxes", {"profile": "python3-gvisor", "name": "yesterday.ipynb"})
    await page.lab.ask("POST", f"sandboxes/{made['id']}/execute", {"code": "x = 'of yesterday'"})
    await page.lab.ask("POST", f"sandboxes/{made['id']}/suspend?wait=60", {})
    page.lab.write("today.ipynb", "print(x)", kernel=TIGHT)
    await page.visit("today.ipynb")
    await page.ready("Tight limits")
    await picker(page)
    asleep = offer(page, "yesterday.ipynb")
    await expect(asleep).to_contain_text("Suspended")
    await picture(page, "picker", page.page.locator(".jp-Dialog-content"))
    await asleep.locator("input[type=radio]").click()
    await page.accept()
    await expect(chip(page)).to_have_attribute("data-look", "suspended")
    await page.run(0)
    await page.printed(0, "of yesterday")
    await page.ready()
    assert page.errors() == []


async def test_the_picker_is_worked_with_keys_alone(page: Window) -> None:
    page.lab.write("keys.ipynb", "1", kernel=KERNEL)
    await page.visit("keys.ipynb")
    await page.ready()
    await picker(page)
    await expect(offer(page, "Python 3 (gVisor)").locator("input[type=radio]")).to_be_focused()
    for _ in range(10):
        if await offer(page, "Tight limits").get_attribute("data-chosen") == "true":
            break
        await page.page.keyboard.press("ArrowDown")
    await page.page.keyboard.press("Enter")
    await page.ready("Tight limits")
    assert page.errors() == []
