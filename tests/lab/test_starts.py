"""Starting: cards, what is remembered of a choice, more memory after a death, phases, and quotas."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from acceptance import Product
from browser import Lab, Window, window
from lab_page import chip, picker, picture
from lab_server import KERNEL, make_lab
from notebook_files import remember, until_saved
from playwright.async_api import Locator, WebSocketRoute, expect

pytestmark = pytest.mark.timeout(300)
NAME = "Python 3 (gVisor)"
MEMORY = "[data-field=memory]"


def toast(page: Window, text: str) -> Locator:
    """A notification."""
    return page.page.locator(".Toastify__toast", has_text=text)


def offer(page: Window, text: str) -> Locator:
    """One of the picker's offers."""
    return page.page.locator(".sg-Offer", has=page.page.get_by_text(text, exact=True))


async def test_a_profile_has_cards_with_its_logo_and_what_was_chosen_for_a_notebook_holds_when_it_is_opened_again(
    page: Window, tmp_path: Path
) -> None:
    await page.visit()
    for category in ("Notebook", "Console"):
        card = page.page.locator(f".jp-LauncherCard[data-category={category}]", has_text=NAME).first
        logo = card.locator("img.jp-Launcher-kernelIcon")
        await expect(logo).to_have_attribute("src", re.compile(rf"/kernelspecs/{KERNEL}/logo-"))
        assert await logo.evaluate("image => image.complete && image.naturalWidth > 0")
    await page.picture(tmp_path / "launcher.png")
    await picture(page, "launcher", page.page.locator(".jp-Launcher-section").first, margin=0)
    await page.page.locator(".jp-LauncherCard[data-category=Notebook]", has_text=NAME).first.click()
    await page.ready()
    shown = await picker(page)
    await expect(offer(page, NAME)).to_contain_text(re.compile("starts in .* s|starts from a template|its first start"))
    await shown.locator(MEMORY).fill("1")
    await expect(shown.locator(".sg-Wrong")).to_contain_text("At least")
    await page.page.keyboard.press("Enter")
    await expect(shown.locator(MEMORY)).to_be_focused()  # not accepted
    await page.picture(tmp_path / "wrong.png")
    await shown.locator(MEMORY).fill("700")
    await expect(shown.locator(".sg-Wrong")).to_have_count(0)
    await shown.locator("summary").click()
    await page.picture(tmp_path / "fields.png")
    suspend, end = (shown.locator(f"[data-field='idle.{tier}']") for tier in ("suspend", "expire"))
    await suspend.fill("10")
    await end.fill("5")
    await page.accept()
    await expect(shown.locator(".sg-Wrong")).to_contain_text("comes before")  # what only the server can know
    await expect(end).to_be_focused()
    await expect(shown.locator(MEMORY)).to_have_value("700")
    await page.picture(tmp_path / "refused.png")
    await suspend.fill("")
    await end.fill("")
    await page.accept()
    await expect(chip(page)).to_contain_text("of 700 MiB")
    await page.save()
    await page.page.locator(".jp-Dialog", has_text="Rename file").locator(".jp-mod-accept").click()
    name = "Untitled.ipynb"
    assert await until_saved(page.lab, name) == {"profile": KERNEL, "resources": {"memory": 700 << 20}}
    assert page.errors() == []
    await page.page.goto("about:blank")
    await page.lab.end_kernels()
    await page.visit(name)
    await page.ready()
    await expect(chip(page)).to_contain_text("of 700 MiB")
    assert len((await page.lab.ask("GET", "sandboxes"))["sandboxes"]) == 1
    await page.run(0, "6 * 7")
    await page.printed(0, "42")
    await expect((await picker(page)).locator(MEMORY)).to_have_value("700")
    await page.page.keyboard.press("Escape")
    assert page.errors() == []


async def test_a_profile_that_opens_the_notebooks_folder_does_so_with_other_resources_too(page: Window) -> None:
    (page.lab.folder / "sub").mkdir(exist_ok=True)
    wanted = {"profile": f"{KERNEL}-files", "path": "sub/a.ipynb", "resources": {"memory": 400 << 20}}
    made = await page.lab.ask("POST", "sandboxes", wanted)
    code = "open('made', 'w').close()"
    ended = await page.lab.ask("POST", f"sandboxes/{made['id']}/execute", {"code": code})
    assert ended["status"] == "ok" and (page.lab.folder / "sub" / "made").is_file()


async def test_a_notebook_that_asks_for_more_than_is_allowed_starts_as_its_profile_has_it_and_says_so(
    page: Window, tmp_path: Path
) -> None:
    page.lab.write("greedy.ipynb", "6 * 7", kernel=KERNEL)
    remember(page.lab, "greedy.ipynb", profile=KERNEL, resources={"memory": 1 << 50, "env": {"A": "b"}})
    await page.visit("greedy.ipynb")
    await expect(toast(page, "“greedy.ipynb” starts without what was chosen for it")).to_contain_text("memory")
    await page.ready()
    await page.picture(tmp_path / "greedy.png")
    await page.run(0)
    await page.printed(0, "42")
    await expect(page.page.locator(".jp-Dialog")).to_have_count(0)
    assert page.errors("status of 400") == []


