"""Clients that others wrote work with a running gateway as they are.

Each is a small program in ``clients/`` that runs in a process of its own with the library that it is about, as people
use it: only the address, the token and, where it has to be named, the kernel are the gateway's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from acceptance import KERNEL, PLAIN
from served import Served

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(KERNEL == PLAIN, reason="the gateway has sandboxes only"),
]

PROGRAMS = Path(__file__).resolve().parent / "clients"

KERNEL_CLIENT = ("jupyter-kernel-client>=1,<2", "jupyter-mimetypes")
"""Installed without pyarrow, which is 150 MB for tables of data and is imported only for these."""


def _need(requirement: str, *modules: str) -> None:
    """Skip where a client is not installed; it is not imported here, where its own warnings would be errors."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{requirement} is not installed: no {', '.join(missing)}")


async def _run(program: str, gateway: Served, **variables: str) -> Any:
    """What a client's program printed last."""
    environment = {
        **os.environ,
        "PORT": str(gateway.port),
        "TOKEN": gateway.token,
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(PROGRAMS / program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}\n{gateway.log.read_text()[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kernel_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with jupyter-kernel-client, by pip; skips with pip's reason where that fails."""
    folder = tmp_path_factory.mktemp("kernel_client")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(folder), *KERNEL_CLIENT], capture_output=True, text=True, timeout=180, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip cannot get jupyter-kernel-client: {last}")
    return str(folder)


async def test_jupyter_kernel_client_runs_asks_interrupts_restarts_and_shares(
    gateway: Served, kernel_client: str
) -> None:
    path = os.pathsep.join(filter(None, [kernel_client, os.environ.get("PYTHONPATH", "")]))
    found = await _run("kernel_client.py", gateway, PYTHONPATH=path)
    assert found["language"] == "python"
    assert found["ran"]["status"] == "ok"
    assert found["ran"]["outputs"] == [
        {"output_type": "stream", "name": "stdout", "text": "out\n"},
        {"output_type": "stream", "name": "stderr", "text": "err\n"},
        {
            "output_type": "execute_result",
            "metadata": {},
            "data": {"text/plain": "42"},
            "execution_count": found["ran"]["execution_count"],
        },
    ]
    assert found["error"]["status"] == "error"
    assert found["error"]["outputs"][0]["ename"] == "ZeroDivisionError"
    assert "answer" in found["variables"]
    assert found["input"]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "hello sandbox\n"}]
    assert found["interrupted"] == "error"
    assert found["second"] == [{"output_type": "stream", "name": "stdout", "text": "42\n"}]
    assert found["alive"]
    assert found["listed"]
    assert found["restarted"] == [{"output_type": "stream", "name": "stdout", "text": "False\n"}]
    assert (await gateway.ask("GET", f"/api/kernels/{found['id']}")).status == 404, "it ends the kernel that it began"


async def test_autogens_jupyter_executor_keeps_state_saves_figures_and_restarts(
    gateway: Served, tmp_path: Path
) -> None:
    _need("autogen-ext[docker-jupyter-executor]", "autogen_ext", "aiohttp", "docker", "websockets")
    found = await _run("autogen_executor.py", gateway, KERNEL=KERNEL, FOLDER=str(tmp_path))
    assert found["state"]["exit_code"] == 0
    assert found["state"]["output"].strip() == "42"
    assert found["error"]["exit_code"] == 1
    assert "ZeroDivisionError" in found["error"]["output"]
    assert found["html"]["files"] == [b"<b>bold<".hex()]
    assert found["plot"]["files"] == [b"\x89PNG\r\n\x1a\n".hex()]
    assert found["restarted"]["output"].strip() == "False"
    assert await gateway.ok("GET", "/api/kernels") == [], "it ends the kernel that it began"


async def test_smolagents_executor_runs_tools_and_gives_the_final_answer(gateway: Served) -> None:
    _need("smolagents[docker]", "smolagents", "docker", "websocket")
    found = await _run("smolagents_executor.py", gateway)
    assert found["cell"] == ["21", "logged ['a', 'b']\n", False]
    assert found["tool"] == "42\n"
    assert found["final"] == [{"answer": 42}, True]
    name, text = found["error"]
    assert name == "AgentError"
    assert "ZeroDivisionError" in text
    [kernel] = await gateway.ok("GET", "/api/kernels")
    assert kernel["id"] == found["kernel"]
    assert kernel["connections"] == 0
