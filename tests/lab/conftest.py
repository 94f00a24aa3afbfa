"""A real JupyterLab with the built extension, and its page in a headless Chromium."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "server")]

from acceptance import Product, product, profile_kernelspec  # noqa: E402
from browser import PATIENCE, Lab, Window, chromium, window  # noqa: E402
from playwright.async_api import expect  # noqa: E402

__all__ = ["product"]

ROOT = TESTS.parent
NAME = "@sandbox-gateway/labextension"
KERNEL = "python3-gvisor"
TIGHT = "own-tight"
"""The kernel of a profile with 512 MiB."""
THEMES = "settings/@jupyterlab/apputils-extension:themes"
expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="session")
def browser_path() -> str:
    return chromium()


def installed_front_end(base: Path) -> Path:
    """A folder for ``JUPYTER_PATH`` in which JupyterLab finds this checkout's bundle as a wheel's."""
    place = base / "share" / "labextensions" / NAME
    place.parent.mkdir(parents=True)
    place.symlink_to(ROOT / "sandbox_gateway" / "_labextension")
    return base / "share"


def enabled(base: Path) -> Path:
    """A folder for ``JUPYTER_CONFIG_PATH`` that enables our server extension, as a wheel does."""
    place = base / "etc" / "jupyter_server_config.d"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "jupyter-config" / "sandbox_gateway.json", place)
    return base / "etc"


def make_lab(base: Path, *options: str, server_extension: bool = True, environment: Mapping[str, str] = {}) -> Lab:
    """A JupyterLab as `pip install sandbox_gateway` makes it, or one whose server lacks our extension."""
    search = os.pathsep.join(filter(None, [str(installed_front_end(base)), os.environ.get("JUPYTER_PATH", "")]))
    environment = {"JUPYTER_PATH": search, **environment}
    if server_extension:
        environment["JUPYTER_CONFIG_PATH"] = str(enabled(base))
    else:
        options = (*options, "--ServerApp.jpserver_extensions={'sandbox_gateway': False}")
    return Lab(base, *options, environment=environment)


@pytest.fixture(scope="module")
def lab(browser_path: str, product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab with the extension and with sandboxes of its own."""
    with profile_kernelspec(product, "tight"):
        started = make_lab(tmp_path_factory.mktemp("lab"))
        try:
            asyncio.run(started.start())
            yield started
        finally:
            started.stop()


@pytest.fixture
async def page(lab: Lab, browser_path: str, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Window]:
    """A fresh browser; what was started is ended after it."""
    async with window(lab, browser_path, tmp_path, request.node.name) as opened:
        yield opened
    await lab.ask("PUT", THEMES, {"raw": "{}"}, base="/lab/api")
    await lab.end_kernels()
    for sandbox in (await lab.ask("GET", "sandboxes?state=all&limit=1000"))["sandboxes"]:
        await lab.ask("DELETE", f"sandboxes/{sandbox['id']}?forget=true")
    for snapshot in (await lab.ask("GET", "snapshots"))["snapshots"]:
        await lab.ask("DELETE", f"snapshots/{snapshot['id']}")
