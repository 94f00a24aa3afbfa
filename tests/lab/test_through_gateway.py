"""What is tried with sandboxes of JupyterLab's own server, once more with those of a gateway (``--gateway-url``)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_active_output
import test_panel
from acceptance import Product
from browser import CUT_OFF, Lab, Window, window
from lab_page import chip, choose, picker
from lab_server import KERNEL, make_lab
from playwright.async_api import expect
from served import Served
from test_chip import (
    test_a_notebook_is_suspended_by_its_chip_and_running_a_cell_resumes_it,
    test_the_chip_is_worked_with_keys_alone_and_shows_details_and_the_log,
)
from test_notebook7 import STOCK, visit
from test_panel import (
    test_a_death_is_told_with_its_reason_and_what_to_do,
    test_a_fork_of_a_notebook_goes_its_own_way_and_stands_under_its_parent,
    test_a_snapshot_is_saved_listed_and_started_from,
    test_an_idle_sandbox_that_ends_soon_is_told_and_kept,
)
from test_picker import chosen_with_less_memory, offer
from test_rejoin import (
    test_a_cell_that_is_suspended_in_the_middle_is_complete_after_a_reload_and_a_resume,
    test_a_display_that_is_changed_an_error_and_a_second_run_are_shown_as_without_a_reload,
)

__all__ = [
    "test_a_cell_that_is_suspended_in_the_middle_is_complete_after_a_reload_and_a_resume",
    "test_a_death_is_told_with_its_reason_and_what_to_do",
    "test_a_display_that_is_changed_an_error_and_a_second_run_are_shown_as_without_a_reload",
    "test_a_fork_of_a_notebook_goes_its_own_way_and_stands_under_its_parent",
    "test_a_notebook_is_suspended_by_its_chip_and_running_a_cell_resumes_it",
    "test_a_snapshot_is_saved_listed_and_started_from",
    "test_an_idle_sandbox_that_ends_soon_is_told_and_kept",
    "test_the_chip_is_worked_with_keys_alone_and_shows_details_and_the_log",
]
pytestmark = pytest.mark.timeout(300)
TIGHT = "tight"
"""The profile, which is the kernel's name on a gateway."""


@pytest.fixture(scope="module")
def lab(remote_lab: Lab) -> Lab:
    """The JupyterLab of all tests here has its kernels on a gateway."""
    return remote_lab


@pytest.fixture(autouse=True)
def as_on_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have their profiles' names, and the manual's pictures are of the other run."""
    monkeypatch.setattr(test_panel, "TIGHT", TIGHT)
    monkeypatch.delenv("SANDBOX_TEST_PICTURES", raising=False)


async def test_a_profile_is_chosen_with_less_memory_and_the_limit_holds(page: Window) -> None:
    page.lab.write("pick.ipynb", "print(1)", "x = bytearray(400 << 20)", kernel=KERNEL)
    await page.visit("pick.ipynb")
    await page.ready()
    await picker(page)
    tight = offer(page, "Tight limits")
    await expect(tight).to_contain_text("512 MiB")
    await chosen_with_less_memory(page, tight)


async def test_output_reaches_neither_the_token_nor_the_terminals_until_it_is_allowed(page: Window) -> None:
    attack = test_active_output
    page.lab.write("hostile.ipynb", attack.ATTACK, attack.OUTPUTS, attack.WIDGET, kernel=KERNEL)
    await page.visit("hostile.ipynb")
    await page.ready()
    for number in range(3):
        await page.run(number)
        await page.done(number, number + 1)
    await expect(attack.bar(page)).to_contain_text("Scripts in the output are held back")
    await expect(page.output(1).locator("b", has_text="bold")).to_be_visible()
    assert (await attack.pwned(page), await attack.terminals(page)) == ([], 0)
    await attack.bar(page).get_by_role("button", name="Allow active output for this notebook").click()
    await attack.all_ran(page, *attack.EVERY, "widget")
    assert page.errors("status of 404 .*/x") == []


async def test_after_the_gateway_was_killed_and_came_back_the_notebook_goes_on_with_its_kernel(
    page: Window, gateway: Served
) -> None:
    page.lab.write("killed.ipynb", "x = 'still there'", "print(x)", kernel=KERNEL)
    await page.shrug()
    await page.visit("killed.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await expect(chip(page)).to_have_attribute("data-look", "running")
    gateway.kill()
    await expect(chip(page)).to_have_attribute("data-look", "unknown")
    assert "does not answer" in str(await chip(page).get_attribute("aria-label"))
    await gateway.start()
    await expect(chip(page)).to_have_attribute("data-look", "running")
    await page.ready()
    await page.run(1)
    await page.printed(1, "still there")
    assert page.errors(*CUT_OFF, "status of (50[23]|599)") == []


@pytest.fixture(scope="module")
def notebook(
    browser_path: str, product: Product, gateway: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """A Notebook 7 whose kernels are on the gateway."""
    started = make_lab(
        tmp_path_factory.mktemp("notebook"),
        f"--gateway-url={gateway.url}",
        environment={"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token},
        application="notebook",
    )
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


async def test_a_notebook_is_suspended_and_resumed_in_notebook_7(
    notebook: Lab, browser_path: str, tmp_path: Path, gateway: Served
) -> None:
    notebook.write("seven.ipynb", "x = 6", "print(x * 7)", kernel=KERNEL)
    async with window(notebook, browser_path, tmp_path, "notebook7") as page:
        await visit(page, "notebooks/seven.ipynb")
        await expect(chip(page)).to_have_attribute("data-look", "running")
        await page.run(0)
        await page.done(0, 1)
        await choose(page, "Suspend…")
        await page.accept()
        await expect(chip(page)).to_have_attribute("data-look", "suspended")
        await page.run(1)
        await page.printed(1, "42")
        assert page.errors(*STOCK) == []
    await notebook.end_kernels()
    await gateway.clear()
