"""What a sandbox's kernel sends cannot act in the page, with the page's login, until the user allows it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from browser import PATIENCE, Window
from lab_page import dark, picker, picture
from lab_server import KERNEL
from playwright.async_api import Locator, Request, TimeoutError, expect

pytestmark = pytest.mark.timeout(420)

ATTACK = """
from html import escape
from IPython.display import display

def attack(name):
    return (
        "(top.pwned=top.pwned||[]).push('" + name + "');"
        "fetch('/api/terminals',{method:'POST',headers:{Authorization:'token '+"
        "JSON.parse(top.document.getElementById('jupyter-config-data').textContent).token}})"
    )

def show(kind, data, **metadata):
    display({kind: data, "text/plain": "in words"}, raw=True, metadata=metadata)
"""
"""A script that takes the page's token and opens a terminal on the host with it."""

OUTPUTS = """
show("text/html", "<script>" + attack("script") + "</script><b id='kept'>bold</b>")
show("text/html", "<img src=x onerror=\\"" + escape(attack("onerror")) + "\\">")
begin = "<animate attributeName='x' dur='1s' onbegin=\\"" + escape(attack("svg")) + "\\"/>"
show("text/html", "<svg>" + begin + "<script>" + attack("svg-script") + "</script></svg>")
show("text/html", "<iframe srcdoc=\\"<script>parent.eval(`" + escape(attack("srcdoc")) + "`)</script>\\"></iframe>")
show("text/html", "<a class='go' href=\\"javascript:" + escape(attack("link")) + "\\">go on</a>")
show("text/html", "<form action='/logout'><button data-commandlinker-command='help:about'>About</button></form>")
show("text/html", "<div class='jp-Dialog' id='cover'>Sign in again</div>")
show("text/html", "<img src=x onerror=\\"" + escape(attack("isolated")) + "\\">", isolated=True)
show("text/markdown", "*slanted* <img src=x onerror=\\"" + escape(attack("markdown")) + "\\">")
show("application/javascript", attack("javascript"))
show("application/vnd.bokehjs_exec.v0+json", "")
show("text/latex", "$\\\\href{javascript:" + attack("latex") + "}{x}$")
drawn = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9' onload=\\"" + escape(attack("image")) + "\\"/>"
display({"image/svg+xml": drawn}, raw=True)
"""

WIDGET = """
import ipywidgets
ipywidgets.HTML("<img src=x onerror=\\"" + escape(attack("widget")) + "\\">widget text")
"""

READER = """
show("application/vnd.vega.v5+json", {
    "usermeta": {"embedOptions": {"actions": True, "sourceHeader": "<script>" + attack("header") + "</script>"}},
    "width": 50, "height": 50,
    "data": [{"name": "page", "url": "/lab", "format": {"type": "dsv", "delimiter": "~"}}],
    "marks": [{"type": "symbol", "encode": {"enter": {"x": {"value": 25}, "y": {"value": 25}}}}],
})
"""

BINDER = """
show("application/vnd.vega.v5+json", {
    "width": 50, "height": 50,
    "signals": [
        {"name": "typed", "value": "rm -rf", "bind": {"element": "#jp-main-statusbar", "event": "input"}},
        {"name": "made", "value": 1, "bind": {"input": "range", "element": ".jp-NotebookPanel-toolbar"}},
    ],
    "marks": [{"type": "symbol", "encode": {"enter": {"x": {"value": 25}, "y": {"value": 25}}}}],
})
"""
"""A chart that writes into elements of the page by their selectors."""

PASSIVE = """
import matplotlib.pyplot, pandas
%matplotlib inline
display(pandas.DataFrame({"a": [1, 2]}))
matplotlib.pyplot.plot([1, 2])
matplotlib.pyplot.show()
sides = {"x": {"field": "a", "type": "nominal"}, "y": {"field": "b", "type": "quantitative"}}
rows = [{"a": "A", "b": 28}, {"a": "B", "b": 55}]
show("application/vnd.vegalite.v5+json", {"mark": "bar", "encoding": sides, "data": {"values": rows}})
"""

HELP = """
async def hostile(*args, **options):
    page = {"text/html": "<img src=x onerror=\\"" + escape(attack("help")) + "\\">helpful"}
    return {"status": "ok", "found": True, "metadata": {}, "data": page | {"application/javascript": attack("help-js")}}

get_ipython().kernel.do_inspect = hostile
"""

EVERY = ("script", "onerror", "svg", "svg-script", "srcdoc", "markdown", "javascript")
"""What acts by itself where output may act; an SVG file and a formula do not even there."""


def bar(page: Window) -> Locator:
    """The bar above the notebook in front."""
    return page.notebook.locator(".sg-Bar")


async def pwned(page: Window) -> list[str]:
    """Which attacks ran in this load of the page."""
    return list(await page.page.evaluate("window.pwned || []"))


async def terminals(page: Window) -> int:
    """How many terminals there are on the host."""
    return len(await page.lab.ask("GET", "terminals"))


async def all_opened(page: Window) -> None:
    """Wait until each attack that ran in this load of the page has its terminal: it says first that it runs."""
    async with asyncio.timeout(PATIENCE):
        while await terminals(page) < len(await pwned(page)):
            await asyncio.sleep(0.1)


