"""A page's messages to a gateway over lines that break: each arrives once, in order, and little is kept meanwhile."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.server.inlet import LONGEST_SENDER, Arriving, Inlet
from sandbox_gateway.server.outgoing import Outgoing

STEPS = st.lists(
    st.sampled_from(["say", "write", "write half", "arrive", "arrive late", "ask", "break"]), max_size=200
)


class Line:
    """A page, a line that breaks, and a gateway that counts."""

    def __init__(self) -> None:
        self.out, self.inlet = Outgoing(), Inlet()
        self.said: list[str] = []
        self.arrived: list[str] = []
        self.under_way: deque[str | bytes] = deque()
        self.arriving: Arriving
        self.left = True
        self.told: int | None = None
        self.connect()

    def connect(self) -> None:
        """A new connection; what its handshake tells may be old by the time it is there."""
        self.out.resume(self.told, left=self.left)
        self.left = True
        self.arriving = self.inlet.open("page", self.told)

    def step(self, what: str) -> None:
        """One of STEPS."""
        if what == "say":
            self.said.append(f"message {len(self.said)}")
            self.out.add(self.said[-1])
        elif what in ("write", "write half") and self.out and self.left:
            message = self.out.take()
            self.left = what == "write"
            if self.left:
                self.under_way.append(message)
        elif what == "arrive" and self.under_way:
            self.deliver(self.arriving, self.under_way.popleft())
        elif what == "ask" and self.left:
            question = self.out.question()
            if question is not None:
                while self.under_way:
                    self.step("arrive")
                self.out.answer(question)
        elif what == "break":
            told = self.inlet.received("page")
            before = (self.arriving, self.under_way)
            self.told, self.under_way = told, deque()
            if before[1] and len(self.said) % 2:
                self.deliver(before[0], before[1].popleft())  # between the handshake and the new connection
            self.connect()

    def deliver(self, arriving: Arriving, message: str | bytes) -> None:
        """It is there."""
        if arriving.take():
            self.arrived.append(str(message))


@given(STEPS)
def test_every_message_arrives_once_and_in_order(steps: list[str]) -> None:
    line = Line()
    for step in steps:
        line.step(step)
        assert line.arrived == line.said[: len(line.arrived)]
    if not line.left:
        line.step("break")
    while line.out:
        line.step("write")
    while line.under_way:
        line.step("arrive")
    assert line.arrived == line.said
    line.step("ask")
    assert line.out.size == 0


def test_a_gateway_that_knows_nothing_gets_only_what_cannot_have_arrived() -> None:
    out = Outgoing()
    for message in ("ran, perhaps", "half written", "waits"):
        out.add(message)
    out.take(), out.take()
    assert out.resume(None, left=False) == len("half written")
    assert [out.take(), out.take()] == ["half written", "waits"]
    assert out.resume(1, left=True) == len("waits")
    assert out.take() == "waits"


def test_a_number_that_cannot_be_is_as_none() -> None:
    out = Outgoing()
    out.add("ran, perhaps")
    out.take()
    assert out.resume(7, left=True) == 0
    out.add("next")
    out.take()
    assert out.resume(7, left=True) == len("next")


def test_a_pong_of_somebody_elses_confirms_nothing() -> None:
    out = Outgoing()
    out.add(b"message")
    out.take()
    question = out.question()
    assert question is not None
    assert out.question() is None
    assert not out.answer(b"")
    assert not out.answer(question[:-1] + b"\x09")
    assert out.size == 7
    assert out.answer(question)
    assert not out.answer(question)
    assert out.size == 0


def test_a_client_without_a_name_is_not_counted() -> None:
    inlet = Inlet()
    for sender in ("", "x" * (LONGEST_SENDER + 1)):
        arriving = inlet.open(sender, None)
        assert arriving.take()
        assert inlet.received(sender) is None


def test_another_client_of_the_session_begins_anew() -> None:
    inlet = Inlet()
    assert inlet.open("page", None).take()
    assert inlet.received("page") == 1
    assert inlet.received("other") is None
    assert inlet.open("other", None).take()
    assert inlet.received("page") is None
    assert inlet.received("other") == 1
