"""``/metrics``: what the gateway does, for Prometheus, beside jupyter_server's own figures.

Fed by events and, when somebody asks, by counts that the hubs keep anyway: nothing is done for each message. No label
names a user or a sandbox, and each label has few values: profiles, states, phases, codes of errors.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import prometheus_client
from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.base.handlers import JupyterHandler
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from tornado import web

from sandbox_gateway.errors import ERRORS, SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.server.events import About, EventBridge
from sandbox_gateway.server.identity import caller_of

WAYS: Final = ("cold", "template", "pool", "snapshot", "fork")
"""How a sandbox began."""
BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds."""
_SHOWN: Final = tuple(state for state in State if state not in {State.TERMINATED, State.EXPIRED})
_PHASES: Final = {
    EventKind.STARTED: "start",
    EventKind.SUSPENDED: "suspend",
    EventKind.RESUMED: "resume",
    EventKind.RESTARTED: "restart",
    EventKind.TEMPLATE_BUILT: "template",
}
_ENDS: Final = frozenset({EventKind.DIED, EventKind.EXPIRED, EventKind.STOPPED})
_MAX_OPEN: Final = 10_000


class Counts(Protocol):
    """A hub's counts (:class:`sandbox_gateway.server.hub.HubStats`)."""

    messages: int
    size: int
    sent: int
    left_out: int
    malformed: int
    rejected: int
    sessions: int
    connected: int
    pending: int


