"""Operations that take long: under way beside the request that began them, looked at later, kept for a while.

An operation goes on when its caller goes away. Use it on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import timestamp
from sandbox_gateway.owner import progress_to
from sandbox_gateway.server.callers import Caller

if TYPE_CHECKING:
    from sandbox_gateway.server.events import EventBridge

log = logging.getLogger(__name__)

KEPT_FOR: Final = 600.0
"""Seconds after its end that an operation can be looked at."""
MAX_KEPT: Final = 5_000
"""Ended operations that are kept at most; the oldest go first."""
MAX_RUNNING: Final = 500
"""Operations of one caller that are under way at most."""
MAX_MESSAGE: Final = 400
TELL_INTERVAL: Final = 0.25
"""Seconds between two reports of the same thing's progress to listeners."""

Report = Callable[[Mapping[str, Any]], None]
"""Takes ``{"message": str, "done": bytes, "total": bytes}``, from any thread; what is not known is left out."""
Work = Callable[[Report], Awaitable[Mapping[str, Any]]]
"""Does it; returns the outcome as JSON."""


class OperationState(enum.StrEnum):
    """How an operation stands."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as it is now."""

    id: str
    kind: str
    owner: str
    """The name of its caller."""
    created: float
    """Seconds since the epoch."""
    sandbox: str | None = None
    """The sandbox that it is about, also before there is one."""
    name: str = ""
    """The label of a sandbox that is being made."""
    state: OperationState = OperationState.RUNNING
    message: str = ""
    done: int | None = None
    """Bytes."""
    total: int | None = None
    result: Mapping[str, Any] | None = None
    error: SandboxGatewayError | None = None
    ended: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as the description has it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "sandbox": self.sandbox,
            "state": str(self.state),
            "progress": {"message": self.message, "done": self.done, "total": self.total},
            "result": None if self.result is None else dict(self.result),
            "error": None if self.error is None else self.error.as_dict(),
            "created": timestamp(self.created),
            "ended": None if self.ended is None else timestamp(self.ended),
        }


Listener = Callable[[Operation], object]
"""Hears of each change on the loop; must not block."""


