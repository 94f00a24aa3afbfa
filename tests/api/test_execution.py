"""One client of one kernel, without a kernel: what comes from inside is anything, and comes as fast as it likes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from sandbox_gateway import kernel_client, messages, results
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.execution import LIMIT, Execution
from sandbox_gateway.kernel_client import IDENTITY, KernelClient
from sandbox_gateway.messages import Buffer
from sandbox_gateway.model import Death, DeathKind
from sandbox_gateway.results import Done, Error, Stream
from sandbox_gateway.wire.frames import Channel

KEY = b"a key"


class Seat:
    def __init__(self) -> None:
        self.key = KEY
        self.channels = KernelChannels(KEY)
        self.released = False

    def release(self) -> None:
        self.released = True


class Live:
    """The part of a LiveSandbox that a client sees, and the kernel's side of the channels."""

    def __init__(self) -> None:
        self.id = "a-kernel"
        self.seat = Seat()
        self.death: Death | None = None
        self.left = False
        self.ended = asyncio.Event()
        self.gone = asyncio.Event()
        self.sent: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self.interrupts = 0
        self.heeds = False
        self.seat.channels.connect(self)

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        assert parts[0] == IDENTITY and parts[2] == messages.sign(KEY, parts[3:7])
        self.sent.append((channel, json.loads(bytes(parts[3])), json.loads(bytes(parts[6]))))
        return len(self.sent)

    def poll(self) -> int | None:
        return None if self.death is None else -9

    async def wait_kernel(self) -> int | None:
        await self.gone.wait()
        return self.poll()

    async def interrupt(self) -> None:
        self.interrupts += 1
        if self.heeds:
            self.reply("error")
            self.idle()

    # What the kernel does

    @property
    def requests(self) -> list[str]:
        return [content["code"] for channel, _, content in self.sent if channel == Channel.SHELL]

    def say(
        self, channel: Channel, kind: str, content: Mapping[str, Any], *, request: int = -1, key: bytes = KEY
    ) -> None:
        parent = json.dumps(self.sent[request][1]).encode()
        prefix: list[Buffer] = [b"topic"] if channel is Channel.IOPUB else [IDENTITY]
        parts = messages.compose(key, prefix, kind, json.dumps(content).encode(), parent=parent)
        self.seat.channels.received(int(channel), parts)

    def idle(self, request: int = -1) -> None:
        self.say(Channel.IOPUB, "status", {"execution_state": "idle"}, request=request)

    def reply(self, status: Any = "ok", count: Any = 1, request: int = -1) -> None:
        self.say(Channel.SHELL, "execute_reply", {"status": status, "execution_count": count}, request=request)


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    made = Live()
    yield made
    client(made).leave(SandboxGatewayError("internal", "the test is over"))
    await asyncio.sleep(0)


def client(live: Live) -> KernelClient:
    return kernel_client.client_of(live)  # type: ignore[arg-type]


def begin(live: Live, code: str = "1", **options: Any) -> Execution:
    execution = Execution(code, KEY, **options)
    client(live).submit(execution)
    return execution


async def everything(execution: Execution) -> list[Any]:
    async with asyncio.timeout(20):
        return [message async for message in execution]


async def test_a_cell_ends_with_its_reply_and_its_idle_in_either_order(live: Live) -> None:
    for order in ((live.idle, live.reply), (live.reply, live.idle)):
        execution = begin(live)
        order[0]()
        assert not execution.done
        order[1]()
        assert await everything(execution) == [Done("ok", 1)]


async def test_output_after_the_reply_belongs_to_the_cell(live: Live) -> None:
    execution = begin(live)
    live.reply()
    live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "late"})
    live.idle()
    live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "after the end"})
    assert await everything(execution) == [Stream("stdout", "late"), Done("ok", 1)]


async def test_the_next_cell_is_sent_when_the_last_has_ended(live: Live) -> None:
    first, second, third = begin(live, "1"), begin(live, "2"), begin(live, "3")
    assert live.requests == ["1"]
    assert client(live).withdraw(second) and not client(live).withdraw(first)
    live.reply()
    live.idle()
    assert live.requests == ["1", "3"]
    assert await everything(second) == [Done("aborted")]
    assert client(live).runs(third)


async def test_a_reply_without_an_idle_is_an_end_after_a_while(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_client, "IDLE_PATIENCE", 0.1)
    monkeypatch.setattr(kernel_client, "_LOOK", 0.05)
    execution = begin(live)
    live.reply()
    assert await everything(execution) == [Done("ok", 1)]


