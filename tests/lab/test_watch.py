"""What sandboxes use against what they may, and what is done with many of them at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import Product, profile_kernelspec
from browser import Lab, Window
from lab_page import alone, chip, choose, dark, entry, picture, running, section
from lab_server import KERNEL, TIGHT, make_lab
from playwright.async_api import Route, expect

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab whose user has a quota."""
    with profile_kernelspec(product, "tight"):
        quota = "--SandboxGateway.quota={'live': 8, 'disk': '2GiB'}"
        started = make_lab(tmp_path_factory.mktemp("watch"), quota)
        try:
            asyncio.run(started.start())
            yield started
        finally:
            started.stop()


async def test_what_a_sandbox_uses_is_shown_against_its_limits_with_a_small_history(
    page: Window, tmp_path: Path
) -> None:
    code = "open('/home/jovyan/x', 'wb').write(b'x' * (5 << 20))\nimport time\nend = time.time() + 25"
    page.lab.write("use.ipynb", code, "while time.time() < end: pass", kernel=TIGHT)
    await page.visit("use.ipynb")
    await page.ready("Tight limits")
    await page.run(0)
    await page.done(0, 1)
    await page.run(1)
    card = page.page.locator(".sg-Card")
    await chip(page).hover()
    for kind, text in (("memory", " of 512 MiB"), ("disk", " MiB of 128 MiB"), ("cpu", " of 1 cores")):
        await expect(card.locator(f"tr[data-kind={kind}] td").first).to_contain_text(text)
        await expect(card.locator(f"tr[data-kind={kind}] .sg-Meter")).to_be_visible()
    await expect(card.locator("tr[data-kind=disk] td").first).to_contain_text("5")
    await expect(card.locator("tr[data-kind=memory] .sg-Sparkline")).to_be_visible()
    await expect(card.locator("tr[data-kind=gpu]")).to_have_count(0)
    await page.picture(tmp_path / "card.png")
    await picture(page, "usage", page.notebook.locator(".jp-KernelName"), chip(page), card, margin=3)
    await page.page.mouse.move(5, 400)
    await expect(card).to_have_count(0)
    # By keys: it comes with the focus, and goes with Escape.
    await page.page.keyboard.press("Escape")  # out of the cell
    await chip(page).focus()
    await expect(card).to_be_visible()
    await page.page.keyboard.press("Escape")
    await expect(card).to_have_count(0)
    await choose(page, "Details")
    details = page.page.locator(".jp-Dialog .sg-Details")
    await expect(details.locator("[data-kind=cpu]")).to_contain_text(" of 1 cores")
    await expect(details.locator("[data-kind=cpu] .sg-Sparkline")).to_be_visible()  # it goes on while one looks
    await page.picture(tmp_path / "details.png")
    await page.accept()
    await page.page.set_viewport_size({"width": 480, "height": 700})
    await expect(chip(page).locator(".sg-Chip-detail")).to_be_hidden()
    await page.picture(tmp_path / "narrow.png")
    assert page.errors() == []


