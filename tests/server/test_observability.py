"""A real gateway from outside: its events and figures tell what happens, and its secrets show nowhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from acceptance import Product
from served import Served
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from sandbox_gateway.server.events import KERNEL_ACTIONS, OPERATION, SANDBOX

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def told(gateway: Served) -> AsyncIterator[WebSocketClientConnection]:
    """A subscriber of the gateway's events."""
    address = f"ws://127.0.0.1:{gateway.port}/api/events/subscribe"
    connected = await websocket_connect(HTTPRequest(address, headers={"Authorization": f"token {gateway.token}"}))
    yield connected
    connected.close()
    await asyncio.sleep(0.1)


async def until(told: WebSocketClientConnection, **wanted: str) -> list[dict[str, Any]]:
    """The events up to the first of a sandbox that has these values."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while True:
            raw = await told.read_message()
            assert isinstance(raw, str)
            found.append(json.loads(raw))
            if found[-1]["schema_id"] == SANDBOX and wanted.items() <= found[-1].items():
                return found


async def figure(gateway: Served, name: str) -> float:
    """The sum of a metric's values, whatever their labels."""
    text = (await gateway.ok("GET", "/metrics")).decode()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"sandbox_gateway_{name}")
    )


async def test_the_life_of_a_sandbox_is_told_and_counted(gateway: Served, told: WebSocketClientConnection) -> None:
    names = ("starts_total", "wakes_total", 'phase_seconds_count{phase="suspend"}', "messages_total")
    before = {name: await figure(gateway, name) for name in names}
    sandbox = await gateway.create()
    events = await until(told, sandbox=sandbox, kind="started")
    about = [event for event in events if event["schema_id"] == SANDBOX and event["sandbox"] == sandbox]
    assert [event["kind"] for event in about] == ["created", "started"] and about[0]["owner"] == "default"
    assert about[1]["profile"] == "python3-gvisor" and about[1]["state"] == "running"
    assert about[1]["data"]["seconds"] > 0

    socket = await gateway.open(sandbox)
    assert (await socket.run("print(6 * 7)")).text == "42\n"
    await gateway.ok("POST", f"/api/sandboxes/{sandbox}/suspend?wait=60")
    await until(told, sandbox=sandbox, kind="suspended")
    assert await figure(gateway, 'sandboxes{state="suspended"}') == 1
    assert (await socket.run("print(6 * 8)")).text == "48\n"
    await until(told, sandbox=sandbox, kind="woke")
    await until(told, sandbox=sandbox, kind="resumed")
    socket.close()
    await gateway.ok("DELETE", f"/api/sandboxes/{sandbox}")
    (*_, last) = await until(told, sandbox=sandbox, kind="stopped")
    assert last["owner"] == "default"
    after = {name: await figure(gateway, name) for name in names}
    assert [after[name] - before[name] for name in names[:3]] == [1, 1, 1]
    assert after["messages_total"] > before["messages_total"]
    assert sandbox not in (await gateway.ok("GET", "/metrics")).decode()


async def test_jupyters_own_events_tell_of_kernels_that_start_and_are_shut_down(
    gateway: Served, told: WebSocketClientConnection
) -> None:
    kernel_id = (await gateway.ok("POST", "/api/kernels", {"name": "python3-gvisor"}))["id"]
    await gateway.ok("POST", f"/api/kernels/{kernel_id}/restart")
    await gateway.ok("DELETE", f"/api/kernels/{kernel_id}")
    actions: list[str] = []
    async with asyncio.timeout(60):
        while "shutdown" not in actions:
            raw = await told.read_message()
            assert isinstance(raw, str)
            event = json.loads(raw)
            if event["schema_id"] == KERNEL_ACTIONS and event["kernel_id"] == kernel_id:
                assert event["status"] == "success"
                actions.append(event["action"])
    assert actions == ["start", "restart", "shutdown"]


async def test_a_start_by_jupyters_own_route_is_told_by_its_phases(
    gateway: Served, told: WebSocketClientConnection
) -> None:
    kernel_id = (await gateway.ok("POST", "/api/kernels", {"name": "python3-gvisor"}))["id"]
    phases: list[str] = []
    async with asyncio.timeout(60):
        while "succeeded" not in phases:
            raw = await told.read_message()
            assert isinstance(raw, str)
            event = json.loads(raw)
            if event["schema_id"] == OPERATION and event["sandbox"] == kernel_id:
                assert (event["kind"], event["owner"]) == ("create", "default")
                phases.append(event["phase"])
    assert phases[0] == "started" and "progress" in phases


async def test_the_token_is_in_no_log_no_event_and_no_command_line(
    gateway: Served, told: WebSocketClientConnection
) -> None:
    secret = "a-variable-that-nobody-else-may-know"
    sandbox = await gateway.create(env={"API_KEY": secret})
    for path in ("/api/status", "/nowhere", f"/api/kernels/{sandbox}", "/api/kernels/none"):
        await gateway.ask("GET", f"{path}?token={gateway.token}", Referer=f"http://x/?token={gateway.token}")
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    for line in lines:
        assert gateway.token.encode() not in line and secret.encode() not in line, line
    await gateway.ok("DELETE", f"/api/sandboxes/{sandbox}")
    events = json.dumps(await until(told, sandbox=sandbox, kind="stopped"))
    for text in (events, gateway.log.read_text(), (await gateway.ok("GET", "/metrics")).decode()):
        assert gateway.token not in text and secret not in text
    assert "/nowhere" in gateway.log.read_text()


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False  # it has ended meanwhile
    return True


async def test_the_log_can_be_json_lines_with_the_sandboxs_id(product: Product, tmp_path: Path) -> None:
    served = Served(tmp_path / "gateway.log", "--SandboxGateway.log_json=true")
    await served.start()
    try:
        sandbox = await served.create()
        await served.ask("GET", f"/api/kernels/{sandbox[:-4]}0000?token=wrong")
        await served.clear()
    finally:
        served.stop()
    lines = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(lines[-1])
    assert any(line.get("sandbox") == f"{sandbox[:-4]}0000" for line in lines), lines
