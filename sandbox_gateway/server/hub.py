"""One kernel's client sessions: who gets what, what is kept for those who come later, how far each of them has got.

The hub is a subscriber of the kernel's channels. It encodes a message once, whatever number of sessions gets it, and
hands it to their queues; a reply goes to the session whose identity it carries. What is malformed is left out, counted,
and told once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sandbox_gateway import messages
from sandbox_gateway.bridge_queue import OVERHEAD
from sandbox_gateway.messages import Buffer
from sandbox_gateway.seat import Seat
from sandbox_gateway.server import session_file, ws_protocol
from sandbox_gateway.server.inlet import Inlet, Inlets
from sandbox_gateway.server.outlet import Entry, Outlet, Writer
from sandbox_gateway.server.session_file import Saved, SessionFile
from sandbox_gateway.server.ws_protocol import Incoming, Malformed
from sandbox_gateway.wire.frames import CHANNELS, Channel

log = logging.getLogger(__name__)

UNTRACKED: Final = frozenset(
    f"{name}_{kind}"
    for name in ("comm_info", "kernel_info", "shutdown", "interrupt", "debug", "input")
    for kind in ("request", "reply")
) | frozenset(
    "stream display_data update_display_data execute_input execute_result error status clear_output debug_event".split()
)
"""Message types that are no use of the kernel by themselves; jupyter_server's ``untracked_message_types``."""
RESTART_CODE: Final = 1012
"""Close code of a server that goes down: JupyterLab connects again."""
STATES: Final = frozenset({"starting", "idle", "busy", "restarting", "dead"})
"""What a status may say: front ends fail at others."""
_IOPUB = int(Channel.IOPUB)
_MAX_STATUS = 4 << 10
_MAX_PARENT = 16 << 10
_MALFORMED = "[sandbox] a message of the kernel was left out: it is not what Jupyter's protocol says\n"


class TooManySessions(Exception):
    """A kernel has all the sessions that it may have, each with a client."""


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Bounds of one kernel's sessions."""

    queue_limit: int = 64 << 20
    """Bytes of output that wait for one session at most."""
    replay_limit: int = 8 << 20
    """Bytes of output that are kept for clients who come later and ask for it; 0: none."""
    session_timeout: float = 600.0
    """Seconds for which a session without a connection is kept."""
    max_sessions: int = 64
    """Sessions of one kernel; beyond that the one that is longest without a connection goes."""
    untracked: frozenset[str] = UNTRACKED
    """Message types that are no use of the kernel by themselves."""
    hide_tracebacks: str | None = None
    """What clients read in place of an error and its traceback; None: they read those. As jupyter_server's
    ``allow_tracebacks``, it is about what is published, not about replies."""


@dataclass(frozen=True, slots=True)
class HubStats:
    """Counts since the hub was made, and what it holds now."""

    messages: int
    """Messages that came from the kernel for somebody."""
    size: int
    """Bytes of them, encoded once."""
    sent: int
    """Bytes that were written to all clients together."""
    left_out: int
    """Messages that slow clients did not get."""
    malformed: int
    """Messages that were not what the protocol says."""
    rejected: int
    """Messages of clients that were not passed on."""
    sessions: int
    connected: int
    pending: int
    """Bytes that wait, or are not confirmed, for all sessions together."""


