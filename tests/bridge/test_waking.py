"""A sleeping kernel: which messages wake it, which wait, which are answered, and that none is lost or left hanging."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bridging import KEY
from jupyter_client.session import Session

from sandbox_gateway import channels, gate, messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.messages import Buffer
from sandbox_gateway.waking import Effect, effect
from sandbox_gateway.wire.frames import Channel

INFO = {"status": "ok", "protocol_version": "5.4", "implementation": "ipython", "banner": "caf\u00e9"}

# Each message that a client may send, of protocol 5.4 (JEP 91 included) and ipykernel's own.
TABLE = {
    (Channel.SHELL, "execute_request"): Effect.WAKE,
    (Channel.SHELL, "inspect_request"): Effect.WAKE,
    (Channel.SHELL, "complete_request"): Effect.WAKE,
    (Channel.SHELL, "history_request"): Effect.WAIT,
    (Channel.SHELL, "is_complete_request"): Effect.WAKE,
    (Channel.SHELL, "connect_request"): Effect.WAIT,
    (Channel.SHELL, "comm_info_request"): Effect.WAIT,
    (Channel.SHELL, "kernel_info_request"): Effect.CACHED,
    (Channel.SHELL, "comm_open"): Effect.WAKE,
    (Channel.SHELL, "comm_msg"): Effect.WAKE,
    (Channel.SHELL, "comm_close"): Effect.WAKE,
    (Channel.CONTROL, "kernel_info_request"): Effect.CACHED,
    (Channel.CONTROL, "execute_request"): Effect.WAKE,
    (Channel.CONTROL, "shutdown_request"): Effect.WAKE,
    (Channel.CONTROL, "interrupt_request"): Effect.WAKE,
    (Channel.CONTROL, "debug_request"): Effect.UNAVAILABLE,
    (Channel.CONTROL, "usage_request"): Effect.UNAVAILABLE,
    (Channel.SHELL, "usage_request"): Effect.UNAVAILABLE,
    (Channel.CONTROL, "create_subshell_request"): Effect.WAIT,
    (Channel.CONTROL, "delete_subshell_request"): Effect.WAIT,
    (Channel.CONTROL, "list_subshell_request"): Effect.WAIT,
    (Channel.STDIN, "input_reply"): Effect.WAKE,
    (Channel.STDIN, "execute_request"): Effect.WAIT,
    (Channel.SHELL, "input_reply"): Effect.WAIT,
    (Channel.SHELL, "something_request"): Effect.WAIT,
    (Channel.SHELL, ""): Effect.WAIT,
}
IDS = [f"{channel.name.lower()}-{kind or 'empty'}" for channel, kind in TABLE]


class Kernel:
    """Channels of a kernel that sleeps, its link, and one client that notes what it gets."""

    def __init__(self, *, info: bool = True) -> None:
        self.session = Session(key=KEY)
        self.wakes = 0
        self.sent: list[tuple[int, Sequence[Buffer]]] = []
        self.got: list[tuple[int, dict[str, Any]]] = []
        self.full = False
        self.channels = KernelChannels(KEY)
        self.channels.subscribe(self._deliver)
        if info:
            self.replies("kernel_info_reply", INFO)
            self.got.clear()
        self.channels.sleep(self.wake)

    def wake(self) -> None:
        self.wakes += 1

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        if self.full:
            raise SandboxGatewayError("link_failed", "the sandbox does not read its input")
        self.sent.append((channel, parts))
        return len(self.sent)

    def _deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        identities, rest = self.session.feed_identities([bytes(part) for part in parts])
        message = self.session.deserialize(rest)  # checks the signature
        message["identities"] = identities
        self.got.append((channel, message))

    def ask(self, channel: int, kind: str, content: dict[str, Any] | None = None, identity: bytes = b"me") -> str:
        message = self.session.msg(kind, content or {})
        self.channels.request(channel, [identity, *self.session.serialize(message)])
        return str(message["header"]["msg_id"])

    def replies(self, kind: str, content: Any, channel: int = Channel.SHELL) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.channels.received(channel, messages.compose(KEY, [b"somebody"], kind, raw))

    def runs(self, state: str, parent: bytes) -> None:
        content = {"execution_state": state}
        status = messages.build(KEY, "status", content, topic=b"kernel.1.status", parent=parent)
        self.channels.received(Channel.IOPUB, [memoryview(bytes(part)) for part in status])

    def kinds(self, channel: int) -> list[str]:
        return [message["msg_type"] for _, parts in self.sent for message in [self._read(parts)] if _ == channel]

    def _read(self, parts: Sequence[Buffer]) -> dict[str, Any]:
        found: dict[str, Any] = self.session.deserialize(
            self.session.feed_identities([bytes(part) for part in parts])[1]
        )
        return found

    def answer_to(self, msg_id: str) -> dict[str, Any]:
        """The one reply to a request, checked to stand between its statuses as a kernel's does."""
        mine = [(channel, m) for channel, m in self.got if m["parent_header"].get("msg_id") == msg_id]
        kinds = [m["msg_type"] for _, m in mine]
        assert kinds[0] == kinds[-1] == "status"
        assert [m["content"]["execution_state"] for _, m in (mine[0], mine[-1])] == ["busy", "idle"]
        (reply,) = (m for channel, m in mine if channel != Channel.IOPUB)
        assert reply["identities"] == [b"me"]
        return reply


