"""The kernels in a real JupyterLab server: its REST API and its kernel WebSocket, as the page uses them."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from acceptance import FILES_KERNEL, KERNEL, Product
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect


class Lab:
    """A JupyterLab server of its own on a free port."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.log = (root / "lab.log").open("wb")
        arguments = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={root}"),
            *(f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1"),
        ]
        environment = {**os.environ, "JUPYTER_TOKEN": self.token, "JUPYTER_CONFIG_DIR": str(root / "config")}
        self.process = subprocess.Popen(
            arguments, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )

    async def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """One REST request; the decoded answer."""
        request = HTTPRequest(
            f"http://127.0.0.1:{self.port}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
            body=None if body is None else json.dumps(body),
            allow_nonstandard_methods=True,
            request_timeout=120,
        )
        answer = await AsyncHTTPClient().fetch(request)
        return json.loads(answer.body) if answer.body else None

    async def ready(self) -> None:
        """Return when the server answers."""
        for _ in range(600):
            assert self.process.poll() is None, "JupyterLab ended"
            try:
                await self.ask("status")
                return
            except OSError:
                await asyncio.sleep(0.1)
        raise TimeoutError("JupyterLab does not answer")

    async def run(self, kernel_id: str, code: str) -> tuple[str, str]:
        """Run a cell over the WebSocket; its printed text and its error's name."""
        url = f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?token={self.token}"
        connected = await websocket_connect(url, max_message_size=64 << 20)
        try:
            message_id = uuid.uuid4().hex
            await connected.write_message(
                json.dumps(
                    {
                        "channel": "shell",
                        "header": {
                            "msg_id": message_id,
                            "msg_type": "execute_request",
                            "version": "5.3",
                            "session": "s",
                        },
                        "parent_header": {},
                        "metadata": {},
                        "content": {"code": code, "silent": False, "allow_stdin": False},
                    }
                )
            )
            text = error = ""
            async with asyncio.timeout(60):
                while True:
                    raw = await connected.read_message()
                    assert isinstance(raw, str), "the WebSocket was closed"
                    message = json.loads(raw)
                    if message["parent_header"].get("msg_id") != message_id:
                        continue
                    if message["msg_type"] == "stream":
                        text += message["content"]["text"]
                    elif message["msg_type"] == "error":
                        error = message["content"]["ename"]
                    elif message["content"].get("execution_state") == "idle":
                        return text, error
        finally:
            connected.close()

    def close(self) -> None:
        """End the server as Ctrl-C does (twice is yes)."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@pytest.fixture
async def lab(product: Product, tmp_path: Path) -> AsyncIterator[Lab]:
    """A running JupyterLab with our kernelspecs."""
    (tmp_path / "data.csv").write_text("1,2,3\n")
    server = Lab(tmp_path)
    try:
        await server.ready()
        yield server
    finally:
        await asyncio.to_thread(server.close)


async def test_jupyterlab_offers_the_kernels_with_their_logos(lab: Lab) -> None:
    specs = (await lab.ask("kernelspecs"))["kernelspecs"]
    assert specs[KERNEL]["spec"]["display_name"] == "Python 3 (gVisor)"
    assert specs[FILES_KERNEL]["spec"]["display_name"] == "Python 3 (gVisor, this folder)"
    assert "logo-svg" in specs[KERNEL]["resources"]


async def test_a_kernel_picked_in_jupyterlab_runs_restarts_and_ends(lab: Lab, product: Product) -> None:
    kernel_id = (await lab.ask("kernels", "POST", {"name": KERNEL}))["id"]
    assert (await lab.run(kernel_id, "import platform; x = 1; print(platform.release())"))[0].endswith("gvisor\n")
    assert kernel_id in product.ids()
    await lab.ask(f"kernels/{kernel_id}/restart", "POST", {})
    assert await lab.run(kernel_id, "x") == ("", "NameError")
    await lab.ask(f"kernels/{kernel_id}", "DELETE")
    assert kernel_id not in product.ids()


async def test_a_session_opens_the_notebooks_folder_to_the_files_kernel(lab: Lab) -> None:
    wanted = {"kernel": {"name": FILES_KERNEL}, "path": "analysis.ipynb", "type": "notebook", "name": "analysis"}
    session = await lab.ask("sessions", "POST", wanted)
    text, _ = await lab.run(session["kernel"]["id"], "print(open('data.csv').read())")
    assert text == "1,2,3\n\n"


async def test_stopping_jupyterlab_leaves_no_sandbox(lab: Lab, product: Product) -> None:
    kernel_id = (await lab.ask("kernels", "POST", {"name": KERNEL}))["id"]
    await asyncio.to_thread(lab.close)
    assert not (product.home / "run" / kernel_id).exists()
    assert kernel_id not in product.ids()
