"""Events: what the store keeps of them, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sandbox_gateway import store as store_module
from sandbox_gateway.events import MAX_TEXT, Event, EventKind, EventLog, of_move
from sandbox_gateway.model import Activity, Death, DeathKind, SandboxRecord, State
from sandbox_gateway.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def some(sandbox: str, count: int, kind: EventKind = EventKind.PAUSED) -> list[Event]:
    return [Event(sandbox, kind, f"{sandbox} {index}", {"index": index}, float(index)) for index in range(count)]


def test_events_come_back_in_order_with_growing_numbers(store: Store) -> None:
    written = store.add_events(some("a", 3)) + store.add_events(some("b", 1, EventKind.WOKE))
    assert [event.id for event in written] == sorted({event.id for event in written})
    assert store.events() == written
    assert store.events("a") == written[:3] and store.events("b") == written[3:]
    assert store.events("a", since=written[0].id) == written[1:3]
    assert store.events("a", limit=2) == written[1:3], "the newest ones"
    assert store.events("nobody") == ()


def test_each_sandbox_keeps_its_newest_events(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_EVENTS_EACH", 5)
    quiet = store.add_events(some("quiet", 2))
    noisy = [event for _ in range(4) for event in store.add_events(some("noisy", 4))]
    assert store.events("noisy") == tuple(noisy[-5:])
    assert store.events("quiet") == quiet, "a sandbox to which much happens costs the others nothing"


def test_all_together_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_EVENTS", 50)
    for number in range(60):
        store.add_events(some(f"s{number}", 5))
    left = store.events()
    assert 50 <= len(left) < 50 + 100 and left[-1].text == "s59 4"


def test_numbers_are_never_given_again(store: Store) -> None:
    store.put(SandboxRecord("a", State.RUNNING, "p", "fake", 1.0, 1.0, "boot"))
    store.put_activity("a", Activity(5.0, 6.0))
    (first,) = store.add_events(some("a", 1))
    assert store.activity("a") == Activity(5.0, 6.0, None)
    store.delete("a")
    assert store.events() == () and store.activity("a") is None, "what is forgotten takes its events along"
    assert store.add_events(some("b", 1))[0].id > first.id


def test_a_kind_that_a_newer_program_wrote_is_left_out(store: Store) -> None:
    store.add_events(some("a", 1))
    with store._transaction() as connection:
        connection.execute("INSERT INTO events (sandbox, time, kind, text, data) VALUES ('a', 1.0, 'dreamt', '', '{}')")
    assert [event.kind for event in store.events("a")] == [EventKind.PAUSED]


async def test_an_event_is_told_when_it_is_written_and_in_order(store: Store) -> None:
    log = EventLog(store, clock=lambda: 7.0)
    heard: list[Event] = []
    unlisten = log.listen(heard.append)
    log.note("a", EventKind.SUSPENDED, "idle for\n10 min", bytes=5)
    for index in range(20):
        log.note("a", EventKind.PAUSED, str(index))
    await log.flush()
    assert tuple(heard) == store.events("a")
    assert heard[0] == Event("a", EventKind.SUSPENDED, "idle for 10 min", {"bytes": 5}, 7.0, heard[0].id)
    unlisten()
    log.note("a", EventKind.WOKE)
    await log.flush()
    assert len(heard) == 21 and len(store.events("a")) == 22


async def test_a_text_is_one_bounded_line(store: Store) -> None:
    log = EventLog(store)
    log.note("a", EventKind.DIED, "x\r\n" * 10 + "y" * 10 * MAX_TEXT)
    await log.flush()
    (event,) = store.events()
    assert MAX_TEXT - 20 < len(event.text) <= MAX_TEXT and event.text.startswith("x x x")


async def test_a_listener_that_fails_disturbs_neither_the_others_nor_the_log(store: Store) -> None:
    log = EventLog(store)
    heard: list[Event] = []
    log.listen(lambda event: 1 / 0)
    log.listen(heard.append)
    log.note("a", EventKind.CREATED)
    await log.flush()
    assert [event.kind for event in heard] == [EventKind.CREATED]


async def test_a_store_that_fails_loses_the_events_but_not_the_listeners() -> None:
    class Broken:
        def add_events(self, events: Sequence[Event]) -> tuple[Event, ...]:
            raise OSError("no space")

    log = EventLog(Broken())
    heard: list[Event] = []
    log.listen(heard.append)
    log.note("a", EventKind.CREATED)
    await log.flush()
    assert [(event.kind, event.id) for event in heard] == [(EventKind.CREATED, 0)]


def at(state: State, changed: float = 0.0, **more: object) -> SandboxRecord:
    return SandboxRecord("a", state, "p", "fake", 0.0, changed, "boot", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "reason", "event"),
    [
        (at(State.CREATING, 1.0), at(State.RUNNING, 1.5), "", Event("a", EventKind.STARTED, "", {"seconds": 0.5}, 1.5)),
        (at(State.RUNNING), at(State.PAUSED, 9.0), "idle", Event("a", EventKind.PAUSED, "idle", {}, 9.0)),
        (at(State.PAUSED), at(State.RUNNING, 9.0), "", Event("a", EventKind.RESUMED, "", {}, 9.0)),
        (at(State.RUNNING), at(State.SUSPENDING), "", None),
        (
            at(State.SUSPENDING, 1.0),
            at(State.SUSPENDED, 3.25),
            "asked",
            Event("a", EventKind.SUSPENDED, "asked", {"seconds": 2.25}, 3.25),
        ),
        (
            at(State.SUSPENDING),
            at(State.RUNNING, 1.0),
            "disk full",
            Event("a", EventKind.FAILED, "it could not be suspended: disk full", {"seconds": 1.0}, 1.0),
        ),
        (
            at(State.RESUMING),
            at(State.SUSPENDED, 1.0),
            "",
            Event("a", EventKind.FAILED, "it could not be resumed", {"seconds": 1.0}, 1.0),
        ),
        (
            at(State.SUSPENDED),
            at(State.EXPIRED, 1.0, death=Death(DeathKind.EXPIRED, "not used for 2 days")),
            "",
            Event("a", EventKind.EXPIRED, "not used for 2 days", {"kind": "expired"}, 1.0),
        ),
        (
            at(State.TERMINATING),
            at(State.TERMINATED, 1.0, death=Death(DeathKind.STOPPED)),
            "",
            Event("a", EventKind.STOPPED, "stopped on request", {"kind": "stopped"}, 1.0),
        ),
        (
            at(State.TERMINATING),
            at(State.TERMINATED, 1.0, death=Death(DeathKind.EXPIRED)),
            "",
            Event("a", EventKind.EXPIRED, "expired", {"kind": "expired"}, 1.0),
        ),
        (
            at(State.TERMINATING),
            at(State.FAILED, 1.0, death=Death(DeathKind.OUT_OF_MEMORY)),
            "",
            Event("a", EventKind.DIED, "out of memory", {"kind": "out_of_memory"}, 1.0),
        ),
    ],
)
def test_a_change_of_state_is_an_event(
    before: SandboxRecord, after: SandboxRecord, reason: str, event: Event | None
) -> None:
    assert of_move(before, after, reason) == event


async def test_events_that_are_noted_while_others_are_written_follow_them(store: Store) -> None:
    log = EventLog(store)
    written = asyncio.Event()
    log.listen(lambda event: (written.set(), event.kind is EventKind.CREATED and log.note("a", EventKind.STARTED)))
    log.note("a", EventKind.CREATED)
    await log.flush()
    assert written.is_set() and [event.kind for event in store.events()] == [EventKind.CREATED, EventKind.STARTED]