@pytest.mark.parametrize(("channel", "kind"), TABLE, ids=IDS)
def test_the_rule_of_waking(channel: Channel, kind: str):
    assert effect(channel, kind) is TABLE[channel, kind]


@pytest.mark.parametrize(("channel", "kind"), TABLE, ids=IDS)
def test_each_message_does_what_the_rule_says_and_reaches_the_kernel_or_is_answered(channel: Channel, kind: str):
    kernel = Kernel()
    kernel.ask(channel, kind)
    kernel.ask(channel, kind)
    does = TABLE[channel, kind]
    assert kernel.wakes == (1 if does is Effect.WAKE else 0), "once, however many ask"
    assert kernel.sent == []
    kernel.channels.connect(kernel)
    assert kernel.kinds(channel) == ([] if does in (Effect.CACHED, Effect.UNAVAILABLE) else [kind, kind])
    assert bool(kernel.got) == (does in (Effect.CACHED, Effect.UNAVAILABLE))


def test_loading_a_page_wakes_no_kernel():
    kernel = Kernel()
    info = kernel.ask(Channel.SHELL, "kernel_info_request")
    nudge = kernel.ask(Channel.CONTROL, "kernel_info_request")
    kernel.ask(Channel.SHELL, "comm_info_request", {"target_name": "jupyter.widget"})
    # As ipywidgets' part of the page does.
    kernel.ask(Channel.SHELL, "comm_open", {"comm_id": "c", "target_name": "jupyter.widget.control", "data": {}})
    kernel.ask(Channel.SHELL, "comm_msg", {"comm_id": "c", "data": {"method": "request_states"}})
    debug = kernel.ask(Channel.CONTROL, "debug_request", {"type": "request", "seq": 1, "command": "debugInfo"})
    usage = kernel.ask(Channel.CONTROL, "usage_request")
    for msg_id in (info, nudge, debug, usage):
        kernel.answer_to(msg_id)
    assert kernel.wakes == 0 and kernel.channels.asleep


@pytest.mark.parametrize(
    "content",
    [
        {"comm_id": "w", "data": {"method": "update", "state": {"value": 7}, "buffer_paths": []}},
        {"comm_id": "w", "data": {"method": "request_states", "state": "x" * 5000}},
        {"comm_id": "w", "data": ["request_states"]},
    ],
)
def test_what_a_person_does_to_a_widget_wakes_its_kernel(content: dict[str, object]):
    kernel = Kernel()
    kernel.ask(Channel.SHELL, "comm_msg", content)
    assert kernel.wakes == 1


