"""One kernel's sessions: who gets what, once, in order, within bounds, whatever breaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ws_harness import IOPUB, SHELL, STDIN, FakeKernel, parse

from sandbox_gateway import messages
from sandbox_gateway.server import outlet, ws_protocol
from sandbox_gateway.server.hub import Hub, HubSettings, TooManySessions, identity_of
from sandbox_gateway.server.outlet import ConnectionLost, Outlet
from sandbox_gateway.server.session_file import NAME, Saved, SessionFile
from sandbox_gateway.server.ws_protocol import Incoming


class Writer:
    """A WebSocket: what was written is here; ``stalled`` ones take nothing off the process's hands."""

    def __init__(self, *, v1: bool = True, stalled: bool = False, answers: bool = True) -> None:
        self.v1 = v1
        self.stalled = stalled
        self.answers = answers
        self.frames: list[bytes] = []
        self.pings: list[bytes] = []
        self.closed: tuple[int, str] | None = None
        self.broken = False
        self.leaving: list[asyncio.Future[None]] = []
        self.outlet: Outlet | None = None

    def write(self, frames: Sequence[bytes]) -> asyncio.Future[None] | None:
        if self.closed or self.broken:
            raise ConnectionLost
        self.frames += frames
        if not self.stalled:
            return None
        self.leaving.append(asyncio.get_running_loop().create_future())
        return self.leaving[-1]

    def ping(self, data: bytes) -> None:
        if self.closed or self.broken:
            raise ConnectionLost
        self.pings.append(data)
        if self.answers and self.outlet is not None and not self.stalled:
            asyncio.get_running_loop().call_soon(self.outlet.pong, data)

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, reason)

    def recover(self) -> None:
        self.stalled = False
        for leaving in self.leaving:
            leaving.set_result(None)
        self.leaving.clear()
        if self.outlet is not None and self.pings and self.answers:
            self.outlet.pong(self.pings[-1])

    @property
    def size(self) -> int:
        return sum(map(len, self.frames))

    @property
    def messages(self) -> list[dict[str, Any]]:
        found = []
        for frame in self.frames:
            data = bytes(ws_protocol.payload(frame))
            with contextlib.suppress(ValueError, RecursionError):  # v1 passes contents on as they are
                found.append(parse(data.decode() if frame[0] == ws_protocol.TEXT else data, v1=self.v1))
        return found

    @property
    def texts(self) -> list[str]:
        streams = [m["content"] for m in self.messages if m["header"]["msg_type"] == "stream"]
        return [content["text"] for content in streams if isinstance(content, dict) and "text" in content]


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sg-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def kernel(directory: Path):
    made = FakeKernel(directory)
    yield made
    made.hub.close(True)
    assert list(directory.iterdir()) == []


def join(
    hub: Hub, session: str | None = "a", *, name: str = "somebody", replay: bool = False, **options: Any
) -> Writer:
    writer = Writer(**options)
    writer.outlet = hub.attach(name, session, writer, replay=replay)
    return writer


def leave(hub: Hub, writer: Writer) -> None:
    """The network breaks, and the server sees it."""
    writer.broken = True
    assert writer.outlet is not None
    hub.detach(writer.outlet, writer)


async def turn(times: int = 5) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def request(msg_type: str = "execute_request", channel: int = SHELL) -> Incoming:
    header = json.dumps({"msg_id": "m", "msg_type": msg_type}).encode()
    return Incoming(channel, [header, b"{}", b"{}", b"{}"], msg_type)


# Who gets what


async def test_output_goes_to_all_and_a_reply_to_the_session_that_asked(kernel: FakeKernel) -> None:
    hub = kernel.hub
    a, b = join(hub, "a"), join(hub, "b", v1=False)
    assert a.outlet and b.outlet
    hub.request(b.outlet, request())
    kernel.print("to all")
    kernel.reply(status="ok")
    hub.request(a.outlet, request("input_reply", STDIN))
    await turn()
    assert a.texts == b.texts == ["to all"]
    assert [m["channel"] for m in a.messages] == ["iopub"] and [m["channel"] for m in b.messages] == ["iopub", "shell"]
    assert [channel for channel, _ in kernel.asked] == [SHELL, STDIN]
    assert kernel.asked[0][1][0] != kernel.asked[1][1][0]