async def all_ran(page: Window, *names: str) -> None:
    """Wait for attacks to have run in this load of the page."""
    wanted = f"{json.dumps(names)}.filter(name => !(window.pwned || []).includes(name))"
    try:
        await page.page.wait_for_function(f"{wanted}.length === 0", timeout=PATIENCE * 1000)
    except TimeoutError:
        raise AssertionError(f"did not run: {await page.page.evaluate(wanted)}") from None


async def chosen(page: Window, command: str) -> None:
    """Run a command from the palette."""
    # By the menu: with the attacks' false dialog in the page, its keys do not open it.
    palette = page.page.locator("#modal-command-palette")
    async with asyncio.timeout(2 * PATIENCE):
        while True:
            try:
                if not await palette.locator("input").is_visible():
                    await page.menu("View", "Activate Command Palette")
                await palette.locator("input").fill(command, timeout=5000)
                return await palette.locator(".lm-CommandPalette-item", has_text=command).click(timeout=5000)
            except TimeoutError:
                continue  # it goes when something else takes the focus


async def test_output_of_a_sandbox_acts_only_where_the_user_allowed_it(page: Window, tmp_path: Path) -> None:
    page.lab.write("hostile.ipynb", ATTACK, OUTPUTS, WIDGET, HELP, "len", kernel=KERNEL)
    asked: list[str] = []

    def note(request: Request) -> None:
        if request.method == "POST" and "/api/terminals" in request.url:
            asked.append(request.url)

    page.page.on("request", note)
    await page.visit("hostile.ipynb")
    await page.ready()
    await expect(bar(page)).to_have_count(0)
    for number in range(4):
        await page.run(number)
        await page.done(number, number + 1)

    await expect(bar(page)).to_contain_text("Scripts in the output are held back")
    await expect(page.output(1).locator("b", has_text="bold")).to_be_visible()
    await expect(page.output(1).locator("em", has_text="slanted")).to_be_visible()
    await expect(page.output(1).locator("a.go")).not_to_have_attribute("href", "")
    assert await page.output(1).locator("a.go").get_attribute("href") is None
    assert await page.output(1).locator("[data-commandlinker-command], a[href^=javascript]").count() == 0
    await expect(page.output(1).locator("img[src^='data:image/svg']")).to_be_visible()
    await expect(page.output(1).locator(".sg-Held")).to_have_text(
        ["Active output is held back: application/javascript"]
    )
    await expect(page.output(2).locator(".sg-Held")).to_have_text("An interactive widget is held back.")
    await expect(page.output(2)).to_contain_text("HTML(value=")
    cover = await page.output(1).locator(".jp-Dialog").bounding_box()
    inside = await page.output(1).bounding_box()
    assert cover is not None and inside is not None and cover["height"] < 100, "it covers the page"
    await page.picture(tmp_path / "held.png")

    await page.cell(4).locator(".cm-content").click()
    await page.page.keyboard.press("End")
    await page.page.keyboard.press("Shift+Tab")
    await expect(page.page.locator(".jp-Tooltip")).to_contain_text("helpful")
    await page.picture(tmp_path / "tooltip.png")
    await page.page.keyboard.press("Escape")
    assert (await pwned(page), asked, await terminals(page)) == ([], [], 0)

    # Saved and opened again, JupyterLab itself trusts all of it.
    await page.save()
    await page.page.wait_for_function("!document.querySelector('.lm-TabBar-tab.lm-mod-current.jp-mod-dirty')")
    await page.reload()
    await page.ready()
    await expect(bar(page)).to_be_visible()
    await expect(page.output(1).locator("b", has_text="bold")).to_be_visible()
    await dark(page)
    await page.picture(tmp_path / "held-dark.png")
    assert (await pwned(page), asked, await terminals(page)) == ([], [], 0)

    await bar(page).get_by_role("button", name="Allow active output for this notebook").click()
    await all_ran(page, *EVERY, "widget")
    await expect(page.output(2)).to_contain_text("widget text")
    await expect(bar(page)).to_have_count(0)
    await page.picture(tmp_path / "allowed-dark.png")
    assert not {"image", "latex", "help"} & set(await pwned(page))
    await page.save()
    await all_opened(page)
    await page.lab.end_terminals()
    await page.reload()
    await page.ready()
    await all_ran(page, *EVERY, "isolated", "widget")
    await all_opened(page)
    assert await terminals(page) >= len(EVERY), "the attacks would work"
    written = json.loads((page.lab.folder / "hostile.ipynb").read_text())
    assert set(written["metadata"]) == {"kernelspec", "language_info"}
    assert not [cell for cell in written["cells"] if set(cell["metadata"]) - {"trusted"}]

    async with page.page.expect_response(lambda answer: answer.request.method == "PUT" and "settings" in answer.url):
        await chosen(page, "Stop Active Output")
    await expect(page.output(1).locator(".sg-Confined").first).to_be_visible()
    await page.lab.end_terminals()
    await page.reload()
    await page.ready()
    await expect(bar(page)).to_be_visible()
    assert (await pwned(page), await terminals(page)) == ([], 0)
    assert page.errors("status of 404 .*/x") == []


