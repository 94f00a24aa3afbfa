"""The gateway beside stock jupyter_server: the same client, the same requests, over HTTP and WebSockets."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websocket

from bench import processes
from bench.kernels import PATIENCE, BenchError
from bench.measures import PLAIN_TRIES, SIDES, Measure, Plan, misprinted
from bench.rest import Rest

V1 = "v1.kernel.websocket.jupyter.org"
_NAMES = ("header", "parent_header", "metadata", "content")


class Server(Rest):
    """One server in a process of its own; both are asked in the same way."""

    def __init__(self, side: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.side = side
        self.token = secrets.token_hex(16)
        options = [f"--port={self.port}", "--ServerApp.port_retries=0", "--ip=127.0.0.1"]
        if os.geteuid() == 0:
            options.append("--allow-root")
        if side == "plain":
            # Nothing else beside it, and no limit that drops output: what is compared is the same work.
            command = ["-m", "jupyter_server", "--ServerApp.jpserver_extensions={}", "--no-browser"]
            options += ["--ZMQChannelsWebsocketConnection.limit_rate=False", f"--ServerApp.root_dir={folder}"]
        else:
            command = ["-m", "sandbox_gateway.cli", "serve", "--SandboxGateway.on_stop=terminate"]
        environment = {**os.environ, "JUPYTER_TOKEN": self.token, "JUPYTER_CONFIG_DIR": str(folder / side)}
        if side == "plain":
            environment["JUPYTER_NO_CONFIG"] = "1"
        self.log = (folder / f"{side}.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, *command, *options], env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )
        self.until_it_answers(f"the {side} server")

    def start(self, name: str) -> Session:
        """A new kernel to its first result."""
        begun = time.perf_counter()
        kernel_id = self.ask("POST", "/api/kernels", {"name": name})["id"]
        session = Session(self, kernel_id)
        _, messages = session.execute("6 * 7")
        texts = [m["content"]["data"]["text/plain"] for m in messages if m["msg_type"] == "execute_result"]
        if texts != ["42"]:
            raise BenchError(f"{self.side}: wrong first result {texts}")
        session.first_result = time.perf_counter() - begun
        return session

    def cpu(self) -> float:
        """Seconds of processor time that the server itself has used."""
        return processes.cpu_seconds([self.process.pid])

    def close(self) -> None:
        """End it, and what it has."""
        with contextlib.suppress(OSError, ValueError):
            for kernel in self.ask("GET", "/api/kernels"):
                self.ask("DELETE", f"/api/kernels/{kernel['id']}")
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Session:
    """One kernel and one WebSocket to it, by the protocol that JupyterLab speaks."""

    def __init__(self, server: Server, kernel_id: str) -> None:
        self.server = server
        self.id = kernel_id
        self.session = uuid.uuid4().hex
        self.first_result = 0.0
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{server.port}/api/kernels/{kernel_id}/channels?session_id={self.session}",
            header=[f"Authorization: token {server.token}"],
            subprotocols=[V1],
            timeout=PATIENCE,
            sockopt=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),
        )

    def send(self, code: str) -> str:
        """Send a cell."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": self.session}
        header |= {"username": "bench", "version": "5.4", "date": "2026-01-01T00:00:00Z"}
        content = {"code": code, "silent": False, "allow_stdin": False, "store_history": True}
        parts = [b"shell", *(json.dumps(part).encode() for part in (header, {}, {}, content))]
        offsets = [8 * (len(parts) + 2)]
        for part in parts:
            offsets.append(offsets[-1] + len(part))
        self.socket.send_binary(struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts))
        return str(header["msg_id"])

    def execute(self, code: str) -> tuple[float, list[dict[str, Any]]]:
        """Run a cell: seconds until both its reply and its idle status have come, and its messages."""
        begun = time.perf_counter()
        sent = self.send(code)
        raw: list[bytes] = []
        idle = replied = False
        wanted = sent.encode()
        while not (idle and replied):
            frame = self.socket.recv()
            if not isinstance(frame, bytes):
                raise BenchError(f"{self.server.side}: the server speaks another protocol")
            if wanted not in frame:
                continue
            raw.append(frame)
            replied = replied or b'"execute_reply"' in frame
            idle = idle or (b'"execution_state"' in frame and b'"idle"' in frame)
        seconds = time.perf_counter() - begun
        return seconds, [decode(frame) for frame in raw]

    def close(self) -> None:
        """Hang up, and end the kernel."""
        self.socket.close()
        self.server.ask("DELETE", f"/api/kernels/{self.id}")


def decode(frame: bytes) -> dict[str, Any]:
    """A message of the v1 protocol."""
    count = int.from_bytes(frame[:8], "little")
    offsets = struct.unpack(f"<{count}Q", frame[8 : 8 * (count + 1)])
    parts = [frame[start:end] for start, end in itertools.pairwise(offsets)]
    message = {name: json.loads(part) for name, part in zip(_NAMES, parts[1:5], strict=True)}
    return {**message, "msg_type": message["header"]["msg_type"]}


@dataclass
class Pair:
    """Both servers."""

    servers: dict[str, Server]
    names: dict[str, str]

    def start(self, side: str, name: str | None = None) -> Session:
        """A kernel of one side."""
        return self.servers[side].start(name if name is not None and side != "plain" else self.names[side])


@contextlib.contextmanager
def servers(names: dict[str, str]) -> Iterator[Pair]:
    """Both servers, for the time of the block."""
    made: dict[str, Server] = {}
    with tempfile.TemporaryDirectory(prefix="sgb-", dir="/tmp") as folder:
        try:
            for side in SIDES:
                made[side] = Server(side, Path(folder))
            yield Pair(made, names)
        finally:
            for server in made.values():
                server.close()