async def test_a_session_is_a_user_s_own(kernel: FakeKernel) -> None:
    """Somebody else's session id gives nobody his replies."""
    mine, theirs = join(kernel.hub, "a", name="me"), join(kernel.hub, "a", name="you")
    assert mine.closed is None and mine.outlet is not theirs.outlet
    assert identity_of("a", "b:c") != identity_of("a:b", "c")
    assert identity_of("me", "a") != identity_of("you", "a") and len(identity_of("x", "\ud800")) == 32


async def test_a_second_socket_of_a_session_closes_the_first(kernel: FakeKernel) -> None:
    first = join(kernel.hub)
    second = join(kernel.hub)
    assert first.closed and first.closed[0] == 1000
    kernel.print("x")
    kernel.hub.detach(first.outlet, first)  # type: ignore[arg-type]
    await turn()
    assert first.frames == [] and second.texts == ["x"]
    assert kernel.hub.connected == 1


async def test_a_session_without_an_id_ends_with_its_connection(kernel: FakeKernel) -> None:
    leave(kernel.hub, join(kernel.hub, None))
    assert kernel.hub.stats.sessions == 0
    leave(kernel.hub, join(kernel.hub, "a"))
    assert kernel.hub.stats.sessions == 1


async def test_fifty_sessions_encode_a_message_once(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"v1": 0, "legacy": 0}

    def count(name: str) -> None:
        real = getattr(ws_protocol, f"frame_{name}")

        def counted(*args: Any) -> bytes:
            made[name] += 1
            return real(*args)

        monkeypatch.setattr(ws_protocol, f"frame_{name}", counted)

    for name in made:
        count(name)
    writers = [join(kernel.hub, str(n), v1=n % 2 == 0) for n in range(50)]
    kernel.print("x")
    await turn()
    assert all(writer.texts == ["x"] for writer in writers)
    assert made == {"v1": 1, "legacy": 1}


async def test_a_new_session_learns_the_state_and_on_request_what_was_printed(kernel: FakeKernel) -> None:
    parent = b'{"msg_id": "m", "msg_type": "execute_request"}'
    kernel.publish("status", {"execution_state": "busy"}, parent=parent)
    kernel.print("before", parent=parent)
    plain, replay = join(kernel.hub, "a"), join(kernel.hub, "b", replay=True)
    await turn()
    state = plain.messages[0]
    assert len(plain.frames) == 1 and state["content"] == {"execution_state": "busy"}
    assert state["parent_header"] == json.loads(parent)
    assert [m["header"]["msg_type"] for m in replay.messages] == ["status", "stream", "status"]
    again = join(kernel.hub, "a", replay=True)
    await turn()
    told = [m["content"] for m in again.messages]
    assert told == [{"execution_state": "busy"}], "a session that goes on has had the rest"


async def test_the_replay_is_bounded(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(replay_limit=100_000))
    for n in range(1000):
        kernel.print(f"{n}")
    kernel.print("x" * 200_000)
    writer = join(kernel.hub, replay=True)
    await turn()
    assert 50 < len(writer.texts) < 300 and writer.texts[-1] == "999"
    kernel.hub.close(True)


# The state


@pytest.mark.parametrize(
    ("parent", "state", "after"),
    [
        ("execute_request", "busy", "busy"),
        ("comm_msg", "busy", "busy"),
        ("kernel_info_request", "busy", "idle"),
        ("debug_request", "busy", "idle"),
        (None, "starting", "starting"),
        (None, "restarting", "restarting"),
        (None, "dead", "dead"),
    ],
)
async def test_the_state_follows_requests_that_count_as_use(
    kernel: FakeKernel, parent: str | None, state: str, after: str
) -> None:
    header = json.dumps({"msg_id": "m", "msg_type": parent} if parent else {}).encode()
    kernel.publish("status", {"execution_state": state}, parent=header)
    assert kernel.hub.execution_state == after


async def test_activity_is_use_and_whatever_comes_while_busy(kernel: FakeKernel) -> None:
    hub = kernel.hub
    execute, info = (json.dumps({"msg_type": f"{name}_request"}).encode() for name in ("execute", "kernel_info"))
    hub.ready()
    assert hub.execution_state == "idle"
    hub._activity = 0.0
    kernel.publish("status", {"execution_state": "busy"}, parent=info)
    kernel.publish("status", {"execution_state": "idle"}, parent=info)
    assert hub.last_activity == datetime(1970, 1, 1, tzinfo=UTC)
    kernel.publish("status", {"execution_state": "busy"}, parent=execute)
    hub._activity = 0.0
    kernel.print("x", parent=info)
    assert abs(hub.last_activity.timestamp() - time.time()) < 10


