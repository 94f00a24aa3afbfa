"""Kernels that lie: what user code sends on its kernel's own sockets breaks neither the envelope that clients see, nor
other kernels, nor the gateway."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from served import V1, Served, Socket, decode

pytestmark = pytest.mark.timeout(300)

TOOLS = """
import hashlib, hmac, json, time, uuid
from ipykernel.kernelapp import IPKernelApp
app = IPKernelApp.instance()
session = app.session
parent = get_ipython().kernel.get_parent() if hasattr(get_ipython().kernel, "get_parent") else session.parent
raw_iopub = app.iopub_socket
while hasattr(raw_iopub, "io_thread"):
    raw_iopub = raw_iopub.io_thread
iopub_thread = raw_iopub if hasattr(raw_iopub, "send_multipart") else app.iopub_thread
def J(value): return json.dumps(value, default=str).encode()
def H(msg_type, **more): return J({"msg_id": uuid.uuid4().hex, "msg_type": msg_type, "username": "u",
    "session": session.session, "date": "2026-01-01T00:00:00Z", "version": "5.4", **more})
P = J(parent["header"])
def send(header, parent=P, metadata=b"{}", content=b"{}", *buffers, topic=b"t", signed=True, extra=()):
    parts = [header, parent, metadata, content]
    mac = hmac.new(session.key, digestmod=hashlib.sha256)
    for part in parts: mac.update(part)
    signature = mac.hexdigest().encode() if signed else b"0" * 64
    iopub_thread.send_multipart([topic, b"<IDS|MSG>", signature, *parts, *buffers])
def raw(*parts): iopub_thread.send_multipart(list(parts))
def S(text): return J({"name": "stdout", "text": text})
"""


def channel_of(raw: str | bytes, *, v1: bool) -> tuple[str, dict[str, Any]]:
    """The channel and the header of one frame, read as strictly as a frame can be; raises ValueError."""

    objects: list[list[str]] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        objects.append([key for key, _ in pairs])
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    if v1:
        assert isinstance(raw, bytes)
        count = int.from_bytes(raw[:8], "little")
        offsets = struct.unpack(f"<{count}Q", raw[8 : 8 * (count + 1)])
        assert offsets[0] == 8 * (count + 1)
        assert list(offsets) == sorted(offsets)
        assert offsets[-1] == len(raw)
        channel, header, parent = (raw[offsets[n] : offsets[n + 1]] for n in range(3))
        for part in (header, parent):
            assert isinstance(json.loads(part), dict)
        return channel.decode(), json.loads(header)
    if isinstance(raw, bytes):
        count = int.from_bytes(raw[:4], "big")
        offsets = struct.unpack(f"!{count}I", raw[4 : 4 * (count + 1)])
        assert count > 1
        assert offsets[0] == 4 * (count + 1)
        assert list(offsets) == sorted(offsets)
        assert offsets[-1] <= len(raw)
        raw = raw[offsets[0] : offsets[1]].decode()
    message = json.loads(raw, object_pairs_hook=note, parse_constant=constant, parse_int=float)
    assert len(set(objects[-1])) == len(objects[-1]), f"the envelope has a name twice: {objects[-1]}"
    assert set(message) >= {"channel", "header", "parent_header", "metadata", "content", "msg_type", "msg_id"}
    assert message["msg_type"] == message["header"]["msg_type"]
    assert all(isinstance(message[part], dict) for part in ("header", "parent_header", "metadata", "content"))
    return message["channel"], message["header"]


class Watched:
    """A client that looks at every frame. Content that Python cannot read (v1 carries what is no JSON, and JSON knows
    numbers of any length) is left out, as front ends do."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.seen: list[tuple[str, dict[str, Any]]] = []
        read = socket.connected.read_message

        async def reading() -> Any:
            while (raw := await read()) is not None:
                self.seen.append(channel_of(raw, v1=socket.v1))
                try:
                    decode(raw)
                except (ValueError, RecursionError):
                    continue
                break
            return raw

        socket.connected.read_message = reading  # type: ignore[method-assign, assignment]


