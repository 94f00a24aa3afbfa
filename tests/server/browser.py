"""JupyterLab as people have it: a server process of its own, and its page in a headless Chromium."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from served import free_port
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

playwright_api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
from playwright.async_api import (  # noqa: E402
    BrowserContext,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    WebSocket,
    async_playwright,
    expect,
)

FLAGS: Final = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
"""What lets Chromium run as root and without the outside world."""

PATIENCE: Final = 60.0
"""Seconds that the page may take for a thing, on a busy machine."""
COUNT: Final = """
import signal, time
pause = 0.05
def hurry(*_):
    global pause
    pause = 0
signal.signal(signal.SIGINT, hurry)
for n in range({}):
    print(n, flush=True)
    time.sleep(pause)"""
"""A cell that prints numbers slowly until it is interrupted, which lets it hurry."""

CUT_OFF: Final = (
    "net::ERR_",
    "Kernel connection is disposed",
    "Failed to fetch",
    "before receiving a handshake response",
)
"""What a page says while it cannot reach its server: patterns for :meth:`Window.errors`."""

FINENESS: Final = 2 if os.environ.get("SANDBOX_TEST_PICTURES") else 1
"""Pixels of a screenshot for each of the page's; the manual's are read on fine screens."""

HARMLESS: Final[Mapping[str, str]] = {
    r"status of 500 .*/api/resolvePath\?": (
        "a traceback's paths are looked up; jupyter_server fails at that for every kernel of a --gateway-url"
    ),
    r"Comm not found for comm id": (
        "a kernel that wakes answers what an earlier page asked about widgets, and tells it to all pages"
    ),
    r"Could not restore the debugger state: Canceled future": "the debugger's panel asks while a kernel restarts",
    r"channels\?.*Sent non-empty 'Sec-WebSocket-Protocol' header but no response was received": (
        "the page asks for the newer protocol, a server with --gateway-url speaks only the older one; the page then"
        " connects without asking"
    ),
}
"""Errors in the page's console that are none of ours: a pattern, and the reason."""


def chromium() -> str:
    """A Chromium of this machine; skips, with the reason, where there is none."""
    named = os.environ.get("SANDBOX_TEST_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here: sh tools/system_packages.sh installs it, or name one by SANDBOX_TEST_CHROMIUM")
    return found