async def test_the_state_is_known_while_output_waits_for_the_first_session(kernel: FakeKernel) -> None:
    parent = b'{"msg_id": "m", "msg_type": "execute_request"}'
    kernel.channels.retain()
    kernel.publish("status", {"execution_state": "busy"}, parent=parent)
    assert kernel.hub.execution_state == "busy"
    kernel.publish("status", {"execution_state": "idle"}, parent=parent)
    assert kernel.hub.execution_state == "idle"
    writer = join(kernel.hub)
    await turn()
    assert [m["content"]["execution_state"] for m in writer.messages][:2] == ["busy", "idle"]
    assert kernel.hub.execution_state == "idle"


async def test_a_traceback_is_hidden_where_that_is_asked_for(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(hide_tracebacks="ask us"))
    writers = [join(kernel.hub, "a"), join(kernel.hub, "b", v1=False)]
    kernel.publish("error", {"ename": "secret", "evalue": "secret", "traceback": ["secret"]}, buffers=[b"secret"])
    await turn()
    for writer in writers:
        assert writer.messages[0]["content"]["traceback"] == ["ask us"] and b"secret" not in writer.frames[0]
    kernel.hub.close(True)


async def test_a_status_of_the_gateway_s_own_reaches_all(kernel: FakeKernel) -> None:
    a, b = join(kernel.hub, "a"), join(kernel.hub, "b", v1=False)
    kernel.hub.publish_status("restarting")
    await turn()
    for writer in (a, b):
        assert [m["content"] for m in writer.messages] == [{"execution_state": "restarting"}]
    assert kernel.hub.execution_state == "restarting"
    kernel.hub.ready()
    assert kernel.hub.execution_state == "idle"
    kernel.channels.kernel_died("it died\n")
    await turn()
    assert kernel.hub.execution_state == "dead" and a.messages[-1]["content"] == {"execution_state": "dead"}


async def test_a_restart_that_was_asked_for_is_no_news_of_a_death(kernel: FakeKernel) -> None:
    writer = join(kernel.hub, "a")
    kernel.hub.publish_restart()
    await turn()
    assert [(m["header"]["msg_type"], m["content"]) for m in writer.messages] == [
        ("shutdown_reply", {"status": "ok", "restart": True})
    ]
    assert kernel.hub.execution_state == "restarting"
    kernel.publish("status", {"execution_state": "idle"})
    assert kernel.hub.execution_state == "idle"


@pytest.mark.parametrize("state", ["busy", "idle"])
async def test_a_session_that_comes_back_learns_the_state(kernel: FakeKernel, state: str) -> None:
    writer = join(kernel.hub, "a")
    kernel.publish("status", {"execution_state": state}, parent=b'{"msg_type": "execute_request"}')
    await turn()
    again = join(kernel.hub, "a")
    await turn()
    assert len(writer.frames) == 1 and again.messages[0]["content"] == {"execution_state": state}


# Hostile kernels

HEADER = b'{"msg_id":"a","msg_type":"stream"}'
CONTENT = b'{"name":"stdout","text":"x"}'
CRAFTED = [
    b'{"msg_id":"a","msg_type":"stream"}, "channel": "shell", "x": {}',
    b'{"msg_id":"a","msg_type":"stream","msg_type":"status"}',
    b'{"msg_id":"a","msg_type":"stream","x":NaN}',
    b'{"msg_id":"a","msg_type":"\xff"}',
    b'{"msg_id":"\xed\xa0\x80","msg_type":"stream"}',
    b'{"msg_id":"\\ud800","msg_type":"\\udfff"}',
    b'{"msg_id":"a","msg_type":"stream","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'["stream"]',
    b'"stream"',
    b"null",
    b"",
    b"{}",
    b'{"msg_id":"a","msg_type":{}}',
    b'{"msg_id":"a","msg_type":null}',
    b'{"msg_type":"status"}',
    b'{"msg_id":"a","msg_type":"status"}',
    HEADER,
]


