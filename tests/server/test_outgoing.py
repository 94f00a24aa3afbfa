"""A page's messages to a gateway over lines that break: each arrives once, in order, and little is kept meanwhile."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.server.inlet import LONGEST_SENDER, MOST, Arriving, Inlet, Inlets
from sandbox_gateway.server.outgoing import Outgoing, Resumed

STEPS = ["say", "write", "write half", "arrive", "ask", "break", "break as a new connection is made"]


class Line:
    """A page, a line that breaks, and a gateway that counts."""

    def __init__(self) -> None:
        self.out, self.inlet = Outgoing(), Inlet()
        self.said: list[str] = []
        self.arrived: list[str] = []
        self.under_way: deque[str | bytes] = deque()
        self.arriving: Arriving
        self.left = True
        self.connect(self.inlet.told("page"))

    def connect(self, told: int | None) -> None:
        """A new connection; what its handshake tells may be old by the time it is there."""
        self.out.resume(told, left=self.left)
        self.left = True
        self.arriving = self.inlet.open("page", told)

    def step(self, what: str) -> None:
        """One of STEPS, or ``forget``."""
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
            told, late, before = self.inlet.told("page"), self.under_way, self.arriving
            self.under_way = deque()
            if late and len(self.said) % 2:
                self.deliver(before, late.popleft())  # between the handshake and the new connection
            self.connect(told)
        elif what == "break as a new connection is made":
            self.inlet.open("page", self.inlet.told("page"))  # nobody hears what it was told
            self.step("break")
        elif what == "forget":
            self.inlet = Inlet()
            self.step("break as a new connection is made")

    def deliver(self, arriving: Arriving, message: str | bytes) -> None:
        """It is there."""
        if arriving.take():
            self.arrived.append(str(message))

    def finish(self) -> None:
        """All is written, and arrives."""
        if not self.left:
            self.step("break")
        while self.out:
            self.step("write")
        while self.under_way:
            self.step("arrive")
        self.step("ask")


@given(st.lists(st.sampled_from(STEPS), max_size=200))
def test_every_message_arrives_once_and_in_order(steps: list[str]) -> None:
    line = Line()
    for step in steps:
        line.step(step)
        assert line.arrived == line.said[: len(line.arrived)]
    line.finish()
    assert line.arrived == line.said
    assert line.out.size == 0


@given(st.lists(st.sampled_from([*STEPS, "forget"]), max_size=200))
def test_over_a_gateway_that_forgets_none_arrives_twice(steps: list[str]) -> None:
    line = Line()
    for step in steps:
        line.step(step)
    line.finish()
    assert line.arrived == [message for message in line.said if message in line.arrived]
    assert line.out.size == 0


def test_a_gateway_that_knows_nothing_gets_only_what_cannot_have_arrived() -> None:
    out = Outgoing()
    for message in ("ran, perhaps", "half written", "waits"):
        out.add(message)
    out.take(), out.take()
    assert out.resume(None, left=False) == Resumed(1, len("half written"), given_up=1)
    assert [out.take(), out.take()] == ["half written", "waits"]
    assert out.resume(1, left=True) == Resumed(2, len("waits"), given_up=0)
    assert out.take() == "waits"


def test_a_number_that_cannot_be_is_as_none() -> None:
    out = Outgoing()
    out.add("ran, perhaps")
    out.take()
    assert out.resume(7, left=True) == Resumed(8, 0, given_up=1)
    out.add("next")
    out.take()
    assert out.resume(7, left=True) == Resumed(8, len("next"), given_up=0)


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
        told = inlet.told(sender)
        assert told is None
        assert inlet.open(sender, told).take()


def test_another_client_of_the_session_begins_anew() -> None:
    inlet = Inlet()
    told = inlet.told("page")
    assert told is not None
    assert inlet.open("page", told).take()
    assert inlet.told("page") == told + 1
    other = inlet.told("other")
    assert other not in (told, told + 1, None)
    assert inlet.open("other", other).take()
    assert inlet.told("page") != told + 1


def test_what_came_of_a_session_is_remembered_beyond_its_end() -> None:
    inlets = Inlets()
    first = inlets.of(b"session")
    for number in range(MOST - 1):
        inlets.of(b"%d" % number)
    assert inlets.of(b"session") is first
    for number in range(MOST):
        inlets.of(b"%d" % number)
    assert inlets.of(b"session") is not first