async def test_many_are_suspended_resumed_and_ended_at_once_and_stand_against_the_quota(
    page: Window, tmp_path: Path
) -> None:
    names = [f"{name}.ipynb" for name in ("one", "two", "three")]
    made = [await page.lab.ask("POST", "sandboxes", {"profile": KERNEL, "name": name}) for name in names]
    await page.visit()
    await running(page)
    await alone(page, "Sandboxes")
    head = page.page.locator(".sg-Head")
    await expect(head).to_contain_text("3 of 8 live")
    await expect(head).to_contain_text("of 2 GiB saved")
    await expect(entry(page, "one.ipynb")).to_contain_text("no notebook")
    await expect(entry(page, "one.ipynb")).to_contain_text("disk ")
    # JupyterLab's own search through what runs finds them.
    await page.page.keyboard.press("Control+Alt+A")
    search = page.page.locator(".jp-Dialog .jp-SearchableSessions")
    await expect(search.locator(".sg-Entry-name", has_text="two.ipynb")).to_be_visible()
    await expect(search.locator(".sg-Entry-choice").first).to_be_hidden()  # there is nothing to do with many there
    await search.get_by_role("searchbox").press("Escape")
    await expect(search).to_have_count(0)

    # By keys, then with Shift and the mouse.
    await page.page.get_by_role("checkbox", name="Choose “one.ipynb”").focus()
    await page.page.keyboard.press("Space")
    await expect(head.get_by_role("toolbar", name="Chosen sandboxes")).to_contain_text("1 chosen")
    await page.page.locator(".sg-Entry-name", has_text="three.ipynb").click(modifiers=["Shift"])
    await expect(head).to_contain_text("3 chosen")
    await page.picture(tmp_path / "chosen.png")
    await picture(page, "panel-chosen", section(page, "Sandboxes"), page.page.locator(".sg-RunningItem").last)
    await head.get_by_role("button", name="Save Snapshots").click()
    await expect(head.get_by_role("toolbar")).to_have_count(0)
    saved = {snapshot["name"].partition("-")[0] for snapshot in (await page.lab.ask("GET", "snapshots"))["snapshots"]}
    assert saved == {"one", "two", "three"}
    for name in names:
        await page.page.locator(".sg-Entry-name", has_text=name).click(modifiers=["Control"])
    await head.get_by_role("button", name="Pause", exact=True).click()
    await expect(page.page.locator(".sg-RunningItem", has_text="Paused")).to_have_count(3)
    await expect(head.get_by_role("toolbar")).to_have_count(0)
    for name in names:
        await page.page.locator(".sg-Entry-name", has_text=name).click(modifiers=["Control"])
    await head.get_by_role("button", name="Suspend", exact=True).press("Enter")
    dialog = page.page.locator(".jp-Dialog")
    await expect(dialog).to_contain_text("Suspend 3 sandboxes?")
    await expect(dialog).to_contain_text("one.ipynb, two.ipynb, three.ipynb")
    await page.picture(tmp_path / "asked.png")
    await page.accept()
    await expect(head).to_contain_text("0 of 8 live")
    await expect(head).to_contain_text("3 suspended")
    await expect(head.get_by_role("toolbar")).to_have_count(0)  # nothing failed, and nothing is chosen any more
    await expect(entry(page, "two.ipynb")).to_contain_text("MiB")
    await page.picture(tmp_path / "suspended.png")

    # One of two is refused: the other goes on, and one message says why.
    async def refuse(route: Route) -> None:
        body = {"code": "over_quota", "message": "no room for it", "hint": "Free some.", "detail": "", "status": 403}
        await route.fulfill(status=403, content_type="application/problem+json", body=json.dumps(body))

    await page.page.route(f"**/api/sandboxes/{made[0]['id']}/resume*", refuse)
    for name in names[:2]:
        await page.page.locator(".sg-Entry-name", has_text=name).click(modifiers=["Control"])
    await expect(head).to_contain_text("2 chosen")
    await head.get_by_role("button", name="Resume").click()
    await expect(dialog).to_contain_text("1 of 2 failed.")
    await expect(dialog).to_contain_text("one.ipynb: no room for it")
    await page.picture(tmp_path / "failed.png")
    await dialog.get_by_role("button", name="Close").click()
    await expect(entry(page, "two.ipynb")).to_contain_text("Running")
    await expect(head).to_contain_text("1 chosen")

    await head.get_by_role("checkbox", name="Choose all sandboxes").click()
    await expect(head).to_contain_text("3 chosen")
    await dark(page)
    await page.picture(tmp_path / "chosen-dark.png")
    await head.get_by_role("button", name="End", exact=True).click()
    await expect(dialog).to_contain_text("End 3 sandboxes?")
    await page.accept()
    await expect(page.page.locator(".sg-RunningItem")).to_have_count(0)
    assert (await page.lab.ask("GET", "sandboxes?state=all"))["sandboxes"] == []
    assert page.errors("status of 403") == []
