"""Running code over plain HTTP: events as they come, and always an end."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeLive, echo
from rest_service import Rest, rest_service

from sandbox_gateway import kernel_client
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import State
from sandbox_gateway.results import Stream
from sandbox_gateway.server import openapi
from sandbox_gateway.server.execute_handler import event_of, line_of
from sandbox_gateway.wire.frames import Channel


@pytest.fixture
async def rest(tmp_path: Path) -> AsyncIterator[Rest]:
    async with rest_service(tmp_path) as made:
        yield made


@pytest.fixture
def live(rest: Rest) -> FakeLive:
    return rest.gateway.lifecycle.live[rest.gateway.add("ann").id]


def events_in(body: bytes) -> list[dict[str, Any]]:
    """The lines, each of which the description has; exactly the last one is an end."""
    found = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in body.splitlines()]
    for event in found:
        openapi.check(event, "ExecuteEvent")
    assert [event["type"] == "end" for event in found] == [False] * (len(found) - 1) + [True]
    return found


async def run(rest: Rest, live: FakeLive, code: str = "1", **options: Any) -> list[dict[str, Any]]:
    answer = await rest.ask("POST", f"/api/sandboxes/{live.id}/execute", {"code": code, **options})
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/x-ndjson"
    return events_in(answer.body)


async def opened(rest: Rest, live: FakeLive, **body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that reads when it likes; the answer's head has been read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.server.app.port)
    content = json.dumps({"code": "1", **body}).encode()
    head = f"POST /api/sandboxes/{live.id}/execute HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {rest.token}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def line_from(reader: asyncio.StreamReader) -> dict[str, Any]:
    """One chunk that is one line."""
    size = int(await reader.readline(), 16)
    content = await reader.readexactly(size + 2)
    found: dict[str, Any] = json.loads(content)
    return found


async def test_everything_that_a_cell_gives_is_an_event(rest: Rest, live: FakeLive) -> None:
    def script(live: FakeLive, code: str) -> None:
        shown = {
            "data": {"text/plain": "x", "image/png": "aGk="},
            "metadata": {"a": 1},
            "transient": {"display_id": "d"},
        }
        live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "out"})
        live.say(Channel.IOPUB, "stream", {"name": "stderr", "text": "err"})
        live.say(Channel.IOPUB, "display_data", shown)
        live.say(Channel.IOPUB, "update_display_data", shown)
        live.say(Channel.IOPUB, "clear_output", {"wait": True})
        live.say(Channel.IOPUB, "execute_result", {"data": {"text/plain": "2"}, "metadata": {}, "execution_count": 1})
        live.say(Channel.IOPUB, "error", {"ename": "E", "evalue": "v", "traceback": ["a", "b"]})
        live.finish("error")

    rest.gateway.script = script
    bundle = {"data": {"text/plain": "x", "image/png": "aGk="}, "metadata": {"a": 1}, "display_id": "d"}
    assert await run(rest, live) == [
        {"type": "stdout", "text": "out"},
        {"type": "stderr", "text": "err"},
        {"type": "display", **bundle},
        {"type": "update_display", **bundle},
        {"type": "clear_output", "wait": True},
        {"type": "result", "data": {"text/plain": "2"}, "metadata": {}, "count": 1},
        {"type": "error", "name": "E", "value": "v", "traceback": ["a", "b"]},
        {"type": "end", "status": "error", "count": 1},
    ]


async def test_events_come_as_they_happen(rest: Rest, live: FakeLive) -> None:
    rest.gateway.script = lambda live, code: live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "now"})
    reader, writer = await opened(rest, live)
    async with asyncio.timeout(10):
        assert await line_from(reader) == {"type": "stdout", "text": "now"}
        live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "then"})
        assert await line_from(reader) == {"type": "stdout", "text": "then"}
        live.finish()
        assert (await line_from(reader))["type"] == "end"
    writer.close()
    await writer.wait_closed()


async def test_a_cell_whose_time_is_over_is_interrupted_and_ends(
    rest: Rest, live: FakeLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest.gateway.script = lambda live, code: None
    live.on_interrupt = lambda: live.finish("error")
    [end] = await run(rest, live, timeout=0.1)
    assert end["status"] == "timeout" and end["code"] == "timeout" and live.interrupts == 1
    monkeypatch.setattr(kernel_client, "INTERRUPT_PATIENCE", 0.1)
    live.on_interrupt = lambda: None
    [end] = await run(rest, live, timeout=0.1)
    assert end["status"] == "timeout" and "does not heed" in end["message"]


async def test_a_kernel_that_dies_is_an_end_with_its_reason(rest: Rest, live: FakeLive) -> None:
    rest.gateway.script = lambda live, code: live.die()
    [end] = await run(rest, live)
    assert end["status"] == "failed" and end["code"] == "kernel_died" and "out of memory" in end["message"]
    told = await rest.problem("POST", f"/api/sandboxes/{live.id}/execute", {"code": "1"})
    assert told["code"] == "kernel_died" and told["status"] == 502


async def test_who_closes_the_connection_interrupts_the_cell(rest: Rest, live: FakeLive) -> None:
    rest.gateway.script = lambda live, code: live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "x"})
    live.on_interrupt = lambda: live.finish("error")
    reader, writer = await opened(rest, live)
    await line_from(reader)
    waiting = asyncio.create_task(run(rest, live, "second"))
    _, hopeless = await opened(rest, live, code="never run")
    hopeless.close()
    await asyncio.sleep(0.1)
    assert live.interrupts == 0, "a cell that waits hits no other"
    rest.gateway.script = echo
    writer.close()
    assert (await waiting)[0]["text"] == "second"
    assert live.interrupts == 1 and [one["code"] for one in live.requests] == ["1", "second"]


async def test_a_connection_that_is_reset_is_as_one_that_is_closed(rest: Rest, live: FakeLive) -> None:
    rest.gateway.script = lambda live, code: live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "x"})
    _, writer = await opened(rest, live)
    reset = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(1, 13, reset)  # SO_LINGER
    writer.transport.abort()
    async with asyncio.timeout(10):
        while not live.interrupts:
            await asyncio.sleep(0.01)
    live.finish()


async def test_a_client_that_does_not_read_costs_a_bounded_amount_and_is_told_what_is_missing(
    rest: Rest, live: FakeLive
) -> None:
    def script(live: FakeLive, code: str) -> None:
        for _ in range(60):
            live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "x" * (1 << 20)})
        live.finish()

    rest.gateway.script = script
    events = await run(rest, live)
    told = sum(len(event["text"]) for event in events if event["type"] == "stdout")
    assert told <= 20 << 20
    assert any(event["type"] == "stderr" and "left out" in event["text"] for event in events)
    assert events[-1]["status"] == "ok"


async def test_input_is_asked_for_and_answered_where_the_caller_can(rest: Rest, live: FakeLive) -> None:
    rest.gateway.script = lambda live, code: live.say(
        Channel.STDIN, "input_request", {"prompt": "name? ", "password": False}
    )
    address = f"/api/sandboxes/{live.id}/input"
    assert (await rest.problem("POST", address, {"value": "too early"}))["status"] == 409
    reader, writer = await opened(rest, live, stdin=True)
    assert await line_from(reader) == {"type": "input_request", "prompt": "name? ", "password": False}
    assert (await rest.ask("POST", address, {"value": "ann"})).status == 204
    assert await line_from(reader) == {"type": "stdout", "text": "ann"}
    assert live.answers == ["ann"] and live.requests[-1]["allow_stdin"] is True
    writer.close()
    await run_plain(rest, live)
    assert live.requests[-1]["allow_stdin"] is False


async def run_plain(rest: Rest, live: FakeLive) -> None:
    rest.gateway.script = echo
    await run(rest, live)


async def test_it_wakes_what_sleeps_and_says_when_it_cannot(rest: Rest, live: FakeLive) -> None:
    await rest.ok("POST", f"/api/sandboxes/{live.id}/suspend?wait=5")
    rest.gateway.fails["resume"] = SandboxGatewayError("snapshot_damaged", "a file is missing")
    told = await rest.problem("POST", f"/api/sandboxes/{live.id}/execute", {"code": "1"})
    assert told["status"] == 422 and not live.requests
    del rest.gateway.fails["resume"]
    assert (await run(rest, live, "here"))[0]["text"] == "here"
    assert live.state is State.RUNNING


async def test_what_json_cannot_say_is_left_out_and_the_stream_goes_on(rest: Rest, live: FakeLive) -> None:
    def script(live: FakeLive, code: str) -> None:
        raw = b'{"data": {"application/json": [NaN, Infinity, 1e999, "\\ud800"]}, "metadata": {}}'
        live.say(Channel.IOPUB, "display_data", {}, raw=raw)
        deep = b'{"data": {"application/json": ' + b"[" * 900 + b"]" * 900 + b'}, "metadata": {}}'
        live.say(Channel.IOPUB, "display_data", {}, raw=deep)
        live.say(Channel.IOPUB, "stream", {}, raw=b"[1, 2")
        live.finish()

    rest.gateway.script = script
    events = await run(rest, live)
    assert events[0]["data"]["application/json"][:3] == [None, None, None]
    assert events[-1] == {"type": "end", "status": "ok", "count": 1}


def test_an_event_is_one_line_whatever_is_in_it() -> None:
    line = line_of(event_of(Stream("stdout", "a\nb\u2028c\x00\ud800")))
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and json.loads(line)["text"].startswith("a\nb")
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    found = json.loads(line_of({"type": "display", "data": {"a": deep}, "metadata": {}, "display_id": None}))
    assert "too deep" in found["data"]["text/plain"]