class Metrics:
    """The figures of one gateway. Use it on the server's loop.

    ``gateway`` is :class:`sandbox_gateway.server.gateway.Gateway`: of it ``lifecycle.store.list()``, ``kernels``
    (``kernel.hub.stats``, :class:`Counts`) and ``on_kernel(listener)`` are used.
    """

    def __init__(self, gateway: Any, bridge: EventBridge) -> None:
        self._gateway = gateway
        self.registry = CollectorRegistry(auto_describe=True)
        self._began: OrderedDict[str, str] = OrderedDict()
        self._running: OrderedDict[str, float] = OrderedDict()
        self._seen: WeakKeyDictionary[Any, Counts] = WeakKeyDictionary()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sandbox_gateway_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"sandbox_gateway_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, label: str) -> Histogram:
            return Histogram(f"sandbox_gateway_{name}", text, [label], registry=self.registry, buckets=BUCKETS)

        self._starts = counter("starts", "Kernels started, by profile and way (cold, template, ...)", "profile", "way")
        self._phase = histogram("phase_seconds", "What a step of a sandbox's life took", "phase")
        self._operation = histogram("operation_seconds", "What a long operation of the API took", "operation")
        self._wakes = counter("wakes", "Suspended kernels that a client's request resumed")
        self._ends = counter("ends", "Sandboxes that ended, by why", "kind")
        self._failures = counter("failures", "Operations that failed, by the error's code", "code")
        self._states = gauge("sandboxes", "Sandboxes of this gateway, by state", "state")
        self._messages = counter("messages", "Messages of kernels that were relayed to clients")
        self._bytes = counter("message_bytes", "Bytes of the messages that were relayed, each counted once")
        self._sent = counter("sent_bytes", "Bytes that were written to all clients together")
        self._left_out = counter("left_out_messages", "Messages that slow clients did not get")
        self._malformed = counter("malformed_messages", "Messages of kernels that broke the protocol")
        self._rejected = counter("rejected_messages", "Messages of clients that were not passed on")
        self._sessions = gauge("websocket_sessions", "Sessions of clients, by whether they are connected", "connected")
        self._pending = gauge("pending_bytes", "Bytes that wait for clients")
        for state in _SHOWN:
            self._states.labels(str(state)).set(0)
        bridge.on_event.append(self._happened)
        bridge.on_operation.append(self._went_on)
        gateway.on_kernel(self._came_or_went)

    def failed(self, code: str) -> None:
        """Count a failure that is no event and no operation; ``code`` is the error's."""
        self._failures.labels(code if code in ERRORS else "other").inc()

    async def render(self) -> bytes:
        """Everything, in Prometheus's text format: jupyter_server's figures of this process, then ours."""
        records = await asyncio.to_thread(self._gateway.lifecycle.store.list)
        self._count_states(records)
        self._take_counts()
        stock = prometheus_client.generate_latest(prometheus_client.REGISTRY)
        return stock + prometheus_client.generate_latest(self.registry)

    # From events

    def _happened(self, event: Event, about: About) -> None:
        if event.kind is EventKind.CREATED:
            _remember(self._began, event.sandbox, _way(event))
        elif event.kind is EventKind.STARTED:
            # A pool's sandbox is nobody's until it is given away; what became of it counts then.
            way = self._began.pop(event.sandbox, "cold")
            self._starts.labels(about.profile or "unknown", way).inc()
        elif event.kind is EventKind.WOKE:
            self._wakes.inc()
        elif event.kind is EventKind.FAILED:
            self.failed(str(event.data.get("code", "other")))
        if event.kind in _ENDS:
            self._began.pop(event.sandbox, None)
            self._ends.labels(str(event.data.get("kind", "unknown"))).inc()
        seconds = event.data.get("seconds")
        if event.kind in _PHASES and isinstance(seconds, int | float):
            self._phase.labels(_PHASES[event.kind]).observe(seconds)

    def _went_on(self, operation_id: str, kind: str, phase: str, error: SandboxGatewayError | None) -> None:
        if phase == "started":
            _remember(self._running, operation_id, time.monotonic())
        elif phase in ("succeeded", "failed"):
            began = self._running.pop(operation_id, None)
            if began is not None:
                self._operation.labels(kind).observe(time.monotonic() - began)
            if error is not None:
                self.failed(error.code)

    # When somebody asks

    def _count_states(self, records: Iterable[SandboxRecord]) -> None:
        found = Tally(record.state for record in records if record.owner and not record.blank)
        for state in _SHOWN:
            self._states.labels(str(state)).set(found[state])

    def _take_counts(self) -> None:
        sessions = connected = pending = 0
        for kernel in tuple(self._gateway.kernels.values()):
            now = self._take(kernel.hub)
            sessions += now.sessions
            connected += now.connected
            pending += now.pending
        self._sessions.labels("yes").set(connected)
        self._sessions.labels("no").set(sessions - connected)
        self._pending.set(pending)

    def _came_or_went(self, kernel: Any, here: bool) -> None:
        if not here:
            self._take(kernel.hub)  # its last counts: it is not among the kernels any more when somebody asks

    def _take(self, hub: Any) -> Counts:
        """Add what a hub has counted since it was looked at last."""
        now: Counts = hub.stats
        before = self._seen.get(hub)
        for counter, name in (
            (self._messages, "messages"),
            (self._bytes, "size"),
            (self._sent, "sent"),
            (self._left_out, "left_out"),
            (self._malformed, "malformed"),
            (self._rejected, "rejected"),
        ):
            counter.inc(max(0, getattr(now, name) - (getattr(before, name) if before is not None else 0)))
        self._seen[hub] = now
        return now


def _way(event: Event) -> str:
    """How a sandbox began, by what it was made from."""
    parent = str(event.data.get("parent", ""))
    if event.data.get("pool"):
        return "pool"
    return {"template": "template", "snapshot": "snapshot", "sandbox": "fork"}.get(parent.partition(":")[0], "cold")


def _remember(where: OrderedDict[str, Any], key: str, value: object) -> None:
    where[key] = value
    while len(where) > _MAX_OPEN:
        where.popitem(last=False)


class MetricsHandler(JupyterHandler):
    """``/metrics`` in place of jupyter_server's: for administrators, as it tells of everybody.

    With one shared token everybody who has it is one. ``ServerApp.authenticate_prometheus = False`` opens it to all, as
    in jupyter_server. Settings: ``sandbox_metrics`` is :class:`Metrics`.
    """

    auth_resource = "metrics"
    _track_activity = False

    @allow_unauthenticated
    async def get(self) -> None:
        """The figures now."""
        if self.settings.get("authenticate_prometheus", True):
            user = self.current_user
            if user is None or not caller_of(user).admin:
                raise web.HTTPError(403)
        metrics: Metrics = self.settings["sandbox_metrics"]
        self.set_header("Content-Type", prometheus_client.CONTENT_TYPE_LATEST)
        self.finish(await metrics.render())
