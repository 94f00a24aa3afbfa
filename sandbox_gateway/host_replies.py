"""Answers that the host gives in a kernel's place while that sleeps: builds messages, does no I/O.

Each is what the kernel would have sent, in its order: status busy, the reply, status idle, all under the request's
header. Clients take a request as done at the reply and its idle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from sandbox_gateway import messages
from sandbox_gateway.messages import Buffer, Request
from sandbox_gateway.wire.frames import Channel

Outgoing = list[tuple[int, list[Buffer]]]
"""Messages with their channel numbers, in the order of sending."""

ASLEEP: Final = "SandboxAsleep"
"""``ename`` of a request that a sleeping kernel could not take."""
UNAVAILABLE: Final = "SandboxUnavailable"
"""``ename`` of a request for which there is no way to the kernel now."""
_LONGEST_COMMAND = 64 << 10


def answer(key: bytes, channel: int, request: Request, content: Buffer, *, running: bytes | None = None) -> Outgoing:
    """The reply with raw ``content``. ``running`` is the header of a request that runs on: its busy is said again, for
    front ends that show the last status they saw."""
    reply_type = request.reply_type or request.msg_type
    outgoing: Outgoing = [
        _status(key, "busy", request.header),
        (channel, messages.compose(key, request.identities, reply_type, content, parent=request.header)),
        _status(key, "idle", request.header),
    ]
    if running is not None:
        outgoing.append(_status(key, "busy", running))
    return outgoing


def unavailable(key: bytes, channel: int, request: Request, *, running: bytes | None = None) -> Outgoing:
    """That the debugger, or what the kernel uses, cannot be asked now, in a shape that front ends take silently."""
    if request.msg_type == "debug_request":
        content = _debug_response(request.content)
    else:
        # Without a hostname, the resource-usage extension shows "not available".
        content = _error(ASLEEP, "the kernel is suspended")
    return answer(key, channel, request, _dumps(content), running=running)


def failure(
    key: bytes, channel: int, request: Request, ename: str, reason: str, *, running: bytes | None = None
) -> Outgoing:
    """That the kernel cannot take the request. A message that has no reply gets a line on stderr instead."""
    if request.reply_type is None:
        text = f"[sandbox] {ename}: {reason}\n"
        # An input belongs to the cell that asked for it.
        parent = running if running is not None and channel == Channel.STDIN else request.header
        return [(int(Channel.IOPUB), messages.stderr_notice(key, text, parent=parent))]
    error = _error(ename, reason)
    content = _dumps({**error, **_EXPECTED.get(request.msg_type, {})})
    outgoing = answer(key, channel, request, content, running=running)
    if request.msg_type == "execute_request":
        # Notebooks show what is published, not what is replied.
        published = messages.build(key, "error", error, topic=b"error", parent=request.header)
        outgoing.insert(1, (int(Channel.IOPUB), published))
    return outgoing


_EXPECTED: Mapping[str, Mapping[str, Any]] = {
    "execute_request": {"execution_count": 0, "user_expressions": {}, "payload": []},
    "is_complete_request": {"status": "unknown", "indent": ""},
    "complete_request": {"matches": [], "cursor_start": 0, "cursor_end": 0, "metadata": {}},
    "inspect_request": {"found": False, "data": {}, "metadata": {}},
    "history_request": {"history": []},
    "comm_info_request": {"comms": {}},
}
"""What clients look at without regard to the status."""


def _status(key: bytes, state: str, parent: Buffer) -> tuple[int, list[Buffer]]:
    content = {"execution_state": state}
    return int(Channel.IOPUB), messages.build(key, "status", content, topic=b"status", parent=parent)


def _error(ename: str, reason: str) -> dict[str, Any]:
    return {"status": "error", "ename": ename, "evalue": reason, "traceback": [f"{ename}: {reason}"]}


def _debug_response(content: Buffer) -> dict[str, Any]:
    """A failed response of the debug adapter protocol, as the front end's debugger reads it."""
    asked: Any = None
    if len(content) <= _LONGEST_COMMAND:
        try:
            asked = json.loads(bytes(content))
        except (ValueError, RecursionError):
            asked = None
    number = asked.get("seq") if isinstance(asked, dict) else None
    command = asked.get("command") if isinstance(asked, dict) else None
    body: dict[str, Any] = {}
    if command == "debugInfo":
        # Asked on loading a page; read without a look at "success". Names no file, so that none is taken for a cell's.
        body = {
            "isStarted": False,
            "hashMethod": "Murmur2",
            "hashSeed": 0xC70F6907,
            "tmpFilePrefix": "",
            "tmpFileSuffix": ".py",
            "breakpoints": [],
            "stoppedThreads": [],
            "richRendering": False,
            "exceptionPaths": [],
            "copyToGlobals": False,
        }
    return {
        "type": "response",
        "seq": 0,
        "request_seq": number if isinstance(number, int) else 0,
        "success": False,
        "command": command if isinstance(command, str) else "",
        "message": "the kernel is suspended",
        "body": body,
    }


def _dumps(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
