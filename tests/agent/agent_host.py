"""A host for one agent process, for tests: the wire's own endpoint over two pipes, and no event loop."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jupyter_client.session import Session

from sandbox_gateway.wire.endpoint import HostEndpoint
from sandbox_gateway.wire.events import Message, StreamClosed, StreamData, StreamOpened
from sandbox_gateway.wire.frames import Channel
from sandbox_gateway.wire.reliable import Outbox

ROOT = Path(__file__).parents[2]
KEY = "secret-of-the-test"
PATIENCE = 20.0
"""Seconds after which a test that waits has failed."""


class AgentError(Exception):
    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["message"])
        self.code = error["code"]


class Host:
    """Speaks to an agent on two descriptors, which it owns."""

    def __init__(self, read_fd: int, write_fd: int, *, epoch: int = 1) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self.endpoint = HostEndpoint(Outbox(), epoch=epoch)
        self.session = Session(key=KEY.encode())
        self.messages: list[tuple[str, list[bytes]]] = []
        self.heard: dict[str, set[str]] = {}
        self.events: list[dict[str, Any]] = []
        self.other: list[Any] = []
        self.answers: dict[int, dict[str, Any]] = {}
        self.numbers = 0
        self.streams: dict[int, bytearray] = {}
        self.closed_streams: set[int] = set()

    def attach(self, received: dict[int, int] | None = None) -> None:
        self.endpoint.attach(uuid.uuid4().hex, received, owner="test", pad=received is not None)
        self.until(lambda: self.endpoint.attached)

    def pump(self, timeout: float) -> None:
        endpoint = self.endpoint
        writing = [self.write_fd] if endpoint.wants_write else []
        readable, writable, _ = select.select([self.read_fd], writing, [], timeout)
        if writable:
            with contextlib.suppress(BlockingIOError):
                endpoint.wrote(os.writev(self.write_fd, endpoint.output()))
        if readable:
            data = os.read(self.read_fd, 1 << 20)
            if not data:
                raise EOFError("the agent is gone")
            for event in endpoint.feed(data):
                self._on_event(event)
            if endpoint.ack_pending:
                endpoint.request_ack()

    def _on_event(self, event: Any) -> None:
        if isinstance(event, Message):
            if event.channel == Channel.AGENT:
                value = json.loads(bytes(event.parts[0]))
                if "id" in value:
                    self.answers[value["id"]] = value
                else:
                    self.events.append(value)
            else:
                name, parts = Channel(event.channel).name.lower(), [bytes(part) for part in event.parts]
                self.messages.append((name, parts))
                self._note(name, parts)
        elif isinstance(event, StreamData):
            self.streams[event.stream] += event.data
            self.endpoint.stream_consumed(event.stream, len(event.data))
        elif isinstance(event, StreamClosed):
            self.closed_streams.add(event.stream)
        elif not isinstance(event, StreamOpened):
            self.other.append(event)

    def until(self, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """Pump until the condition holds; returns its value."""
        end = time.monotonic() + patience
        while True:
            value = condition()
            if value:
                return value
            left = end - time.monotonic()
            assert left > 0, f"nothing happened; events: {self.events[-3:]}, messages: {self.messages[-3:]}"
            self.pump(min(left, 0.5))

    def request(self, op: str, *, attachment: bytes | None = None, **fields: Any) -> int:
        self.numbers += 1
        body = json.dumps({"id": self.numbers, "op": op, **fields}).encode()
        self.endpoint.send(Channel.AGENT, [body] if attachment is None else [body, attachment])
        return self.numbers

    def answer(self, number: int) -> dict[str, Any]:
        answer = self.until(lambda: self.answers.pop(number, None))
        if "error" in answer:
            raise AgentError(answer["error"])
        return dict(answer["ok"])

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        return self.answer(self.request(op, **fields))

    def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """The next event of that name with those fields; it is taken away."""

        def found() -> dict[str, Any] | None:
            for event in self.events:
                if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                    return event
            return None

        event: dict[str, Any] = self.until(found)
        self.events.remove(event)
        return event

    # -- Jupyter

    def ask(
        self, msg_type: str, content: dict[str, Any], channel: str = "shell", ident: bytes = b"client", **header: Any
    ) -> str:
        message = self.session.msg(msg_type, content)
        message["header"].update(header)
        self.endpoint.send(Channel[channel.upper()], [ident, *self.session.serialize(message)])
        return str(message["header"]["msg_id"])

    def parsed(self, channel: str, parent: str | None = None) -> list[dict[str, Any]]:
        """The messages of a channel so far, checked and unpacked, that belong to a request."""
        found = []
        for name, parts in self.messages:
            if name != channel:
                continue
            idents, frames = self.session.feed_identities(parts)
            self.session.digest_history.clear()  # the same message may be looked at twice
            message = self.session.deserialize(frames, content=True)
            message["idents"] = idents
            if parent is None or message["parent_header"].get("msg_id") == parent:
                found.append(message)
        return found

    def reply(self, msg_id: str, channel: str = "shell") -> dict[str, Any]:
        return dict(self.until(lambda: self.parsed(channel, msg_id))[0])

    def execute(self, code: str, *, ident: bytes = b"client", wait: bool = True, **content: Any) -> str:
        request = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": True}
        msg_id = self.ask("execute_request", {**request, "stop_on_error": True, **content}, ident=ident)
        if wait:
            self.done(msg_id)
        return msg_id

    def done(self, msg_id: str) -> None:
        """Wait for the reply and for ``idle``."""
        self.until(lambda: {"shell", "idle"} <= self.heard.get(msg_id, set()), 60)

    def _note(self, channel: str, parts: list[bytes]) -> None:
        at = parts.index(b"<IDS|MSG>")
        parent = json.loads(parts[at + 3]).get("msg_id")
        self.heard.setdefault(parent, set()).add("idle" if b'"idle"' in parts[at + 5][:100] else channel)

    def text(self, msg_id: str, name: str = "stdout") -> str:
        """Everything that a request printed."""
        return "".join(
            message["content"]["text"]
            for message in self.parsed("iopub", msg_id)
            if message["msg_type"] == "stream" and message["content"]["name"] == name
        )

    def run(self, code: str) -> str:
        """Execute, and return what was printed on stdout; an error of the cell is an error of the test."""
        msg_id = self.execute(code)
        reply = self.reply(msg_id)["content"]
        assert reply["status"] == "ok", reply
        return self.text(msg_id)

    def log(self) -> bytes:
        number = self.endpoint.open_stream("log", {"follow": False})
        self.streams[number] = bytearray()
        self.endpoint.stream_end(number)
        self.until(lambda: number in self.closed_streams)
        return bytes(self.streams[number])

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


class AgentProcess:
    """The agent as a subprocess of the test."""

    def __init__(self, prefix: Sequence[str] = (), interpreter: str = sys.executable, **env: str) -> None:
        down_r, self.down = os.pipe()
        self.up, up_w = os.pipe()
        program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from sandbox_gateway.agent.main import main; "
        self.process = subprocess.Popen(
            [*prefix, interpreter, "-c", program + "sys.exit(main())"],
            stdin=down_r,
            stdout=up_w,
            env={**os.environ, **env},
        )
        os.close(down_r)
        os.close(up_w)
        self.host = Host(self.up, self.down)

    def kernel_pids(self) -> list[int]:
        """All processes below the agent."""
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
        found = [self.process.pid]
        for pid in found:
            found.extend(child for child, parent in parents.items() if parent == pid)
        return found[1:]

    def end(self) -> None:
        """Close the link: the agent ends its kernel and itself."""
        self.host.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            raise


def ipykernel_fields(home: Path, **changes: Any) -> dict[str, Any]:
    """What start_kernel needs for an ipykernel of the test's own environment, as the test's own user."""
    fields = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "env": {"PATH": os.environ["PATH"], "HOME": str(home), "IPYTHONDIR": str(home / "ipython")},
        "cwd": str(home),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "key": KEY,
    }
    return {**fields, **changes}