def served(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """The gateway's rows (DESIGN section 8): against stock jupyter_server in the same run."""
    with servers(names) as pair:
        measures = [*_starts(pair, plan, say), *_traffic(pair, plan, say), *_bursts(pair, plan, say)]
        return [*measures, *_many(pair, plan, say)]


def _turn(number: int) -> tuple[str, ...]:
    return SIDES if number % 2 == 0 else SIDES[::-1]


def _starts(pair: Pair, plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    template = Measure(
        "gateway: create to first result", "s", "lower", target_ratio=0.45, target_from="issue", note="aim 0.3"
    )
    pool = Measure("gateway: from the pool", "s", "lower", target_ratio=0.15, target_from="issue", note="aim 0.08")
    rows = [(template, None), (pool, "bench-pool")]
    for _, name in rows:
        for side in SIDES:
            pair.start(side, name).close()
    time.sleep(2.0)  # until the pool is full
    for number in range(plan.starts):
        for measure, name in rows:
            for side in _turn(number):
                session = pair.start(side, name)
                measure.samples[side].append(session.first_result)
                session.close()
                if name is not None:
                    time.sleep(1.0)  # until the pool is full again
        say(f"gateway: start {number + 1} of {plan.starts}")
    return [template, pool]


def _traffic(pair: Pair, plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    trip = Measure("gateway: execute round trip (WebSocket)", "ms", "lower", target_ratio=0.25, target_from="issue")
    plain = Measure("gateway: printed lines", "lines/s", "higher", target_ratio=1.0, target_from="issue")
    flushed = Measure(
        "gateway: printed lines, flush=True",
        "lines/s",
        "higher",
        target_ratio=0.4,
        target_from="issue",
        note="aim 0.8; 0 lost",
    )
    display = Measure("gateway: 8 MB display", "MB/s", "higher", target_ratio=1.0, target_from="issue")
    cpu = Measure("gateway: its processor time for each message", "us", "lower", target_ratio=0.3, target_from="issue")
    sessions = {side: pair.start(side) for side in SIDES}
    try:
        for session in sessions.values():
            for _ in range(5):
                session.execute("1")
        block = 20
        for number in range(plan.round_trips // block):
            for side in _turn(number):
                trip.samples[side] += [sessions[side].execute("1")[0] * 1000 for _ in range(block)]
        say("gateway: round trips")
        for number in range(plan.repeats):
            for side in _turn(number):
                session = sessions[side]
                plain.samples[side].append(_lines(session, plan.plain_lines, "")[0])
                before = pair.servers[side].cpu()
                rate, count = _lines(session, plan.flushed_lines, ", flush=True")
                flushed.samples[side].append(rate)
                cpu.samples[side].append(1e6 * (pair.servers[side].cpu() - before) / count)
                display.samples[side].append(_display(session, 8_000_000))
            say(f"gateway: output {number + 1} of {plan.repeats}")
    finally:
        for session in sessions.values():
            session.close()
    return [trip, plain, flushed, display, cpu]


def _lines(session: Session, count: int, options: str) -> tuple[float, int]:
    """Lines per second of a printing loop, none lost or doubled, and the messages that came."""
    for _ in range(PLAIN_TRIES if session.server.side == "plain" else 1):
        seconds, messages = session.execute(f"for number in range({count}):\n    print(number{options})")
        wrong = misprinted(messages, count)
        if not wrong:
            return count / seconds, len(messages)
    raise BenchError(f"{session.server.side}: {wrong}")


def _display(session: Session, size: int) -> float:
    """MB per second of one display of ``size`` characters that were made before."""
    session.execute(f"from IPython.display import display\ntext = 'x' * {size}")
    seconds, messages = session.execute("display({'text/plain': text}, raw=True)")
    sizes = [len(m["content"]["data"]["text/plain"]) for m in messages if m["msg_type"] == "display_data"]
    if sizes != [size]:
        raise BenchError(f"the display arrived with {sizes} characters instead of {size}")
    return size / 1e6 / seconds


def _bursts(pair: Pair, plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    wide = 10
    measure = Measure(
        f"gateway: creates per second, {wide} at a time", "1/s", "higher", target_ratio=1.5, target_from="issue"
    )
    for number in range(max(1, plan.large)):
        for side in _turn(number):
            begun = time.perf_counter()
            with ThreadPoolExecutor(wide) as pool:
                sessions = list(pool.map(pair.start, [side] * wide))
            measure.samples[side].append(wide / (time.perf_counter() - begun))
            for session in sessions:
                session.close()
    say(f"gateway: bursts, {wide} at a time")
    return [measure]


def _many(pair: Pair, plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """Flushed lines of many kernels at once, each with a client of its own, through one server."""
    measures = []
    for count in plan.together:
        measure = Measure(f"gateway: lines of {count} kernels at once, flush=True", "lines/s", "higher")
        for side in SIDES:
            with ThreadPoolExecutor(min(4, count)) as pool:
                sessions = list(pool.map(pair.start, [side] * count))
            lines = max(200, 4000 // count)
            begun = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                rates = list(pool.map(_lines, sessions, [lines] * count, [", flush=True"] * count))
            measure.samples[side].append(count * lines / (time.perf_counter() - begun))
            measure.note = f"{statistics.median(rate for rate, _ in rates):.0f} lines/s for each, {side}; 0 lost"
            for session in sessions:
                session.close()
        say(f"gateway: {count} kernels at once")
        measures.append(measure)
    return measures