async def test_after_a_death_for_want_of_memory_it_is_started_with_more(page: Window, tmp_path: Path) -> None:
    page.lab.write("more.ipynb", "x = bytearray(400 << 20)\nprint(len(x) >> 20)", kernel=KERNEL)
    remember(page.lab, "more.ipynb", profile=KERNEL, resources={"memory": 300 << 20})
    await page.visit("more.ipynb")
    await page.ready()
    await expect(chip(page)).to_contain_text("of 300 MiB")
    await page.run(0)
    told = toast(page, "“more.ipynb” died")
    await expect(told).to_contain_text("out of memory at 300 MiB")
    await page.picture(tmp_path / "died.png")
    await told.get_by_role("button", name="Start with 600 MiB…").click()
    shown = page.page.locator(".sg-Picker")
    await expect(shown.locator(MEMORY)).to_have_value("600")
    await page.picture(tmp_path / "more.png")
    await page.accept()
    await expect(chip(page)).to_contain_text("of 600 MiB")
    await page.run(0)
    await page.printed(0, "400")
    assert page.errors() == []


async def test_a_start_that_takes_a_while_is_told_by_its_phase_and_a_short_one_is_not(
    page: Window, tmp_path: Path
) -> None:
    sockets: list[WebSocketRoute] = []

    def through(socket: WebSocketRoute) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    await page.page.route_web_socket(re.compile("/api/events/subscribe"), through)
    await page.visit()
    async with asyncio.timeout(30):
        while not sockets:
            await asyncio.sleep(0.1)

    def tell(operation: str, phase: str, **more: Any) -> None:
        schema = "https://events.jupyter.org/sandbox_gateway/operation/v1"
        event = {"schema_id": schema, "operation": operation, "kind": "create", "phase": phase, "owner": "me", **more}
        sockets[-1].send(json.dumps(event))

    tell("short", "started", name="short.ipynb")
    tell("short", "progress", name="short.ipynb", text="restoring it from its template")
    tell("long", "started", name="/home/me/long.ipynb")
    tell("long", "progress", name="/home/me/long.ipynb", text="building environment", done=30 << 20, total=60 << 20)
    tell("short", "succeeded")
    told = toast(page, "Starting “long.ipynb”")
    await expect(told).to_contain_text("building environment · 50 %")
    await page.picture(tmp_path / "phase.png")
    tell("long", "progress", name="/home/me/long.ipynb", text="restoring it from its template")
    await expect(told).to_contain_text("restoring it from its template")
    await expect(toast(page, "short.ipynb")).to_have_count(0)
    tell("long", "succeeded")
    await expect(told).to_have_count(0)
    assert page.errors() == []


@pytest.fixture(scope="module")
def small_lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab whose user may have one live sandbox."""
    started = make_lab(tmp_path_factory.mktemp("small"), "--SandboxGateway.quota={'live': 1}")
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


@pytest.fixture
async def small_page(small_lab: Lab, browser_path: str, tmp_path: Path) -> AsyncIterator[Window]:
    async with window(small_lab, browser_path, tmp_path, "small") as opened:
        yield opened
    await small_lab.end_kernels()
    for sandbox in (await small_lab.ask("GET", "sandboxes?state=all"))["sandboxes"]:
        await small_lab.ask("DELETE", f"sandboxes/{sandbox['id']}?forget=true")


async def test_over_quota_is_told_with_what_to_free_and_a_button_that_does_it(
    small_page: Window, tmp_path: Path
) -> None:
    page = small_page
    await page.lab.ask("POST", "sandboxes", {"profile": KERNEL, "name": "one.ipynb"})
    page.lab.write("two.ipynb", "6 * 7", kernel=KERNEL)
    await page.visit("two.ipynb")
    dialog = page.page.locator(".jp-Dialog", has_text="Error Starting Kernel")
    await expect(dialog).to_contain_text("you have 1 live sandboxes of at most 1")
    await page.picture(tmp_path / "refused.png")
    await page.accept()
    await page.page.locator(".jp-Dialog", has_text="Select a kernel").locator(".jp-mod-reject").click()
    told = toast(page, "Over quota: you have 1 live sandboxes of at most 1")
    await expect(told).to_be_visible()
    await page.picture(tmp_path / "over.png")
    await picture(page, "over-quota", told)
    await told.get_by_role("button", name="Suspend “one.ipynb”").click()
    await page.page.locator(".jp-Dialog", has_text="Suspend “one.ipynb”?").locator(".jp-mod-accept").click()
    async with asyncio.timeout(30):
        while [one["state"] for one in (await page.lab.ask("GET", "sandboxes"))["sandboxes"]] != ["suspended"]:
            await asyncio.sleep(0.2)
    # ipywidgets' own extension takes for granted that a notebook has a session.
    assert page.errors("status of 403", r"uncaught(?s:.*)jupyterlab-manager") == []
