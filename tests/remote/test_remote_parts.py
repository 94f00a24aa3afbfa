"""The pure parts of the remote runtime: addresses, tokens, frames, and what a break leaves unknown."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import struct
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse

from sandbox_gateway import host_replies, messages
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.remote import credentials, frames
from sandbox_gateway.remote import session as session_module
from sandbox_gateway.remote.address import parse
from sandbox_gateway.remote.client import GatewayClient, RemoteProfile, RemoteSandbox, Unreachable
from sandbox_gateway.remote.in_flight import MAX_KEPT, InFlight, Pending
from sandbox_gateway.remote.kernelspecs import kernel_json, name_of
from sandbox_gateway.remote.provisioner import chosen
from sandbox_gateway.remote.session import RemoteSession
from sandbox_gateway.wire.frames import Channel

SHELL, CONTROL, STDIN, IOPUB = (int(Channel[name]) for name in ("SHELL", "CONTROL", "STDIN", "IOPUB"))


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("https://Gateway.Example.org/", "https://gateway.example.org"),
        ("HTTPS://gateway.example.org:443/a/b/", "https://gateway.example.org/a/b"),
        ("http://localhost:8888", "http://localhost:8888"),
        ("http://[::1]:8888/", "http://[::1]:8888"),
    ],
)
def test_an_address_has_one_form(written: str, url: str) -> None:
    address = parse(written)
    assert address.url == url
    assert address.websocket("/x", {"a": "b c"}) == f"ws{url.removeprefix('http')}/x?a=b+c"


@pytest.mark.parametrize(
    "written", ["", "gateway:8888", "ftp://x", "https://", "https://u:p@x", "https://x?token=s", "https://x:99999"]
)
def test_what_is_no_address_is_refused_and_no_secret_repeated(written: str) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        parse(written)
    assert caught.value.code == "invalid_request"
    assert "token=s" not in str(caught.value) and "u:p" not in str(caught.value)


def test_only_encrypted_or_local_addresses_are_private() -> None:
    assert parse("https://x.org").private and parse("http://127.0.0.1:1").private and parse("http://[::1]").private
    assert not parse("http://x.org").private and not parse("http://localhost.x.org").private


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    return tmp_path


def test_tokens_are_kept_by_address_in_a_private_file(config: Path) -> None:
    first, second = parse("https://a.org", "/my/ca.pem"), parse("https://b.org")
    file = credentials.keep(first, "one")
    credentials.keep(second, "two")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (credentials.token(first, {}), credentials.token(second, {})) == ("one", "two")
    assert credentials.known("https://A.org/") == first
    assert credentials.forget(first.url) and not credentials.forget(first.url)
    assert credentials.token(first, {}) == "" and credentials.token(second, {}) == "two"
    assert [path.name for path in config.iterdir()] == [credentials.FILE]


def test_the_variables_token_goes_to_no_gateway_that_has_its_own(config: Path) -> None:
    credentials.keep(parse("https://a.org"), "one")
    environment = {credentials.VARIABLE: "any"}
    assert credentials.token(parse("https://a.org"), environment) == "one"
    assert credentials.token(parse("https://b.org"), environment) == "any"


def test_a_file_that_others_could_read_is_made_private(config: Path) -> None:
    file = credentials.keep(parse("https://a.org"), "one")
    os.chmod(file, 0o644)
    assert credentials.token(parse("https://a.org"), {}) == "one"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "[]", '{"https://a.org": 1}', "{", '{"https://a.org": {"token": 3}}'])
def test_a_broken_file_holds_no_tokens(config: Path, content: str) -> None:
    (config / credentials.FILE).write_text(content)
    assert credentials.token(parse("https://a.org"), {}) == ""


@given(st.sampled_from([SHELL, CONTROL, STDIN, IOPUB]), st.lists(st.binary(max_size=50), min_size=4, max_size=9))
def test_a_frame_comes_out_as_it_went_in(channel: int, body: list[bytes]) -> None:
    found, parts = frames.decode(frames.encode(channel, body))
    assert (found, [bytes(part) for part in parts]) == (channel, body)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_clear_error(data: bytes) -> None:
    try:
        frames.decode(data)
    except frames.FrameError:
        pass


@given(st.lists(st.integers(0, 1 << 64 - 1), min_size=6, max_size=8))
def test_any_offsets_are_a_frame_or_a_clear_error(offsets: list[int]) -> None:
    try:
        frames.decode(struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"shell" * 20)
    except frames.FrameError:
        pass


def item(msg_id: str, kind: str = "execute_request", *, channel: int = SHELL, apart: bool = False) -> Pending:
    request = messages.Request(kind, (b"client",), b"{}", b"{}")
    return Pending(channel, msg_id, request, b"frame-" + msg_id.encode(), apart)


def ids(items: tuple[Pending, ...]) -> list[str]:
    return [one.msg_id for one in items]


def test_a_reply_finds_its_client_once() -> None:
    flight = InFlight()
    flight.sent(item("a"))
    assert flight.heard(IOPUB, "a") == (b"client",)
    assert flight.heard(STDIN, "a") == (b"client",)
    assert flight.heard(SHELL, "a") == (b"client",)
    assert flight.heard(SHELL, "a") is None and flight.heard(SHELL, "unknown") is None


def test_only_what_was_never_heard_of_is_sent_again() -> None:
    flight = InFlight()
    for name in ("heard", "never", "done"):
        flight.sent(item(name))
    flight.heard(IOPUB, "heard")
    flight.heard(SHELL, "done")
    assert flight.unheard
    verdict = flight.judge(flight.shell(), settled=True, forgotten=False)
    assert (ids(verdict.again), ids(verdict.lost)) == (["never"], ["heard"])
    assert verdict.again[0].frame == b"frame-never" and len(flight) == 0


def test_a_sleeping_kernel_says_nothing_of_what_it_had_begun() -> None:
    flight = InFlight()
    for name in ("heard", "never"):
        flight.sent(item(name))
    flight.heard(IOPUB, "heard")
    assert flight.begun(flight.shell())
    verdict = flight.judge(flight.shell(), settled=False, forgotten=False)
    assert (ids(verdict.again), ids(verdict.lost), flight.shell()) == ([], [], ("heard", "never"))


def test_a_kernel_that_fell_asleep_with_nothing_to_do_never_received_what_it_did_not_begin() -> None:
    flight = InFlight()
    flight.sent(item("never"))
    assert not flight.begun(flight.shell())
    verdict = flight.judge(flight.shell(), settled=False, forgotten=False)
    assert (ids(verdict.again), ids(verdict.lost)) == (["never"], [])


def test_nothing_is_sent_again_when_the_session_may_be_forgotten() -> None:
    flight = InFlight()
    flight.sent(item("never"))
    verdict = flight.judge(flight.shell(), settled=True, forgotten=True)
    assert (ids(verdict.again), ids(verdict.lost)) == ([], ["never"])


def test_a_request_of_a_subshell_is_never_judged_by_the_order_of_others() -> None:
    flight = InFlight()
    flight.sent(item("begun", apart=True))
    flight.sent(item("never", apart=True))
    flight.heard(IOPUB, "begun")
    verdict = flight.judge(flight.shell(), settled=True, forgotten=False)
    assert (ids(verdict.again), ids(verdict.lost), flight.shell()) == ([], ["never"], ("begun",))


def test_a_widgets_message_is_done_when_the_kernel_takes_it_up() -> None:
    flight = InFlight()
    flight.sent(item("w", "comm_msg"))
    assert flight.unheard
    flight.heard(IOPUB, "w")
    assert not flight.unheard and len(flight) == 0


def test_an_input_is_kept_until_the_kernel_goes_on() -> None:
    flight = InFlight()
    flight.sent(item("cell"))
    flight.heard(STDIN, "cell")
    flight.sent(item("answer", "input_reply", channel=STDIN))
    flight.heard(IOPUB, "another")
    assert ids(flight.repeatable()) == ["answer"]
    flight.heard(IOPUB, "cell")
    assert flight.repeatable() == ()


def test_what_is_kept_to_be_sent_again_is_bounded() -> None:
    flight = InFlight()
    for number in range(3):
        large = item(str(number))
        large.frame = bytes(MAX_KEPT // 2 + 1)
        flight.sent(large)
    verdict = flight.judge(flight.shell(), settled=True, forgotten=False)
    assert (ids(verdict.again), ids(verdict.lost)) == (["2"], ["0", "1"])


def test_variables_go_by_name_only_and_patterns_of_a_gateway_reach_for_nothing() -> None:
    offered = {"TZ": "UTC", "AWS_SECRET": "s", "KERNEL_USERNAME": "ada", "JPY_PARENT_PID": "1", "PATH": "/bin"}
    assert chosen(offered, ["TZ"], {"MODE": "x", "JPY_PARENT_PID": "2"}) == {
        "TZ": "UTC",
        "KERNEL_USERNAME": "ada",
        "MODE": "x",
    }
    profile = RemoteProfile("p", "P", variables=("TZ", "AWS_*", "*"))
    spec = kernel_json(profile, parse("https://a.org"))
    assert spec["metadata"]["kernel_provisioner"]["config"]["variables"] == ["TZ"]


def test_a_kernelspecs_name_is_one_that_jupyter_takes() -> None:
    profile = RemoteProfile("Big Data", "Big")
    assert name_of(profile, parse("https://[::1]:8888")) == "big-data-at-1-8888"


class Told:
    """An application's side and a listener that only note down."""

    def __init__(self) -> None:
        self.delivered: list[tuple[int, list[messages.Buffer]]] = []
        self.states: list[str] = []
        self.shutdowns: list[bool] = []

    def deliver(self, channel: int, parts: Sequence[messages.Buffer]) -> None:
        self.delivered.append((channel, list(parts)))

    def hold(self, held: bool) -> None: ...

    def shutdown_asked(self, restart: bool) -> None:
        self.shutdowns.append(restart)

    def kernel_state(self, state: str) -> None:
        self.states.append(state)

    def given_up(self, error: SandboxGatewayError) -> None: ...


