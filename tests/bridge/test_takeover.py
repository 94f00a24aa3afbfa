"""The owner of a kernel is killed with -9, or hands over: jupyter_client's own clients go on with the next one.

The owner is a process (``owner_process.py``); the test plays the kernel and what the agent keeps for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bridging import KEY, PATIENCE, ready, until_it_beats
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.session import Session

from sandbox_gateway.wire.frames import Channel
from sandbox_gateway.zmq_bridge import CONNECTION_FILE


class Owner:
    """The process, and what it said."""

    def __init__(self, directory: Path) -> None:
        script = Path(__file__).with_name("owner_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(directory), KEY.decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.requests: queue.Queue[tuple[Any, list[bytes]]] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "request" in said:
                channel, parts = said["request"]
                self.requests.put((channel, [bytes.fromhex(part) for part in parts]))
            else:
                self._answers.put(said["answer"])

    def tell(self, op: str, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **more}) + "\n")
        self.process.stdin.flush()

    def ask(self, op: str, **more: Any) -> Any:
        self.tell(op, **more)
        return self._answers.get(timeout=PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(PATIENCE)
        self._reader.join()
        self.process.stdout.close()


class Kernel:
    """Answers what an owner passes on; its messages are signed as a kernel's are."""

    def __init__(self) -> None:
        self.session = Session(key=KEY)
        self.count = 0

    def send(self, owner: Owner, channel: int, kind: str, content: dict[str, Any], parent: Any, to: bytes) -> None:
        message = self.session.msg(kind, content, parent=parent)
        parts = [to, *self.session.serialize(message)]
        owner.tell("received", channel=int(channel), parts=[bytes(part).hex() for part in parts])

    def publish(self, owner: Owner, kind: str, content: dict[str, Any], parent: Any) -> None:
        self.send(owner, Channel.IOPUB, kind, content, parent, kind.encode())

    def taken(self, owner: Owner) -> tuple[int, bytes, dict[str, Any]]:
        """The next request: channel, identity, message."""
        channel, parts = owner.requests.get(timeout=PATIENCE)
        identities, rest = self.session.feed_identities(parts)
        return channel, identities[0], self.session.deserialize(rest)

    def answer(self, owner: Owner, channel: int, identity: bytes, request: dict[str, Any]) -> None:
        """One request, as a kernel would: an execution prints its code."""
        kind = request["header"]["msg_type"]
        self.publish(owner, "status", {"execution_state": "busy"}, request)
        if kind == "execute_request":
            self.count += 1
            self.publish(owner, "stream", {"name": "stdout", "text": request["content"]["code"]}, request)
            content: dict[str, Any] = {"status": "ok", "execution_count": self.count}
        else:
            content = {"status": "ok", "protocol_version": "5.3", "implementation": "test"}
        self.send(owner, channel, kind.replace("_request", "_reply"), content, request, identity)
        self.publish(owner, "status", {"execution_state": "idle"}, request)

    @contextlib.contextmanager
    def serving(self, owner: Owner) -> Iterator[None]:
        """Answer everything meanwhile."""
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    channel, parts = owner.requests.get(timeout=0.02)
                except queue.Empty:
                    continue
                identities, rest = self.session.feed_identities(parts)
                self.answer(owner, channel, identities[0], self.session.deserialize(rest))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


Start = Callable[[], Owner]


@pytest.fixture
def owner(directory: Path) -> Iterator[Start]:
    """Starts an owner."""
    made: list[Owner] = []

    def start() -> Owner:
        made.append(Owner(directory))
        return made[-1]

    yield start
    for known in made:
        if known.process.poll() is None:
            known.kill()
    for path in directory.iterdir():
        path.unlink()


@pytest.fixture
def client(directory: Path) -> Iterator[Callable[[], BlockingKernelClient]]:
    made: list[BlockingKernelClient] = []

    def connect() -> BlockingKernelClient:
        client = BlockingKernelClient(connection_file=str(directory / CONNECTION_FILE))
        client.load_connection_file()
        client.start_channels()
        made.append(client)
        return client

    yield connect
    for known in made:
        known.stop_channels()
        known.context.destroy(linger=0)


def iopub(client: BlockingKernelClient, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """What comes, up to the first that is wanted; without the welcomes."""
    got = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=PATIENCE)
        if message["msg_type"] != "iopub_welcome":
            got.append(message)
            if until(message):
                return got
    raise AssertionError(f"it did not come, but {got}")


def says(text: str) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["content"].get("text") == text


def test_the_connection_file_is_private_and_what_a_client_takes(owner: Start, directory: Path):
    first = owner()
    first.ask("open")
    file = directory / CONNECTION_FILE
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert json.loads(file.read_text())["kernel_name"] == "sandbox-python3"
    assert json.loads(file.read_text())["key"] == KEY.decode()


