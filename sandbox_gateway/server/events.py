"""What happens to sandboxes, on jupyter_server's event bus: its schemas, and who may see which event.

Two schemas: ``sandbox`` for the life of a sandbox (:class:`sandbox_gateway.events.EventKind`) and ``operation`` for
long operations of the REST API. Both name the owner, and by that a subscriber of ``/api/events/subscribe`` gets only
what is his own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from jupyter_events import EventLogger

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventLog
from sandbox_gateway.model import SandboxRecord
from sandbox_gateway.server.callers import Caller

log = logging.getLogger(__name__)

SCHEMAS: Final = Path(__file__).parent / "schemas"
SANDBOX: Final = "https://events.jupyter.org/sandbox_gateway/sandbox/v1"
OPERATION: Final = "https://events.jupyter.org/sandbox_gateway/operation/v1"
OURS: Final = frozenset({SANDBOX, OPERATION})
KERNEL_ACTIONS: Final = "https://events.jupyter.org/jupyter_server/kernel_actions/v1"
"""jupyter_server's own, by the id of the kernel."""
PHASES: Final = ("started", "progress", "succeeded", "failed")
"""How far an operation is, in the schema ``operation``."""
_REMEMBERED = 10_000
"""Sandboxes whose owner is remembered beyond their end."""


class Events(Protocol):
    """Of the lifecycle, what the bridge needs."""

    @property
    def events(self) -> EventLog:
        """What happens in this process."""
        ...

    @property
    def store(self) -> Any:
        """Whose sandboxes are (``get(sandbox_id)``)."""
        ...

    @property
    def live(self) -> Any:
        """The sandboxes that this process owns, by id."""
        ...


class Source(Protocol):
    """Of the gateway, what the bridge needs."""

    @property
    def lifecycle(self) -> Any:
        """An :class:`Events`."""
        ...

    def owner_of(self, sandbox_id: str) -> str | None:
        """Whose a kernel of this server is."""
        ...


@dataclass(frozen=True, slots=True)
class About:
    """What an event says of its sandbox besides what happened."""

    owner: str = ""
    """Empty: nobody's, or not known any more; administrators see such events."""
    profile: str = ""
    state: str = ""


OnEvent = Callable[[Event, About], object]
"""Takes each event of a sandbox, in order."""
OnOperation = Callable[[str, str, str, "SandboxGatewayError | None"], object]
"""Takes an operation's id, its kind, its phase and why it failed."""