KEY = b"local"


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def session(told: Told) -> RemoteSession:
    return RemoteSession(GatewayClient(parse("http://127.0.0.1:1")), "an-id", KEY, told, told)


def from_kernel(kind: str, content: dict[str, object], *, msg_id: str = "", parent: bytes = b"{}") -> bytes:
    message = messages.build(b"the gateway's", kind, content, msg_id=msg_id, parent=parent)
    return frames.encode(IOPUB, message[3:])


def test_output_is_signed_with_the_local_key_and_passed_on_once(session: RemoteSession, told: Told) -> None:
    line = from_kernel("stream", {"name": "stdout", "text": "a"}, msg_id="m")
    joined = from_kernel("stream", {"name": "stdout", "text": "ab"}, msg_id="m")
    for frame in (line, line, joined):
        session._received(frame)
    texts = [json.loads(bytes(parts[-1]))["text"] for _, parts in told.delivered]
    assert texts == ["a", "ab"], "what was joined since is more than what came before"
    for _, parts in told.delivered:
        assert parts[0] == b"kernel.an-id.stream" and parts[2] == messages.sign(KEY, parts[3:7])


def test_what_a_gateway_sends_in_disorder_is_dropped(session: RemoteSession, told: Told) -> None:
    whole = from_kernel("status", {"execution_state": "idle"})
    hostile = [b"", whole[:-1], whole[:30], frames.encode(IOPUB, [b"[]", b"{}", b"{}", b"{}"])]
    hostile += [frames.encode(IOPUB, [b"[" * 60_000, b"{}", b"{}", b"{}"]), frames.encode(SHELL, [b"{}"] * 4)]
    hostile += [frames.encode(IOPUB, [b'{"msg_type": "status"}', b"{}", b"{}", content]) for content in (b"[]", b"x")]
    for frame in hostile:
        session._received(frame)
    assert told.states == []
    session._received(whole)
    assert told.states == ["idle"]


