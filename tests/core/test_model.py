"""States, transitions and values."""

from __future__ import annotations

import itertools
import json

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import (
    TRANSITIONS,
    Death,
    DeathKind,
    Image,
    KernelSpec,
    Launch,
    Layer,
    Limits,
    Mount,
    SandboxRecord,
    SandboxSpec,
    State,
    advance,
)

ALLOWED = {(old, new) for old, targets in TRANSITIONS.items() for new in targets}


def test_the_table_names_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


@pytest.mark.parametrize(("old", "new"), sorted(ALLOWED))
def test_a_transition_of_the_table_is_allowed(old: State, new: State) -> None:
    assert advance(old, new) is new


@pytest.mark.parametrize(("old", "new"), sorted(set(itertools.product(State, State)) - ALLOWED))
def test_any_other_transition_raises(old: State, new: State) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        advance(old, new)
    assert caught.value.code == "illegal_transition"


def test_every_state_but_the_ends_can_be_terminated_and_can_fail() -> None:
    for state in set(State) - {State.TERMINATING, State.TERMINATED, State.FAILED}:
        assert {State.TERMINATING, State.FAILED} <= TRANSITIONS[state]


def test_a_suspending_sandbox_can_go_back_so_that_a_failed_suspend_leaves_it_running() -> None:
    assert {State.RUNNING, State.PAUSED} <= TRANSITIONS[State.SUSPENDING]


def test_a_failed_resume_leaves_the_sandbox_suspended() -> None:
    assert State.SUSPENDED in TRANSITIONS[State.RESUMING]


def test_a_death_survives_the_way_through_json() -> None:
    death = Death(DeathKind.EXITED, "x", exit_code=3, stderr_tail="last line")
    assert Death.from_dict(death.as_dict()) == death


@pytest.mark.parametrize("kind", list(DeathKind))
def test_every_death_describes_itself(kind: DeathKind) -> None:
    assert Death(kind).describe()
    assert Death(kind, "told").describe() == "told"


def test_a_record_moves_only_along_the_table() -> None:
    record = SandboxRecord("a", State.CREATING, "p", "fake", created=1.0, changed=1.0, boot_id="b")
    moved = record.moved(State.RUNNING, 2.0)
    assert (moved.state, moved.changed, record.state) == (State.RUNNING, 2.0, State.CREATING)
    with pytest.raises(SandboxGatewayError):
        moved.moved(State.SUSPENDED, 3.0)


def test_a_launch_survives_json() -> None:
    image = Image("host", (Layer("/l", "/", digest="sha256:1"),), "/py", {"A": "1"}, Layer("/a", "/opt/agent"))
    spec = SandboxSpec("id", "p", "gvisor", image, Limits(memory=1), (Mount("/s", "/d", False),))
    launch = Launch(spec, KernelSpec(("python", "-m", "x"), {"B": "2"}), b"key", 1000, 1000, "hint")
    assert Launch.from_dict(json.loads(json.dumps(launch.as_dict()))) == launch