def test_kernel_info_is_the_last_real_reply():
    kernel = Kernel()
    for n, channel in enumerate((Channel.SHELL, Channel.CONTROL)):
        kernel.replies("kernel_info_reply", {**INFO, "banner": str(n)}, channel)
        asked = kernel.ask(channel, "kernel_info_request")
        reply = kernel.answer_to(asked)
        assert reply["msg_type"] == "kernel_info_reply"
        assert reply["content"] == {**INFO, "banner": str(n)}


@pytest.mark.parametrize(
    "content",
    [
        b"no json",
        b"[1]",
        b'{"status": "error"}',
        b"[" * 10_000,
        b"\xff\xfe",
        json.dumps({"status": "ok", "x": "x" * (1 << 20)}).encode(),
    ],
    ids=["text", "list", "error", "deep", "utf", "long"],
)
def test_what_is_no_kernel_info_is_not_kept(content: bytes):
    kernel = Kernel()
    kernel.channels._deliver = lambda *_: None  # type: ignore[method-assign]  # clients choke on it; not the subject
    kernel.replies("kernel_info_reply", content)
    del kernel.channels._deliver  # type: ignore[method-assign]
    assert kernel.answer_to(kernel.ask(Channel.SHELL, "kernel_info_request"))["content"] == INFO
    assert kernel.wakes == 0


def test_kernel_info_wakes_where_nothing_is_known_of_the_kernel():
    kernel = Kernel(info=False)
    kernel.ask(Channel.SHELL, "kernel_info_request")
    assert kernel.wakes == 1
    kernel.channels.connect(kernel)
    assert kernel.kinds(Channel.SHELL) == ["kernel_info_request"]


def test_the_next_owner_answers_with_what_the_last_one_knew():
    first = Kernel()
    first.runs("busy", b'{"msg_id":"cell"}')
    facts = json.loads(json.dumps(first.channels.facts()))
    second = Kernel(info=False)
    second.channels.recall(facts)
    assert second.answer_to(second.ask(Channel.SHELL, "kernel_info_request"))["content"] == INFO
    assert second.got[-1][1]["content"] == {"execution_state": "busy"}
    assert second.wakes == 0


@pytest.mark.parametrize(
    "facts", [{}, {"kernel_info": 1, "running": 1}, {"kernel_info": "[]", "running": [1, "x", "[" * 9999]}]
)
def test_malformed_facts_are_passed_over(facts: dict[str, Any]):
    kernel = Kernel(info=False)
    kernel.channels.recall(facts)
    kernel.ask(Channel.SHELL, "kernel_info_request")
    assert kernel.wakes == 1


def test_a_cell_that_was_running_still_looks_busy_after_an_answer():
    cell = b'{"msg_id":"cell"}'
    kernel = Kernel()
    kernel.runs("busy", b'{"msg_id":"before"}')
    kernel.runs("idle", b'{"msg_id":"before"}')
    kernel.runs("busy", cell)
    assert len(kernel.got) == 3, "nothing artificial comes of the sleep itself"
    asked = kernel.ask(Channel.SHELL, "kernel_info_request")
    last = kernel.got[-1][1]
    assert last["parent_header"] == {"msg_id": "cell"} and last["content"] == {"execution_state": "busy"}
    kernel.got.pop()
    kernel.answer_to(asked)
    kernel.runs("idle", cell)
    kernel.answer_to(kernel.ask(Channel.SHELL, "kernel_info_request"))
    assert kernel.got[-1][1]["content"] == {"execution_state": "idle"}


def test_nothing_runs_any_more_in_a_kernel_that_was_restarted():
    kernel = Kernel()
    kernel.runs("busy", b'{"msg_id":"cell"}')
    kernel.channels.disconnect()
    kernel.channels.sleep(kernel.wake)
    kernel.ask(Channel.SHELL, "kernel_info_request")
    assert kernel.got[-1][1]["content"] == {"execution_state": "idle"}


def test_a_kernel_that_begins_requests_without_end_is_not_followed():
    kernel = Kernel()
    kernel.channels._deliver = lambda *_: None  # type: ignore[method-assign]
    for n in range(10_000):
        kernel.runs("busy", b'{"msg_id":"%d"}' % n)
    assert len(kernel.channels.facts()["running"]) < 100