@pytest.fixture
async def kernel(gateway: Served) -> str:
    """A kernel with the tools of somebody who wants to do harm."""
    kernel = await gateway.create()
    socket = await gateway.open(kernel)
    cell = await socket.run(TOOLS)
    assert cell.reply is not None
    assert cell.reply["content"]["status"] == "ok", cell.reply["content"]
    await gateway.hang_up()
    return kernel


@pytest.fixture
async def bystander(gateway: Served) -> AsyncIterator[Socket]:
    """A client of another kernel, which goes on as ever."""
    socket = await gateway.open(await gateway.create())
    assert (await socket.run("print('well')")).stdout == "well\n"
    yield socket
    assert (await socket.run("print('unharmed')", timeout=60)).stdout == "unharmed\n"


CRAFTED = {
    "a header that is an array": "send(b'[]')",
    "a header that is cut off": 'send(b\'{"msg_id": "1"\')',
    "a header that ends the envelope": 'send(H(\'stream\')[:-1] + b\'}, "channel": "shell", "x": {}\')',
    "content that ends the envelope": "send(H('stream'), P, b'{}', S('x') + b', \"channel\": \"shell\"')",
    "content that is two objects": "send(H('stream'), P, b'{}', S('x') + S('y'))",
    "metadata that ends the envelope": "send(H('stream'), P, b'{}, \"channel\": \"shell\", \"y\": {}', S('x'))",
    "a parent that ends the envelope": "send(H('stream'), P + b', \"msg_type\": \"execute_reply\"', b'{}', S('x'))",
    "no JSON": "send(b'\\xff\\xfe', b'\\x00', b'x', b'')",
    "empty parts": "send(b'', b'', b'', b'')",
    "NaN": "send(H('display_data'), P, b'{}', b'{\"data\": {\"x\": NaN}, \"metadata\": {}}')",
    "infinity": "send(H('display_data'), P, b'{}', b'{\"data\": {\"x\": -Infinity}, \"metadata\": {}}')",
    "content that is not UTF-8": 'send(H(\'stream\'), P, b\'{}\', b\'{"name": "stdout", "text": "\\xff"}\')',
    "a name twice": "send(H('stream')[:-1] + b', \"msg_type\": \"execute_reply\"}', P, b'{}', S('x'))",
    "a name twice in content": 'send(H(\'stream\'), P, b\'{}\', b\'{"name": "stdout", "name": "stderr", "text": ""}\')',
    "no msg_type": "send(J({'msg_id': '1'}))",
    "a msg_type that is no text": "send(H(['stream']))",
    "a status nobody knows": "send(H('status'), P, b'{}', J({'execution_state': 'suspended'}))",
    "a status that is an object": "send(H('status'), P, b'{}', J({'execution_state': {}}))",
    "a deep one": "send(H('stream'), P, b'{}', b'{\"a\":' * 50000 + b'1' + b'}' * 50000)",
    "a deep header": "send(b'{\"a\":' * 50000 + b'1' + b'}' * 50000)",
    "a wrong signature": "send(H('stream'), P, b'{}', S('forged'), signed=False)",
    "a parent of nobody": "send(H('stream'), J({'msg_id': 'nobody', 'msg_type': 'execute_request'}), b'{}', S('x'))",
    "a parent that is an array": "send(H('stream'), b'[]', b'{}', S('x'))",
    "a reply on iopub": "send(H('execute_reply'), P, b'{}', J({'status': 'ok', 'execution_count': 666}))",
    "an input request on iopub": "send(H('input_request'), P, b'{}', J({'prompt': 'password', 'password': True}))",
    "a shutdown reply on iopub": "send(H('shutdown_reply'), P, b'{}', J({'status': 'ok', 'restart': False}))",
    "no delimiter": "raw(b'x', b'y', b'z')",
    "one part": "raw(b'')",
    "a thousand parts": "raw(*[b'<IDS|MSG>'] * 1000)",
    "a thousand buffers": "send(H('display_data'), P, b'{}', J({'data': {}, 'metadata': {}}), *[b'x'] * 1000)",
    "a topic of a megabyte": "send(H('stream'), P, b'{}', S('x'), topic=b't' * (1 << 20))",
    "a large header": "send(H('stream', more='x' * (1 << 20)), P, b'{}', S('x'))",
    "line separators": "send(H('stream'), P, b'{}', J({'name': 'stdout', 'text': '\\u2028\\ud800'}))",
    "numbers that overflow": 'send(H(\'stream\'), P, b\'{}\', b\'{"name": "stdout", "text": "", "n": 1e99999}\')',
    "a number without end": "send(H('stream'), P, b'{}', b'{\"name\": \"stdout\", \"n\": ' + b'9' * 100000 + b'}')",
}


