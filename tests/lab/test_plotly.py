"""A figure of plotly is drawn without permission, by the renderer that plotly brings for JupyterLab.

plotly is taken by pip when the test runs, into a folder of its own: nothing else here needs it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import Product
from browser import Lab, window
from lab_server import KERNEL, make_lab
from playwright.async_api import expect

pytestmark = pytest.mark.timeout(420)

FIGURE = """
import json, plotly.graph_objects, plotly.io
plotly.io.renderers.default = "plotly_mimetype+notebook_connected"  # what plotly chooses in JupyterLab
figure = plotly.graph_objects.Figure(plotly.graph_objects.Bar(x=["a", "b", "c"], y=[1, 3, 2]))
figure.update_layout(title="<a href='javascript:top.pwned=1'>bars</a> <img src=x onerror='top.pwned=1'>")
print(json.dumps(figure._repr_mimebundle_()))
"""


@pytest.fixture(scope="module")
def plotly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plotly")
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    done = subprocess.run(
        [*install, "--target", str(folder), "plotly", "narwhals"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip cannot get plotly: {last}")
    return folder


@pytest.fixture(scope="module")
def lab(browser_path: str, product: Product, plotly: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab that has plotly's renderer, too."""
    before = os.environ["JUPYTER_PATH"]
    os.environ["JUPYTER_PATH"] = os.pathsep.join([str(plotly / "share" / "jupyter"), before])
    try:
        started = make_lab(tmp_path_factory.mktemp("lab"))
    finally:
        os.environ["JUPYTER_PATH"] = before
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


async def test_a_figure_is_drawn_without_permission_and_runs_nothing(
    lab: Lab, plotly: Path, browser_path: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(plotly)}
    bundle = subprocess.run(
        [sys.executable, "-c", FIGURE], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()[-1]  # before it comes what plotly shows once
    show = f"from IPython.display import display; import json\ndisplay(json.loads({bundle!r}), raw=True)"
    lab.write("plotly.ipynb", show, kernel=KERNEL)
    async with window(lab, browser_path, tmp_path, "plotly") as page:
        await page.visit("plotly.ipynb")
        await page.ready()
        await page.run(0)
        await page.done(0, 1)
        await expect(page.output(0).locator(".js-plotly-plot .bars path")).to_have_count(3)
        await expect(page.output(0).locator(".gtitle")).to_contain_text("bars")
        await page.output(0).locator(".nsewdrag").first.hover()
        await expect(page.output(0).locator(".hoverlayer .hovertext")).to_have_count(1)  # no picture, but the figure
        await expect(page.notebook.locator(".sg-Bar")).to_have_count(0)
        await page.picture(tmp_path / "plotly.png")
        assert await page.page.evaluate("window.pwned") is None
        assert page.errors() == []
    await lab.end_kernels()
