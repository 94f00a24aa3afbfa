"""One client of a kernel: plain ZMQ sockets over the connection file, everything that passes fed to the model.

jupyter_client makes the sockets and the messages; receiving is our own, since its ``Session`` refuses a repeated
signature before anyone could see that a message came twice.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from jupyter_client import KernelClient
from model import Failure, KernelModel, Request, payload_hashes

PATIENCE = 90.0
"""Seconds without any message after which what is awaited will not come."""
PAYLOAD = 100_000
"""Characters of a display."""

SETUP = """
import asyncio, hashlib, os, random, sys, threading, time, uuid
from IPython.display import display
counter = 0
def lines(tag, count, pause, flush):
    for number in range(count):
        print(f"{tag}:{number}", flush=flush == "each" or (flush == "some" and number % 7 == 0))
        if pause:
            time.sleep(pause)
async def slow_lines(tag, count, pause):
    for number in range(count):
        print(f"{tag}:{number}")
        await asyncio.sleep(pause)
def thread_lines(tag, count, pause):
    worker = threading.Thread(target=lines, args=(tag, count, pause, "each"))
    worker.start()
    worker.join()
def payload(tag, number, size):
    return (hashlib.sha256(f"{tag}/{number}".encode()).hexdigest() * (size // 64 + 1))[:size]
def show(tag, count, size):
    for number in range(count):
        display({"text/plain": payload(tag, number, size)}, raw=True)
def opened(comm, message):
    comm.on_msg(lambda message: comm.send({"echo": message["content"]["data"], "counter": counter}))
get_ipython().kernel.comm_manager.register_target("soak", opened)
"""
"""The first cell of every kernel: what the later ones call."""


class Stuck(Exception):
    """Nothing came for too long."""


class Broken(Exception):
    """The kernel was not as it must be; what is wrong is in its model's failures, or this text."""


def payload(tag: str, number: int, size: int) -> str:
    """What ``show`` of :data:`SETUP` displays."""
    return (hashlib.sha256(f"{tag}/{number}".encode()).hexdigest() * (size // 64 + 1))[:size]


class Watcher:
    """A client and its model. Use it on one thread."""

    def __init__(self, connection_file: Path, model: KernelModel, rng: random.Random) -> None:
        self.model = model
        self.rng = rng
        self.numbers = 0
        self.last_message = time.monotonic()
        self.welcomed = False
        """Whether the subscription has begun: what was published before it is nobody's loss."""
        self.on_tick: Callable[[], None] = lambda: None
        self._client = KernelClient(connection_file=str(connection_file))
        self._client.load_connection_file()
        self.session = self._client.session
        identity = self.session.bsession
        self._sockets = {
            "shell": self._client.connect_shell(identity=identity),
            "iopub": self._client.connect_iopub(),
            "stdin": self._client.connect_stdin(identity=identity),
            "control": self._client.connect_control(identity=identity),
        }
        self._poller = zmq.Poller()
        for socket in self._sockets.values():
            self._poller.register(socket, zmq.POLLIN)
        self._names = {socket: name for name, socket in self._sockets.items()}
        self._comm: str | None = None
        self.control_replies: list[str] = []

    def close(self) -> None:
        """Close the sockets."""
        for socket in self._sockets.values():
            socket.close(linger=0)

    # Receiving

    def pump(self, seconds: float = 0.0) -> None:
        """Take in what is there, waiting for it up to ``seconds``."""
        for socket, _ in self._poller.poll(int(seconds * 1000)):
            for _ in range(500):  # then the others have their turn
                try:
                    parts = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self.last_message = time.monotonic()
                self._take(self._names[socket], parts)

    def _take(self, channel: str, parts: list[bytes]) -> None:
        if parts == [b""] or len(parts) < 6:
            return
        _, parts = self.session.feed_identities(parts)
        if not hmac.compare_digest(self.session.sign(parts[1:5]), parts[0]):
            self.model.failures.append(Failure("bad_signature", f"{channel} {parts[1][:300]!r}"))
            return
        header, parent, metadata, content = (json.loads(part) for part in parts[1:5])
        message = {"header": header, "parent_header": parent, "metadata": metadata, "content": content}
        if channel == "control":
            self.control_replies.append(parent.get("msg_id", ""))
        self.welcomed |= header["msg_type"] == "iopub_welcome"
        self.model.received(channel, message)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Take messages in until ``condition()``; raises :class:`Stuck` after ``seconds`` without any."""
        begun = self.last_message = time.monotonic()
        while not condition():
            self.pump(0.05)
            self.on_tick()
            now = time.monotonic()
            if now - self.last_message > seconds or now - begun > 4 * PATIENCE:
                waiting = "; ".join(request.describe() for request in self.model.open())
                raise Stuck(f"{what} did not come in {now - begun:.0f} s; open: {waiting}")

    def idle(self, seconds: float) -> None:
        """Take messages in for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.pump(min(left, 0.02))
            self.on_tick()

    # Sending

    def execute(self, code: str, tag: str | None = None, **expected: Any) -> Request:
        """Send a cell; ``expected`` are fields of :class:`Request`."""
        message = self.session.msg(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": True,
                "stop_on_error": False,
            },
        )
        request = self.model.sent(Request(message["header"]["msg_id"], tag or self.tag(), **expected))
        self.session.send(self._sockets["shell"], message)
        return request

    def tag(self) -> str:
        """A name for a cell, its own in this kernel's life."""
        self.numbers += 1
        return f"c{self.numbers}"

    def setup(self) -> None:
        """Run the first cell."""
        self.wait(lambda: self.welcomed, "the welcome")
        self.finish(self.execute(SETUP, "setup"))

    def lines(self, count: int, pause: float) -> Request:
        """A cell that prints numbered lines in one of several ways."""
        tag = self.tag()
        way = self.rng.choice(("each", "each", "some", "none", "thread", "await"))
        if way == "thread":
            code = f"thread_lines({tag!r}, {count}, {pause})"
        elif way == "await":
            code = f"await slow_lines({tag!r}, {count}, {pause})"
        else:
            code = f"lines({tag!r}, {count}, {pause}, {way!r})"
        return self.execute(code, tag, lines=count, threaded=way == "thread")

    def show(self, count: int) -> Request:
        """A cell with rich output."""
        tag = self.tag()
        hashes = payload_hashes(payload(tag, number, PAYLOAD) for number in range(count))
        return self.execute(f"show({tag!r}, {count}, {PAYLOAD})", tag, displays=hashes)

    def ask(self) -> Request:
        """A cell that waits for input, with lines before and after."""
        tag = self.tag()
        code = f"lines({tag!r}, 3, 0, 'each')\nprint('answer', input({tag + '?'!r}))"
        answer = f"{tag}-{self.rng.randrange(10**9)}"
        request = self.execute(code, tag, lines=3, prompt=f"{tag}?", values=(f"answer {answer}",))
        return request

    def answer(self, request: Request) -> None:
        """Answer the question of :meth:`ask`."""
        value = request.values[0].removeprefix("answer ")
        request.answered = value
        self.session.send(self._sockets["stdin"], self.session.msg("input_reply", {"value": value, "status": "ok"}))

    def comm(self, number: int) -> Request:
        """A comm message (the comm is opened on first use), which the kernel echoes with its counter."""
        if self._comm is None:
            self._comm = self.session.msg("x")["header"]["msg_id"]
            content = {"comm_id": self._comm, "target_name": "soak", "data": {}}
            self._comm_send("comm_open", content)
        return self._comm_send("comm_msg", {"comm_id": self._comm, "data": {"number": number}})

    def _comm_send(self, kind: str, content: dict[str, Any]) -> Request:
        message = self.session.msg(kind, content)
        request = Request(message["header"]["msg_id"], f"{kind}{self.numbers}", inherited=True)
        # No cell: no execute_input, and no reply.
        self.model.sent(request)
        self.session.send(self._sockets["shell"], message)
        return request

    def forget_comm(self) -> None:
        """The kernel was restarted: it has no comm any more."""
        self._comm = None

    def control(self, kind: str) -> str:
        """Send a control message; returns its id."""
        message = self.session.msg(kind, {})
        self.session.send(self._sockets["control"], message)
        return str(message["header"]["msg_id"])

    # Waiting for the whole of it

    def finish(self, *requests: Request) -> None:
        """Wait for the end of ``requests``; raises :class:`Broken` when the model found fault."""
        self.wait(lambda: all(request.done for request in requests) or self.model.failures, "the end of a cell")
        self.check()

    def finish_all(self) -> None:
        """Wait for the end of everything."""
        self.wait(lambda: not self.model.open() or self.model.failures, "the end of all cells")
        self.check()

    def check(self) -> None:
        """Raise :class:`Broken` when the model found fault."""
        if self.model.failures:
            raise Broken("; ".join(map(str, self.model.failures[:5])))
