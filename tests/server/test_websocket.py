"""The kernel WebSocket, with real clients over TCP."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from traitlets.config import Configurable
from ws_harness import IOPUB, KEY, SHELL, gateway, v1

from sandbox_gateway import messages
from sandbox_gateway.server import outlet
from sandbox_gateway.server.hub import HubSettings
from sandbox_gateway.server.websocket import SandboxWebSocketConnection


async def until(condition: object, timeout: float = 20.0) -> None:
    """Wait until ``condition()`` holds."""
    deadline = asyncio.get_running_loop().time() + timeout
    while not condition():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < deadline, "it did not become true"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("v1", [True, False])
async def test_a_request_and_its_answers_cross_in_both_protocols(v1: bool) -> None:
    async with gateway() as served:
        client = await served.connect("a", v1=v1)
        await client.ask(code="1+1")
        await until(lambda: served.kernel.asked)
        channel, parts = served.kernel.asked[0]
        assert channel == SHELL
        assert parts[1] == messages.DELIMITER and parts[2] == messages.sign(KEY, parts[3:7])
        served.kernel.print("hello", parent=parts[3])
        served.kernel.publish("display_data", {"data": {}}, parent=parts[3], buffers=[b"\x00\xff", b""])
        served.kernel.reply(status="ok")
        stream, display, reply = [await client.read() for _ in range(3)]
        assert stream and stream["channel"] == "iopub" and stream["content"]["text"] == "hello"
        assert display and display["buffers"] == [b"\x00\xff", b""]
        assert reply and reply["channel"] == "shell" and reply["content"] == {"status": "ok"}
        assert reply["parent_header"]["msg_id"] == "m-1"


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("compression", [False, True])
async def test_messages_of_100_megabytes_cross_both_ways(v1: bool, compression: bool) -> None:
    options = {"websocket_compression_options": {"compression_level": 1}} if compression else {}
    asked = {"compression_options": {}} if compression else {}
    async with gateway(**options) as served:
        client = await served.connect("a", v1=v1, **asked)
        text = "é" * ((5 if compression else 48) << 20)
        served.kernel.publish("display_data", {"data": {"text/plain": text}})
        served.kernel.print("after")
        found = await client.read(60)
        assert found and found["content"]["data"]["text/plain"] == text
        assert await client.texts(1) == ["after"]
        await client.ask(code=text)
        await until(lambda: served.kernel.asked, 60)
        assert json.loads(served.kernel.asked[0][1][6])["code"] == text


@pytest.mark.parametrize("v1", [True, False])
async def test_binary_buffers_cross_both_ways(v1: bool) -> None:
    async with gateway() as served:
        client = await served.connect("a", v1=v1)
        buffers = [b"", b"\x00" * 3, bytes(range(256)) * 4000]
        served.kernel.publish("comm_msg", {"data": {}}, buffers=buffers)
        found = await client.read()
        assert found and found["buffers"] == buffers and found["content"] == {"data": {}}
        await client.send("comm_msg", buffers=buffers, data={})
        await until(lambda: served.kernel.asked)
        assert served.kernel.asked[0][1][7:] == buffers


async def test_a_message_is_written_at_once() -> None:
    """Nagle's algorithm would keep the second for the first one's acknowledgement."""
    async with gateway() as served:
        await served.connect("a")
        writer = next(iter(SandboxWebSocketConnection._open))._writer
        assert writer is not None and writer._stream is not None
        assert writer._stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_client_that_does_not_read_slows_only_itself() -> None:
    async with gateway(HubSettings(queue_limit=8 << 20, replay_limit=0)) as served:
        slow, fast = await served.connect("slow"), await served.connect("fast")
        count = 4000
        reading = asyncio.create_task(_displays(fast, count))
        for n in range(count):
            served.kernel.publish("display_data", {"n": n, "x": "x" * 20_000})
            if n % 10 == 0:
                await asyncio.sleep(0)
                while served.kernel.hub.stats.pending > (8 << 20) * 1.1 + outlet.WINDOW:
                    await asyncio.sleep(0.001)
        assert await reading == list(range(count))
        seen, told = 0, 0
        while seen + told < count:
            message = await slow.read()
            assert message
            if message["header"]["msg_type"] == "display_data":
                seen += 1
            elif "left out" in message["content"].get("text", ""):
                told += int(message["content"]["text"].split()[1])
        assert told == served.kernel.hub.stats.left_out > 0 and seen + told == count


async def _displays(client: object, count: int) -> list[int]:
    return [(await client.read())["content"]["n"] for _ in range(count)]  # type: ignore[attr-defined]


async def test_a_client_that_comes_back_gets_what_it_missed_once() -> None:
    async with gateway() as served:
        client = await served.connect("a")
        served.kernel.print("1")
        assert await client.texts(1) == ["1"]
        await asyncio.sleep(0.3)
        client.cut()
        await until(lambda: not served.kernel.hub.connected)
        served.kernel.print("2")
        again = await served.connect("a")
        served.kernel.print("3")
        assert await again.texts(2) == ["2", "3"]
        other = await served.connect("b")
        served.kernel.print("4")
        assert await other.texts(1) == ["4"]
        assert served.manager.connections == 2


async def test_a_burst_that_a_broken_connection_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as served:
        client = await served.connect("a")
        for n in range(2000):
            served.kernel.print(f"{n};")
        await asyncio.sleep(0)
        first = await client.texts(10)
        client.cut()
        await until(lambda: not served.kernel.hub.connected)
        again = await served.connect("a", v1=False)
        rest: list[str] = []
        while not rest or rest[-1] != "1999;":
            rest += await again.texts(1)
        assert first == [f"{n};" for n in range(10)]
        start = int(rest[0][:-1])
        assert start <= 10 and rest == [f"{n};" for n in range(start, 2000)]


async def test_after_a_crash_of_the_server_a_client_goes_on() -> None:
    async with gateway() as served:
        old = served.kernel
        client = await served.connect("a")
        old.print("1")
        assert await client.texts(1) == ["1"]
        await asyncio.sleep(0.3)
        old.hub._closed = True  # kill -9: it writes nothing any more
        client.cut()
        new = served.adopt()
        for channel, parts in ((IOPUB, messages.stderr_notice(KEY, f"{n}")) for n in (2, 3)):
            new.numbers[IOPUB] = max(new.numbers[IOPUB], old.numbers[IOPUB])
            new.say(channel, parts)
        again = await served.connect("a")
        new.print("4")
        assert await again.texts(3) == ["2", "3", "4"]
        await client.read()


async def test_nothing_a_client_sends_ends_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway() as served:
        clients = [await served.connect("a"), await served.connect("b", v1=False)]
        garbage = ["", "{", "[]", "null", '{"header": 1}', "x" * 1000, b"", b"\x00" * 8, b"\xff" * 100]
        with caplog.at_level(logging.WARNING):
            for client in clients:
                for message in garbage * 5:
                    await client.connection.write_message(message, binary=isinstance(message, bytes))
                await client.connection.write_message(v1("iopub", [b"{}"] * 4), binary=True)
                await client.connection.write_message(v1("shell", [b"{}", b"", b"\xff", b"{"]), binary=True)
                await client.ask()
        await until(lambda: len(served.kernel.asked) == 2)
        assert served.kernel.hub.stats.rejected == 2 * (len(garbage) * 5 + 2)
        assert len([r for r in caplog.records if "not passed on" in r.message]) <= 20
        served.kernel.print("x")
        served.kernel.print("x")
        assert await clients[0].texts(2) == await clients[1].texts(2) == ["x", "x"]


async def test_a_message_type_that_is_not_allowed_is_not_passed_on() -> None:
    async with gateway() as served:
        served.manager.allowed_message_types = ["kernel_info_request"]
        client = await served.connect("a")
        await client.ask("execute_request")
        await client.ask("kernel_info_request")
        await until(lambda: served.kernel.asked)
        assert [json.loads(parts[3])["msg_type"] for _, parts in served.kernel.asked] == ["kernel_info_request"]


async def test_a_kernel_that_is_gone_takes_messages_without_an_error() -> None:
    async with gateway() as served:
        client = await served.connect("a")
        served.kernel.channels.disconnect()
        for _ in range(1200):
            await client.ask()
        answer = await client.read()
        assert answer and answer["header"]["msg_type"] in ("status", "execute_reply")


async def test_clients_are_told_to_come_again_when_the_server_ends() -> None:
    async with gateway() as served:
        clients = [await served.connect("a"), await served.connect("", v1=False)]
        await SandboxWebSocketConnection.close_all()
        for client in clients:
            while await client.read() is not None:
                pass
            assert client.connection.close_code == 1012
        await until(lambda: served.manager.connections == 0)


async def test_a_deleted_kernel_ends_its_connections() -> None:
    async with gateway() as served:
        client = await served.connect("a")
        served.kernel.seat.release(remove=True)
        assert await client.read() is None and client.connection.close_code == 1000


async def test_sessions_are_limited() -> None:
    async with gateway(HubSettings(max_sessions=1)) as served:
        await served.connect("a")
        refused = await served.connect("b")
        assert await refused.read() is None and refused.connection.close_code == 1013
        await until(lambda: served.manager.connections == 1)


async def test_a_client_may_ask_for_what_was_printed_before() -> None:
    async with gateway() as served:
        served.kernel.print("before")
        client = await served.connect("a", query="&replay=1")
        assert await client.texts(1) == ["before"]


def test_kernels_that_are_not_ours_get_the_stock_connection() -> None:
    class Other(Configurable):
        pass

    assert isinstance(SandboxWebSocketConnection(parent=Other()), ZMQChannelsWebsocketConnection)