def readable(writer: Writer) -> None:
    """Every frame is a message that a strict client reads, and says its channel itself."""

    def never(name: str) -> None:
        raise AssertionError(name)

    for frame in writer.frames:
        data = bytes(ws_protocol.payload(frame))
        if not writer.v1:
            assert frame[0] == ws_protocol.TEXT
            pairs = json.loads(data.decode(), object_pairs_hook=list, parse_constant=never)
            names = [name for name, _ in pairs]
            assert len(set(names)) == len(names)
            assert dict(pairs)["channel"] in ("iopub", "shell")
        else:
            count = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8 * count : 8 * count + 8], "little") == len(data)
            assert data[8 * (count + 1) :][:5] in (b"iopub", b"shell")


@pytest.mark.parametrize("place", range(4))
async def test_crafted_parts_break_nothing_for_anybody(kernel: FakeKernel, place: int) -> None:
    writers = [join(kernel.hub, "a"), join(kernel.hub, "b", v1=False)]
    for n, crafted in enumerate(CRAFTED):
        body = [HEADER, b"{}", b"{}", CONTENT]
        body[place] = crafted
        kernel.say(IOPUB, [b"stream", messages.DELIMITER, b"", *body])
        kernel.say(SHELL, [identity_of("somebody", "ab"[n % 2]), messages.DELIMITER, b"", *body])
        await turn()
    kernel.print("the end")
    await turn()
    for writer in writers:
        readable(writer)
        assert writer.texts[-1] == "the end"
        told = [text for text in writer.texts if "left out" in text]
        # v1 passes contents on as they are.
        assert len(told) == (1 if place < 2 or not writer.v1 else 0), told
    assert kernel.hub.stats.malformed > 0


FRAMES = st.one_of(
    st.sampled_from([messages.DELIMITER, b"status", b"{}", HEADER, CONTENT, *CRAFTED, identity_of("somebody", "a")]),
    st.binary(max_size=20),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 6), st.lists(FRAMES, max_size=9)), max_size=20))
def test_no_message_of_a_kernel_raises_or_breaks_the_envelope(traffic: list[tuple[int, list[bytes]]]) -> None:
    async def play() -> None:
        directory = Path(tempfile.mkdtemp(prefix="sg-"))
        try:
            kernel = FakeKernel(directory)
            hub = kernel.hub
            writers = [join(hub, "a"), join(hub, "b", v1=False)]
            number = dict.fromkeys(range(7), 0)
            for channel, parts in traffic:
                number[channel] += 1
                kernel.channels.number = number[channel]
                hub._deliver(channel, parts)
                kernel.channels.number = 0
            await turn()
            for writer in writers:
                for frame in writer.frames:
                    if frame[0] == ws_protocol.TEXT:
                        assert json.loads(bytes(ws_protocol.payload(frame)))["channel"] in (
                            "iopub",
                            "shell",
                            "control",
                            "stdin",
                        )
            hub.close(True)
        finally:
            shutil.rmtree(directory)

    asyncio.run(play())


# Slow clients


async def test_a_client_that_stalls_slows_only_itself_and_is_told_what_it_missed(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(queue_limit=6 << 20, replay_limit=0))
    hub = kernel.hub
    slow, fast = join(hub, "slow", stalled=True), join(hub, "fast")
    assert slow.outlet and fast.outlet
    printed = 0
    for n in range(300):
        for _ in range(10):
            kernel.publish("display_data", {"data": {"text/plain": f"{n}" + "x" * 10_000}})
            printed += 1
        await turn()
        assert slow.outlet.pending < (7 << 20) + outlet.IN_FLIGHT
    await turn(200)
    assert len(fast.frames) == printed and not fast.outlet.left_out
    assert slow.size < 2 * outlet.IN_FLIGHT
    assert hub._served()[IOPUB] < 200
    slow.recover()
    await asyncio.sleep(0.3)
    told = [text for text in slow.texts if "left out" in text]
    assert len(told) == 1 and int(told[0].split()[1]) == slow.outlet.left_out == hub.stats.left_out
    assert len(slow.frames) - 1 + slow.outlet.left_out == printed
    assert slow.messages[-1]["content"]["data"]["text/plain"].startswith("299")
    assert hub._served() == {}
    hub.close(True)


async def test_lines_that_wait_are_joined_and_none_is_lost(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(queue_limit=16 << 20))
    writer = join(kernel.hub, stalled=True)
    assert writer.outlet
    for n in range(40_000):
        kernel.print(f"{n}\n")
    assert writer.outlet.pending < 12 << 20
    await turn()
    writer.recover()
    await asyncio.sleep(0.3)
    assert "".join(writer.texts) == "".join(f"{n}\n" for n in range(40_000))
    assert len(writer.frames) < 20_000
    assert kernel.hub._served() == {}
    kernel.hub.close(True)


