"""The wheel, in an environment that it did not come from and without Node: a working extension."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Lab, window
from lab_server import NAME, ROOT
from playwright.async_api import expect
from tornado.httpclient import AsyncHTTPClient

from sandbox_gateway.host.paths import Paths

pytest.importorskip("hatchling", reason="building needs hatchling, which the `test` extra brings")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing of ours but the wheel; what that depends on is read from this one."""
    base = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(base)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = base.glob("*.whl")
    fresh = base / "environment"
    venv.create(fresh, symlinks=True)
    python = fresh / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", str(wheel)], check=True)
    (packages,) = fresh.glob("lib/python*/site-packages")
    theirs = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    # A line of a .pth file only lengthens the path: the checkout's own .pth, in that folder, is not followed.
    (packages / "dependencies.pth").write_text("\n".join(theirs) + "\n")
    stock = Path(sysconfig.get_path("data"), "share", "jupyter", "lab")
    application = fresh / "share" / "jupyter" / "lab"
    application.mkdir()
    for part in stock.iterdir():
        (application / part.name).symlink_to(part)
    # What the dependencies install beside their packages.
    for file in Path(sysconfig.get_path("data"), "etc", "jupyter", "jupyter_server_config.d").glob("*.json"):
        place = fresh / "etc" / "jupyter" / "jupyter_server_config.d" / file.name
        if not place.exists():
            shutil.copy(file, place)
    return fresh


@pytest.fixture
def variables(environment: Path) -> dict[str, str]:
    """What programs of the fresh environment see: no Node, and nothing of this checkout."""
    path = str(environment / "bin")
    assert shutil.which("node", path=path) is None
    assert shutil.which("npm", path=path) is None
    return {"PATH": path, "JUPYTER_PATH": "", "JUPYTER_CONFIG_PATH": "", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}


def test_jupyter_finds_both_halves_of_the_wheel_enabled(
    environment: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    def said(module: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / "python"), "-m", module, *arguments],
            env={**os.environ, **variables, "JUPYTER_CONFIG_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return re.sub(r"\x1b\[\d*m", "", done.stdout + done.stderr)

    place = environment / "share" / "jupyter" / "labextensions"
    listed = said("jupyterlab.labextensions", "list")
    assert str(place) in listed
    assert re.search(rf"{re.escape(NAME)} v\S+ enabled \S*OK", listed), listed
    assert re.search(r"sandbox_gateway\S* enabled", said("jupyter_server.extension.serverextension", "list"))
    where = subprocess.run(
        [str(environment / "bin" / "python"), "-c", "import sandbox_gateway; print(sandbox_gateway.__file__)"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)


@pytest.fixture
def fresh_lab(environment: Path, variables: dict[str, str], paths: Paths, tmp_path: Path) -> Iterator[Lab]:
    started = Lab(
        tmp_path,
        environment={**variables, "SANDBOX_GATEWAY_HOME": str(paths.home)},
        program=(str(environment / "bin" / "python"), "-m", "jupyterlab"),
    )
    try:
        asyncio.run(started.start())
        yield started
    finally:
        started.stop()


async def test_a_jupyterlab_with_the_wheel_serves_the_extension_and_its_page_has_it(
    environment: Path, fresh_lab: Lab, browser_path: str, tmp_path: Path
) -> None:
    (entry,) = (environment / "share" / "jupyter" / "labextensions" / NAME / "static").glob("remoteEntry.*.js")
    served = await AsyncHTTPClient().fetch(f"{fresh_lab.url}/lab/extensions/{NAME}/static/{entry.name}")
    assert served.body == entry.read_bytes()
    # An administrator's defaults for everybody, as the manual has them.
    settings = environment / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(json.dumps({f"{NAME}:commands": {"confirmSuspend": False}}))
    told = await fresh_lab.ask("GET", f"settings/{NAME}:commands", base="/lab/api")
    assert told["schema"]["properties"]["confirmSuspend"]["default"] is False
    async with window(fresh_lab, browser_path, tmp_path, "wheel") as page:
        await page.visit()
        await page.page.locator(".jp-SideBar .lm-TabBar-tab[data-id='jp-running-sessions']").click()
        await expect(page.page.locator("#jp-running-sessions")).to_contain_text("Sandbox Snapshots")
        assert page.errors() == []
