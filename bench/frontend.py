"""What the JupyterLab extension costs: its share of the time to a usable page, and its size. Needs a Chromium."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.kernels import PATIENCE, BenchError
from bench.measures import SIDES, Measure, Plan
from bench.rest import Rest
from sandbox_gateway.host.paths import discover
from sandbox_gateway.model import State
from sandbox_gateway.store import Store

ROOT = Path(__file__).resolve().parent.parent
NAME = "@sandbox-gateway/labextension"
BUNDLE = ROOT / "sandbox_gateway" / "_labextension"
MANY = 200
AFTER = 5.0
"""Seconds behind the usable page in which the main thread's work still counts as the start's."""
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

WATCH = """
(() => {
  const usable = () =>
    document.querySelector('.jp-LauncherCard') !== null &&
    document.querySelector('#main') !== null &&
    document.querySelector('#jupyterlab-splash') === null;
  window.benchBlocked = 0;
  new PerformanceObserver(list => {
    for (const entry of list.getEntries()) window.benchBlocked += entry.duration;
  }).observe({ type: 'longtask', buffered: true });
  const look = () => (usable() ? (window.benchUsable = performance.now()) : requestAnimationFrame(look));
  requestAnimationFrame(look);
})();
"""
"""Tells when the launcher is there, the splash screen gone and the main thread free to draw; and for how long tasks of
more than 50 ms kept the page from answering."""


def frontend(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """JupyterLab without the extension, and with it beside one and beside many suspended sandboxes; fresh loads."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise BenchError("playwright is not installed: pip install playwright") from error
    chromium = os.environ.get("SANDBOX_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise BenchError("no Chromium here: sh tools/system_packages.sh installs it")
    folder = discover().home.parent
    measures = [size()]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            with lab("sandboxed", folder) as server:
                sandbox = server.suspended(names["sandboxed"])
            for count in (1, MANY):
                multiply(sandbox, count)
                with lab("plain", folder) as plain, lab("sandboxed", folder) as with_it:
                    found = len(with_it.ask("GET", f"/api/sandboxes?limit={MANY + 1}")["sandboxes"])
                    if found != count:
                        raise BenchError(f"the server lists {found} sandboxes instead of {count}")
                    measures += _loads(browser, {"plain": plain, "sandboxed": with_it}, count, plan, say)
        finally:
            browser.close()
    return measures


def size() -> Measure:
    """What a browser loads of us."""
    files = list((BUNDLE / "static").rglob("*.js"))
    total = sum(file.stat().st_size for file in files)
    packed = sum(len(gzip.compress(file.read_bytes())) for file in files)
    measure = Measure("the extension's bundle", "KiB", "lower", note=f"{packed / 1024:.0f} KiB compressed")
    measure.samples["sandboxed"] = [total / 1024]
    return measure


def _loads(browser: Any, servers: dict[str, Lab], count: int, plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    what = "1 sandbox" if count == 1 else f"{count} sandboxes"
    usable = Measure(f"JupyterLab: usable page, {what}", "s", "lower", note="plain: without the extension")
    blocked = Measure(
        f"JupyterLab: page that does not answer, {what}", "s", "lower", note=f"in all, until {AFTER:g} s behind that"
    )
    # JupyterLab draws a list of all kernels at its start, also where nobody sees it: that is no cost of ours.
    told = "plain: without the extension, told of the same kernels"
    alike = [Measure(f"{own.name}, kernels in both", "s", "lower", note=told) for own in (usable, blocked)]
    kernels = json.dumps(servers["sandboxed"].ask("GET", "/api/kernels"))
    for server in servers.values():
        load(browser, server)  # fills the page cache, and the server's own
    for number in range(plan.pages):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            for measure, taken in zip((usable, blocked), load(browser, servers[side]), strict=True):
                measure.samples[side].append(taken)
        if count > 1:
            for measure, taken in zip(alike, load(browser, servers["plain"], kernels), strict=True):
                measure.samples["plain"].append(taken)
        say(f"page {number + 1} of {plan.pages}, {what}")
    for measure, own in zip(alike, (usable, blocked), strict=True):
        measure.samples["sandboxed"] = own.samples["sandboxed"]
    return [usable, blocked, *(alike if count > 1 else [])]


def load(browser: Any, server: Lab, kernels: str | None = None) -> tuple[float, float]:
    """A load with nothing cached: seconds until it can be used, and seconds in which it did not answer. With
    ``kernels`` the page is told that those run."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.add_init_script(WATCH)
        if kernels is not None:
            page.route("**/api/kernels?*", lambda route: route.fulfill(content_type="application/json", body=kernels))
        page.goto(f"{server.url}/lab?token={server.token}&reset", timeout=PATIENCE * 1000)
        page.wait_for_function("() => window.benchUsable !== undefined", timeout=PATIENCE * 1000)
        page.wait_for_timeout(AFTER * 1000)
        usable, blocked = page.evaluate("() => [window.benchUsable, window.benchBlocked]")
        return usable / 1000, blocked / 1000
    finally:
        context.close()


def multiply(sandbox_id: str, count: int) -> None:
    """Have ``count`` suspended sandboxes on record, all like that one. None of them is ever resumed."""
    with Store(discover().database) as store:
        record, launch = store.get(sandbox_id), store.launch(sandbox_id)
        for number in range(len(store.list(frozenset({State.SUSPENDED}))), count):
            another = str(uuid.uuid4())
            name, created = f"notebook{number}.ipynb", record.created + number
            spec = replace(launch.spec, id=another)
            store.enter(replace(record, id=another, name=name, created=created), replace(launch, spec=spec))


class Lab(Rest):
    """A JupyterLab; the plain one does not know of us."""

    def __init__(self, side: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = secrets.token_hex(16)
        base = folder / f"lab-{side}-{self.port}"
        notebooks, config = base / "notebooks", base / "config"
        settings = config / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        extensions = base / "labextensions"
        for place in (notebooks, settings, extensions, base / "etc" / "jupyter_server_config.d"):
            place.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        environment = {
            **os.environ,
            "JUPYTER_TOKEN": self.token,
            "JUPYTER_CONFIG_DIR": str(config),
            "JUPYTERLAB_WORKSPACES_DIR": str(config / "workspaces"),
        }
        options = [f"--ServerApp.root_dir={notebooks}", f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"]
        if side == "plain":
            options.append("--ServerApp.jpserver_extensions={'sandbox_gateway': False}")
        else:
            (extensions / NAME).parent.mkdir()
            (extensions / NAME).symlink_to(BUNDLE)
            shutil.copy(ROOT / "jupyter-config" / "sandbox_gateway.json", base / "etc" / "jupyter_server_config.d")
            environment["JUPYTER_CONFIG_PATH"] = str(base / "etc")
        # What else this environment has, both have; ours in the environment may be an older one.
        for other in (Path(sys.prefix) / "share" / "jupyter" / "labextensions").glob("*"):
            if other.name != NAME.partition("/")[0]:
                (extensions / other.name).symlink_to(other)
        options.append(f"--LabApp.labextensions_path={str(extensions)!r}")
        if os.geteuid() == 0:
            options.append("--allow-root")
        self.log = (base / "lab.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", *options],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.until_it_answers("JupyterLab")

    def suspended(self, profile: str) -> str:
        """A new sandbox, suspended; its id."""
        sandbox_id: str = self.ask("POST", "/api/sandboxes", {"profile": profile})["id"]
        self.ask("POST", f"/api/sandboxes/{sandbox_id}/suspend?wait=60", {})
        return sandbox_id

    def close(self) -> None:
        """End it; what is suspended stays."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@contextlib.contextmanager
def lab(side: str, folder: Path) -> Iterator[Lab]:
    """A server for the time of the block."""
    server = Lab(side, folder)
    try:
        yield server
    finally:
        server.close()
