"""What happened to sandboxes, for people and programs: typed events, kept in order and told to who listens.

An event is written down before anybody in this process hears of it, so that its number is the same everywhere. Writing
goes on beside what it tells of: a store that fails loses events (and says so in the log), never the operation.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sandbox_gateway.model import Death, DeathKind, SandboxRecord, State

log = logging.getLogger(__name__)

MAX_TEXT = 1000
"""Characters of an event's text; the rest is cut off (a part of it may come from inside a sandbox)."""
_MAX_WAITING = 10_000


class EventKind(enum.StrEnum):
    """What happened. Others may be added: whoever reads events ignores what he does not know."""

    CREATED = "created"
    """The sandbox was made; ``data`` has ``parent`` where it was made from something."""
    STARTED = "started"
    """Its kernel was started."""
    PAUSED = "paused"
    RESUMED = "resumed"
    """It goes on after a pause or a suspend; ``data`` has ``seconds``, the time it took."""
    SUSPENDED = "suspended"
    """It is on disk and uses no memory; ``data`` has ``seconds``, the time it took."""
    WOKE = "woke"
    """A client's request is what resumed it."""
    FORKED = "forked"
    """``data`` has ``children``, their ids."""
    SNAPSHOT = "snapshot"
    """It was saved and runs on; ``data`` has ``snapshot``, its id."""
    ADOPTED = "adopted"
    """A process took it over from one that is gone."""
    HANDED_OVER = "handed_over"
    """Its owner gave it to another process."""
    RESTARTED = "restarted"
    WARNED = "warned"
    """It will end at ``data["due"]`` (seconds since the epoch); where ``data["idle"]`` is true, unless it is used."""
    INTERRUPTED = "interrupted"
    """A request ran longer than the profile allows."""
    EXPIRED = "expired"
    DIED = "died"
    """``data`` has ``kind``, the death's kind."""
    STOPPED = "stopped"
    """It was ended, on request or with its application."""
    FAILED = "failed"
    """An operation failed and the sandbox is as it was before; ``data`` has ``code``, the error's."""
    TEMPLATE_BUILT = "template_built"
    """Of a profile, not of a sandbox."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    sandbox: str
    """The sandbox's id; empty where it is about none."""
    kind: EventKind
    text: str = ""
    """One line for people."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """More of it for programs: plain JSON values."""
    time: float = 0.0
    """Seconds since the epoch."""
    id: int = 0
    """Grows from event to event in one installation; 0 until it is written down."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "id": self.id,
            "time": self.time,
            "sandbox": self.sandbox,
            "kind": str(self.kind),
            "text": self.text,
            "data": dict(self.data),
        }


_MOVES: Mapping[tuple[State, State], EventKind] = {
    (State.CREATING, State.RUNNING): EventKind.STARTED,
    (State.RUNNING, State.PAUSED): EventKind.PAUSED,
    (State.PAUSED, State.RUNNING): EventKind.RESUMED,
    (State.SUSPENDING, State.SUSPENDED): EventKind.SUSPENDED,
    (State.SUSPENDING, State.RUNNING): EventKind.FAILED,
    (State.SUSPENDING, State.PAUSED): EventKind.FAILED,
    (State.RESUMING, State.RUNNING): EventKind.RESUMED,
    (State.RESUMING, State.SUSPENDED): EventKind.FAILED,
    (State.RESTARTING, State.RUNNING): EventKind.RESTARTED,
}
_FAILURES = {State.SUSPENDING: "it could not be suspended", State.RESUMING: "it could not be resumed"}


def of_move(before: SandboxRecord, after: SandboxRecord, reason: str = "") -> Event | None:
    """The event that a change of state is, with the time that it took; None for one that is half of another.

    ``reason`` is why it was made, or why it failed.
    """
    if after.state in {State.EXPIRED, State.TERMINATED, State.FAILED}:
        death = after.death or Death(DeathKind.FAILED)
        kind = EventKind.EXPIRED if death.kind is DeathKind.EXPIRED else EventKind.STOPPED
        if after.state is State.FAILED:
            kind = EventKind.DIED
        return Event(after.id, kind, death.describe(), {"kind": str(death.kind)}, after.changed)
    found = _MOVES.get((before.state, after.state))
    if found is None:
        return None
    text, data = reason, {"seconds": round(max(0.0, after.changed - before.changed), 3)}
    if found is EventKind.FAILED:
        text = f"{_FAILURES[before.state]}: {reason}" if reason else _FAILURES[before.state]
    elif found is EventKind.PAUSED or before.state is State.PAUSED:
        data = {}  # how long it was in the state before says nothing of how long this took
    return Event(after.id, found, text, data, after.changed)


class Keeper(Protocol):
    """Where events are written down: :class:`sandbox_gateway.store.Store`."""

    def add_events(self, events: Sequence[Event]) -> tuple[Event, ...]:
        """Write them in their order; returns them with their numbers."""
        ...


Listener = Callable[[Event], object]
"""Takes each event on the loop; must not block."""


class EventLog:
    """This process's way to write events. Use it on one event loop."""

    def __init__(self, keeper: Keeper, clock: Callable[[], float] = time.time) -> None:
        self._keeper = keeper
        self._clock = clock
        self._listeners: list[Listener] = []
        self._waiting: list[Event] = []
        self._writing: asyncio.Task[None] | None = None

    def note(self, sandbox_id: str, kind: EventKind, text: str = "", **data: Any) -> None:
        """Write down that something happened just now. Never blocks, never raises."""
        self.add(Event(sandbox_id, kind, text, data, self._clock()))

    def moved(self, before: SandboxRecord, after: SandboxRecord, reason: str = "") -> None:
        """Note a change of state, if it is an event (:func:`of_move`). Never blocks, never raises."""
        event = of_move(before, after, reason)
        if event is not None:
            self.add(event)

    def add(self, event: Event) -> None:
        """Write an event down. Never blocks, never raises."""
        if len(self._waiting) >= _MAX_WAITING:
            log.warning("an event was not written (%s %s): %d others wait", event.sandbox, event.kind, _MAX_WAITING)
            return
        line = " ".join(event.text[: MAX_TEXT + 1].split())
        self._waiting.append(replace(event, text=line[:MAX_TEXT]))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell ``listener`` every event of this process from now on; the returned function ends that."""
        self._listeners.append(listener)

        def unlisten() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unlisten

    async def flush(self) -> None:
        """Return when all that was noted before is written down and told."""
        while self._writing is not None:
            await asyncio.shield(self._writing)

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    written = await asyncio.to_thread(self._keeper.add_events, batch)
                except Exception as error:
                    log.warning("%d events could not be written: %s", len(batch), error)
                    written = tuple(replace(event, id=0) for event in batch)
                for event in written:
                    self._tell(event)
        finally:
            self._writing = None

    def _tell(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener to events failed; the others go on")