async def test_what_is_malformed_or_not_signed_is_passed_over(live: Live) -> None:
    execution = begin(live)
    live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": "forged"}, key=b"another key")
    live.seat.channels.received(int(Channel.IOPUB), [b"topic", b"<IDS|MSG>", b"", b"{", b"[]", b"null", b"\xff"])
    live.seat.channels.received(int(Channel.SHELL), [IDENTITY])
    deep = b"[" * 100_000
    for kind, content in (
        ("stream", {"name": ["stdout"], "text": {"not": "a text"}}),
        ("display_data", {"data": "none", "metadata": 3, "transient": []}),
        ("execute_result", {"data": None, "execution_count": "one"}),
        ("error", {"ename": 1, "evalue": None, "traceback": [1, "line"]}),
        ("clear_output", {"wait": "yes"}),
        ("no_such_type", {}),
    ):
        live.say(Channel.IOPUB, kind, content)
    parent = json.dumps(live.sent[-1][1]).encode()
    live.seat.channels.received(int(Channel.IOPUB), messages.compose(KEY, [b"topic"], "stream", deep, parent=parent))
    live.reply(status=["ok"], count=True)
    live.idle()
    found = await everything(execution)
    assert found == [
        Stream("stderr", ""),
        results.DisplayData({}),
        results.ExecuteResult({}),
        Error("", "", ("line",)),
        results.ClearOutput(),
        Stream("stderr", ""),
        Done("error"),
    ]


async def test_a_program_that_does_not_read_costs_bounded_memory_and_is_told(live: Live) -> None:
    execution = begin(live)
    text = "x" * (1 << 20)
    for _ in range(40):
        live.say(Channel.IOPUB, "display_data", {"data": {"text/plain": text}})
    live.say(Channel.IOPUB, "error", {"ename": "E", "evalue": "", "traceback": []})
    assert execution._queue.pending <= LIMIT * 1.1
    live.reply("error")
    live.idle()
    found = await everything(execution)
    assert "[sandbox]" in found[0].text and "were left out" in found[0].text
    shown = [message for message in found if isinstance(message, results.DisplayData)]
    assert 5 < len(shown) < 17
    assert found[-2:] == [Error("E", ""), Done("error", 1)]


async def test_errors_without_end_are_bounded_too(live: Live) -> None:
    execution = begin(live)
    for _ in range(60):
        live.say(Channel.IOPUB, "error", {"ename": "E", "evalue": "x" * (1 << 20), "traceback": []})
    assert execution._queue.pending <= LIMIT * 2.2


async def test_many_small_lines_reach_a_slow_program_whole(live: Live) -> None:
    execution = begin(live)
    for number in range(10_000):
        live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": f"{number}\n"})
    live.reply()
    live.idle()
    found = "".join(message.text for message in await everything(execution) if isinstance(message, Stream))
    assert found == "".join(f"{number}\n" for number in range(10_000))


async def test_a_death_and_another_owner_end_every_cell_with_the_reason(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_client, "LAST_WORDS", 0.01)
    client(live).has_seat = True
    cells = [begin(live), begin(live)]
    live.death = Death(DeathKind.OUT_OF_MEMORY)
    live.gone.set()
    live.ended.set()
    for cell in cells:
        with pytest.raises(SandboxGatewayError, match="out of memory") as caught:
            await everything(cell)
        assert caught.value.code == "kernel_died"
    assert live.seat.released

    other = Live()
    cell = begin(other)
    user = client(other)
    user.has_seat = True
    other.left = True
    other.gone.set()
    with pytest.raises(SandboxGatewayError) as caught:
        await everything(cell)
    assert caught.value.code == "owned_elsewhere" and not other.seat.released
    with pytest.raises(SandboxGatewayError):
        user.submit(Execution("1", KEY))


async def test_a_time_that_is_over_interrupts_and_a_cell_that_does_not_heed_it_ends_all_the_same(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_client, "INTERRUPT_PATIENCE", 0.1)
    cell, behind = begin(live, "1", timeout=0.05), begin(live, "2")
    with pytest.raises(SandboxGatewayError, match="does not heed") as caught:
        await everything(cell)
    assert caught.value.code == "timeout" and live.interrupts == 1
    assert live.requests == ["1"] and not behind.done, "the kernel is still busy with the first"
    live.reply("error")
    live.idle()
    assert live.requests == ["1", "2"]
    live.reply()
    live.idle()
    live.heeds = True
    quick = begin(live, timeout=0.05)
    with pytest.raises(SandboxGatewayError, match="longer than"):
        await everything(quick)