async def test_a_flood_of_what_may_not_be_left_out_is_bounded_too(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(queue_limit=1 << 20))
    writer = join(kernel.hub, stalled=True)
    assert writer.outlet
    await turn()
    for _ in range(400):
        kernel.publish("error", {"ename": "x" * 50_000, "evalue": "", "traceback": []})
        assert writer.outlet.pending < (2 << 20) + 2 * outlet.IN_FLIGHT
    await turn()
    writer.recover()
    await asyncio.sleep(0.05)
    assert any("left out" in text for text in writer.texts)
    kernel.hub.close(True)


async def test_a_client_that_confirms_nothing_gets_a_window_only(kernel: FakeKernel) -> None:
    """What it has taken into its buffers would otherwise have to be kept without bound for its return."""
    writer = join(kernel.hub, answers=False)
    assert writer.outlet
    for n in range(300):
        kernel.publish("display_data", {"n": n, "x": "x" * 100_000})
        await turn()
    assert outlet.WINDOW <= writer.size < outlet.WINDOW + 2 * outlet.BATCH
    writer.answers = True
    writer.outlet.pong(writer.pings[-1])
    async with asyncio.timeout(10):
        while len(writer.frames) < 300:
            await asyncio.sleep(0.01)
    assert [m["content"]["n"] for m in writer.messages] == list(range(300))


async def test_a_client_that_never_answers_is_served_all_the_same(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "PATIENCE", 0.05)
    writer = join(kernel.hub, answers=False)
    assert writer.outlet
    for n in range(300):
        kernel.publish("display_data", {"n": n, "x": "x" * 100_000})
    await asyncio.sleep(0.3)
    assert [m["content"]["n"] for m in writer.messages] == list(range(300))
    assert writer.outlet.pending <= outlet.WINDOW
    assert 300 - 90 < kernel.hub._served()[IOPUB] < 300
    leave(kernel.hub, writer)
    again = join(kernel.hub)
    await asyncio.sleep(0.05)
    numbers = [m["content"]["n"] for m in again.messages]
    assert numbers == list(range(numbers[0], 300)) and len(numbers) < 90


async def test_what_only_one_protocol_cannot_say_is_left_out_of_that(kernel: FakeKernel) -> None:
    new, old = join(kernel.hub, "a"), join(kernel.hub, "b", v1=False)
    for _ in range(3):
        kernel.say(IOPUB, [b"stream", messages.DELIMITER, b"", HEADER, b"{}", b"{}", b'{"name": NaN}'])
    kernel.print("x")
    await turn()
    assert len(new.frames) == 4
    assert len(old.texts) == 2 and "left out" in old.texts[0] and old.texts[1] == "x"
    await asyncio.sleep(0.3)
    assert kernel.hub._served() == {}


# Connections that end


async def test_what_was_confirmed_does_not_come_again_and_what_was_not_does(kernel: FakeKernel) -> None:
    writer = join(kernel.hub)
    kernel.print("1")
    await asyncio.sleep(0.05)
    writer.answers = False
    kernel.print("2")
    await asyncio.sleep(0.15)
    leave(kernel.hub, writer)
    kernel.print("3")
    assert writer.outlet
    kernel.hub.request(writer.outlet, request())
    kernel.reply(status="ok")
    again = join(kernel.hub)
    assert again.outlet is writer.outlet
    kernel.print("4")
    await turn()
    assert writer.texts == ["1", "2"]
    assert again.texts == ["2", "3", "4"]
    assert again.messages[0]["header"]["msg_id"] == writer.messages[1]["header"]["msg_id"]
    assert [m["channel"] for m in again.messages] == ["iopub", "iopub", "shell", "iopub"]


async def test_a_pong_that_answers_nothing_confirms_nothing(kernel: FakeKernel) -> None:
    writer = join(kernel.hub, answers=False)
    assert writer.outlet
    kernel.print("1")
    await turn()
    for data in (b"", b"sg", b"sg\x00\x00\x00\x00\x00\x00\x00\x02", b"x" * 125):
        writer.outlet.pong(data)
    leave(kernel.hub, writer)
    writer.outlet.pong(writer.pings[0])
    again = join(kernel.hub)
    await turn()
    assert again.texts == ["1"]


