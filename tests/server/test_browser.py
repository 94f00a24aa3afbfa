"""An unmodified JupyterLab in a real browser, whose kernels are on the gateway (``--gateway-url``)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from acceptance import Product
from browser import COUNT, CUT_OFF, PATIENCE, Lab, Window, chromium, window
from cut_proxy import CutProxy
from playwright.async_api import expect
from served import Served

pytestmark = pytest.mark.timeout(300)
KERNEL = "python3-gvisor"
expect.set_options(timeout=PATIENCE * 1000)
GATEWAY_GONE = ("status of 50[0-9]",)
"""What the page says while the server behind the server is away."""


@pytest.fixture(scope="module")
def browser_path() -> str:
    return chromium()


@pytest.fixture(scope="module")
def lab(browser_path: str, _gateway: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab whose kernels are on the gateway, and which does not have our extension."""
    started = Lab(
        tmp_path_factory.mktemp("lab"),
        f"--gateway-url={_gateway.url}",
        "--ServerApp.jpserver_extensions={'sandbox_gateway': False}",
        environment={"JUPYTER_GATEWAY_AUTH_TOKEN": _gateway.token},
    )
    started.disable(OURS)
    try:
        asyncio.run(_warm(_gateway))
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


OURS = "@sandbox-gateway/labextension"
"""The package's own front end: these tests are about what JupyterLab does without it."""


