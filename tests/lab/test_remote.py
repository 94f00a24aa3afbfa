"""The same interface where the kernels are on a gateway (``--gateway-url``)."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from browser import Lab, window
from cut_proxy import CutProxy
from lab_page import chip, choose, entry, running
from lab_server import KERNEL
from notebook_files import remember
from playwright.async_api import expect
from served import V1, Served
from tornado.httpclient import HTTPClientError

pytestmark = pytest.mark.timeout(300)
SCRIPT = "from IPython.display import HTML\nHTML('<script>window.pwned = true</script>')"


@pytest.fixture
async def ended(remote_lab: Lab, gateway: Served) -> AsyncIterator[None]:
    yield
    await remote_lab.end_kernels()
    await gateway.clear()


async def test_a_notebook_on_a_gateway_is_suspended_resumed_and_forked(
    remote_lab: Lab, gateway: Served, browser_path: str, tmp_path: Path, ended: None
) -> None:
    async with window(remote_lab, browser_path, tmp_path, "remote") as page:
        remote_lab.write("far.ipynb", "x = 41", "print(x + 1)", SCRIPT, kernel=KERNEL)
        remember(remote_lab, "far.ipynb", profile=KERNEL, resources={"memory": 700 << 20})
        await page.visit("far.ipynb")
        await page.ready()
        await expect(chip(page)).to_have_attribute("data-look", "running")
        await expect(chip(page)).to_contain_text("of 700 MiB")
        await page.run(0)
        await page.done(0, 1)
        await choose(page, "Suspend…")
        await page.accept()
        await expect(chip(page)).to_have_attribute("data-look", "suspended")
        await page.run(1)
        await expect(chip(page)).to_contain_text("resumed in")  # for five seconds; told by the gateway's events
        await page.printed(1, "42")
        await page.run(2)
        await expect(page.notebook.locator(".sg-Bar")).to_be_visible()
        assert await page.page.evaluate("window.pwned === undefined"), "a script of the gateway's kernel ran"
        await choose(page, "Fork This Notebook")
        await expect(page.page.locator(".lm-TabBar-tab", has_text="far-fork1.ipynb")).to_be_visible()
        await running(page)
        await expect(entry(page, "far.ipynb").locator(".sg-RunningItem")).to_have_count(1)
        assert page.errors() == []


def through(remote_lab: Lab) -> Served:
    """Ways to ask JupyterLab's server what a client asks a gateway."""
    served = Served(Path(remote_lab.log), token=remote_lab.token)
    served.port = remote_lab.port
    return served


@pytest.mark.parametrize("protocol", [V1, None], ids=["v1", "legacy"])
async def test_buffers_and_large_messages_pass_both_ways(
    remote_lab: Lab, gateway: Served, ended: None, protocol: str | None
) -> None:
    served = through(remote_lab)
    kernel = (await served.ok("POST", "/api/kernels", {"name": KERNEL}))["id"]
    socket = await served.open(kernel, protocol=protocol)
    code = """
from IPython.display import display
def opened(comm, msg):
    comm.on_msg(lambda msg: comm.send({"size": len(msg["buffers"][0])}, buffers=[bytes(msg["buffers"][0])[::-1]]))
get_ipython().kernel.comm_manager.register_target("echo", opened)
display({"text/plain": "x" * (30 << 20)}, raw=True)
"""
    cell = await socket.run(code)
    (shown,) = (m for m in cell.messages if m["msg_type"] == "display_data")
    assert len(shown["content"]["data"]["text/plain"]) == 30 << 20
    socket.send("comm_open", {"comm_id": "one", "target_name": "echo", "data": {}})
    sent = os.urandom(12 << 20)
    socket.send("comm_msg", {"comm_id": "one", "data": {}}, buffers=[sent])
    async with asyncio.timeout(60):
        while (message := await socket.next()) is None or message["msg_type"] != "comm_msg":
            assert message is not None, "the WebSocket was closed"
    assert message["content"]["data"] == {"size": len(sent)}
    assert [bytes(buffer) for buffer in message["buffers"]] == [sent[::-1]]
    socket.close()


async def test_nothing_is_lost_when_the_gateway_is_killed_under_a_running_cell(
    remote_lab: Lab, gateway: Served, line: CutProxy, ended: None
) -> None:
    served = through(remote_lab)
    kernel = (await served.ok("POST", "/api/kernels", {"name": KERNEL}))["id"]
    socket = await served.open(kernel)
    cell = socket.execute("import time\nfor n in range(100):\n    print(n, flush=True)\n    time.sleep(0.03)")
    await socket.follow(cell, 20)
    gateway.kill()
    line.cut()  # at once, as the gateway's machine would
    later = socket.execute("print('sent while it was away')")
    await gateway.start()
    await socket.finish(cell)
    cell.once()
    assert cell.stdout == "".join(f"{n}\n" for n in range(100))
    await socket.finish(later)
    assert later.stdout == "sent while it was away\n"
    socket.close()


async def test_what_the_network_took_with_it_is_done_once(
    remote_lab: Lab, gateway: Served, line: CutProxy, ended: None
) -> None:
    """What had left this machine when the line died goes out again; what had arrived does not."""
    served = through(remote_lab)
    kernel = (await served.ok("POST", "/api/kernels", {"name": KERNEL}))["id"]
    socket = await served.open(kernel)
    await socket.run("said = []")
    line.swallow()
    cells = {cell.id: cell for cell in [socket.execute(f"said.append({number})") for number in range(20)]}
    async with asyncio.timeout(30):
        while line.swallowed < 20 * 200:
            await asyncio.sleep(0.01)
    line.cut()
    line.swallow(False)
    for number in range(20, 200):
        cell = socket.execute(f"said.append({number})")
        cells[cell.id] = cell
        await asyncio.sleep(0.005)
        if number % 20 == 0:
            line.cut()
    while not all(cell.done for cell in cells.values()):
        message = await socket.next()
        assert message is not None, "the WebSocket was closed"
        if (done := cells.get(message["parent_header"].get("msg_id", ""))) is not None:
            done.take(message)
    assert (await socket.run("print(said == list(range(200)), len(said))")).stdout == "True 200\n"
    socket.close()