async def test_no_message_breaks_the_envelope(gateway: Served, kernel: str, bystander: Socket) -> None:
    clients = [
        Watched(await gateway.open(kernel, protocol=protocol, **query))
        for protocol in (V1, None)
        for query in ({}, {"replay": "1"})
    ]
    for name, code in CRAFTED.items():
        cell = await clients[0].socket.run(code)
        assert cell.reply is not None, name
        assert cell.reply["content"]["status"] == "ok", (name, cell.reply["content"])
    marker = await clients[0].socket.run("print('the end')")
    assert marker.stdout.endswith("the end\n")
    for client in clients[1:]:
        async with asyncio.timeout(60):
            while True:
                message = await client.socket.next()
                assert message is not None
                if message["msg_type"] == "stream" and message["content"].get("text") == "the end\n":
                    break
    for client in clients:
        for channel, header in client.seen:
            assert channel in ("iopub", "shell", "control", "stdin")
            assert isinstance(header["msg_type"], str)
            if header["msg_type"] in ("execute_reply", "input_request", "shutdown_reply"):
                # What a kernel publishes stays on iopub, whatever it calls it.
                assert channel == "iopub" or client is clients[0]
    # A client of before, and one that comes now, are served as ever.
    assert (await clients[2].socket.run("print(6 * 7)")).stdout == "42\n"
    late = Watched(await gateway.open(kernel, protocol=None, replay="1"))
    assert (await late.socket.run("print(6 * 7)")).stdout == "42\n"
    models = await gateway.ok("GET", "/api/kernels")
    assert {model["execution_state"] for model in models} <= {"idle", "busy"}


async def test_execute_over_rest_has_an_end_whatever_the_kernel_sends(
    gateway: Served, kernel: str, bystander: Socket
) -> None:
    for name, code in CRAFTED.items():
        body = {"code": f"parent = session.parent if hasattr(session, 'parent') else parent\n{code}\nprint('after')"}
        answer = await gateway.ask("POST", f"/api/sandboxes/{kernel}/execute", {**body, "timeout": 30})
        assert answer.status == 200, name
        events = [json.loads(line) for line in answer.body.splitlines()]
        assert events[-1]["type"] == "end", (name, events[-1])
        assert [event["type"] for event in events].count("end") == 1, name


@pytest.mark.parametrize("protocol", [V1, None])
async def test_floods_and_giants_keep_the_gateways_memory_bounded(
    gateway: Served, kernel: str, bystander: Socket, protocol: str | None
) -> None:
    assert gateway.process is not None
    socket = await gateway.open(kernel, protocol=protocol)
    silent = await gateway.open(kernel, protocol=protocol)  # reads nothing
    silent.connected.stream.set_close_callback(None)
    await socket.run("1")
    before = resident(gateway.process.pid)
    most = before

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, resident(gateway.process.pid))  # type: ignore[union-attr]
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    for code in (
        "big = J({'data': {'text/plain': 'x' * (8 << 20)}, 'metadata': {}})\n"
        "for n in range(60): send(H('display_data'), P, b'{}', big)",
        "for n in range(60): send(b'[' + b'1,' * (4 << 20) + b'1]')",
        "for n in range(20000): send(H('stream'), P, b'{}', S('x' * 200))",
        "for n in range(20000): raw(b'x', b'y')",
    ):
        cell = await socket.run(code, timeout=200)
        assert cell.reply is not None
        assert cell.reply["content"]["status"] == "ok", cell.reply["content"]
        assert (await gateway.ask("GET", "/api/status")).status == 200
    watching.cancel()
    print(f"\nresident: {before >> 20} MiB before, {most >> 20} MiB at most")
    # One client's bound for what it does not read, the replay, and what is under way.
    assert most - before < (256 + 256) << 20
    socket = await gateway.open(kernel, protocol=protocol)
    assert (await socket.run("print('still there')", timeout=60)).stdout == "still there\n"


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
