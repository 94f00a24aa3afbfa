"""A stock jupyter_server with suspended kernels: what a page asks when it is loaded wakes none, what a person does
wakes one."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from acceptance import KERNEL, Product, environment, short_directory, until
from jupyter_client.session import Session
from suspending import state
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

TOKEN = "t0ken"
PATIENCE = 60.0


class Page:
    """One notebook's WebSocket, spoken as JupyterLab does."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self._socket = socket
        self._session = Session()
        self.states: list[str] = []
        """Each status that came, and in :attr:`parents` the request it belongs to."""
        self.parents: list[str | None] = []

    async def send(self, channel: str, kind: str, content: dict[str, Any] | None = None) -> str:
        message = {**self._session.msg(kind, content or {}), "channel": channel, "buffers": []}
        await self._socket.write_message(json.dumps(message, default=str))
        return str(message["header"]["msg_id"])

    async def done(self, msg_id: str, patience: float = PATIENCE) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The reply to a request, when its idle status has come too, and what was published for it."""
        reply: dict[str, Any] | None = None
        published: list[dict[str, Any]] = []
        idle = False
        while reply is None or not idle:
            raw = await asyncio.wait_for(self._socket.read_message(), patience)
            assert isinstance(raw, str), "the server closed the connection"
            message = json.loads(raw)
            if message["msg_type"] == "status":
                self.states.append(message["content"]["execution_state"])
                self.parents.append(message["parent_header"].get("msg_id"))
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["channel"] == "iopub":
                published.append(message)
                idle = idle or message["content"].get("execution_state") == "idle"
            else:
                reply = message
        return reply["content"], published


class Server:
    """A stock jupyter_server in a process of its own."""

    def __init__(self, url: str, product: Product) -> None:
        self.url = url
        self.product = product

    async def rest(self, method: str, path: str, body: Any = None) -> Any:
        request = HTTPRequest(
            self.url + path,
            method=method,
            headers={"Authorization": f"token {TOKEN}"},
            body=json.dumps(body) if body is not None else None,
            allow_nonstandard_methods=True,
            request_timeout=120,
        )
        answer = await AsyncHTTPClient().fetch(request)
        return json.loads(answer.body) if answer.body else None

    @asynccontextmanager
    async def page(self, kernel_id: str) -> AsyncIterator[Page]:
        address = self.url.replace("http", "ws", 1) + f"api/kernels/{kernel_id}/channels?token={TOKEN}"
        socket = await websocket_connect(address, connect_timeout=PATIENCE)
        try:
            yield Page(socket)
        finally:
            socket.close()


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def server(product: Product) -> Iterator[Server]:
    base = short_directory()
    with (
        (base / "log").open("wb") as log,
        environment(JUPYTER_RUNTIME_DIR=str(base / "run"), JUPYTER_CONFIG_DIR=str(base / "config")),
    ):
        (base / "config").mkdir()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"),
                *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={base}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            told = base / "run" / f"jpserver-{process.pid}.json"
            # Written in place (complete when it ends as it should), and before the server listens.
            until(
                lambda: (told.exists() and told.read_text().endswith("}")) or process.poll() is not None,
                PATIENCE,
            )
            assert process.poll() is None, (base / "log").read_text()
            address = json.loads(told.read_text())
            until(lambda: listens(address["port"]) or process.poll() is not None, PATIENCE)
            assert process.poll() is None, (base / "log").read_text()
            yield Server(address["url"], product)
        finally:
            process.terminate()
            process.wait(60)
    for path in sorted(base.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    base.rmdir()


async def load(page: Page) -> tuple[dict[str, Any], dict[str, Any]]:
    """What JupyterLab 4 asks when it opens a notebook: the replies about the kernel and its debugger."""
    info = await page.send("shell", "kernel_info_request")
    kernel, _ = await page.done(info)
    await page.send("shell", "comm_info_request", {"target_name": "jupyter.widget"})
    asked = {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}}
    debugger, _ = await page.done(await page.send("control", "debug_request", asked))
    return kernel, debugger


def run(product: Product, *arguments: str) -> None:
    done = product.command(*arguments)
    assert done.returncode == 0, done.stderr


async def test_loading_pages_of_suspended_kernels_wakes_none_and_running_a_cell_wakes_one(
    server: Server, product: Product
) -> None:
    kernels = [(await server.rest("POST", "api/kernels", {"name": KERNEL}))["id"] for _ in range(2)]
    for kernel_id in kernels:
        async with server.page(kernel_id) as page:
            await load(page)
            _, said = await page.done(await page.send("shell", "execute_request", {"code": "x = 41", "silent": False}))
        await asyncio.to_thread(run, product, "suspend", kernel_id)
    for kernel_id in kernels:
        for _ in range(2):
            async with server.page(kernel_id) as page:
                info, debugger = await load(page)
                assert info["language_info"]["name"] == "python"
                assert debugger["body"]["isStarted"] is False
                usage, _ = await page.done(await page.send("control", "usage_request"))
                assert usage["status"] == "error"
                assert page.states[-1] == "idle"
        assert await asyncio.to_thread(state, product, kernel_id) == "suspended"
    listed = {entry["id"]: entry["execution_state"] for entry in await server.rest("GET", "api/kernels")}
    assert [listed[kernel_id] for kernel_id in kernels] == ["idle", "idle"]
    one, other = kernels
    async with server.page(one) as page:
        content = {"code": "print(x + 1)", "silent": False, "store_history": True}
        reply, said = await page.done(await page.send("shell", "execute_request", content))
        assert reply["status"] == "ok" and reply["execution_count"] == 2
        assert [m["content"]["text"] for m in said if m["msg_type"] == "stream"] == ["42\n"]
    assert await asyncio.to_thread(state, product, other) == "suspended"
    for kernel_id in kernels:
        await server.rest("DELETE", f"api/kernels/{kernel_id}")


async def test_a_page_that_is_loaded_in_mid_cell_still_shows_the_kernel_as_busy(
    server: Server, product: Product
) -> None:
    kernel_id = (await server.rest("POST", "api/kernels", {"name": KERNEL}))["id"]
    code = "import time\nfor n in range(200):\n    print(n, flush=True)\n    time.sleep(0.05)"
    async with server.page(kernel_id) as page:
        await load(page)
        cell = await page.send("shell", "execute_request", {"code": code, "silent": False})
        finished = asyncio.create_task(page.done(cell, 120))
        async with asyncio.timeout(PATIENCE):
            while cell not in page.parents:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(run, product, "suspend", kernel_id)
        async with server.page(kernel_id) as again:
            await load(again)
            listed = await server.rest("GET", f"api/kernels/{kernel_id}")
            assert listed["execution_state"] == "busy"
            last = max(at for at, parent in enumerate(again.parents) if parent == cell)
            assert again.states[last - 1 : last + 1] == ["idle", "busy"], "said again after the answer's idle"
        assert not finished.done()
        await asyncio.to_thread(run, product, "resume", kernel_id)
        reply, said = await finished
        text = "".join(m["content"]["text"] for m in said if m["msg_type"] == "stream")
        assert reply["status"] == "ok" and text == "".join(f"{n}\n" for n in range(200))
    await server.rest("DELETE", f"api/kernels/{kernel_id}")
