"""A real headless gateway in a process of its own, and clients of it over real HTTP and WebSockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.websocket import WebSocketClientConnection, websocket_connect

V1 = "v1.kernel.websocket.jupyter.org"
LARGE = 256 << 20


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Answer:
    """What a request was answered."""

    status: int
    body: Any
    headers: Mapping[str, str]


class Served:
    """One gateway. ``start`` may be called again after ``kill`` or ``stop``: same port, same token, same home."""

    def __init__(self, log: Path, *options: str, token: str | None = None, environment: Mapping[str, str] = {}) -> None:
        self.port = free_port()
        self.token = secrets.token_hex(16) if token is None else token
        self.log = log
        self._options = options
        self._environment = dict(environment)
        self.process: subprocess.Popen[bytes] | None = None
        self.sockets: list[Socket] = []

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start it, and return when it answers."""
        environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(self.log.with_suffix(".config")), **self._environment}
        if self.token:
            environment["JUPYTER_TOKEN"] = self.token
        arguments = [sys.executable, "-m", "sandbox_gateway.cli", "serve", "--ip", "127.0.0.1", "--port"]
        arguments += [str(self.port), "--ServerApp.port_retries=0", *self._options]
        if os.geteuid() == 0:
            arguments.append("--allow-root")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the gateway ended: {self.log.read_text()[-3000:]}"
            try:
                if (await self.ask("GET", "/api/status")).status in (200, 403):
                    return
            except OSError:
                await asyncio.sleep(0.05)
        raise TimeoutError("the gateway does not answer")

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        raw: bytes | None = None,
        **headers: str,
    ) -> Answer:
        """One request; a JSON answer is decoded."""
        token = self.token if token is None else token
        sent = {"Authorization": f"token {token}"} if token else {}
        sent.update(headers)
        if raw is None and body is not None:
            raw = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        request = HTTPRequest(
            self.url + path,
            method=method,
            headers=sent,
            body=raw,
            allow_nonstandard_methods=True,
            request_timeout=180,
            follow_redirects=False,
        )
        answer: HTTPResponse = await AsyncHTTPClient().fetch(request, raise_error=False)
        if answer.code == 599:
            raise OSError(str(answer.error))
        decoded: Any = answer.body
        kind = answer.headers.get("Content-Type", "")
        if "json" in kind and "ndjson" not in kind and answer.body:
            decoded = json.loads(answer.body)
        return Answer(answer.code, decoded, answer.headers)

    async def ok(self, method: str, path: str, body: Any = None, *, token: str | None = None) -> Any:
        """The body of a request that has to succeed."""
        answer = await self.ask(method, path, body, token=token)
        assert answer.status < 300, (method, path, answer.status, answer.body)
        return answer.body

    async def create(self, *, token: str | None = None, **wanted: Any) -> str:
        """A new sandbox's id."""
        made = await self.ok("POST", "/api/sandboxes", {"profile": "python3-gvisor", **wanted}, token=token)
        return str(made["id"])

    async def open(
        self,
        kernel_id: str,
        session: str | None = None,
        *,
        protocol: str | None = V1,
        token: str | None = None,
        **query: str,
    ) -> Socket:
        """A WebSocket of a kernel's channels; ``protocol`` None is the legacy one."""
        session = uuid.uuid4().hex if session is None else session
        extra = "".join(f"&{name}={value}" for name, value in query.items())
        request = HTTPRequest(
            f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?session_id={session}{extra}",
            headers={"Authorization": f"token {self.token if token is None else token}"},
            request_timeout=60,
        )
        connected = await websocket_connect(
            request, max_message_size=LARGE, subprotocols=[protocol] if protocol else None
        )
        opened = Socket(connected, session, v1=connected.selected_subprotocol == V1)
        self.sockets.append(opened)
        return opened

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As systemd does."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    async def hang_up(self) -> None:
        """Close every WebSocket that a test has left open."""
        sockets, self.sockets = self.sockets, []
        for opened in sockets:
            opened.close()
        for opened in sockets:
            async with asyncio.timeout(10):
                while not opened.ended:
                    await opened.next()

    async def clear(self) -> None:
        """End every sandbox."""
        found = await self.ok("GET", "/api/sandboxes?limit=1000")
        for sandbox in found["sandboxes"]:
            await self.ask("DELETE", f"/api/sandboxes/{sandbox['id']}")


@dataclass
class Cell:
    """What came of one request."""

    id: str
    reply: dict[str, Any] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    idle: bool = False

    @property
    def text(self) -> str:
        """What was printed."""
        return "".join(message["content"]["text"] for message in self.messages if message["msg_type"] == "stream")

    @property
    def stdout(self) -> str:
        """What was printed on stdout."""
        return "".join(
            message["content"]["text"]
            for message in self.messages
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout"
        )

    def take(self, message: dict[str, Any]) -> None:
        """A message under the request has come."""
        self.messages.append(message)
        if message["msg_type"] == "status":
            self.idle = message["content"]["execution_state"] == "idle"
        elif message["channel"] in ("shell", "control"):
            self.reply = message

    def once(self) -> int:
        """Keep each message once, by its id; returns how many had come again."""
        kept: dict[str, dict[str, Any]] = {}
        for message in self.messages:
            kept.setdefault(message["header"]["msg_id"], message)
        again = len(self.messages) - len(kept)
        self.messages = list(kept.values())
        return again

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.idle and self.reply is not None