async def test_a_session_whose_client_stays_away_is_forgotten(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(session_timeout=0.1))
    leave(kernel.hub, join(kernel.hub))
    kernel.print("x")
    assert kernel.hub.stats.sessions == 1 and kernel.hub._served() == {IOPUB: 0}
    async with asyncio.timeout(10):
        while kernel.hub.stats.sessions or SessionFile(directory).read().sessions:
            await asyncio.sleep(0.02)
    assert kernel.hub._served() == {}
    kernel.hub.close(True)


async def test_sessions_are_limited_and_the_longest_away_goes(directory: Path) -> None:
    kernel = FakeKernel(directory, HubSettings(max_sessions=3))
    hub = kernel.hub
    first, second, third = (join(hub, str(n)) for n in range(3))
    with pytest.raises(TooManySessions):
        hub.attach("somebody", "3", Writer())
    leave(hub, second)
    await asyncio.sleep(0.01)
    leave(hub, first)
    kernel.print("x")
    join(hub, "3")
    assert hub.stats.sessions == 3
    back = join(hub, "0")
    await turn()
    assert back.texts == ["x"] and third.texts == ["x"]
    hub.close(True)


async def test_output_before_the_first_session_waits_for_it(kernel: FakeKernel) -> None:
    kernel.channels.retain()
    kernel.print("1")
    assert kernel.channels.retained
    first = join(kernel.hub, "a")
    second = join(kernel.hub, "b")
    third = join(kernel.hub, "c", replay=True)
    kernel.print("2")
    await turn()
    assert first.texts == second.texts == third.texts == ["1", "2"]


# Crashes


async def replayed(kernel: FakeKernel, old: FakeKernel) -> None:
    """What the agent does: all after the number that the new owner names, which is the lowest."""
    served = old.channels.served(dict(old.numbers))
    assert served is not None
    for channel, parts, number in old.log:
        if number > served[channel]:
            kernel.channels.received(channel, parts, number)
    kernel.numbers = dict(old.numbers)
    kernel.log = list(old.log)


async def test_after_a_crash_each_session_gets_exactly_what_follows(directory: Path) -> None:
    old = FakeKernel(directory)
    ahead, behind = join(old.hub, "ahead"), join(old.hub, "behind", v1=False)
    old.print("1")
    assert behind.outlet and ahead.outlet
    old.hub.request(behind.outlet, request())
    await asyncio.sleep(0.15)
    behind.answers = False
    leave(old.hub, behind)
    for n in range(2, 6):
        old.print(str(n))
    old.reply(status="ok")
    await asyncio.sleep(0.3)
    assert ahead.texts == ["1", "2", "3", "4", "5"]
    saved = SessionFile(directory).read()
    assert saved.received[IOPUB] == 5
    assert {numbers[IOPUB] for numbers in saved.sessions.values()} == {1, 5}

    # kill -9: nobody says goodbye.
    new = FakeKernel(directory)
    assert new.hub.stats.sessions == 2 and new.hub.connected == 0
    fresh = join(new.hub, "fresh")
    await replayed(new, old)
    assert SessionFile(directory).read().received[IOPUB] == 5
    ahead_again, behind_again = join(new.hub, "ahead"), join(new.hub, "behind", v1=False)
    new.print("6")
    await asyncio.sleep(0.3)
    assert ahead_again.texts == ["6"]
    assert behind_again.texts == ["2", "3", "4", "5", "6"]
    assert [m["channel"] for m in behind_again.messages].count("shell") == 1
    assert fresh.texts == ["6"]
    assert behind_again.messages[0]["header"]["msg_id"] == ahead.messages[1]["header"]["msg_id"]
    assert new.hub._served() == {}
    new.hub.close(True)
    old.hub._closed = True
    assert list(directory.iterdir()) == []


async def test_a_crash_before_the_replay_has_reached_anybody_loses_nothing(directory: Path) -> None:
    old = FakeKernel(directory)
    writer = join(old.hub)
    old.print("1")
    await asyncio.sleep(0.2)
    leave(old.hub, writer)
    old.print("2")
    await asyncio.sleep(0.1)
    second = FakeKernel(directory)
    second.hub._save()
    await replayed(second, old)
    second.hub._save()
    third = FakeKernel(directory)
    await replayed(third, old)
    again = join(third.hub)
    await turn()
    assert again.texts == ["2"]
    for kernel in (old, second):
        kernel.hub._closed = True
    third.hub.close(True)