class Operations:
    """All operations of one server."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._known: dict[str, Operation] = {}
        """In the order in which they began."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, float] = {}
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell ``listener`` every change from now on; the returned function ends that."""
        self._listeners.append(listener)

        def unlisten() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unlisten

    def start(self, caller: Caller, kind: str, work: Work, *, sandbox: str | None = None, name: str = "") -> Operation:
        """Begin ``work``. Raises ``rate_limited`` when too many of the caller's are under way."""
        running = sum(self._known[one].owner == caller.name for one in self._tasks)
        if running >= MAX_RUNNING:
            text = f"{running} operations of yours are under way"
            raise SandboxGatewayError("rate_limited", text, "Wait for some of them to end.")
        self._tidy()
        operation = Operation(uuid.uuid4().hex, kind, caller.name, self._clock(), sandbox, name)
        self._known[operation.id] = operation
        self._tasks[operation.id] = asyncio.create_task(self._run(operation.id, work))
        self._tell(operation)
        return operation

    def get(self, caller: Caller, operation_id: str) -> Operation:
        """One operation as it is now; raises ``unknown_operation``, also for another caller's."""
        self._tidy()
        found = self._known.get(operation_id)
        if found is None or not caller.may_use(found.owner):
            raise SandboxGatewayError("unknown_operation", f"there is no operation {operation_id[:80]!r}")
        return found

    def list(self, caller: Caller) -> tuple[Operation, ...]:
        """Those that a caller may see, the oldest first."""
        self._tidy()
        return tuple(one for one in self._known.values() if caller.may_use(one.owner))

    async def wait(self, operation: Operation, seconds: float) -> Operation:
        """The operation when it has ended, or when ``seconds`` are over."""
        task = self._tasks.get(operation.id)
        if task is not None and seconds > 0:
            await asyncio.wait({task}, timeout=seconds)
        return self._known.get(operation.id, operation)

    async def close(self) -> None:
        """Cancel what is under way; whatever that leaves is for the lifecycle to tidy up."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Running

    async def _run(self, operation_id: str, work: Work) -> None:
        loop = asyncio.get_running_loop()

        def report(progress: Mapping[str, Any]) -> None:
            # The server may have ended while a thread of ours still works.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._progress, operation_id, dict(progress))

        try:
            with progress_to(report):
                result = await work(report)
        except asyncio.CancelledError:
            self._end(operation_id, error=SandboxGatewayError("owner_unreachable", "the server is ending"))
            raise
        except SandboxGatewayError as error:
            self._end(operation_id, error=error)
        except Exception as error:
            log.exception("operation %s failed", self._known[operation_id].kind)
            self._end(operation_id, error=SandboxGatewayError("internal", f"{type(error).__name__} in the server"))
        else:
            self._end(operation_id, result=result)

    def _progress(self, operation_id: str, progress: Mapping[str, Any]) -> None:
        operation = self._known.get(operation_id)
        if operation is None or operation.state is not OperationState.RUNNING:
            return
        changes: dict[str, Any] = {key: _count(progress[key]) for key in ("done", "total") if key in progress}
        message = progress.get("message")
        if isinstance(message, str) and message[:MAX_MESSAGE] != operation.message:
            # What was counted before was of something else.
            changes = {"message": message[:MAX_MESSAGE], "done": None, "total": None, **changes}
        operation = self._known[operation_id] = replace(operation, **changes)
        now = time.monotonic()
        if "message" in changes or now - self._told.get(operation_id, 0.0) >= TELL_INTERVAL:
            self._told[operation_id] = now
            self._tell(operation)

    def _end(
        self, operation_id: str, *, result: Mapping[str, Any] | None = None, error: SandboxGatewayError | None = None
    ) -> None:
        del self._tasks[operation_id]
        self._told.pop(operation_id, None)
        state = OperationState.SUCCEEDED if error is None else OperationState.FAILED
        operation = self._known[operation_id]
        operation = replace(operation, state=state, result=result, error=error, ended=self._clock())
        self._known[operation_id] = operation
        self._tell(operation)

    def _tell(self, operation: Operation) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(operation)
            except Exception:
                log.exception("a listener to operations failed; the others go on")

    def _tidy(self) -> None:
        now = self._clock()
        ended = sorted((one.ended, one.id) for one in self._known.values() if one.ended is not None)
        surplus = len(ended) - MAX_KEPT
        for at, (when, operation_id) in enumerate(ended):
            if at < surplus or now - when > KEPT_FOR:
                del self._known[operation_id]


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


_SETTING: Final = "sandbox_gateway_operations"


def operations_of(settings: dict[str, Any]) -> Operations:
    """The operations of a web application, made on first use; its event bridge hears of them."""
    found: Operations | None = settings.get(_SETTING)
    if found is None:
        found = settings[_SETTING] = Operations()
        bridge: EventBridge | None = settings.get("sandbox_events")
        if bridge is not None:
            found.listen(_Telling(bridge))
    return found


class _Telling:
    """Tells the event bridge of operations in its terms."""

    def __init__(self, bridge: EventBridge) -> None:
        self._bridge = bridge
        self._started: set[str] = set()

    def __call__(self, operation: Operation) -> None:
        if operation.state is not OperationState.RUNNING:
            phase = str(operation.state)
            self._started.discard(operation.id)
        else:
            phase = "progress" if operation.id in self._started else "started"
            self._started.add(operation.id)
        self._bridge.operation(
            operation.id,
            operation.kind,
            phase,
            operation.owner,
            sandbox=operation.sandbox or "",
            name=operation.name,
            text=operation.message,
            done=operation.done,
            total=operation.total,
            error=operation.error,
        )