def test_requests_come_out_in_the_order_in_which_they_came():
    kernel = Kernel()
    asked = [kernel.ask(1 + n % 3, "comm_msg" if n % 3 < 2 else "input_reply", {"n": n}) for n in range(100)]
    kernel.channels.connect(kernel)
    assert [kernel._read(parts)["header"]["msg_id"] for _, parts in kernel.sent] == asked
    after = kernel.ask(Channel.SHELL, "execute_request")
    assert kernel._read(kernel.sent[-1][1])["header"]["msg_id"] == after, "awake, they pass"
    assert not kernel.channels.asleep


def test_what_the_link_does_not_take_is_answered():
    kernel = Kernel()
    asked = [kernel.ask(Channel.SHELL, "execute_request", {"n": n}) for n in range(4)]
    send = kernel.send

    def breaks(channel: int, parts: Sequence[Buffer]) -> int:
        kernel.full = len(kernel.sent) == 2
        return send(channel, parts)

    kernel.send = breaks  # type: ignore[method-assign]
    kernel.channels.connect(kernel)
    assert [kernel._read(parts)["header"]["msg_id"] for _, parts in kernel.sent] == asked[:2]
    for msg_id in asked[2:]:
        assert kernel.answer_to(msg_id)["content"]["evalue"] == "the sandbox does not read its input"


def test_a_second_sleep_wakes_for_what_waits_already():
    kernel = Kernel()
    kernel.ask(Channel.SHELL, "comm_info_request")
    kernel.channels.sleep(kernel.wake)
    assert kernel.wakes == 0
    kernel.ask(Channel.SHELL, "execute_request")
    assert kernel.wakes == 1
    kernel.channels.sleep(kernel.wake)
    assert kernel.wakes == 2
    kernel.channels.connect(kernel)
    assert kernel.kinds(Channel.SHELL) == ["comm_info_request", "execute_request"]


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for (channel, kind), does in TABLE.items()
        if channel == Channel.SHELL and "_request" in kind and does is not Effect.UNAVAILABLE
    ],
)
def test_a_request_is_answered_when_the_kernel_cannot_be_woken(kind: str):
    kernel = Kernel(info=False)
    asked = kernel.ask(Channel.SHELL, kind)
    if kernel.wakes == 0:
        kernel.ask(Channel.SHELL, "execute_request")
    kernel.channels.asleep_again("the snapshot is damaged")
    reply = kernel.answer_to(asked)
    assert reply["msg_type"] == kind.replace("_request", "_reply")
    assert reply["content"]["status"] == ("unknown" if kind == "is_complete_request" else "error")
    assert reply["content"]["ename"] == "SandboxAsleep"
    assert kernel.channels.asleep
    wakes = kernel.wakes
    kernel.ask(Channel.SHELL, "execute_request")
    assert kernel.wakes == wakes + 1, "the next one tries again"
    kernel.channels.connect(kernel)
    assert kernel.kinds(Channel.SHELL) == ["execute_request"], "what was answered is not sent as well"


def test_a_cell_that_could_not_be_run_shows_the_reason():
    kernel = Kernel()
    asked = kernel.ask(Channel.SHELL, "execute_request")
    kernel.channels.asleep_again("the snapshot is damaged")
    kinds = [message["msg_type"] for _, message in kernel.got]
    assert kinds == ["status", "error", "execute_reply", "status"]
    assert kernel.got[1][1]["content"]["evalue"] == "the snapshot is damaged"
    assert "SandboxAsleep: the snapshot is damaged" in "".join(kernel.got[1][1]["content"]["traceback"])
    assert isinstance(kernel.answer_to(asked)["content"]["execution_count"], int)