async def test_the_state_is_known_after_a_crash(directory: Path) -> None:
    old = FakeKernel(directory)
    parent = b'{"msg_id": "m", "msg_type": "execute_request"}'
    old.publish("status", {"execution_state": "busy"}, parent=parent)
    await asyncio.sleep(0.1)
    old.hub._closed = True
    new = FakeKernel(directory)
    assert new.hub.execution_state == "busy"
    writer = join(new.hub, "a")
    await turn()
    assert writer.messages[0]["parent_header"] == json.loads(parent)
    new.hub.close(True)


@pytest.mark.parametrize("crashed", [False, True])
async def test_a_new_sandbox_under_the_same_id_begins_at_one(directory: Path, crashed: bool) -> None:
    kernel = FakeKernel(directory)
    writer = join(kernel.hub)
    for n in range(5):
        kernel.print(f"old {n}")
    await asyncio.sleep(0.2)
    leave(kernel.hub, writer)
    kernel.print("old 5")
    await asyncio.sleep(0.1)
    if crashed:
        kernel.hub._closed = True
        kernel = FakeKernel(directory)
    kernel.numbers[IOPUB] = 0
    kernel.print("new 0")
    again = join(kernel.hub)
    kernel.print("new 1")
    await asyncio.sleep(0.3)
    assert again.texts == (["new 0", "new 1"] if crashed else ["old 5", "new 0", "new 1"])
    saved = SessionFile(directory).read()
    assert saved.received[IOPUB] == 2 and {numbers[IOPUB] for numbers in saved.sessions.values()} == {2}
    kernel.hub.close(True)


async def test_on_a_goodbye_clients_come_again_and_on_the_kernel_s_end_they_do_not(directory: Path) -> None:
    kernel = FakeKernel(directory)
    writer = join(kernel.hub)
    kernel.seat.release(remove=False)
    assert writer.closed and writer.closed[0] == 1012
    assert (directory / NAME).stat().st_mode & 0o777 == 0o600
    kernel = FakeKernel(directory)
    writer = join(kernel.hub)
    kernel.seat.release(remove=True)
    assert writer.closed and writer.closed[0] == 1000
    assert list(directory.iterdir()) == []
    kernel.hub.close(True)


def test_of_a_write_that_a_crash_has_torn_the_one_before_counts(directory: Path) -> None:
    file = SessionFile(directory)
    for number in range(1, 6):
        file.write(Saved(state=f"state {number}"))
    file.close()
    path = directory / NAME
    whole = path.read_bytes()
    assert SessionFile(directory).read().state == "state 5"
    for at in (whole.index(b"state 5"), whole.index(b"state 5") - 20):
        path.write_bytes(whole[:at] + b"\0" + whole[at + 1 :])
        assert SessionFile(directory).read().state == "state 4"
    following = SessionFile(directory)
    assert following.read().state == "state 4"
    following.write(Saved(state="state 6"))
    assert SessionFile(directory).read().state == "state 6"
    following.close()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"version": 2}',
        b"\xff",
        b"[" * 100_000,
        b'{"version":1,"received":[1],"sessions":{}}',
    ],
    ids=lambda damage: repr(damage[:20]),
)
@pytest.mark.parametrize("whole", [False, True])
async def test_a_damaged_file_is_as_none(directory: Path, damage: bytes, whole: bool) -> None:
    if whole:
        damage = struct.pack("<4sQII", b"sgs1", 1, len(damage), zlib.crc32(damage)) + damage
    (directory / NAME).write_bytes(damage)
    assert SessionFile(directory).read() == Saved()
    kernel = FakeKernel(directory)
    writer = join(kernel.hub)
    kernel.print("x")
    await turn()
    assert writer.texts == ["x"]
    kernel.hub.close(True)