async def test_the_time_of_a_sleeping_kernel_stands_still(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_client, "_LOOK", 0.02)
    cell = begin(live, timeout=0.2)
    live.seat.channels.sleep(lambda: None)
    await asyncio.sleep(0.5)
    assert live.interrupts == 0 and not cell.done
    live.seat.channels.connect(live)
    async with asyncio.timeout(10):
        while not live.interrupts:
            await asyncio.sleep(0.01)


async def test_an_input_is_given_to_the_cell_that_asked(live: Live) -> None:
    cell = begin(live, stdin=True)
    live.say(Channel.STDIN, "input_request", {"prompt": "? ", "password": True})
    assert await anext(cell) == results.InputRequest("? ", password=True)
    client(live).answer("a line")
    assert live.sent[-1][0] == Channel.STDIN and live.sent[-1][2]["value"] == "a line"
    with pytest.raises(SandboxGatewayError):
        client(live).answer("another")


async def test_a_cell_of_an_earlier_owner_is_followed_to_its_end() -> None:
    live = Live()
    elsewhere = {"msg_id": "theirs", "session": "another"}

    def theirs(kind: str, content: Mapping[str, Any]) -> None:
        parent = json.dumps(elsewhere).encode()
        live.seat.channels.received(
            int(Channel.IOPUB),
            messages.compose(KEY, [b"topic"], kind, json.dumps(content).encode(), parent=parent),
        )

    live.seat.channels.retain()
    theirs("stream", {"name": "stdout", "text": "kept "})
    user = client(live)
    theirs("stream", {"name": "stdout", "text": "and heard "})
    followed = Execution("", KEY, id="")
    user.follow(followed)
    theirs("stream", {"name": "stdout", "text": "and followed"})
    assert live.requests == [""] and live.sent[-1][2]["silent"]
    live.reply()
    live.idle()
    found = await everything(followed)
    assert "".join(m.text for m in found[:-1]) == "kept and heard and followed" and found[-1] == Done("ok")
    assert followed.id == "theirs"
    nothing = Execution("", KEY, id="never heard of")
    user.follow(nothing)
    live.reply()
    live.idle()
    assert await everything(nothing) == [Done("ok")]
    user.leave(SandboxGatewayError("internal", "the test is over"))


async def test_it_is_read_from_another_thread_than_it_is_fed_from(live: Live) -> None:
    cell = begin(live)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(everything(cell))))
    thread.start()
    for number in range(2000):
        live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": f"{number} "})
        if number % 100 == 0:
            await asyncio.sleep(0)
    live.reply()
    live.idle()
    await asyncio.to_thread(thread.join)
    assert "".join(m.text for m in found if isinstance(m, Stream)) == "".join(f"{n} " for n in range(2000))


async def test_two_readers_of_one_cell_are_refused(live: Live) -> None:
    cell = begin(live)
    reader = asyncio.create_task(everything(cell))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task"):
        await everything(cell)
    live.reply()
    live.idle()
    assert await reader == [Done("ok", 1)]


def test_a_result_holds_a_bounded_amount_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "COLLECTED", 10)
    collector = results.Collector()
    for message in (Stream("stdout", "12345678"), Stream("stderr", "too long"), results.ExecuteResult({"a": "b"})):
        collector.add(message)
    result = collector.result(Done("ok", 3))
    assert (result.stdout, result.stderr, result.left_out) == ("12345678", "", 8)
    assert len(result.results) == 1 and result.value is None and result.ok


def test_the_package_names_the_api_and_imports_it_only_when_it_is_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sandbox_gateway as s\n"
        "assert 'asyncio' not in sys.modules and 'sandbox_gateway.sandbox' not in sys.modules\n"
        "for name in s.__all__: getattr(s, name)\n"
        "assert s.Sandbox is sys.modules['sandbox_gateway.sandbox'].Sandbox\n"
        "assert not {'traitlets', 'tornado', 'zmq'} & set(sys.modules), 'the core needs none of them'\n"
        "try: s.nothing\nexcept AttributeError: pass\nelse: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