@pytest.fixture(scope="module")
def local_lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab with our server extension, as installing the package makes it."""
    base = tmp_path_factory.mktemp("local")
    enabled = base / "etc" / "jupyter_server_config.d"
    enabled.mkdir(parents=True)
    shutil.copy(Path(__file__).parents[2] / "jupyter-config" / "sandbox_gateway.json", enabled)
    started = Lab(base, environment={"JUPYTER_CONFIG_PATH": str(base / "etc")})
    started.disable(OURS)
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


async def _warm(gateway: Served) -> None:
    """The first sandbox waits for the image and the template to be built, which is no matter of these tests."""
    sandbox = await gateway.create()
    await gateway.ok("DELETE", f"/api/sandboxes/{sandbox}")


@pytest.fixture
async def page(
    gateway: Served, lab: Lab, browser_path: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Window]:
    """A fresh browser."""
    async with window(lab, browser_path, tmp_path, request.node.name) as opened:
        yield opened
    await lab.end_kernels()


async def test_a_notebook_is_created_from_the_launcher_and_shows_text_results_errors_and_a_plot(page: Window) -> None:
    await page.visit()
    card = page.page.locator(".jp-Launcher-section", has_text="Notebook").locator(
        ".jp-LauncherCard", has_text="Python 3 (gVisor)"
    )
    await card.click()
    await page.ready()
    await page.run(0, "import platform\nprint(platform.release())\n6 * 7")
    await page.done(0, 1)
    await expect(page.output(0)).to_contain_text("gvisor")
    await expect(page.output(0)).to_contain_text("42")
    await page.run(1, "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()")
    await page.done(1, 2)
    image = page.output(1).locator("img")
    await expect(image).to_be_visible()
    assert await image.evaluate("image => image.naturalWidth") > 300
    await page.run(2, "1 / 0")
    await page.done(2, 3)
    await expect(page.output(2)).to_contain_text("ZeroDivisionError")
    assert page.errors() == []


SLIDER = """
import ipywidgets
slider = ipywidgets.IntSlider(value=3, description="n")
told = ipywidgets.Label(value="nothing yet")
slider.observe(lambda change: setattr(told, "value", f"the square is {change['new'] ** 2}"), "value")
ipywidgets.VBox([slider, told])
"""


async def test_a_slider_talks_with_the_kernel_and_input_is_answered_in_the_page(page: Window) -> None:
    page.lab.write("talk.ipynb", SLIDER, "slider.value", "print('hello', input('name? '))", kernel=KERNEL)
    await page.visit("talk.ipynb")
    await page.ready()
    await page.run(0)
    handle = page.output(0).locator(".noUi-handle")
    await handle.focus()
    for _ in range(4):
        await page.page.keyboard.press("ArrowRight")
    await expect(page.output(0).locator(".widget-readout")).to_have_text("7")
    await expect(page.output(0).locator(".widget-label", has_text="square")).to_have_text("the square is 49")
    await page.run(1)
    await page.printed(1, "7")
    await page.run(2)
    box = page.output(2).locator(".jp-Stdin-input")
    await box.fill("Ada")
    await box.press("Enter")
    await expect(page.output(2)).to_contain_text("hello Ada")
    assert page.errors() == []


async def test_interrupt_and_restart(page: Window) -> None:
    endless = "import time\nx = 1\nprint('on')\ntime.sleep(600)"
    page.lab.write("stop.ipynb", endless, "print('x' in dir())", kernel=KERNEL)
    await page.visit("stop.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("on")
    await expect(page.prompt(0)).to_have_text("[*]:")
    await page.menu("Kernel", "Interrupt Kernel")
    await expect(page.output(0)).to_contain_text("KeyboardInterrupt")
    await page.done(0, 1)
    await page.run(1)
    await page.printed(1, "True")
    await page.menu("Kernel", "Restart Kernel…")
    await page.accept()
    await page.ready()
    await page.run(1)
    await page.done(1, 1)
    await page.printed(1, "False")
    assert page.errors() == []


async def hurry(page: Window) -> None:
    """Tell the cell that counts to hurry."""
    (session,) = await page.lab.ask("GET", "sessions")
    await page.lab.ask("POST", f"kernels/{session['kernel']['id']}/interrupt")


def counted(number: int) -> str:
    return "\n".join(map(str, range(number)))


async def counted_with_repeats(page: Window, number: int) -> None:
    """Wait for the first cell to have printed so many numbers. What was on its way when the gateway went may come
    twice, and JupyterLab shows it twice."""
    await page.done(0, 1)
    await expect(page.output(0)).to_contain_text(str(number - 1))
    lines = [int(line) for line in (await page.text(0)).split()]
    assert list(dict.fromkeys(lines)) == list(range(number)) and len(lines) < number + 80


async def test_a_page_that_is_reloaded_in_mid_cell_shows_the_busy_kernel_and_its_output_in_the_log(
    page: Window, tmp_path: Path
) -> None:
    """JupyterLab itself forgets which cell a running request came from: the cell keeps what was saved of its output,
    and what comes is shown by the log console only."""
    page.lab.write("long.ipynb", COUNT.format(800) + "\nx = 5", "print(x)", kernel=KERNEL)
    await page.visit("long.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("19")
    await page.save()
    async with asyncio.timeout(PATIENCE):
        while '"19\\n"' not in (page.lab.folder / "long.ipynb").read_text():
            await asyncio.sleep(0.05)
    await page.reload()
    await expect(page.status).to_have_text("Python 3 (gVisor) | Busy")
    await expect(page.output(0)).to_contain_text("19")
    kept = await page.text(0)
    assert counted(20) in kept
    await page.menu("View", "Show Log Console")
    await page.page.locator(".jp-LogConsole-toolbarLogLevel select").select_option("info")
    await page.run(1)
    await hurry(page)
    log = page.page.locator(".jp-LogConsolePanel")
    await expect(log).to_contain_text("799")
    await page.done(1)
    await page.printed(1, "5")
    await page.ready()
    assert await page.text(0) == kept
    lines = [line for line in (await log.inner_text()).split("\n") if line.isdecimal()]
    assert lines[-51:] == [*map(str, range(750, 800)), "5"]
    await page.picture(tmp_path / "log.png")
    assert page.errors() == []


async def test_output_is_complete_when_the_gateway_is_killed_in_mid_cell(page: Window, gateway: Served) -> None:
    page.lab.write("killed.ipynb", COUNT.format(300), "print(n)", kernel=KERNEL)
    await page.visit("killed.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("19")
    gateway.kill()
    await asyncio.sleep(2.0)  # the cell prints on without a gateway
    assert "299" not in await page.text(0)
    await gateway.start()
    await counted_with_repeats(page, 300)
    await page.run(1)
    await page.printed(1, "299")
    assert page.errors(*GATEWAY_GONE) == []


async def test_output_is_complete_when_the_gateway_is_stopped_and_started_in_mid_cell(
    page: Window, gateway: Served
) -> None:
    page.lab.write("stopped.ipynb", COUNT.format(300), "print(n)", kernel=KERNEL)
    await page.visit("stopped.ipynb")
    await page.ready()
    await page.run(0)
    await expect(page.output(0)).to_contain_text("19")
    await asyncio.to_thread(gateway.stop)
    assert "299" not in await page.text(0)
    await gateway.start()
    await counted_with_repeats(page, 300)  # none, where JupyterLab's server answers within a second
    await page.run(1)
    await page.printed(1, "299")
    assert page.errors(*GATEWAY_GONE) == []


async def test_output_is_complete_when_the_page_loses_its_connection_in_mid_cell(page: Window, gateway: Served) -> None:
    """The cell is silent when the connection breaks: what is on its way then is lost between page and JupyterLab, whose
    server told the gateway that it had it."""
    silence = "    while n == 19 and pause:\n        time.sleep(0.05)\n    pause = 0.05"
    page.lab.write("cut.ipynb", f"{COUNT.format(100)}\n{silence}", "print(n)", kernel=KERNEL)
    proxy = CutProxy(page.lab.port)
    try:
        page.address = proxy.url
        await page.shrug()
        await page.visit("cut.ipynb")
        await page.ready()
        await page.run(0)
        await page.printed(0, counted(20))
        await asyncio.sleep(0.5)
        proxy.refuse()
        (kernel,) = await gateway.ok("GET", "/api/kernels")
        async with asyncio.timeout(PATIENCE):
            while (await gateway.ok("GET", f"/api/kernels/{kernel['id']}"))["connections"]:
                await asyncio.sleep(0.05)
        await hurry(page)  # it prints on
        await asyncio.sleep(2.0)
        assert (await page.text(0)).strip() == counted(20)
        proxy.refuse(False)
        await page.done(0, 1)
        await page.printed(0, counted(100))
        await page.run(1)
        await page.printed(1, "99")
    finally:
        proxy.close()
    assert page.errors(*CUT_OFF) == []


SLEEPERS = 20


async def test_a_page_with_suspended_notebooks_is_loaded_and_wakes_none_until_a_cell_is_run(
    page: Window, gateway: Served, tmp_path: Path
) -> None:
    names = [f"sleeper{number}.ipynb" for number in range(SLEEPERS)]
    kernels = []
    for number, name in enumerate(names):
        page.lab.write(name, "print('woken', x)", kernel=KERNEL)
        wanted = {"path": name, "name": name, "type": "notebook", "kernel": {"name": KERNEL}}
        kernels.append((await page.lab.ask("POST", "sessions", wanted))["kernel"]["id"])
        await gateway.ask("POST", f"/api/sandboxes/{kernels[-1]}/execute", {"code": f"x = {number}"})
    await page.lab.open_together("sleepers", names)
    await page.workspace("sleepers")
    await informed(page, kernels)
    await asyncio.sleep(6.0)  # the rest of what the page asks at first, and what it asks when that is not answered
    for kernel_id in kernels:
        await gateway.ok("POST", f"/api/sandboxes/{kernel_id}/suspend?wait=60")
    page.sent.clear()
    page.got.clear()
    await page.reload()
    await informed(page, kernels)
    await page.ready()
    await asyncio.sleep(6.0)
    asked = {kind for _, kind in page.sent}
    assert asked >= {"kernel_info_request", "comm_info_request", "history_request", "comm_open"}
    asleep = dict.fromkeys(kernels, "suspended")
    assert await states(gateway) == asleep
    await page.page.locator(".lm-TabBar-tab", has_text=names[3]).click()
    await page.ready()
    await page.picture(tmp_path / "asleep.png")
    assert await states(gateway) == asleep
    await page.run(0)
    await page.printed(0, "woken 3")
    assert await states(gateway) == {**asleep, kernels[3]: "running"}
    assert page.errors() == []


async def informed(page: Window, kernels: list[str]) -> None:
    """Wait until the page knows each kernel."""
    async with asyncio.timeout(PATIENCE):
        while not {(kernel_id, "kernel_info_reply") for kernel_id in kernels} <= set(page.got):
            await asyncio.sleep(0.2)


async def states(gateway: Served) -> dict[str, str]:
    """The states of all sandboxes."""
    found = await gateway.ok("GET", "/api/sandboxes?limit=1000")
    return {sandbox["id"]: sandbox["state"] for sandbox in found["sandboxes"]}


PICTURE = """
import io, ipywidgets, matplotlib.image, numpy, platform
file = io.BytesIO()
matplotlib.image.imsave(file, numpy.zeros((20, 30)), format="png")
print(platform.release())
ipywidgets.Image(value=file.getvalue())
"""


async def test_a_local_jupyterlab_has_kernels_in_sandboxes_beside_its_own(
    local_lab: Lab, browser_path: str, tmp_path: Path
) -> None:
    """No gateway apart: our server extension in JupyterLab's own server. The page gets the newer protocol here, and so
    binary buffers (the picture)."""
    local_lab.write("ours.ipynb", PICTURE, "open('made', 'w').write('inside')", kernel=KERNEL)
    local_lab.write("plain.ipynb", PICTURE, "import os; os.path.exists('made')", kernel="python3")
    await local_lab.open_together("both", ["ours.ipynb", "plain.ipynb"])
    async with window(local_lab, browser_path, tmp_path, "local") as page:
        await page.workspace("both")
        for name, kernel in (("ours", "Python 3 (gVisor)"), ("plain", "Python 3 (ipykernel)")):
            await page.page.locator(".lm-TabBar-tab", has_text=name).click()
            await page.ready(kernel)
            await page.run(0)
            await page.done(0, 1)
            image = page.output(0).locator("img")
            await expect(image).to_be_visible()
            assert await image.evaluate("image => image.naturalWidth") == 30
            assert ("gvisor" in await page.text(0)) == (name == "ours")
            await page.run(1)
            await page.done(1, 2)
            await page.picture(tmp_path / f"{name}.png")
        await page.printed(1, "False")
        await page.page.locator(".lm-TabBar-tab", has_text="ours").click()
        await page.menu("Kernel", "Restart Kernel…")
        await page.accept()
        await page.ready()
        await page.run(1, "'file' in dir()")
        await page.done(1, 1)
        await page.printed(1, "False")
        assert page.errors() == []
    await local_lab.end_kernels()