async def test_the_hub_of_a_closed_kernel_takes_and_gives_nothing(directory: Path) -> None:
    kernel = FakeKernel(directory)
    writer = join(kernel.hub)
    kernel.hub.close(True)
    kernel.print("x")
    await turn()
    kernel.hub.detach(writer.outlet, writer)  # type: ignore[arg-type]
    assert writer.frames == [] and list(directory.iterdir()) == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(1, 30)),
        st.tuples(st.just("cut"), st.just(0)),
        st.tuples(st.just("join"), st.integers(0, 3)),
        st.tuples(st.just("pong"), st.integers(0, 2)),
        st.tuples(st.just("recover"), st.just(0)),
        st.tuples(st.just("crash"), st.just(0)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_breaks_and_when_nothing_is_lost_and_nothing_confirmed_comes_twice(
    steps: list[tuple[str, int]],
) -> None:
    async def play() -> None:
        directory = Path(tempfile.mkdtemp(prefix="sg-"))
        kernel = FakeKernel(directory)
        had = confirmed = base = said = 0
        writer = join(kernel.hub, answers=False)
        marks: list[tuple[Writer, int]] = []

        def check(done: Writer) -> None:
            nonlocal had
            numbers = [m["content"]["n"] for m in done.messages]
            if numbers:
                assert numbers == list(range(numbers[0], numbers[-1] + 1))
                assert base < numbers[0] <= had + 1
                had = max(had, numbers[-1])

        real = Writer.ping

        def ping(self: Writer, data: bytes) -> None:
            real(self, data)
            numbers = [m["content"]["n"] for m in self.messages]
            marks.append((self, numbers[-1] if numbers else 0))

        Writer.ping = ping  # type: ignore[method-assign]
        try:
            for step, n in [*steps, ("cut", 0), ("join", 0), ("turn", 3)]:
                if step == "say":
                    for _ in range(n):
                        said += 1
                        kernel.publish("display_data", {"n": said})
                elif step == "cut":
                    leave(kernel.hub, writer)
                elif step == "join":
                    check(writer)
                    base = confirmed
                    old = writer
                    writer = join(kernel.hub, answers=False, stalled=n == 1, v1=n != 2)
                    assert old.broken or old.closed
                elif step == "pong" and writer.pings and writer.outlet and writer.outlet.writer is writer:
                    mark = next((number for by, number in reversed(marks) if by is writer), 0)
                    before = writer.outlet._ping_mark
                    writer.outlet.pong(writer.pings[-1])
                    if before >= 0:
                        confirmed = max(confirmed, mark)
                elif step == "recover" and writer.outlet:
                    writer.answers = False
                    writer.recover()
                elif step == "crash":
                    kernel.hub._save()
                    check(writer)
                    base = confirmed
                    old_kernel = kernel
                    writer.broken = True
                    kernel = FakeKernel(directory)
                    old_kernel.hub._closed = True
                    await replayed(kernel, old_kernel)
                    writer = join(kernel.hub, answers=False)
                elif step == "turn":
                    await turn(n)
            check(writer)
            assert had == said
        finally:
            Writer.ping = real  # type: ignore[method-assign]
            kernel.hub.close(True)
            shutil.rmtree(directory)

    asyncio.run(play())


@pytest.mark.parametrize(("refused", "connections"), [(False, outlet.STUMBLES), (True, 1)])
async def test_a_message_at_which_a_clients_connection_breaks_each_time_is_left_out_and_told(
    kernel: FakeKernel, refused: bool, connections: int
) -> None:
    made = outlet.Outlet(b"a", b"key", [0] * 5, limit=1 << 30, moved=lambda: None)
    body = [b"{}", b"{}", b"{}", json.dumps({"name": "stdout", "text": "x" * outlet.LARGE_MESSAGE}).encode()]
    made.add(outlet.Entry(IOPUB, body, "stream", 1))
    made.add(outlet.Entry(IOPUB, [b"{}", b"{}", b"{}", b'{"name": "stdout", "text": "after"}'], "stream", 2))
    for _ in range(connections):
        writer = Writer(answers=False)
        made.connect(writer)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert writer.size > outlet.LARGE_MESSAGE
        made.disconnect(writer, refused=refused)
    last = Writer(answers=False)
    made.connect(last)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    told, after = (bytes(ws_protocol.payload(frame)) for frame in last.frames)
    assert b"was left out" in told and b"after" in after
    assert made.left_out == 1
    made.close(1000, "")


async def test_only_who_names_himself_and_his_session_is_remembered_by_what_he_has_sent(kernel: FakeKernel) -> None:
    hub = kernel.hub
    assert hub.inlet("ada", "session", "page") is hub.inlet("ada", "session", "page")
    assert hub.inlet("eve", "session", "page") is not hub.inlet("ada", "session", "page")
    for session, sender in (("session", ""), (None, "page"), (None, "")):
        assert hub.inlet("ada", session, sender) is not hub.inlet("ada", session, sender)
