"""``POST /api/sandboxes/{id}/execute``: one cell, its output as newline-delimited JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.execution import Execution
from sandbox_gateway.kernel_client import KernelClient, client_of
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import State
from sandbox_gateway.results import (
    ClearOutput,
    DisplayData,
    Done,
    Error,
    ExecuteResult,
    InputRequest,
    Message,
    Stream,
    UpdateDisplayData,
)
from sandbox_gateway.server.api_handler import RestHandler
from sandbox_gateway.server.identity import Revocation
from sandbox_gateway.server.problems import hint_of
from sandbox_gateway.server.requests import MAX_CODE

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/x-ndjson"
_UNSENT: Final = 256 << 10
"""Bytes that wait here for the client, beyond which nothing more is taken from the cell."""
_TOO_DEEP: Final = "[sandbox] This output is nested too deep to be shown"
_ASLEEP = frozenset({State.PAUSED, State.SUSPENDED})


_Method = TypeVar("_Method", bound=Callable[..., Any])
_executing = cast(Callable[[_Method], _Method], authorized("execute"))


def event_of(message: Message) -> dict[str, Any]:
    """A message of a cell as an event."""
    match message:
        case Stream():
            return {"type": message.name, "text": message.text}
        case ExecuteResult():
            return {"type": "result", **_bundle(message), "count": message.count}
        case DisplayData():
            return {"type": "display", **_bundle(message), "display_id": message.display_id}
        case UpdateDisplayData():
            return {"type": "update_display", **_bundle(message), "display_id": message.display_id}
        case ClearOutput():
            return {"type": "clear_output", "wait": message.wait}
        case Error():
            traceback = list(message.traceback)
            return {"type": "error", "name": message.name, "value": message.value, "traceback": traceback}
        case InputRequest():
            return {"type": "input_request", "prompt": message.prompt, "password": message.password}
        case Done():
            return {"type": "end", "status": message.status, "count": message.count}


def end_of(error: SandboxGatewayError) -> dict[str, Any]:
    """The last event of a cell that was kept from its end."""
    status = "timeout" if error.code == "timeout" else "failed"
    return {
        "type": "end",
        "status": status,
        "count": None,
        "code": error.code,
        "message": error.message,
        "hint": hint_of(error),
    }


def line_of(event: Mapping[str, Any]) -> bytes:
    """One line of the answer; what a kernel shows and JSON cannot say (NaN) becomes null."""
    try:
        return json.dumps(event, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except ValueError:
        plain = json.loads(json.dumps(event), parse_constant=lambda name: None)
    except RecursionError:
        plain = {**event, "data": {"text/plain": _TOO_DEEP}, "metadata": {}}
    return json.dumps(plain, separators=(",", ":")).encode() + b"\n"


def _bundle(message: ExecuteResult | DisplayData | UpdateDisplayData) -> dict[str, Any]:
    return {"data": dict(message.data), "metadata": dict(message.metadata)}


class ExecuteHandler(RestHandler):
    """Runs a cell. While nobody reads, no more than a bounded amount of output waits; what is left out is told."""

    path = "/api/sandboxes/{id}/execute"
    _reading: asyncio.Task[None] | None = None
    _gone = False

    @web.authenticated
    @_executing
    async def post(self, sandbox_id: str) -> None:
        """Run it."""
        self.query()
        wanted = self.read("Execute", MAX_CODE)
        live = await self.gateway.live(self.caller, sandbox_id)
        if live.state in _ASLEEP:
            # Here it can still be told as what it is, if it cannot be woken.
            await self.gateway.resume(self.caller, sandbox_id)
        client = client_of(live)
        execution = Execution(
            wanted["code"],
            live.seat.key,
            stdin=wanted.get("stdin", False),
            silent=wanted.get("silent", False),
            timeout=wanted.get("timeout"),
        )
        if self._gone:
            return
        client.submit(execution)
        self._reading = asyncio.create_task(self._tell(execution))
        revocation = Revocation(self, self._revoked)
        try:
            # Not awaited itself: who closes the connection cancels it, and not us.
            await asyncio.wait({self._reading})
            if not self._reading.cancelled():
                self._reading.result()
            elif not self._gone:
                with contextlib.suppress(StreamClosedError):
                    await self._send(line_of(end_of(SandboxGatewayError("unauthenticated", "the token was revoked"))))
        finally:
            revocation.close()
            self._reading.cancel()
            if not execution.done:
                await give_up(client, execution, live)

    def _revoked(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    def on_connection_close(self) -> None:
        """The client is gone: the cell is nobody's."""
        super().on_connection_close()
        self._gone = True
        if self._reading is not None:
            self._reading.cancel()

    async def _tell(self, execution: Execution) -> None:
        self.set_header("Content-Type", MEDIA_TYPE)
        self.set_header("Cache-Control", "no-store")
        # Proxies would keep back what is meant to be seen as it comes.
        self.set_header("X-Accel-Buffering", "no")
        stream = getattr(self.request.connection, "stream", None)
        if stream is not None:
            stream.set_nodelay(True)
        with contextlib.suppress(StreamClosedError):
            await self.flush()
            async for event in _events(execution):
                await self._send(line_of(event))
            await self.finish(set_content_type=MEDIA_TYPE)

    async def _send(self, line: bytes) -> None:
        self.write(line)
        written = self.flush()
        stream = getattr(self.request.connection, "stream", None)
        unsent = getattr(stream, "_write_buffer", None)
        # Waiting for each line would cost a turn of the loop each; a client that reads slowly is waited for.
        if stream is None or unsent is None or len(unsent) > _UNSENT or stream.closed():
            await written
        else:
            written.add_done_callback(_heard)


def _heard(written: asyncio.Future[None]) -> None:
    """Take the error of a write: that the connection is closed is told elsewhere."""
    if not written.cancelled():
        written.exception()


async def _events(execution: Execution) -> Any:
    """The events of a cell; the last one is always its end."""
    try:
        async for message in execution:
            yield event_of(message)
    except SandboxGatewayError as error:
        yield end_of(error)
    except Exception:
        log.exception("a cell's output could not be told")
        yield end_of(SandboxGatewayError("internal", "the output could not be told"))


async def give_up(client: KernelClient, execution: Execution, live: LiveSandbox) -> None:
    """Take a cell back that has not begun; interrupt one that runs."""
    if client.withdraw(execution) or not client.runs(execution):
        return
    try:
        await live.interrupt()
    except SandboxGatewayError as error:
        log.warning("sandbox %s: a cell that nobody waits for could not be interrupted: %s", live.id, error.message)


class InputHandler(RestHandler):
    """The answer to ``input()``."""

    path = "/api/sandboxes/{id}/input"

    @web.authenticated
    @_executing
    async def post(self, sandbox_id: str) -> None:
        """Give the line."""
        self.query()
        value = self.read("Input")["value"]
        client_of(await self.gateway.live(self.caller, sandbox_id)).answer(value)
        self.answer_nothing()
