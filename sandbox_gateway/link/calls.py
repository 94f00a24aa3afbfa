"""Calls to the agent: JSON objects on the channel AGENT, answered by id.

A request is ``{"id": n, "op": name, ...}``; the agent answers ``{"id": n, "ok": {...}}`` or ``{"id": n, "error":
{"code", "message"}}``, and reports events ``{"event": name, ...}`` on the same channel.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.wire.frames import WireError
from sandbox_gateway.wire.handshake import load_object

MAX_CONTROL_MESSAGE = 4 * 1024 * 1024
"""Bytes of an answer or event of the agent's at most."""
MAX_CALLS = 1000
MAX_MESSAGE_TEXT = 4000
_AGENT_CODES = frozenset({"kernel_failed", "invalid_request", "unsupported", "timeout", "identity_failed"})
"""Codes that an agent may choose; any other becomes ``link_failed``."""

Answer = asyncio.Future[dict[str, Any]]


class Calls:
    """The calls that wait for their answers."""

    def __init__(self) -> None:
        self._waiting: dict[int, Answer] = {}
        # Not from 1: the answer to a call of an earlier owner's must not be taken for that of one of ours.
        self._next = secrets.randbelow(1 << 48)

    def begin(self, op: str, params: Mapping[str, Any]) -> tuple[bytes, Answer]:
        """The request to send, and the future of its answer, which must be given to :meth:`end` afterwards."""
        if len(self._waiting) >= MAX_CALLS:
            raise SandboxGatewayError("link_failed", "too many calls are waiting for the agent")
        self._next += 1
        request = json.dumps({**params, "id": self._next, "op": op}, separators=(",", ":")).encode()
        future: Answer = asyncio.get_running_loop().create_future()
        self._waiting[self._next] = future
        return request, future

    def end(self, future: Answer) -> None:
        """Wait no more; a late answer is dropped."""
        for number, waiting in self._waiting.items():
            if waiting is future:
                del self._waiting[number]
                return

    def waiting(self) -> list[Answer]:
        """All that wait."""
        return list(self._waiting.values())

    def handle(self, parts: list[bytes | memoryview]) -> dict[str, Any] | None:
        """Take a message of the agent's: an answer goes to its caller, an event is returned.

        Raises :class:`WireError` for what is neither. Answers that nobody waits for are dropped.
        """
        if len(parts) != 1:
            raise WireError("a message of the agent's that is not one part")
        message = load_object(parts[0], MAX_CONTROL_MESSAGE)
        if "event" in message:
            if not isinstance(message["event"], str):
                raise WireError("an event without a name")
            return message
        number = message.get("id")
        if type(number) is not int:
            raise WireError("an answer without an id")
        answer, error = message.get("ok"), message.get("error")
        if not isinstance(answer, dict) and not isinstance(error, dict):
            raise WireError("an answer that is neither a result nor an error")
        future = self._waiting.get(number)
        if future is None or future.done():
            return None
        if isinstance(answer, dict):
            future.set_result(answer)
        elif isinstance(error, dict):
            code = error.get("code")
            known = code if isinstance(code, str) and code in _AGENT_CODES else "link_failed"
            text = str(error.get("message", "the agent failed"))[:MAX_MESSAGE_TEXT]
            future.set_exception(SandboxGatewayError(known, text))
        return None