async def test_tables_pictures_and_charts_need_no_permission_and_a_chart_reads_nothing(
    page: Window, tmp_path: Path
) -> None:
    page.lab.write("charts.ipynb", ATTACK, PASSIVE, READER, BINDER, kernel=KERNEL)
    read: list[str] = []
    await page.visit("charts.ipynb")
    await page.ready()
    page.page.on("request", lambda request: read.append(request.url))
    for number in range(2):
        await page.run(number)
        await page.done(number, number + 1)
    await expect(page.output(1).locator("table.dataframe td").first).to_have_text("1")
    await expect(page.output(1).locator("img[src^='data:image/png']").first).to_be_visible()
    await expect(page.output(1).locator("canvas")).to_be_visible()
    await expect(bar(page)).to_have_count(0)
    await page.picture(tmp_path / "charts.png")
    await page.run(2)
    await expect(bar(page)).to_be_visible()
    await expect(page.output(2).locator("canvas")).to_be_visible()
    await page.output(2).locator("summary").click()
    await expect(page.output(2).locator(".vega-actions a")).to_have_count(2)  # pictures to save, and no source
    await page.picture(tmp_path / "reader.png")
    await page.output(1).evaluate("output => output.scrollIntoView()")
    await picture(page, "active-output", bar(page), page.output(1), margin=3, height=520)
    assert not [url for url in read if url.endswith("/lab")]
    await bar(page).get_by_role("button", name="Dismiss").click()
    await expect(bar(page)).to_have_count(0)
    await page.run(3)
    await page.done(3, 4)
    await expect(page.output(3).locator("canvas")).to_be_visible()
    bound = page.notebook.locator(".jp-NotebookPanel-toolbar input[type=range]")
    await expect(bound).to_have_count(0)
    await chosen(page, "Allow Active Output")
    await expect(bound).to_have_count(1)  # it would work
    assert page.errors("held back", "Loading failed") == []


async def test_a_plain_kernels_notebook_acts_as_ever_and_what_a_sandbox_left_in_it_does_not(
    page: Window, tmp_path: Path
) -> None:
    page.lab.write("plain.ipynb", ATTACK, OUTPUTS, WIDGET, kernel="python3")
    await page.visit("plain.ipynb")
    await page.ready("Python 3 (ipykernel)")
    for number in range(3):
        await page.run(number)
        await page.done(number, number + 1)
    await all_ran(page, *EVERY, "isolated", "widget")
    await all_opened(page)
    await expect(page.output(2)).to_contain_text("widget text")
    await expect(bar(page)).to_have_count(0)
    await expect(page.notebook.locator(".sg-Confined")).to_have_count(0)

    page.lab.write("left.ipynb", ATTACK, OUTPUTS, kernel=KERNEL)
    await page.visit("left.ipynb")
    await page.lab.end_terminals()
    await page.ready()
    for number in range(2):
        await page.run(number)
        await page.done(number, number + 1)
    await expect(bar(page)).to_be_visible()
    await picker(page)
    plain = page.page.get_by_text("Python 3 (ipykernel)", exact=True)
    await page.page.locator(".sg-Offer", has=plain).locator("input[type=radio]").click()
    await page.accept()
    await page.ready("Python 3 (ipykernel)")
    await page.save()
    await page.page.wait_for_function("!document.querySelector('.lm-TabBar-tab.lm-mod-current.jp-mod-dirty')")
    await page.reload()
    await page.ready("Python 3 (ipykernel)")
    await expect(bar(page)).to_be_visible()
    assert (await pwned(page), await terminals(page)) == ([], 0)
    assert page.errors("status of 404 .*/x") == []


async def test_a_console_is_guarded(page: Window, tmp_path: Path) -> None:
    page.lab.write("console.ipynb", ATTACK, kernel=KERNEL)
    await page.visit("console.ipynb")
    await page.ready()
    await page.run(0)
    await page.done(0, 1)
    await page.menu("File", "New Console for Notebook")
    console = page.page.locator(".jp-ConsolePanel")
    await console.locator(".jp-CodeConsole-promptCell .cm-content").click()
    await page.page.keyboard.insert_text("show('application/javascript', attack('console'))")
    await page.page.keyboard.press("Shift+Enter")
    await expect(console.locator(".sg-Held")).to_be_visible()
    await expect(console.locator(".sg-Bar")).to_contain_text("for this console")
    await page.picture(tmp_path / "console.png")
    assert await pwned(page) == []
    assert page.errors() == []


async def test_an_administrator_can_open_a_profile(page: Window) -> None:
    page.lab.write("open.ipynb", ATTACK, OUTPUTS, WIDGET, kernel="own-open")
    await page.visit("open.ipynb")
    await page.ready("open")
    for number in range(3):
        await page.run(number)
        await page.done(number)
    await all_ran(page, *EVERY, "widget")
    await expect(bar(page)).to_have_count(0)
    await page.lab.end_terminals()
    assert page.errors("status of 404 .*/x") == []