@contextmanager
def running(served: Served) -> Iterator[Served]:
    """Start a gateway; at the end what it has is ended, and then the gateway, unless a test did so."""
    asyncio.run(served.start())
    try:
        yield served
    finally:
        if served.process is not None and served.process.poll() is None:
            asyncio.run(served.clear())
        served.stop()


class Socket:
    """A client of one kernel over a WebSocket, as JupyterLab is one."""

    def __init__(self, connected: WebSocketClientConnection, session: str, *, v1: bool) -> None:
        self.connected = connected
        self.session = session
        self.v1 = v1
        self.ended = False

    def send(
        self,
        msg_type: str,
        content: dict[str, Any],
        *,
        channel: str = "shell",
        msg_id: str | None = None,
        parent: dict[str, Any] | None = None,
        buffers: list[bytes] | None = None,
    ) -> str:
        """Send a message; returns its id."""
        msg_id = uuid.uuid4().hex if msg_id is None else msg_id
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "username": "test",
            "session": self.session,
            "date": "2026-01-01T00:00:00.000000Z",
            "version": "5.4",
        }
        if self.v1:
            parts = [channel.encode(), *(json.dumps(part).encode() for part in (header, parent or {}, {}, content))]
            parts += buffers or []
            offsets = [8 * (len(parts) + 2)]
            for part in parts:
                offsets.append(offsets[-1] + len(part))
            data = struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts)
            self.connected.write_message(data, binary=True)
        else:
            message = {
                "channel": channel,
                "header": header,
                "parent_header": parent or {},
                "metadata": {},
                "content": content,
            }
            if buffers:
                pieces = [json.dumps(message).encode(), *buffers]
                offsets = [4 * (len(pieces) + 1)]
                for piece in pieces[:-1]:
                    offsets.append(offsets[-1] + len(piece))
                data = struct.pack(f"!{len(pieces) + 1}I", len(pieces), *offsets) + b"".join(pieces)
                self.connected.write_message(data, binary=True)
            else:
                self.connected.write_message(json.dumps(message))
        return msg_id

    async def next(self, timeout: float = 60.0) -> dict[str, Any] | None:
        """The next message; None when the connection has ended."""
        async with asyncio.timeout(timeout):
            raw = await self.connected.read_message()
        self.ended = raw is None
        return None if raw is None else decode(raw)

    async def finish(self, cell: Cell, *, answer: Callable[[str], str] | None = None, timeout: float = 120.0) -> Cell:
        """Read until a request has ended."""
        async with asyncio.timeout(timeout):
            while not cell.done:
                message = await self.next(timeout)
                assert message is not None, "the WebSocket was closed"
                if message["parent_header"].get("msg_id") != cell.id:
                    continue
                cell.take(message)
                if message["msg_type"] == "input_request":
                    assert answer is not None
                    text = answer(message["content"]["prompt"])
                    self.send("input_reply", {"value": text, "status": "ok"}, channel="stdin", parent=message["header"])
        return cell

    async def follow(self, cell: Cell, lines: int | None = None) -> None:
        """Take what comes of a cell until it has printed so many lines, or (None) until the connection ends."""
        while lines is None or cell.stdout.count("\n") < lines:
            message = await self.next()
            if message is None:
                assert lines is None, "the WebSocket was closed"
                return
            if message["parent_header"].get("msg_id") == cell.id:
                cell.take(message)

    def execute(self, code: str, *, stdin: bool = False) -> Cell:
        """Send a cell."""
        return Cell(self.send("execute_request", {"code": code, "silent": False, "allow_stdin": stdin}))

    async def run(self, code: str, *, answer: Callable[[str], str] | None = None, timeout: float = 120.0) -> Cell:
        """Run a cell to its end."""
        return await self.finish(self.execute(code, stdin=answer is not None), answer=answer, timeout=timeout)

    def close(self) -> None:
        """Hang up."""
        self.connected.close()

    def cut(self) -> None:
        """Break the connection as a network does: no goodbye."""
        stream = self.connected.stream
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


def decode(raw: str | bytes) -> dict[str, Any]:
    """A message of either protocol."""
    if isinstance(raw, str):
        return dict(json.loads(raw))
    if raw[:4] != b"\0\0\0\0" and int.from_bytes(raw[:8], "little") < 4096:
        count = int.from_bytes(raw[:8], "little")
        offsets = struct.unpack(f"<{count}Q", raw[8 : 8 * (count + 1)])
        parts = [raw[start:end] for start, end in itertools.pairwise(offsets)]
        names = ("header", "parent_header", "metadata", "content")
        message = {name: json.loads(part) for name, part in zip(names, parts[1:5], strict=True)}
        message |= {"channel": parts[0].decode(), "buffers": parts[5:], "msg_type": message["header"]["msg_type"]}
        return message
    count = int.from_bytes(raw[:4], "big")
    offsets = (*struct.unpack(f"!{count}I", raw[4 : 4 * (count + 1)]), len(raw))
    pieces = [raw[start:end] for start, end in itertools.pairwise(offsets)]
    return {**json.loads(pieces[0]), "buffers": pieces[1:]}