def test_only_signed_requests_are_taken_and_a_shutdown_goes_no_further(session: RemoteSession, told: Told) -> None:
    def request(key: bytes, kind: str, content: dict[str, object]) -> list[bytes]:
        return [bytes(part) for part in (b"me", *messages.build(key, kind, content)[1:])]

    session.request(SHELL, request(b"guessed", "shutdown_request", {"restart": False}))
    session.request(SHELL, [b"me", messages.DELIMITER])
    assert told.shutdowns == [] and told.delivered == []
    session.request(CONTROL, request(KEY, "shutdown_request", {"restart": True}))
    assert told.shutdowns == [True]
    (reply,) = (parts for channel, parts in told.delivered if channel == CONTROL)
    assert reply[0] == b"me" and json.loads(bytes(reply[-1])) == {"status": "ok", "restart": True}


def refused(status: int, body: bytes = b"") -> SandboxGatewayError:
    """What the client makes of an answer with this status."""
    response = HTTPResponse(HTTPRequest("http://127.0.0.1:1"), status, buffer=BytesIO(body))
    return GatewayClient(parse("http://127.0.0.1:1")).explained(HTTPClientError(status, response=response))


@pytest.mark.parametrize("status", [520, 525, 529, 530, 561])
@pytest.mark.parametrize("body", [b"", b"<html>error code: 1033</html>", b'{"message": "no tunnel"}', b"[]"])
def test_a_server_error_that_no_standard_knows_is_of_something_on_the_way(status: int, body: bytes) -> None:
    error = refused(status, body)
    assert isinstance(error, Unreachable) and str(status) in error.message