def test_a_client_goes_on_with_the_next_owner_after_a_kill(owner: Start, client: Any):
    kernel = Kernel()
    first = owner()
    first.ask("open")
    first.ask("connect")
    mine = client()
    with kernel.serving(first):
        ready(mine)
        said: list[str] = []
        mine.execute_interactive("one", output_hook=lambda m: said.append(m["content"].get("text")), timeout=PATIENCE)
        assert "one" in said
    first.kill()
    second = owner()
    second.ask("retain")
    second.ask("open")
    second.ask("connect")
    with kernel.serving(second):
        reply = mine.execute_interactive("two", output_hook=lambda m: said.append(m["content"].get("text")), timeout=30)
    assert reply["content"]["execution_count"] == 2
    assert said.count("two") == 1
    until_it_beats(mine)


def test_output_and_replies_from_between_the_owners_reach_the_client_that_waits_for_them(owner: Start, client: Any):
    """The kernel ran on while there was no owner; the agent gives what it kept to the next one before any client is
    back."""
    kernel = Kernel()
    first = owner()
    first.ask("open")
    first.ask("connect")
    mine = client()
    with kernel.serving(first):
        ready(mine)
    mine.execute("cell")
    _, identity, cell = kernel.taken(first)
    kernel.publish(first, "stream", {"name": "stdout", "text": "before"}, cell)
    iopub(mine, says("before"))
    first.kill()
    second = owner()
    second.ask("retain")
    for n in range(100):
        kernel.publish(second, "display_data", {"text": str(n)}, cell)
    kernel.send(second, Channel.STDIN, "input_request", {"prompt": "n?", "password": False}, cell, identity)
    second.ask("open")
    for n in range(100, 200):
        kernel.publish(second, "display_data", {"text": str(n)}, cell)
    second.ask("connect")
    got = iopub(mine, says("199"))
    assert [message["content"]["text"] for message in got] == [str(n) for n in range(200)]


def test_an_input_request_and_a_reply_wait_for_their_client(owner: Start, client: Any):
    kernel = Kernel()
    first = owner()
    first.ask("open")
    first.ask("connect")
    mine = client()
    with kernel.serving(first):
        ready(mine)
    asked = mine.execute("cell")
    channel, identity, cell = kernel.taken(first)
    first.kill()
    second = owner()
    second.ask("retain")
    second.ask("open")
    second.ask("connect")
    # Nobody has reconnected for sure when these come.
    kernel.send(second, Channel.STDIN, "input_request", {"prompt": "n?", "password": False}, cell, identity)
    kernel.send(second, channel, "execute_reply", {"status": "ok", "execution_count": 7}, cell, identity)
    assert mine.get_stdin_msg(timeout=PATIENCE)["content"]["prompt"] == "n?"
    reply = mine.get_shell_msg(timeout=PATIENCE)
    assert reply["parent_header"]["msg_id"] == asked and reply["content"]["execution_count"] == 7
    mine.input("42")
    channel, again, answer = kernel.taken(second)
    assert (channel, again, answer["content"]["value"]) == (Channel.STDIN, identity, "42")


def test_several_clients_come_back_and_each_gets_everything(owner: Start, client: Any):
    kernel = Kernel()
    first = owner()
    first.ask("open")
    first.ask("connect")
    clients = [client() for _ in range(3)]
    with kernel.serving(first):
        for known in clients:
            ready(known)
    clients[0].execute("cell")
    _, _, cell = kernel.taken(first)
    first.kill()
    second = owner()
    second.ask("retain")
    second.ask("open")
    for n in range(300):
        kernel.publish(second, "display_data", {"text": str(n)}, cell)
        time.sleep(0.002)
    for known in clients:
        got = [m for m in iopub(known, says("299")) if m["parent_header"]["msg_id"] == cell["header"]["msg_id"]]
        texts = [m["content"]["text"] for m in got if "text" in m["content"]]
        assert texts == [str(n) for n in range(300)]


def test_a_sleeping_kernel_is_handed_over_and_nobody_notices(owner: Start, client: Any):
    kernel = Kernel()
    first = owner()
    first.ask("open")
    first.ask("connect")
    mine = client()
    with kernel.serving(first):
        ready(mine)
    first.ask("sleep")
    until_it_beats(mine)
    assert first.ask("settle")
    facts = first.ask("facts")
    second = owner()
    second.ask("recall", facts=facts)
    second.ask("sleep")
    second.ask("open")
    # The old one is late: it must not take away what is the new one's.
    first.ask("close")
    first.end()
    info = mine.kernel_info(reply=True, timeout=PATIENCE)
    assert info["content"]["implementation"] == "test"
    until_it_beats(mine)
    assert second.requests.empty()
    asked = mine.execute("cell")
    assert second.requests.get(timeout=PATIENCE)[0] == "wake"
    second.ask("connect")
    channel, identity, cell = kernel.taken(second)
    assert cell["header"]["msg_id"] == asked
    kernel.answer(second, channel, identity, cell)
    while mine.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] != asked:
        pass
    new = client()
    with kernel.serving(second):
        ready(new)
