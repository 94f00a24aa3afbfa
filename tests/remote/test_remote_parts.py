"""The pure parts of the remote runtime: addresses, tokens, frames, and what a break leaves unknown."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway import messages
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.remote import credentials, frames
from sandbox_gateway.remote.address import parse
from sandbox_gateway.remote.client import GatewayClient, RemoteProfile
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
    verdict = flight.judge(flight.shell(), settled=False, forgotten=False)
    assert (ids(verdict.again), ids(verdict.lost), flight.shell()) == (["never"], [], ("heard",))


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