def test_an_input_is_not_lost_when_the_kernel_cannot_be_woken():
    kernel = Kernel()
    kernel.runs("busy", b'{"msg_id":"cell"}')
    kernel.ask(Channel.STDIN, "input_reply", {"value": "42"})
    kernel.ask(Channel.SHELL, "comm_msg")
    kernel.channels.asleep_again("the disk is away")
    notices = [message for _, message in kernel.got if message["msg_type"] == "stream"]
    assert all("the disk is away" in message["content"]["text"] for message in notices)
    assert notices[0]["parent_header"] == {"msg_id": "cell"}
    assert kernel.wakes == 1, "it is not tried again for what failed"
    kernel.channels.connect(kernel)
    assert [channel for channel, _ in kernel.sent] == [Channel.STDIN, Channel.SHELL]


def test_a_wake_that_raises_is_answered():
    kernel = Kernel()

    def fails() -> None:
        raise OSError("no way")

    kernel.channels.sleep(fails)
    asked = kernel.ask(Channel.SHELL, "execute_request")
    assert kernel.answer_to(asked)["content"]["evalue"] == "no way"
    kernel.channels.sleep(kernel.wake)
    assert kernel.wakes == 0, "it waits no more"


def test_above_the_bound_a_request_is_refused_and_not_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "MAX_WAITING", 10)
    kernel = Kernel()
    for _ in range(10):
        kernel.ask(Channel.SHELL, "complete_request")
    refused = kernel.ask(Channel.SHELL, "execute_request")
    assert kernel.answer_to(refused)["content"]["ename"] == "SandboxAsleep"
    kernel.answer_to(kernel.ask(Channel.SHELL, "kernel_info_request"))
    kernel.channels.connect(kernel)
    assert kernel.kinds(Channel.SHELL) == ["complete_request"] * 10


def test_a_full_room_of_requests_that_wait_does_not_stop_the_kernel_from_being_woken(monkeypatch: pytest.MonkeyPatch):
    """Pages that are reloaded again and again leave their questions behind: a person's request still wakes."""
    monkeypatch.setattr(gate, "MAX_WAITING", 10)
    kernel = Kernel()
    for _ in range(20):
        asked = kernel.ask(Channel.SHELL, "comm_info_request")
    assert kernel.answer_to(asked)["content"]["comms"] == {}
    kernel.ask(Channel.SHELL, "execute_request")
    assert kernel.wakes == 1
    kernel.channels.connect(kernel)
    assert "execute_request" in kernel.kinds(Channel.SHELL)


def test_bytes_that_wait_are_bounded_but_one_large_message_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "MAX_WAITING_BYTES", 100_000)
    kernel = Kernel()
    kernel.ask(Channel.SHELL, "execute_request", {"code": "x" * 1_000_000})
    assert kernel.got == []
    refused = kernel.ask(Channel.SHELL, "execute_request", {"code": "x" * 1000})
    assert kernel.answer_to(refused)["content"]["status"] == "error"
    kernel.channels.connect(kernel)
    kernel.channels.sleep(kernel.wake)
    count = len(kernel.got)
    for _ in range(50):
        kernel.ask(Channel.SHELL, "execute_request", {"code": "x" * 1000})
    assert len(kernel.got) == count, "what was sent no longer counts"


def test_a_kernel_that_is_being_restarted_refuses_above_the_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "MAX_WAITING", 10)
    kernel = Kernel()
    kernel.channels.disconnect()
    asked = [kernel.ask(Channel.SHELL, "execute_request") for _ in range(11)]
    assert kernel.answer_to(asked[-1])["content"]["ename"] == "SandboxUnavailable"
    assert kernel.wakes == 0
    kernel.channels.connect(kernel)
    assert len(kernel.sent) == 10


def test_a_sandbox_that_does_not_read_its_input_is_told_to_the_client():
    kernel = Kernel()
    kernel.channels.connect(kernel)
    kernel.full = True
    asked = kernel.ask(Channel.SHELL, "execute_request")
    assert kernel.answer_to(asked)["content"]["evalue"] == "the sandbox does not read its input"


def _unsigned(parts: list[bytes]) -> list[bytes]:
    return [parts[0], b"0" * 64, *parts[2:]]