def test_what_the_gateway_itself_says_counts_whatever_its_status_is() -> None:
    error = refused(520, b'{"code": "disk_full", "message": "no place", "hint": ""}')
    assert (error.code, error.message) == ("disk_full", "no place")


def test_a_clients_error_that_no_standard_knows_is_a_clear_error() -> None:
    error = refused(460)
    assert error.code == "internal" and "460" in error.message


class Gateway:
    """A gateway with one kernel, as far as a session that has just connected again sees it: it is the client that asks
    and the connection that carries, and a kernel in a sandbox that may sleep."""

    def __init__(self, state: str, execution_state: str = "idle") -> None:
        self.state = state
        self.execution_state = execution_state
        self.arrived: list[str] = []
        """The types of the requests that came, in order."""
        self.looks = self.resumed = 0
        self.failing: list[Exception] = []
        """What the next questions for the sandbox raise."""
        self.stuck: SandboxGatewayError | None = None
        """Why it cannot be woken."""
        self.unanswered: list[tuple[str, str, str]] = []
        self.knows = "resumed"
        """What it says of the session."""
        self.session: RemoteSession | None = None
        self.address = parse("http://127.0.0.1:1")

    async def get(self, sandbox_id: str) -> RemoteSandbox:
        self.looks += 1
        if self.failing:
            raise self.failing.pop(0)
        kernel = {"execution_state": self.execution_state}
        return RemoteSandbox.from_dict({"id": sandbox_id, "state": self.state, "kernel": kernel})

    async def resume(self, sandbox_id: str) -> RemoteSandbox:
        self.resumed += 1
        if self.stuck is not None:
            for _, kind, msg_id in self.unanswered:
                error = {"status": "error", "ename": host_replies.ASLEEP, "evalue": "no"}
                self.say(SHELL, kind.replace("_request", "_reply"), error, msg_id)
            self.unanswered.clear()
            raise self.stuck
        self.wake()
        return await self.get(sandbox_id)

    def wake(self) -> None:
        """The kernel goes on, with what it has to do."""
        self.state, self.execution_state = "running", "busy"

    def header(self, name: str) -> str:
        return self.knows

    async def write(self, frame: bytes) -> None:
        channel, body = frames.decode(frame)
        header = json.loads(bytes(body[0]))
        kind, msg_id = header["msg_type"], header["msg_id"]
        self.arrived.append(kind)
        if kind == "kernel_info_request" and self.state in ("paused", "suspending", "suspended"):
            self.say(channel, "kernel_info_reply", {"status": "ok"}, msg_id)
        else:
            self.unanswered.append(("shell", kind, msg_id))

    def answer(self) -> None:
        """The kernel has done all that it has, and takes what came meanwhile."""
        waiting, self.unanswered = self.unanswered, []
        for _, kind, msg_id in waiting:
            self.say(SHELL, kind.replace("_request", "_reply"), {"status": "ok"}, msg_id)
        self.execution_state = "idle"

    def say(self, channel: int, kind: str, content: dict[str, object], parent: str) -> None:
        told = json.dumps({"msg_id": parent}).encode()
        assert self.session is not None
        self.session._received(frames.encode(channel, messages.build(b"g", kind, content, parent=told)[3:]))

    def busy(self, msg_id: str) -> None:
        """The kernel begins with a request."""
        self.say(IOPUB, "status", {"execution_state": "busy"}, msg_id)


