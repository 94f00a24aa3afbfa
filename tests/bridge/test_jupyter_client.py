"""The bridge between jupyter_client's own clients and a native ipykernel, connected back to back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from bridging import KEY, PATIENCE, ready, until_it_beats
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.blocking.client import BlockingKernelClient

from sandbox_gateway.background import Background
from sandbox_gateway.zmq_bridge import ZmqBridge

PORTS = {"shell_port": 1, "control_port": 2, "stdin_port": 3, "iopub_port": 4, "hb_port": 5}


class Relay:
    """Does what agent and link do together: a kernel's raw messages to a bridge and back. Runs on a loop."""

    def __init__(self, prefix: Path) -> None:
        self._context = zmq.Context()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        for number, kind in ((1, zmq.DEALER), (2, zmq.DEALER), (3, zmq.DEALER), (4, zmq.SUB)):
            made = self._context.socket(kind)
            made.rcvhwm = 0
            if kind == zmq.DEALER:
                made.identity = b"agent"
            else:
                made.subscribe(b"")
            made.connect(f"ipc://{prefix}-{number}")
            self._sockets[number] = made
        self.deliver: Callable[[int, list[bytes]], None] = lambda channel, parts: None
        self._loop = asyncio.get_running_loop()
        for number, made in self._sockets.items():
            self._loop.add_reader(made.fileno(), self._drain, number)
        self._loop.call_soon(self._drain_all)

    def request(self, channel: int, parts: list[bytes]) -> None:
        self._sockets[channel].send_multipart(parts)
        self._drain(channel)

    def _drain_all(self) -> None:
        for number in self._sockets:
            self._drain(number)

    def _drain(self, number: int) -> None:
        made = self._sockets[number]
        while made.events & zmq.POLLIN:
            parts = made.recv_multipart()
            if b"iopub_welcome" not in b"".join(parts[:4]):
                self.deliver(number, parts)

    def close(self) -> None:
        for made in self._sockets.values():
            self._loop.remove_reader(made.fileno())
            made.close(linger=0)
        self._context.term()


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.stop()


@pytest.fixture
def kernel(directory: Path) -> Iterator[dict[str, Any]]:
    """A native kernel's connection info."""
    info = {
        "transport": "ipc",
        "ip": str(directory / "kernel"),
        **PORTS,
        "key": KEY.decode(),
        "signature_scheme": "hmac-sha256",
    }
    file = directory / "kernel.json"
    file.write_text(json.dumps(info))
    process = subprocess.Popen(
        [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield info
    process.kill()
    process.wait()
    for path in directory.glob("kernel*"):
        path.unlink()


@pytest.fixture
def bridged(background: Background, kernel: dict[str, Any], directory: Path) -> Iterator[dict[str, Any]]:
    """The same kernel's connection info through a bridge on a background loop."""

    async def make() -> tuple[Relay, ZmqBridge]:
        relay = Relay(directory / "kernel")
        bridge = ZmqBridge(directory, KEY, relay.request)
        relay.deliver = bridge.deliver
        return relay, bridge

    relay, bridge = background.run(make()).result(20)
    yield bridge.connection_info

    async def end() -> None:
        bridge.close()
        relay.close()

    background.run(end()).result(20)


def blocking_client(info: dict[str, Any]) -> BlockingKernelClient:
    client = BlockingKernelClient()
    client.load_connection_info(info)
    client.start_channels()
    ready(client)
    return client


def stop(client: Any) -> None:
    client.stop_channels()
    client.context.term()


def test_a_blocking_client_executes_reads_input_and_sees_the_heartbeat(bridged: dict[str, Any]):
    client = blocking_client(bridged)
    output: list[dict[str, Any]] = []
    reply = client.execute_interactive("print('a' * 3); 1 + 1", output_hook=output.append, timeout=60)
    assert reply["content"]["status"] == "ok"
    kinds = [message["msg_type"] for message in output]
    assert kinds == ["status", "execute_input", "stream", "execute_result", "status"]
    asked: list[str] = []

    def answer(message: dict[str, Any]) -> None:
        asked.append(message["content"]["prompt"])
        client.input("42")

    output.clear()
    client.execute_interactive("print(input('n?'))", stdin_hook=answer, output_hook=output.append, timeout=60)
    assert asked == ["n?"]
    assert [m["content"]["text"] for m in output if m["msg_type"] == "stream"] == ["42\n"]
    until_it_beats(client)
    stop(client)


def test_many_lines_arrive_once_and_in_order(bridged: dict[str, Any]):
    client = blocking_client(bridged)
    lines: list[str] = []

    def take(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            lines.append(message["content"]["text"])

    # The kernel's own socket drops what is more than a thousand messages behind.
    code = "for n in range(20000): print(n, flush=n % 25 == 0)"
    client.execute_interactive(code, output_hook=take, timeout=120)
    assert "".join(lines).split() == [str(n) for n in range(20000)]
    stop(client)


async def test_an_async_client_executes(bridged: dict[str, Any]):
    client = AsyncKernelClient()
    client.load_connection_info(bridged)
    client.start_channels()
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(RuntimeError):  # a second without a heartbeat
                await client.wait_for_ready(timeout=PATIENCE)
                break
    reply = await client.execute_interactive("x = 1", timeout=60)
    assert reply["content"]["status"] == "ok"
    stop(client)


def test_the_heartbeat_is_answered_while_output_floods(bridged: dict[str, Any]):
    client = blocking_client(bridged)
    context = zmq.Context()
    heart = context.socket(zmq.REQ)
    heart.connect(f"ipc://{bridged['ip']}-{bridged['hb_port']}")
    msg_id = client.execute("import sys\nfor n in range(30000):\n    print(n, flush=True)")
    times = []
    while True:
        begun = time.perf_counter()
        heart.send(b"ping")
        assert heart.poll(10_000)
        heart.recv()
        times.append(time.perf_counter() - begun)
        try:
            if client.get_shell_msg(timeout=0.02)["parent_header"].get("msg_id") == msg_id:
                break
        except Exception as error:
            if type(error).__name__ != "Empty":
                raise
    print(f"slowest heartbeat during a flood: {max(times) * 1000:.1f} ms")
    assert sorted(times)[len(times) * 9 // 10] < 1.0, "jupyter_client's own patience"
    heart.close(linger=0)
    context.term()
    stop(client)


def test_the_bridge_adds_little_to_a_round_trip(kernel: dict[str, Any], bridged: dict[str, Any]):
    """Figures are printed; the bound is generous, since other work may run on the machine."""
    medians = {}
    for name, info in (("direct", {**kernel, "key": KEY}), ("bridged", bridged)):
        client = blocking_client(info)
        times = []
        for _ in range(100):
            begun = time.perf_counter()
            msg_id = client.execute("1")
            while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
                pass
            times.append(time.perf_counter() - begun)
        medians[name] = statistics.median(times) * 1000
        stop(client)
    print(f"execute round trip: {medians['direct']:.2f} ms direct, {medians['bridged']:.2f} ms through the bridge")
    assert medians["bridged"] < medians["direct"] + 10
