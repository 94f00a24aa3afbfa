"""``jupyter sandbox events``."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from cli_harness import Run, record

from sandbox_gateway.cli import event_commands
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import State
from sandbox_gateway.store import Store

A = "11112222-3333-4444-5555-666677778888"
B = "22229999-3333-4444-5555-666677778888"


@pytest.fixture
def told(store: Store) -> Store:
    store.put(record(A))
    store.put(record(B, State.SUSPENDED))
    store.add_events(
        [
            Event(A, EventKind.CREATED, "", {}, 1_700_000_000.0),
            Event(A, EventKind.PAUSED, "idle for\x1b[31m 10 min", {}, 1_700_000_600.0),
            Event(B, EventKind.WARNED, "it expires in 24 h", {"due": 1.0}, 1_700_000_601.5),
            Event("", EventKind.TEMPLATE_BUILT, "python3-gvisor", {}, 1_700_000_602.0),
        ]
    )
    return store


def test_a_fresh_installation_has_none_and_looking_makes_nothing(program: Run, paths: Paths) -> None:
    before = sorted(paths.home.iterdir())
    assert program("events", "--json").json == []
    assert program("events").stdout == ""
    assert sorted(paths.home.iterdir()) == before


def test_events_are_lines_oldest_first_with_what_a_terminal_can_take(run: Run, told: Store) -> None:
    lines = run("events").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["2023-11-14T22:13:20.000Z", "11112222", "created"],
        ["2023-11-14T22:23:20.000Z", "11112222", "paused"],
        ["2023-11-14T22:23:21.500Z", "22229999", "warned"],
        ["2023-11-14T22:23:22.000Z", "-", "template_built"],
    ]
    assert "\x1b" not in lines[1] and lines[1].endswith(" 10 min")


def test_events_of_one_sandbox_as_json(run: Run, told: Store) -> None:
    (found,) = run("events", "2222", "--json").json
    assert found == {
        "id": found["id"],
        "time": "2023-11-14T22:23:21.500Z",
        "sandbox": B,
        "kind": "warned",
        "text": "it expires in 24 h",
        "data": {"due": 1.0},
    }
    assert [item["kind"] for item in run("events", A, "-n", "1", "--json").json] == ["paused"]
    assert run("events", "nope", "--json").error["code"] == "unknown_sandbox"
    assert run("events", "-n", "-1").status == 2


def test_following_shows_what_comes_and_ends_with_the_sandbox(paths: Paths, told: Store) -> None:
    command = [sys.executable, "-m", "sandbox_gateway.cli", "events", A, "--follow", "--json", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["kind"] == "paused"
        told.add_events([Event(A, EventKind.WOKE, "", {}, time.time()), Event(B, EventKind.WOKE, "", {}, time.time())])
        woke = json.loads(following.stdout.readline())
        assert (woke["kind"], woke["sandbox"]) == ("woke", A)
        told.add_events([Event(A, EventKind.STOPPED, "", {}, time.time())])
        told.transition(A, State.TERMINATING, time.time())
        told.transition(A, State.TERMINATED, time.time())
        assert json.loads(following.stdout.readline())["kind"] == "stopped"
        assert following.stdout.readline() == "" and following.wait(30) == 0


def test_following_a_sandbox_that_is_removed_ends(paths: Paths, told: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_commands, "INTERVAL", 0.0)
    batches = event_commands.follow(paths, A, 10)
    assert [event.kind for event in next(batches)] == [EventKind.CREATED, EventKind.PAUSED]
    told.delete(A)
    assert list(batches) == []
