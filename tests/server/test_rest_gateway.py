"""The REST API of a real gateway with real sandboxes: what only those can show."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

import pytest
from acceptance import Product
from rest_service import route_of
from served import Answer, Served

from sandbox_gateway.server import openapi

pytestmark = pytest.mark.timeout(300)


async def run(gateway: Served, sandbox_id: str, code: str, **options: Any) -> list[dict[str, Any]]:
    """The events of a cell; the last one is its end."""
    events = [event async for event in events_of(gateway, sandbox_id, code, **options)]
    assert [event["type"] == "end" for event in events] == [False] * (len(events) - 1) + [True]
    return events


async def events_of(gateway: Served, sandbox_id: str, code: str, **options: Any) -> Any:
    """They as they come; leaving the loop closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 30)
    body = json.dumps({"code": code, **options}).encode()
    head = (
        f"POST /api/sandboxes/{sandbox_id}/execute HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {gateway.token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in status.split(b"\r\n")[0], status + await reader.read(1000)
        left = b""
        while size := int(await reader.readline(), 16):
            left += (await reader.readexactly(size + 2))[:-2]
            *lines, left = left.split(b"\n")
            for line in lines:
                event = json.loads(line)
                openapi.check(event, "ExecuteEvent")
                yield event
        assert not left
    finally:
        writer.close()


def described(method: str, path: str, answer: Answer, schema: str) -> Any:
    """The body, which the description has."""
    assert str(answer.status) in openapi.description()["paths"][route_of(path)][method.lower()]["responses"]
    openapi.check(answer.body, schema)
    return answer.body


async def test_one_that_is_being_made_is_shown_and_refuses_what_needs_it_whole(gateway: Served) -> None:
    statuses: set[int] = set()
    for _ in range(5):  # on a busy machine one may be made between two requests
        making = asyncio.create_task(gateway.create())
        while not making.done():
            for one in (await gateway.ok("GET", "/api/sandboxes?stats=true"))["sandboxes"]:
                assert (await gateway.ask("GET", f"/api/sandboxes/{one['id']}?stats=true")).status == 200
                statuses.add((await gateway.ask("POST", f"/api/sandboxes/{one['id']}/pause")).status)
        address = f"/api/sandboxes/{await making}"
        assert (await gateway.ok("POST", f"{address}/resume"))["state"] == "running"
        assert (await gateway.ask("DELETE", address)).status == 204
        if 409 in statuses:
            break
    assert 409 in statuses
    assert statuses <= {200, 409}


async def test_the_life_of_a_sandbox_by_rest_alone(gateway: Served) -> None:
    wanted = str(uuid.uuid4())
    body = {"id": wanted, "env": {"WHO": "ann"}, "name": "a.ipynb", "resources": {"idle": {"suspend": "1h"}}}
    made = described("POST", "/api/sandboxes", await gateway.ask("POST", "/api/sandboxes", body), "Sandbox")
    address = f"/api/sandboxes/{wanted}"
    assert made["id"] == wanted and made["state"] == "running" and made["limits"]["memory"] > 0
    assert made["idle"] == {"pause": None, "suspend": 3600, "expire": None}
    assert (await run(gateway, wanted, "import os; kept = os.environ['WHO']; kept"))[0]["data"]["text/plain"] == "'ann'"

    asleep = described("POST", f"{address}/suspend", await gateway.ask("POST", f"{address}/suspend?wait=60"), "Sandbox")
    assert asleep["state"] == "suspended" and asleep["snapshot"]
    listed = await gateway.ok("GET", "/api/sandboxes?state=suspended")
    assert [one["id"] for one in listed["sandboxes"]] == [wanted]
    saved = (await gateway.ok("GET", f"{address}?stats=true"))["usage"]
    assert saved["saved"] > 1 << 20 and saved["memory"] is None
    quota = described("GET", "/api/quota", await gateway.ask("GET", "/api/quota"), "Quota")
    assert (quota["suspended"]["used"], quota["disk"]["used"]) == (1, saved["saved"])
    assert (await run(gateway, wanted, "print(kept)"))[0] == {"type": "stdout", "text": "ann\n"}, "it wakes"

    children = (await gateway.ok("POST", f"{address}/fork?wait=60", {"count": 2}))["children"]
    assert [child["error"] for child in children] == [None, None]
    for child in children:
        seen = described("GET", address, await gateway.ask("GET", f"/api/sandboxes/{child['id']}"), "Sandbox")
        assert seen["parent"] == f"sandbox:{wanted}" and seen["idle"] == made["idle"] and seen["owner"] == made["owner"]
        assert (await run(gateway, child["id"], "kept"))[0]["data"]["text/plain"] == "'ann'"

    saved = await gateway.ok("POST", f"{address}/snapshots?wait=60", {"name": "loaded"})
    openapi.check(saved, "Snapshot")
    started = (await gateway.ok("POST", "/api/snapshots/loaded/start?wait=60"))["children"][0]
    assert started["error"] is None
    assert (await run(gateway, started["id"], "kept"))[0]["data"]["text/plain"] == "'ann'"
    assert (await gateway.ask("DELETE", "/api/snapshots/loaded")).status == 204

    assert (await gateway.ok("POST", f"{address}/pause"))["state"] == "paused"
    stats = described("GET", f"{address}/stats", await gateway.ask("GET", f"{address}/stats"), "Stats")
    assert stats["memory"] > 1 << 20 and stats["disk"] is None, "a paused agent cannot look"
    assert (await gateway.ok("POST", f"{address}/resume?wait=60"))["state"] == "running"
    assert (await gateway.ok("POST", f"{address}/restart"))["state"] == "running"
    assert (await run(gateway, wanted, "kept"))[0]["name"] == "NameError"
    events = described("GET", f"{address}/events", await gateway.ask("GET", f"{address}/events"), "EventList")
    kinds = [event["kind"] for event in events["events"]]
    assert {"created", "started", "suspended", "resumed", "forked", "snapshot", "paused", "restarted"} <= set(kinds)

    assert (await gateway.ask("DELETE", address)).status == 204
    over = described("GET", address, await gateway.ask("GET", address), "Sandbox")
    assert over["state"] == "terminated" and over["death"]["kind"] == "stopped"
    assert (await gateway.ask("DELETE", f"{address}?forget=1")).status == 204
    assert (await gateway.ask("GET", address)).status == 404


async def test_a_cell_whose_time_is_over_is_interrupted_and_the_kernel_goes_on(gateway: Served) -> None:
    one = await gateway.create()
    begun = time.monotonic()
    events = await run(gateway, one, "x = 1\nimport time\nprint('go')\ntime.sleep(60)", timeout=5)
    assert time.monotonic() - begun < 30
    assert events[0] == {"type": "stdout", "text": "go\n"} and events[-1]["status"] == "timeout"
    assert (await run(gateway, one, "x"))[0]["data"]["text/plain"] == "1"


async def test_who_goes_away_interrupts_his_cell(gateway: Served) -> None:
    one = await gateway.create()
    async for event in events_of(gateway, one, "import time\nprint('go')\ntime.sleep(60)"):
        assert event["text"] == "go\n"
        break
    async with asyncio.timeout(30):
        assert (await run(gateway, one, "2"))[0]["data"]["text/plain"] == "2"


async def test_a_kernel_that_ends_in_a_cell_is_told_and_another_follows(gateway: Served) -> None:
    one = await gateway.create()
    for _ in range(2):
        events = await run(gateway, one, "import os; os._exit(3)")
        assert events[-1]["status"] == "failed" and events[-1]["code"] == "kernel_died"
        async with asyncio.timeout(60):
            while (await gateway.ask("POST", f"/api/sandboxes/{one}/execute", {"code": ""})).status != 200:
                await asyncio.sleep(0.2)


async def test_a_clean_restart_leaves_nothing_but_the_id_and_what_was_chosen(gateway: Served) -> None:
    one = await gateway.create(name="report", resources={"memory": "300MiB"})
    address = f"/api/sandboxes/{one}"
    assert (await run(gateway, one, "x = 1\nopen('file', 'w').close()"))[-1]["status"] == "ok"
    for _ in range(2):
        made = await gateway.ok("POST", f"{address}/restart", {"clean": True})
        assert (made["id"], made["state"], made["name"]) == (one, "running", "report")
        assert made["limits"]["memory"] == 300 << 20
        told = await run(gateway, one, "import os\nprint('x' in globals(), os.path.exists('file'))")
        assert told[0] == {"type": "stdout", "text": "False False\n"}
        await gateway.ok("POST", f"{address}/suspend?wait=60")  # the second time it is asleep
    profiles = {each["name"]: each for each in (await gateway.ok("GET", "/api/profiles"))["profiles"]}
    assert profiles["python3-gvisor"]["start"]["template"] in (True, False)


async def test_a_clean_restart_that_cannot_make_another_ends_nothing(gateway: Served, product: Product) -> None:
    profiles = product.home / "profiles.toml"
    before = profiles.read_text()
    profiles.write_text(before + "\n[profiles.passing]\n")
    try:
        one = await gateway.create(profile="passing")
        assert (await run(gateway, one, "x = 42"))[-1]["status"] == "ok"
        profiles.write_text(before)
        refused = await gateway.ask("POST", f"/api/sandboxes/{one}/restart", {"clean": True})
        assert (refused.status, refused.body["code"]) == (404, "unknown_profile")
        assert (await run(gateway, one, "print(x)"))[0] == {"type": "stdout", "text": "42\n"}
    finally:
        profiles.write_text(before)


async def test_a_restart_ends_the_cell_that_runs(gateway: Served) -> None:
    one = await gateway.create()
    told = []
    async for event in events_of(gateway, one, "import time\nprint('go')\ntime.sleep(60)"):
        told.append(event)
        if event["type"] == "stdout":
            await gateway.ok("POST", f"/api/sandboxes/{one}/restart")
    assert told[-1]["type"] == "end" and told[-1]["status"] == "failed"
    assert (await run(gateway, one, "1"))[-1]["status"] == "ok"


async def test_a_cell_sent_right_after_a_restart_ends_when_its_kernel_dies(gateway: Served) -> None:
    one = await gateway.create()
    assert (await run(gateway, one, "1"))[-1]["status"] == "ok"
    await gateway.ok("POST", f"/api/sandboxes/{one}/restart")
    async with asyncio.timeout(60):
        told = await run(gateway, one, "import os\nos._exit(1)")
    assert told[-1]["status"] == "failed" and told[-1]["code"] == "kernel_died"


async def test_input_over_plain_http(gateway: Served) -> None:
    one = await gateway.create()
    told = []
    async for event in events_of(gateway, one, "print('hello', input('who? '))", stdin=True):
        told.append(event)
        if event["type"] == "input_request":
            await gateway.ok("POST", f"/api/sandboxes/{one}/input", {"value": "ann"})
    assert told[0] == {"type": "input_request", "prompt": "who? ", "password": False}
    assert {"type": "stdout", "text": "hello ann\n"} in told
    assert (await run(gateway, one, "input()"))[0]["name"] == "StdinNotImplementedError"


async def test_a_large_result_is_one_line(gateway: Served) -> None:
    one = await gateway.create()
    events = await run(gateway, one, "print('x' * 12_000_000)")
    assert sum(len(event["text"]) for event in events if event["type"] == "stdout") == 12_000_001


async def test_what_is_chosen_holds_inside_and_what_is_out_of_bounds_makes_nothing(gateway: Served) -> None:
    answer = await gateway.ask("POST", "/api/sandboxes", {"resources": {"processes": 10**6}})
    assert answer.status == 400 and answer.body["field"] == "resources.processes"
    assert (await gateway.ok("GET", "/api/sandboxes"))["sandboxes"] == []
    one = await gateway.create(resources={"disk": "64MiB"})
    await run(gateway, one, "open('/home/jovyan/b', 'wb').write(b'x' * (5 << 20)); open('/tmp/c', 'w').write('y')")
    used = (await gateway.ok("GET", f"/api/sandboxes/{one}?stats=true"))["usage"]
    assert 5 << 20 < used["disk"] < 6 << 20 and used["cpu_seconds"] > 0 and used["gpu"] is None
    told = await run(gateway, one, "open('/home/jovyan/a', 'wb').write(b'x' * (100 << 20))")
    assert [event["name"] for event in told if event["type"] == "error"] == ["OSError"]