def asked(msg_id: str, kind: str = "execute_request") -> list[bytes]:
    """An application's request."""
    return [bytes(part) for part in (b"me", *messages.build(KEY, kind, {"code": msg_id}, msg_id=msg_id)[1:])]


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow one another at once."""
    monkeypatch.setattr(session_module, "LOOK", 0.05)
    monkeypatch.setattr(session_module, "FIRST_PAUSE", 0.01)


class Again:
    """A session that sent ``sent``, of which the kernel began with ``begun``, and connects again to ``gateway``."""

    def __init__(self, gateway: Gateway, told: Told, sent: Sequence[str], begun: str = "") -> None:
        self.gateway, self.told = gateway, told
        self.session = RemoteSession(gateway, "an-id", KEY, told, told)  # type: ignore[arg-type]
        gateway.session = self.session
        for name in sent:
            self.session.request(SHELL, asked(name))
            self.session._in_flight.sent(self.session._waiting._shell.popleft())
        if begun:
            gateway.busy(begun)

    async def __aenter__(self) -> Again:
        self.session._recover(self.gateway, 0.0)  # type: ignore[arg-type]
        self._pump = asyncio.create_task(self.session._pump(self.gateway))  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *exception: object) -> None:
        tasks = [task for task in (self._pump, self.session._finding) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def looked(self, times: int) -> None:
        """Return when the session has asked for the sandbox so many times more."""
        before = self.gateway.looks
        await eventually(lambda: self.gateway.looks >= before + times)

    def count(self, kind: str = "execute_request") -> int:
        return self.gateway.arrived.count(kind)

    @property
    def replies(self) -> list[dict[str, object]]:
        return [json.loads(bytes(parts[-1])) for channel, parts in self.told.delivered if channel == SHELL]


@pytest.mark.parametrize("state", ["suspended", "paused"])
@pytest.mark.parametrize("begun", ["R1", ""])
def test_a_kernel_that_was_put_to_sleep_in_a_cell_sleeps_on_and_gets_nothing_twice(
    quick: None, told: Told, state: str, begun: str
) -> None:
    """Without ``begun`` it was another client's cell, which the gateway's record tells alone."""

    async def scenario() -> None:
        gateway = Gateway(state, "idle" if begun else "busy")
        async with Again(gateway, told, ["R1", "R2"], begun) as again:
            await again.looked(4)
            assert again.count() == 0 and gateway.resumed == 0 and "comm_info_request" not in gateway.arrived
            assert again.session._in_flight.shell() == ("R1", "R2")
            # A person lets it go on: it has had both all the time.
            gateway.wake()
            await eventually(lambda: again.count("comm_info_request"))
            for name in ("R1", "R2"):
                gateway.say(SHELL, "execute_reply", {"status": "ok", "of": name}, name)
            gateway.answer()
            await eventually(lambda: not again.session._waiting.barred)
            await asyncio.sleep(0.02)
            assert again.count() == 0
            assert [reply["of"] for reply in again.replies] == ["R1", "R2"]

    asyncio.run(scenario())


def test_a_new_request_wakes_a_kernel_that_sleeps_in_a_cell_and_overtakes_nothing(quick: None, told: Told) -> None:
    async def scenario() -> None:
        gateway = Gateway("suspended")
        async with Again(gateway, told, ["R1", "R2"], "R1") as again:
            await again.looked(2)
            again.session.request(SHELL, asked("K", "kernel_info_request"))
            await eventually(lambda: again.count("kernel_info_request") == 2)
            assert gateway.resumed == 0, "a page that is loaded is answered, and wakes nobody"
            again.session.request(SHELL, asked("N"))
            await eventually(lambda: again.count("comm_info_request"))
            assert gateway.resumed == 1 and again.count() == 0
            # R2 was lost on the way: the kernel answers R1, and then at once the question that came behind both.
            gateway.say(SHELL, "execute_reply", {"status": "ok"}, "R1")
            gateway.answer()
            await eventually(lambda: again.count() == 2)
            assert [msg_id for _, kind, msg_id in gateway.unanswered if kind == "execute_request"] == ["R2", "N"]
            gateway.answer()
            assert [reply["status"] for reply in again.replies] == ["ok"] * 4 and gateway.resumed == 1

    asyncio.run(scenario())


def test_a_request_that_was_made_during_the_break_wakes_a_kernel_that_sleeps_in_a_cell(quick: None, told: Told) -> None:
    async def scenario() -> None:
        gateway = Gateway("suspended", "busy")
        made = Again(gateway, told, ["R1"])
        made.session.request(SHELL, asked("N"))
        made.session.request(SHELL, asked("K", "kernel_info_request"))
        async with made as again:
            await eventually(lambda: again.count("comm_info_request"))
            gateway.say(SHELL, "execute_reply", {"status": "ok"}, "R1")
            gateway.answer()
            await eventually(lambda: again.count() == 1)
            assert gateway.resumed == 1

    asyncio.run(scenario())


def test_one_that_is_put_to_sleep_again_is_not_woken_again_for_the_same_request(quick: None, told: Told) -> None:
    async def scenario() -> None:
        gateway = Gateway("suspended")
        async with Again(gateway, told, ["R1", "R2"], "R1") as again:
            again.session.request(SHELL, asked("N"))
            await eventually(lambda: again.count("comm_info_request"))
            gateway.state = "suspended"
            await again.looked(4)
            assert gateway.resumed == 1 and again.count() == 0
            again.session.request(SHELL, asked("M"))
            await eventually(lambda: gateway.resumed == 2)

    asyncio.run(scenario())


def test_one_that_is_put_to_sleep_after_a_request_was_made_is_not_woken_for_it(quick: None, told: Told) -> None:
    """Without the break it would lie in the kernel's queue."""

    async def scenario() -> None:
        gateway = Gateway("running", "busy")
        async with Again(gateway, told, ["R1", "R2"], "R1") as again:
            again.session.request(SHELL, asked("N"))
            await again.looked(2)
            gateway.state = "paused"
            await again.looked(4)
            assert gateway.resumed == 0 and again.count() == 0

    asyncio.run(scenario())