def _with_header(header: bytes) -> Callable[[list[bytes]], list[bytes]]:
    def change(parts: list[bytes]) -> list[bytes]:
        body = [header, *parts[3:]]
        return [parts[0], messages.sign(KEY, body), *body]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _unsigned,
        _with_header(b"{}"),
        _with_header(b'{"msg_type": ["execute_request"]}'),
        _with_header(b'{"msg_type": "%s"}' % (b"x" * 1000)),
        _with_header(b"[" * 60_000),
        _with_header(b'{"msg_type": "execute_request", "x": "%s"}' % (b"x" * (64 << 10))),
        _with_header(b"\xff"),
        _with_header(b""),
        lambda parts: parts[:4],
    ],
    ids=["signature", "no-type", "list-type", "long-type", "deep", "long", "utf", "empty", "cut"],
)
def test_what_no_kernel_would_take_neither_wakes_nor_waits(change: Callable[[list[bytes]], list[bytes]]):
    kernel = Kernel()
    parts = kernel.session.serialize(kernel.session.msg("execute_request", {}))
    for _ in range(3):
        kernel.channels.request(Channel.SHELL, [b"me", *change(parts)])
    assert kernel.wakes == 0 and kernel.got == []
    kernel.channels.connect(kernel)
    assert kernel.sent == []


@pytest.mark.parametrize(
    "content", [{"seq": 7, "command": "debugInfo"}, {"seq": "x", "command": 3}, {}, {"seq": 9, "command": "attach"}]
)
def test_the_debugger_is_told_that_it_is_not_available(content: dict[str, Any]):
    kernel = Kernel()
    reply = kernel.answer_to(kernel.ask(Channel.CONTROL, "debug_request", content))
    told = reply["content"]
    assert reply["msg_type"] == "debug_reply"
    assert told["type"] == "response" and told["success"] is False
    assert told["request_seq"] == (content["seq"] if isinstance(content.get("seq"), int) else 0)
    if content.get("command") == "debugInfo":
        # What JupyterLab reads of it when a page is loaded.
        assert told["body"]["isStarted"] is False and told["body"]["hashMethod"] == "Murmur2"
        assert told["body"]["breakpoints"] == told["body"]["stoppedThreads"] == []


def test_the_usage_extension_is_told_that_it_is_not_available():
    kernel = Kernel()
    reply = kernel.answer_to(kernel.ask(Channel.CONTROL, "usage_request"))
    assert reply["msg_type"] == "usage_reply" and "hostname" not in reply["content"]


def test_malformed_messages_of_the_kernel_reach_the_clients_and_harm_nothing_here(caplog: pytest.LogCaptureFixture):
    kernel = KernelChannels(KEY)
    odd: list[list[Buffer]] = [
        [b"me"],
        [],
        [b"me", messages.DELIMITER, b"", b'"kernel_info_reply"'],
        [b"me", messages.DELIMITER, b"", b'{"msg_type":"kernel_info_reply"}', b"", b"", b"[" * 60_000],
        [b"status", messages.DELIMITER, b"", b"", b"[" * 9000, b"", b'{"execution_state": "busy"}'],
        [b"status", messages.DELIMITER, b"", b"", b"", b"", b"[" * 4000],
    ]
    for parts in odd:
        for channel in Channel:
            kernel.received(channel, parts)
    assert len(caplog.records) <= channels.MAX_LOGGED


def test_the_page_about_waking_says_what_the_rule_does():
    text = (Path(__file__).parents[2] / "docs" / "reference" / "waking.md").read_text()
    said = dict(re.findall(r"`(\w+)`(?=[^|\n]*\| (\w+))", text))
    words = {
        Effect.WAKE: ("wakes",),
        Effect.WAIT: ("waits",),
        Effect.CACHED: ("answered",),
        Effect.UNAVAILABLE: ("answered",),
    }
    for (channel, kind), does in TABLE.items():
        if kind in said and (channel == Channel.STDIN) == (kind == "input_reply"):
            assert said[kind] in words[does], kind
    known = {kind for (_, kind), does in TABLE.items() if kind and kind != "something_request"}
    assert known == set(said)