class EventBridge:
    """Takes what the lifecycle notes to the event bus. Use it on the server's loop; :meth:`close` ends it."""

    def __init__(self, gateway: Source, event_logger: EventLogger) -> None:
        self._gateway = gateway
        self._logger = event_logger
        self._about: OrderedDict[str, About] = OrderedDict()
        self._waiting: list[Event] = []
        self._telling: asyncio.Task[None] | None = None
        self.on_event: list[OnEvent] = []
        """Called with each event, before the bus; must not block."""
        self.on_operation: list[OnOperation] = []
        """Called with each :meth:`operation`; must not block."""
        for path in sorted(SCHEMAS.glob("*.yaml")):
            if schema_id(path) not in event_logger.schemas:
                event_logger.register_event_schema(path)
        self._unlisten: Callable[[], None] = gateway.lifecycle.events.listen(self._heard)

    def close(self) -> None:
        """Tell nothing any more."""
        self._unlisten()
        if self._telling is not None:
            self._telling.cancel()

    async def flush(self) -> None:
        """Return when all that was heard is told."""
        while self._telling is not None:
            await asyncio.shield(self._telling)

    def owner_of(self, sandbox_id: str) -> str | None:
        """Whose a sandbox is or was, as far as it is known here without looking it up."""
        found = self._gateway.owner_of(sandbox_id)
        if found is not None:
            return found
        live = self._gateway.lifecycle.live.get(sandbox_id)
        if live is not None:
            return str(live.record.owner) or None
        about = self._about.get(sandbox_id)
        return about.owner or None if about is not None else None

    def operation(
        self,
        operation_id: str,
        kind: str,
        phase: str,
        owner: str,
        *,
        sandbox: str = "",
        name: str = "",
        text: str = "",
        done: int | None = None,
        total: int | None = None,
        error: SandboxGatewayError | None = None,
    ) -> None:
        """Tell how far a long operation is.

        ``kind`` is its name (``create``, ``suspend``, ``fork``...), ``phase`` one of :data:`PHASES`, ``owner`` whose it
        is, ``name`` the label of a sandbox that is being made, ``text`` one line for people, ``done`` of ``total`` its
        progress (bytes, or children), and ``error`` why it failed. Never raises.
        """
        data: dict[str, Any] = {"operation": operation_id, "kind": kind, "phase": phase, "owner": owner}
        more = {"sandbox": sandbox, "name": name, "text": text[:1000], "done": done, "total": total}
        data |= {key: value for key, value in more.items() if value not in ("", None)}
        if error is not None:
            data["error"] = {"code": error.code, "message": error.message[:1000], "hint": error.hint[:1000]}
        for listener in self.on_operation:
            _call(listener, operation_id, kind, phase, error)
        self._emit(OPERATION, data)

    # From the lifecycle

    def _heard(self, event: Event) -> None:
        self._waiting.append(event)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                for event in batch:
                    about = await self._look_up(event)
                    for listener in self.on_event:
                        _call(listener, event, about)
                    data = {
                        "id": event.id,
                        "time": event.time,
                        "kind": str(event.kind),
                        "sandbox": event.sandbox,
                        "owner": about.owner,
                        "profile": about.profile or str(event.data.get("profile", "")),
                        "state": about.state,
                        "text": event.text,
                        "data": dict(event.data),
                    }
                    self._emit(SANDBOX, data)
        finally:
            self._telling = None

    async def _look_up(self, event: Event) -> About:
        """What is known of the event's sandbox: in this process, else on record, else from an earlier event."""
        sandbox_id = event.sandbox
        if not sandbox_id:
            return About()
        live = self._gateway.lifecycle.live.get(sandbox_id)
        record: SandboxRecord | None = None if live is None else live.record
        if record is None:
            try:
                record = await asyncio.to_thread(self._gateway.lifecycle.store.get, sandbox_id)
            except SandboxGatewayError:
                pass  # a creation that failed leaves no record; whose it was is known from its first event
        if record is None:
            return self._about.get(sandbox_id) or About(self._gateway.owner_of(sandbox_id) or "")
        about = About(record.owner, record.profile, str(record.state))
        self._about[sandbox_id] = about
        self._about.move_to_end(sandbox_id)
        while len(self._about) > _REMEMBERED:
            self._about.popitem(last=False)
        return about

    def _emit(self, schema: str, data: dict[str, Any]) -> None:
        try:
            self._logger.emit(schema_id=schema, data=data)
        except Exception:
            log.exception("an event was not told (%s)", schema)


def _call(listener: Callable[..., object], *values: object) -> None:
    try:
        listener(*values)
    except Exception:
        log.exception("a listener to events failed; the others go on")


def schema_id(path: Path) -> str:
    """The ``$id`` of a schema of ours."""
    return f"https://events.jupyter.org/sandbox_gateway/{path.stem}/v1"


def may_see(caller: Caller, schema: str, data: dict[str, Any], owner_of: Callable[[str], str | None]) -> bool:
    """Whether an event is for this caller: his own, or anything at all for an administrator.

    What names no owner, sandbox or kernel could be anybody's, and is for administrators only.
    """
    if caller.admin:
        return True
    if schema in OURS:
        return bool(data.get("owner")) and data["owner"] == caller.name
    kernel_id = data.get("kernel_id")
    return schema == KERNEL_ACTIONS and isinstance(kernel_id, str) and owner_of(kernel_id) == caller.name
