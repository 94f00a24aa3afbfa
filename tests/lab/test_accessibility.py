"""What axe-core finds of names, roles, states and contrast in our parts of the page, in both themes."""

from __future__ import annotations

from pathlib import Path

import axe_playwright_python
import pytest
from browser import Window
from lab_page import alone, chip, choose, entry, picker, picture, running, section, theme
from lab_server import KERNEL, ROOT
from playwright.async_api import expect

OWN = ROOT / "labextension" / "node_modules" / "axe-core" / "axe.min.js"
AXE = OWN if OWN.is_file() else Path(axe_playwright_python.__file__).with_name("axe.min.js")
pytestmark = pytest.mark.timeout(300)
STOCK = ("scrollable-region-focusable", "aria-required-children", "presentation-role-conflict")
"""Rules about what JupyterLab puts around our parts: dialogs that scroll, and the separators of Lumino's menus."""


async def found(page: Window, *parts: str) -> list[str]:
    """What is wrong with ``parts`` (selectors) in the light and in the dark theme."""
    problems = []
    for kind in ("Dark", "Light"):
        await theme(page, kind)
        report = await page.page.evaluate(
            """async ([parts, stock]) => {
                const rules = Object.fromEntries(stock.map(rule => [rule, { enabled: false }]));
                const { violations } = await axe.run({ include: parts.map(part => [part]) }, { rules });
                return violations.flatMap(({ id, nodes }) =>
                  nodes.map(node => `${id}: ${node.html.slice(0, 200)} ${node.failureSummary}`));
            }""",
            [parts, STOCK],
        )
        problems += [f"{kind}: {text}" for text in report]
    return problems


async def test_nothing_is_wrong_with_names_roles_and_contrast(page: Window, tmp_path: Path) -> None:
    page.lab.write("report.ipynb", "x = 1", kernel=KERNEL)
    tight = await page.lab.ask("POST", "sandboxes", {"profile": "tight", "name": "yesterday.ipynb"})
    await page.lab.ask("POST", f"sandboxes/{tight['id']}/snapshots?wait=60", {"name": "prepared"})
    await page.lab.ask("POST", f"sandboxes/{tight['id']}/suspend?wait=60", {})
    await page.visit("report.ipynb")
    await page.ready()
    await page.page.add_script_tag(path=AXE)
    await page.run(0)
    await page.done(0, 1)
    await running(page)
    await expect(entry(page, "report.ipynb")).to_contain_text("Running")
    await expect(page.page.locator(".sg-SnapshotItem", has_text="prepared")).to_have_count(1)
    await alone(page, "Sandbox Snapshots")
    await picture(page, "panel-snapshots", section(page, "Sandbox Snapshots"), page.page.locator(".sg-SnapshotItem"))
    problems = await found(page, ".sg-SnapshotItem")
    await alone(page, "Sandboxes")
    await picture(page, "panel", section(page, "Sandboxes"), page.page.locator(".sg-RunningItem").last)
    problems += await found(page, ".sg-ChipHolder", ".sg-RunningItem")
    await chip(page).click()
    problems += await found(page, ".sg-Menu")
    await page.page.keyboard.press("Escape")
    for item in ("Suspend…", "Save Snapshot…", "Details", "Show Log"):
        await choose(page, item)
        await expect(page.page.locator(".jp-Dialog-content")).to_be_visible()
        problems += await found(page, ".jp-Dialog-content")
        await page.page.keyboard.press("Escape")
        await expect(page.page.locator(".jp-Dialog")).to_have_count(0)
    await expect(await picker(page)).to_contain_text("yesterday.ipynb")
    await expect(page.page.locator(".sg-Picker input:checked")).to_be_focused()
    problems += await found(page, ".jp-Dialog-content")
    await page.page.keyboard.press("Escape")
    assert not problems, "\n".join(problems)
    assert page.errors() == []