def frame(opcode: int, data: bytes) -> bytes:
    """A frame as a client sends it (RFC 6455)."""
    length = struct.pack("!B", 0x80 | len(data)) if len(data) < 126 else struct.pack("!BH", 0x80 | 126, len(data))
    return bytes([0x80 | opcode]) + length + bytes(4) + data


@pytest.mark.parametrize("at_once", [False, True])
async def test_what_a_page_said_before_it_went_is_done(
    remote_lab: Lab, gateway: Served, ended: None, at_once: bool
) -> None:
    served = through(remote_lab)
    kernel = (await served.ok("POST", "/api/kernels", {"name": KERNEL}))["id"]
    watching = await served.open(kernel)
    await watching.run("said = []")
    if at_once:
        reader, writer = await asyncio.open_connection("127.0.0.1", remote_lab.port)
        lines = [
            f"GET /api/kernels/{kernel}/channels?session_id=going HTTP/1.1",
            f"Host: 127.0.0.1:{remote_lab.port}",
            f"Authorization: token {remote_lab.token}",
            *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA=="),
        ]
        cells = []
        for number in range(20):
            header = {"msg_id": str(number), "msg_type": "execute_request", "session": "going", "version": "5.4"}
            content = {"code": f"said.append({number})"}
            whole = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
            cells.append(frame(1, json.dumps(whole).encode()))
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + b"".join(cells) + frame(8, b""))
        await reader.read()
        writer.close()
    else:
        going = await served.open(kernel)
        for number in range(20):
            going.execute(f"said.append({number})")
        going.close()
    async with asyncio.timeout(60):
        while (await watching.run("print(len(said))")).stdout != "20\n":
            pass
    assert (await watching.run("print(said)")).stdout == f"{list(range(20))}\n"
    watching.close()


async def test_a_connection_to_a_kernel_that_is_gone_is_refused(remote_lab: Lab, gateway: Served, ended: None) -> None:
    served = through(remote_lab)
    kernel = (await served.ok("POST", "/api/kernels", {"name": KERNEL}))["id"]
    socket = await served.open(kernel)
    await socket.run("1")
    assert (await gateway.ask("DELETE", f"/api/sandboxes/{kernel}?forget=true")).status == 204
    while await socket.next() is not None:
        pass  # told that it is gone, not left waiting
    socket.close()
    with pytest.raises(HTTPClientError) as refused:
        await served.open(kernel)
    assert refused.value.code == 404


async def test_what_the_gateway_refuses_is_passed_on_as_it_is(remote_lab: Lab, gateway: Served, ended: None) -> None:
    served = through(remote_lab)
    missing = await served.ask("GET", "/api/sandboxes/none")
    assert (missing.status, missing.body["code"]) == (404, "unknown_sandbox")
    assert missing.headers["Content-Type"].startswith("application/problem+json")
    wrong = await served.ask("GET", "/api/sandboxes?limit=no")
    assert (wrong.status, wrong.body["field"]) == (400, "limit")
    stranger = await served.ask("GET", "/api/sandboxes", token="wrong")
    assert stranger.status in (401, 403)
    made = await served.ok("POST", "/api/sandboxes", {"profile": "python3-gvisor", "name": "by hand"})
    assert [one["name"] for one in (await served.ok("GET", "/api/sandboxes"))["sandboxes"]] == ["by hand"]
    assert (await served.ask("DELETE", f"/api/sandboxes/{made['id']}?forget=true")).status == 204


async def test_a_session_takes_any_kernel_that_the_gateway_has_and_no_other(
    remote_lab: Lab, gateway: Served, ended: None
) -> None:
    served = through(remote_lab)
    session = {"path": "any.ipynb", "name": "any.ipynb", "type": "notebook", "kernel": {"name": KERNEL}}
    begun = await served.ok("POST", "/api/sessions", session)
    made = await served.ok("POST", "/api/sandboxes", {"profile": KERNEL, "resources": {"memory": 700 << 20}})
    changed = await served.ok("PATCH", f"/api/sessions/{begun['id']}", {"kernel": {"id": made["id"]}})
    assert changed["kernel"]["id"] == made["id"]
    assert [one["id"] for one in await served.ok("GET", "/api/kernels")] == [made["id"]]
    nobodys = str(uuid.uuid4())
    refused = await served.ask("PATCH", f"/api/sessions/{begun['id']}", {"kernel": {"id": nobodys}})
    assert (refused.status, refused.body["message"]) == (404, f"Kernel does not exist: {nobodys}")
    odd = await served.ask("PATCH", f"/api/sessions/{begun['id']}", {"kernel": {"id": "../../sandboxes"}})
    assert odd.status == 400
    assert (await served.ok("GET", f"/api/sessions/{begun['id']}"))["kernel"]["id"] == made["id"]


async def test_a_gateway_that_is_away_is_no_refusal(remote_lab: Lab, gateway: Served) -> None:
    served = through(remote_lab)
    await asyncio.to_thread(gateway.stop)
    try:
        assert (await served.ask("GET", "/api/sandboxes")).status == 502
    finally:
        await gateway.start()
    assert (await served.ask("GET", "/api/sandboxes")).status == 200