class Lab:
    """A JupyterLab server with a folder, a configuration and a token of its own."""

    def __init__(
        self,
        base: Path,
        *options: str,
        environment: Mapping[str, str] = {},
        program: Sequence[str] = (sys.executable, "-m", "jupyterlab"),
    ) -> None:
        self.port = free_port()
        self._program = program
        self.token = secrets.token_hex(16)
        self.folder = base / "notebooks"
        self.log = base / "lab.log"
        self._options = options
        self._environment = dict(environment)
        self._config = base / "config"
        self.process: subprocess.Popen[bytes] | None = None

    def disable(self, *extensions: str) -> None:
        """Have its page load none of these extensions, or plugins, of the front end."""
        choice = self._config / "labconfig" / "page_config.json"
        choice.parent.mkdir(parents=True, exist_ok=True)
        choice.write_text(json.dumps({"disabledExtensions": dict.fromkeys(extensions, True)}))

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it, and return when it answers; again after it was killed: same port, same token, same folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._user_settings.exists():
            self.forget_settings()
        arguments = [
            *(*self._program, "--no-browser", f"--ServerApp.root_dir={self.folder}"),
            *(f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
            *self._options,
        ]
        if os.geteuid() == 0:
            arguments.append("--allow-root")
        environment = {
            **os.environ,
            "JUPYTER_TOKEN": self.token,
            "JUPYTER_CONFIG_DIR": str(self._config),
            "JUPYTERLAB_WORKSPACES_DIR": str(self._config / "workspaces"),
            **self._environment,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, f"JupyterLab ended: {self.log.read_text()[-3000:]}"
            try:
                await self.ask("GET", "status")
                return
            except OSError:
                await asyncio.sleep(0.1)
        raise TimeoutError("JupyterLab does not answer")

    @property
    def _user_settings(self) -> Path:
        return self._config / "lab" / "user-settings"

    def forget_settings(self) -> None:
        """The user's settings are as of a first start; the server reads them anew for every page."""
        shutil.rmtree(self._user_settings, ignore_errors=True)
        settings = self._user_settings / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        # The one question that a first start asks: news from the project's site.
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')

    async def ask(self, method: str, path: str, body: Any = None, *, base: str = "/api") -> Any:
        """One REST request that has to succeed; the decoded answer."""
        request = HTTPRequest(
            f"{self.url}{base}/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
            body=None if body is None else json.dumps(body),
            allow_nonstandard_methods=True,
            request_timeout=120,
        )
        answer = await AsyncHTTPClient().fetch(request)
        return json.loads(answer.body) if answer.body else None

    def write(self, name: str, *cells: str, kernel: str) -> None:
        """A notebook with these cells."""
        notebook = {
            "cells": [
                {
                    "cell_type": "code",
                    "execution_count": None,
                    "id": f"cell{number}",
                    "metadata": {},
                    "outputs": [],
                    "source": code,
                }
                for number, code in enumerate(cells)
            ],
            "metadata": {"kernelspec": {"display_name": kernel, "language": "python", "name": kernel}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (self.folder / name).write_text(json.dumps(notebook))

    async def open_together(self, workspace: str, names: Sequence[str]) -> None:
        """A layout with these notebooks in tabs."""
        widgets = [f"notebook:{name}" for name in names]
        dock = {"type": "tab-area", "currentIndex": 0, "widgets": widgets}
        data: dict[str, Any] = {f"notebook:{name}": {"data": {"path": name, "factory": "Notebook"}} for name in names}
        data["layout-restorer:data"] = {"main": {"dock": dock, "current": widgets[0]}}
        body = {"data": data, "metadata": {"id": workspace}}
        await self.ask("PUT", f"workspaces/{workspace}", body, base="/lab/api")

    async def end_kernels(self) -> None:
        """Close every session, and so its kernel."""
        for session in await self.ask("GET", "sessions"):
            await self.ask("DELETE", f"sessions/{session['id']}")

    async def end_terminals(self) -> None:
        """Close every terminal."""
        for terminal in await self.ask("GET", "terminals"):
            await self.ask("DELETE", f"terminals/{terminal['name']}")

    def kill(self) -> None:
        """End the server as ``kill -9`` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End the server as Ctrl-C does."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@dataclass
class Window:
    """A page of JupyterLab, and what its console said."""

    page: Page
    lab: Lab
    address: str
    """Where the page reaches the server."""
    said: list[str] = field(default_factory=list)
    """Errors of the console and exceptions that nobody caught."""

    sent: list[tuple[str, str]] = field(default_factory=list)
    """What the page sent: kernel and message type. Of the older protocol only, as all of these."""
    got: list[tuple[str, str]] = field(default_factory=list)
    """What the page got."""

    def _follow(self, socket: WebSocket) -> None:
        found = re.search(r"/kernels/([0-9a-f-]+)/channels", socket.url)
        if found is None:
            return
        kernel_id = found.group(1)

        def note(messages: list[tuple[str, str]], data: str | bytes) -> None:
            if isinstance(data, str):
                messages.append((kernel_id, json.loads(data)["header"]["msg_type"]))

        socket.on("framesent", functools.partial(note, self.sent))
        socket.on("framereceived", functools.partial(note, self.got))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            where = message.location.get("url", "") if message.location else ""
            self.said.append(f"{message.text} [{where}]")

    def listen(self) -> None:
        """Take down what goes wrong in the page."""
        self.page.on("console", self._heard)
        self.page.on("websocket", self._follow)
        self.page.on("pageerror", lambda error: self.said.append(f"uncaught: {error.stack or error}"))

    def errors(self, *expected: str) -> list[str]:
        """What was said beyond what is harmless or ``expected`` (patterns)."""
        patterns = [*HARMLESS, *expected]
        return [text for text in self.said if not any(re.search(pattern, text) for pattern in patterns)]

    async def visit(self, path: str = "") -> None:
        """Load the page: the launcher, or a notebook by its path; no layout of an earlier visit."""
        tree = f"/lab/tree/{path}" if path else "/lab"
        await self.page.goto(f"{self.address}{tree}?token={self.lab.token}&reset")
        await self.loaded()

    async def workspace(self, name: str) -> None:
        """Load the page with a layout that :meth:`Lab.open_together` wrote."""
        await self.page.goto(f"{self.address}/lab/workspaces/{name}?token={self.lab.token}")
        await self.loaded()

    async def loaded(self) -> None:
        """Wait for the splash screen to go."""
        await expect(self.page.locator("#main")).to_be_visible()
        await expect(self.page.locator("#jupyterlab-splash")).to_have_count(0)

    async def reload(self) -> None:
        """Load the page again, as a person does."""
        await self.page.reload()
        await self.loaded()

    @property
    def notebook(self) -> Locator:
        """The notebook in front."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def cell(self, number: int) -> Locator:
        """A cell by its place."""
        return self.notebook.locator(".jp-Cell").nth(number)

    def output(self, number: int) -> Locator:
        """All that a cell shows below its code."""
        return self.cell(number).locator(".jp-Cell-outputArea")

    async def text(self, number: int) -> str:
        """What a cell printed."""
        return "".join(await self.output(number).locator("pre").all_inner_texts())

    def prompt(self, number: int) -> Locator:
        """``[1]:`` beside a cell; a star while it runs."""
        return self.cell(number).locator(".jp-InputPrompt")

    async def ready(self, kernel: str = "Python 3 (gVisor)") -> None:
        """Wait for the notebook to have its kernel, and for that to be idle."""
        await expect(self.status).to_have_text(f"{kernel} | Idle")

    @property
    def status(self) -> Locator:
        """The kernel and its state in the bar at the bottom."""
        return self.page.locator("#jp-main-statusbar .jp-StatusBar-TextItem", has_text=" | ")

    @property
    def indicator(self) -> Locator:
        """The circle that tells the kernel's state."""
        return self.notebook.locator(".jp-Notebook-ExecutionIndicator")

    async def edit(self, number: int, code: str) -> None:
        """Replace a cell's code by typing."""
        await self.cell(number).locator(".cm-content").click()
        await self.page.keyboard.press("Control+A")
        await self.page.keyboard.insert_text(code)

    async def run(self, number: int, code: str | None = None) -> None:
        """Put the cursor into a cell and press Shift-Enter."""
        if code is None:
            await self.cell(number).locator(".cm-content").click()
        else:
            await self.edit(number, code)
        await self.page.keyboard.press("Shift+Enter")

    async def done(self, number: int, count: int | None = None) -> None:
        """Wait for a cell to have its number."""
        pattern = re.compile(r"^\[\d+\]:$") if count is None else f"[{count}]:"
        await expect(self.prompt(number)).to_have_text(pattern)

    async def printed(self, number: int, text: str) -> None:
        """Wait for a cell to show exactly this printed text."""
        await expect(self.output(number).locator("pre").first).to_have_text(text)

    async def save(self) -> None:
        """Ctrl-S."""
        await self.page.keyboard.press("Control+S")

    async def menu(self, top: str, item: str) -> None:
        """Choose from the menu bar."""
        await self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{top}$")).click()
        await self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(item)}$")).click()

    async def accept(self) -> None:
        """Press the dialog's chief button."""
        await self.page.locator(".jp-Dialog .jp-mod-accept").click()

    async def shrug(self) -> None:
        """Close the dialog about a lost connection whenever it is in the way."""
        dialog = self.page.locator(".jp-Dialog", has_text="Server Connection Error")
        await self.page.add_locator_handler(dialog, lambda shown: shown.get_by_role("button", name="Close").click())

    async def picture(self, path: Path) -> None:
        """A screenshot."""
        await self.page.screenshot(path=path)


@asynccontextmanager
async def window(lab: Lab, executable: str, pictures: Path, name: str) -> AsyncIterator[Window]:
    """A Chromium with a fresh profile, ended at the end; with a picture of the page's last state."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            context: BrowserContext = await browser.new_context(
                viewport={"width": 1280, "height": 900}, device_scale_factor=FINENESS
            )
            context.set_default_timeout(PATIENCE * 1000)
            opened = Window(await context.new_page(), lab, lab.url)
            opened.listen()
            try:
                yield opened
            finally:
                try:
                    await opened.picture(pictures / f"{name}.png")
                except Error:
                    print("no picture of the page: it is gone")
                print("console:", *opened.said, sep="\n  ")
        finally:
            await browser.close()