def test_a_new_request_to_a_kernel_that_cannot_be_woken_is_answered_and_what_it_has_is_not_sent_again(
    quick: None, told: Told
) -> None:
    async def scenario() -> None:
        gateway = Gateway("running", "busy")
        async with Again(gateway, told, ["R1", "R2"], "R1") as again:
            # It is put to sleep just when the session's question is on its way, which waits there then.
            await eventually(lambda: again.count("comm_info_request"))
            gateway.state = "suspended"
            gateway.stuck = SandboxGatewayError("restore_failed", "the snapshot is gone")
            await again.looked(2)
            again.session.request(SHELL, asked("N"))
            await eventually(lambda: again.replies)
            (reply,) = again.replies
            assert (reply["ename"], reply["evalue"]) == (host_replies.ASLEEP, "the snapshot is gone")
            await again.looked(3)
            assert again.session._in_flight.shell() == ("R1", "R2") and again.count() == 0 and gateway.resumed == 1
            gateway.stuck = None
            again.session.request(SHELL, asked("M"))
            await eventually(lambda: gateway.resumed == 2)

    asyncio.run(scenario())


def test_a_request_that_a_kernel_never_got_before_it_fell_asleep_idle_is_sent_again(quick: None, told: Told) -> None:
    async def scenario() -> None:
        gateway = Gateway("suspending")
        async with Again(gateway, told, ["R1"]) as again:
            await again.looked(2)
            assert again.count() == 0, "until it sleeps, what it says is still on its way"
            gateway.state = "suspended"
            await eventually(lambda: again.count() == 1)
            assert gateway.resumed == 0, "the gateway wakes it for that"

    asyncio.run(scenario())


