"""Two users of one gateway, each with a JupyterLab of his own; and one whose token is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from acceptance import Product
from browser import Lab, Window, window
from lab_page import chip, choose, entry, picker, running
from lab_server import KERNEL, make_lab
from people import gateway_for_users, revoke, token
from playwright.async_api import expect
from served import Served

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def gateway(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with gateway_for_users(product, tmp_path_factory.mktemp("gateway") / "gateway.log") as served:
        yield served


@pytest.fixture(scope="module")
def labs(
    browser_path: str, product: Product, gateway: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Lab]]:
    """The users' JupyterLabs, by name. Bob may have two sandboxes that are not suspended."""
    started: dict[str, Lab] = {}
    try:
        for name, options in (("ann", ()), ("bob", ("--quota", "live=2"))):
            secret = token(product, name, *options)
            lab = make_lab(
                tmp_path_factory.mktemp(name),
                f"--gateway-url={gateway.url}",
                environment={"JUPYTER_GATEWAY_AUTH_TOKEN": secret},
            )
            started[name] = lab
            asyncio.run(lab.start())
        yield started
    finally:
        # In order, a JupyterLab first ends its kernels, and tries long where the gateway does not let it any more.
        for lab in started.values():
            lab.kill()


@pytest.fixture
async def ended(labs: dict[str, Lab], gateway: Served) -> AsyncIterator[None]:
    yield
    await gateway.clear()


async def opened(page: Window, name: str) -> None:
    """A notebook of a user's, with its kernel, and the panel beside it."""
    page.lab.write(name, "x = 1", kernel=KERNEL)
    await page.visit(name)
    await page.ready()
    await running(page)
    await expect(entry(page, name)).to_contain_text("Running")


async def test_neither_of_two_users_sees_what_the_other_has(
    labs: dict[str, Lab], gateway: Served, browser_path: str, tmp_path: Path, ended: None
) -> None:
    made = await labs["ann"].ask("POST", "sandboxes", {"profile": KERNEL, "name": "ann-alone"})
    await labs["ann"].ask("POST", f"sandboxes/{made['id']}/snapshots?wait=60", {"name": "ann-saved"})
    async with (
        window(labs["ann"], browser_path, tmp_path, "ann") as ann,
        window(labs["bob"], browser_path, tmp_path, "bob") as bob,
    ):
        await bob.page.set_viewport_size({"width": 2400, "height": 900})  # two notebooks side by side
        await opened(ann, "ann.ipynb")
        await opened(bob, "bob.ipynb")
        await expect(ann.page.locator(".sg-RunningItem")).to_have_count(2)
        await expect(ann.page.locator(".sg-SnapshotItem")).to_contain_text("ann-saved")
        await expect(bob.page.locator(".sg-RunningItem")).to_have_count(1)
        await expect(bob.page.locator(".sg-SnapshotItem")).to_have_count(0)
        for page, shown in ((ann, 1), (bob, 0)):
            offered = await picker(page)
            await expect(offered).to_contain_text("New sandbox")
            await expect(offered.get_by_text("ann-alone", exact=True)).to_have_count(shown)
            await expect(offered.get_by_text("ann-saved", exact=True)).to_have_count(shown)
            await expect(offered.locator("input:checked")).to_be_focused()
            await page.page.keyboard.press("Escape")
        await choose(bob, "Fork This Notebook")
        await expect(bob.page.locator(".lm-TabBar-tab", has_text="bob-fork1.ipynb")).to_be_visible()
        await expect(ann.page.locator(".sg-RunningItem")).to_have_count(2)  # not told of it either
        # What is refused is told with the reason, and changes nothing.
        await bob.page.locator(".jp-NotebookPanel .sg-Chip").first.click()
        await bob.page.locator(".sg-Menu .lm-Menu-itemLabel", has_text="Fork This Notebook").click()
        refused = bob.page.locator(".jp-Dialog", has_text="The notebook could not be forked")
        await expect(refused).to_contain_text("2 live sandboxes")
        await refused.get_by_role("button", name="Close").click()
        await bob.page.locator(".jp-NotebookPanel .cm-content").first.click()
        await bob.page.keyboard.press("Control+Enter")
        await expect(bob.page.locator(".jp-NotebookPanel .jp-InputPrompt").first).to_have_text("[1]:")
        assert not (labs["bob"].folder / "bob-fork2.ipynb").exists()
        for snapshot in (await labs["ann"].ask("GET", "snapshots"))["snapshots"]:
            await labs["ann"].ask("DELETE", f"snapshots/{snapshot['id']}")
        assert ann.errors() == []
        assert bob.errors("status of 403") == []


async def test_a_user_whose_token_was_taken_back_is_told_and_the_page_works_on(
    labs: dict[str, Lab], gateway: Served, product: Product, browser_path: str, tmp_path: Path, ended: None
) -> None:
    async with window(labs["ann"], browser_path, tmp_path, "revoked") as page:
        await page.shrug()
        await opened(page, "last.ipynb")
        revoke(product, "ann")
        await expect(chip(page)).to_have_attribute("data-look", "unknown")
        await expect(chip(page)).to_contain_text("No access")
        assert "does not accept this server" in str(await chip(page).get_attribute("aria-label"))
        await page.edit(0, "x = 'written without a gateway'")
        await page.save()
        async with asyncio.timeout(60):
            while "without a gateway" not in (labs["ann"].folder / "last.ipynb").read_text():
                await asyncio.sleep(0.1)
        assert (
            page.errors("status of (401|403|404|500|502|503)", "net::ERR_", "disposed", "Failed to fetch", "WebSocket")
            == []
        )