class Hub:
    """The sessions of the kernel in ``seat``; made on the event loop on which everything runs."""

    def __init__(self, seat: Seat, *, settings: HubSettings | None = None) -> None:
        self._state = "starting"
        self._settings = settings or HubSettings()
        self._channels = seat.channels
        self._key = seat.key
        self._file = SessionFile(seat.directory)
        self._loop = asyncio.get_running_loop()
        self._outlets: dict[bytes, Outlet] = {}
        self._inlets = Inlets()
        self._all: tuple[Outlet, ...] = ()
        self._ring: deque[Entry] = deque()
        self._ring_size = 0
        self._parent = b""
        self._parent_counts = True
        self._state_parent = b""
        self._activity = time.time()
        self._received = [0] * CHANNELS
        self._last = [0] * CHANNELS
        self._messages = self._size = self._malformed = self._rejected = 0
        self._gone = [0, 0, 0]
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._recall(self._file.read())
        self._subscription = self._channels.subscribe(
            self._deliver, listening=lambda: bool(self._outlets), settled=self._settled, served=self._served
        )
        seat.on_release(self.close)

    # Sessions

    def attach(self, name: str, session_id: str | None, writer: Writer, *, replay: bool = False) -> Outlet:
        """Let the session ``session_id`` of the user ``name`` go on over ``writer``; a new one begins.

        Without an id it ends with its connection. With ``replay`` a new one gets what was kept of the output first.
        Raises :class:`TooManySessions`.
        """
        identity = identity_of(name, session_id or uuid.uuid4().hex)
        outlet = self._outlets.get(identity)
        if outlet is not None:
            if outlet.timer is not None:
                outlet.timer.cancel()
                outlet.timer = None
            outlet.connect(writer)
            # A page may have lost it with what another program confirmed for it: a JupyterLab server (--gateway-url)
            # opens a connection for the page's first attempt as well, which always fails, and nobody reads that one.
            self._tell_state(outlet)
            return outlet
        self._make_place()
        outlet = self._enter(identity, self._received, lasting=bool(session_id))
        outlet.connect(writer)
        if replay:
            for entry in self._ring:
                outlet.replay(entry)
        if self._channels.retained:
            # Nobody was there: it is news for the ring as well.
            self._subscription.listen()
            outlet.hold(_IOPUB)
        elif not replay:
            self._subscription.listen(lambda channel, parts: self._catch_up(outlet, parts))
        self._tell_state(outlet)
        return outlet

    def knows(self, name: str, session_id: str | None) -> bool:
        """Whether the session ``session_id`` of the user ``name`` is there to go on."""
        return session_id is not None and identity_of(name, session_id) in self._outlets

    def inlet(self, name: str, session_id: str | None, sender: str) -> Inlet:
        """What has come from the client of a session. Who names not both himself and it takes no place here."""
        return self._inlets.of(identity_of(name, session_id)) if session_id and sender else Inlet()

    def detach(self, outlet: Outlet, writer: Writer, *, refused: bool = False) -> None:
        """A session's WebSocket has ended; it is kept for its client to come back. ``refused``: a message was too large
        for that."""
        if outlet.disconnect(writer, refused=refused) is None or self._closed:
            return
        if outlet.lasting and self._settings.session_timeout > 0:
            outlet.timer = self._loop.call_later(self._settings.session_timeout, self._forget, outlet)
            self._moved()
        else:
            self._forget(outlet)

    def request(self, outlet: Outlet, message: Incoming) -> None:
        """Pass a client's message on to the kernel."""
        signature = messages.sign(self._key, message.parts[:4])
        self._channels.request(message.channel, [outlet.identity, messages.DELIMITER, signature, *message.parts])

    def reject(self, error: Malformed) -> None:
        """A client's message was not what the protocol says."""
        self._rejected += 1
        if self._rejected <= 20:
            log.warning("a client's message was not passed on: %s", error)

    def close(self, remove: bool) -> None:
        """Give everything up; with ``remove`` the kernel is gone for good."""
        if self._closed:
            return
        if not remove:
            self._save()
        self._closed = True
        self._subscription.close()
        if self._timer is not None:
            self._timer.cancel()
        for outlet in self._all:
            if remove:
                outlet.close(1000, "the kernel is gone")
            else:
                outlet.close(RESTART_CODE, "the server goes down")
        self._outlets.clear()
        self._all = ()
        self._ring.clear()
        self._file.close(remove=remove)

    def _enter(self, identity: bytes, positions: Sequence[int], *, lasting: bool) -> Outlet:
        outlet = Outlet(
            identity,
            self._key,
            positions,
            limit=self._settings.queue_limit,
            moved=self._moved,
            expected=self._received,
            lasting=lasting,
        )
        self._outlets[identity] = outlet
        self._all = tuple(self._outlets.values())
        return outlet

    def _make_place(self) -> None:
        if len(self._outlets) < self._settings.max_sessions:
            return
        waiting = [outlet for outlet in self._all if outlet.timer is not None]
        if not waiting:
            raise TooManySessions(f"{len(self._outlets)} clients")
        self._forget(min(waiting, key=lambda outlet: outlet.timer.when() if outlet.timer is not None else 0.0))

    def _forget(self, outlet: Outlet) -> None:
        outlet.close(RESTART_CODE, "the session is over")
        self._outlets.pop(outlet.identity, None)
        self._all = tuple(self._outlets.values())
        for index, count in enumerate((outlet.sent, outlet.left_out, outlet.malformed)):
            self._gone[index] += count
        self._moved()

    # What the kernel says

    @property
    def execution_state(self) -> str:
        """One of :data:`STATES`, by the statuses of requests that count as use."""
        if self._channels.retained and self._state in ("starting", "idle", "busy"):
            # Its statuses are kept for the first client, and did not come here.
            return "idle" if self._channels.running is None else "busy"
        return self._state

    @property
    def last_activity(self) -> datetime:
        """When the kernel was last used, in UTC."""
        return datetime.fromtimestamp(self._activity, UTC)

    @property
    def connected(self) -> int:
        """Sessions with a client."""
        return sum(outlet.connected for outlet in self._all)

    @property
    def stats(self) -> HubStats:
        """Counts."""
        sent, left_out, malformed = self._gone
        return HubStats(
            messages=self._messages,
            size=self._size,
            sent=sent + sum(outlet.sent for outlet in self._all),
            left_out=left_out + sum(outlet.left_out for outlet in self._all),
            malformed=malformed + self._malformed + sum(outlet.malformed for outlet in self._all),
            rejected=self._rejected,
            sessions=len(self._all),
            connected=self.connected,
            pending=sum(outlet.pending for outlet in self._all),
        )

    def publish_status(self, state: str) -> None:
        """Tell all sessions one of :data:`STATES`, as ``restarting`` of a kernel that died, and remember it."""
        status = messages.build(self._key, "status", {"execution_state": state}, topic=b"status")
        self._deliver(_IOPUB, status)

    def publish_restart(self) -> None:
        """Tell all sessions that the kernel is started anew because somebody asked for that.

        It is what a kernel says itself. The status ``restarting`` would be news of a death: JupyterLab tells people so,
        and connects again.
        """
        self._state, self._state_parent = "restarting", b""
        said = messages.build(self._key, "shutdown_reply", {"status": "ok", "restart": True}, topic=b"shutdown_reply")
        self._deliver(_IOPUB, said)

    def ready(self) -> None:
        """The kernel has started, and waits for requests."""
        if self._state in ("starting", "restarting", "dead"):
            self._state = "idle"
            self._state_parent = b""
            self._moved()

    def _deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        if channel not in ws_protocol.NAMES:
            return
        number = self._channels.number
        if number:
            self._numbered(channel, number)
        at: int | None = 1
        if len(parts) < 7 or parts[1] != messages.DELIMITER:
            at = messages.delimiter_index(parts)
        if at is None:
            self._malformed += 1
            return
        if channel == _IOPUB:
            entry = self._entry(channel, parts, at, number)
            if entry is None:
                return
            self._keep(entry)
            for outlet in self._all:
                outlet.add(entry, parts)
        else:
            found = self._outlets.get(bytes(parts[at - 1])) if at else None
            if found is None:
                # It belongs to a client of another front end, or to one that was forgotten.
                return
            entry = self._entry(channel, parts, at, number)
            if entry is not None:
                found.add(entry)

    def _entry(self, channel: int, parts: Sequence[Buffer], at: int, number: int) -> Entry | None:
        """A message to pass on; None when it is malformed."""
        try:
            kind = ws_protocol.json_object(parts[at + 2]).get("msg_type")
            if not isinstance(kind, str):
                raise Malformed("a header without msg_type")
            parent = bytes(parts[at + 3])
            if parent != self._parent:
                self._belongs_to(parent)
            if kind == "status" and channel == _IOPUB:
                self._saw_status(parts[at + 5])
            body = parts[at + 2 :]
            if kind == "error" and self._settings.hide_tracebacks is not None:
                body = self._without_traceback(body)
            entry = Entry(channel, body, kind, number)
        except Malformed as error:
            self._malformed += 1
            log.debug("a message was left out: %s", error)
            if self._malformed == 1:
                told = Entry(_IOPUB, messages.stderr_notice(self._key, _MALFORMED)[3:], "stream")
                for outlet in self._all:
                    outlet.add(told)
            return None
        self._messages += 1
        self._size += entry.size
        if self._parent_counts or self._state == "busy" or kind not in self._settings.untracked:
            self._activity = time.time()
        return entry

    def _without_traceback(self, body: Sequence[Buffer]) -> Sequence[Buffer]:
        error = {
            "ename": "ExecutionError",
            "evalue": "Execution error",
            "traceback": [self._settings.hide_tracebacks],
        }
        return [*body[:3], json.dumps(error).encode()]

    def _belongs_to(self, parent: bytes) -> None:
        kind = ws_protocol.json_object(parent).get("msg_type")
        self._parent = parent
        self._parent_counts = not isinstance(kind, str) or kind not in self._settings.untracked

    def _saw_status(self, content: Buffer) -> None:
        found: Any = None
        if len(content) <= _MAX_STATUS:
            try:
                found = json.loads(bytes(content))
            except (ValueError, RecursionError):
                found = None
        state = found.get("execution_state") if isinstance(found, dict) else None
        if not isinstance(state, str) or state not in STATES:
            raise Malformed("a status that front ends do not know")
        if self._parent_counts:
            self._state = state
            self._state_parent = self._parent if len(self._parent) <= _MAX_PARENT else b""
        elif self._state in ("starting", "restarting") and state in ("busy", "idle"):
            # It answers: it has started.
            self._state = "idle"
            self._state_parent = b""

    def _tell_state(self, outlet: Outlet) -> None:
        """What a front end that has just come shows; simple clients look for the parent of every message."""
        if self._state_parent and self._state in ("busy", "idle"):
            content = {"execution_state": self._state}
            status = messages.build(self._key, "status", content, topic=b"status", parent=self._state_parent)
            outlet.add(Entry(_IOPUB, status[3:], "status"))

    def _keep(self, entry: Entry) -> None:
        limit = self._settings.replay_limit
        if entry.size > limit:
            return
        self._ring.append(entry)
        self._ring_size += entry.size + OVERHEAD
        while self._ring_size > limit and self._ring:
            self._ring_size -= self._ring.popleft().size + OVERHEAD

    def _catch_up(self, outlet: Outlet, parts: Sequence[Buffer]) -> None:
        """For one that came a moment after the first: what was kept for that."""
        at = messages.delimiter_index(parts)
        if at is not None:
            entry = self._entry(_IOPUB, parts, at, 0)
            if entry is not None:
                outlet.replay(entry)

    # How far the sessions have got

    def _numbered(self, channel: int, number: int) -> None:
        last = self._last[channel]
        # After a crash older ones come again, as far as an earlier server's clients had them: but from the first on?
        if number <= last if last else number == 1 and self._received[channel]:
            log.info("another sandbox has the kernel's id: its numbers begin anew")
            self._received = [0] * CHANNELS
            self._last = [0] * CHANNELS
            for outlet in self._all:
                outlet.forget_numbers()
        self._last[channel] = number
        if number > self._received[channel]:
            self._received[channel] = number
        if self._timer is None:
            self._moved()

    def _served(self) -> Mapping[int, int]:
        numbers: dict[int, int] = {}
        for outlet in self._all:
            for channel in range(CHANNELS):
                position = outlet.position(channel)
                if position is not None:
                    numbers[channel] = min(position, numbers.get(channel, position))
        return numbers

    def _settled(self) -> bool:
        return all(outlet.settled for outlet in self._all if outlet.connected)

    def _moved(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(session_file.DELAY, self._look)

    def _look(self) -> None:
        self._timer = None
        self._save()
        self._channels.on_served()

    def _save(self) -> None:
        sessions: dict[str, tuple[int, ...]] = {}
        for identity, outlet in self._outlets.items():
            if outlet.lasting:
                positions = map(outlet.position, range(CHANNELS))
                sessions[identity.decode()] = tuple(
                    received if position is None else position
                    for position, received in zip(positions, self._received, strict=True)
                )
        saved = Saved(
            tuple(self._received),
            sessions,
            self._state,
            self._state_parent.decode("utf-8", "replace"),
            round(self._activity),
        )
        self._file.write(saved)

    def _recall(self, saved: Saved) -> None:
        """Take over what an earlier server wrote: its sessions are without a connection."""
        self._received = list(saved.received)
        if saved.state in STATES:
            self._state = saved.state
            self._state_parent = saved.parent.encode()
        if saved.activity:
            self._activity = min(saved.activity, self._activity)
        for identity, numbers in list(saved.sessions.items())[: self._settings.max_sessions]:
            outlet = self._enter(identity.encode(), numbers, lasting=True)
            outlet.timer = self._loop.call_later(self._settings.session_timeout, self._forget, outlet)


def identity_of(name: str, session_id: str) -> bytes:
    """A session's identity to the kernel: a reply finds the session after a reconnect, and after a crash of ours."""
    told = f"{len(name)}:{name}:{session_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(told, digest_size=16).hexdigest().encode()