def test_what_a_sleeping_kernel_had_begun_is_lost_where_the_gateway_has_forgotten_the_session(
    quick: None, told: Told
) -> None:
    async def scenario() -> None:
        gateway = Gateway("suspended")
        gateway.knows = "new"
        async with Again(gateway, told, ["R1", "R2"], "R1") as again:
            await eventually(lambda: len(again.replies) == 2)
            assert {reply["status"] for reply in again.replies} == {"error"}
            assert not again.session._waiting.barred and gateway.resumed == 0 and again.count() == 0

    asyncio.run(scenario())


def test_who_waits_for_a_kernel_that_somebody_else_could_not_wake_is_tried_for_too(quick: None, told: Told) -> None:
    async def scenario() -> None:
        gateway = Gateway("suspended")
        async with Again(gateway, told, ["R1", "R2"], "R1") as again:
            await again.looked(2)
            gateway.state = "resuming"  # for another client
            await again.looked(2)
            again.session.request(SHELL, asked("N"))
            await eventually(lambda: again.count("comm_info_request"))
            gateway.state = "suspended"
            (msg_id,) = [found for _, kind, found in gateway.unanswered if kind == "comm_info_request"]
            gateway.unanswered.clear()
            gateway.say(SHELL, "comm_info_reply", {"status": "error", "ename": host_replies.ASLEEP}, msg_id)
            await eventually(lambda: gateway.resumed == 1)

    asyncio.run(scenario())


def test_an_answer_to_what_was_asked_before_another_break_settles_nothing(quick: None, told: Told) -> None:
    async def scenario() -> None:
        gateway = Gateway("running")
        async with Again(gateway, told, ["R1"]) as again:
            await eventually(lambda: again.count("comm_info_request"))
            ((_, _, msg_id),) = gateway.unanswered
        async with again:
            await eventually(lambda: again.count("comm_info_request") == 2)
            gateway.say(SHELL, "comm_info_reply", {"status": "ok"}, msg_id)
            await again.looked(3)
            assert again.session._waiting.barred and again.count() == 0

    asyncio.run(scenario())


def test_an_unexpected_failure_to_ask_for_the_sandbox_leaves_no_request_behind_the_bar(
    quick: None, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        gateway = Gateway("running")
        gateway.failing = [ValueError("530 is not a valid HTTPStatus")]
        async with Again(gateway, told, ["R1"]) as again:
            await eventually(lambda: again.count("comm_info_request"))
            gateway.answer()
            await eventually(lambda: again.count() == 1)

    asyncio.run(scenario())


def test_an_unexpected_failure_after_a_reconnect_is_tried_again(
    quick: None, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        gateway = Gateway("running")
        made = Again(gateway, told, ["R1"])
        ask, failures = made.session._ask, [RuntimeError("never thought of")]

        async def failing(*args: object) -> object:
            if failures:
                raise failures.pop()
            return await ask(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(made.session, "_ask", failing)
        async with made as again:
            await eventually(lambda: again.count("comm_info_request"))
            gateway.answer()
            await eventually(lambda: again.count() == 1)

    asyncio.run(scenario())
