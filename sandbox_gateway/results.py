"""What a cell gives, as typed and frozen values; reading them from a kernel's messages, which are hostile input.

The fields are those of the Jupyter messaging protocol 5.3. What has another shape than the protocol's is passed over.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from sandbox_gateway import messages
from sandbox_gateway.messages import MAX_HEADER, MAX_TYPE, Buffer

COLLECTED: Final = 64 << 20
"""Characters of output that a :class:`Result` holds at most."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Text on ``stdout`` or ``stderr``. Notices of the sandbox come on ``stderr`` and begin with ``[sandbox]``."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class DisplayData:
    """Something to show: representations by their media type."""

    data: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    display_id: str | None = None
    """Names the display for later :class:`UpdateDisplayData`."""


@dataclass(frozen=True, slots=True)
class UpdateDisplayData:
    """What a display that was shown before is to show from now on."""

    data: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    display_id: str | None = None


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    """The value of the cell's last expression."""

    data: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = None
    """The cell's number."""


@dataclass(frozen=True, slots=True)
class ClearOutput:
    """What was shown before is to go."""

    wait: bool = False
    """Only once something new comes."""


@dataclass(frozen=True, slots=True)
class Error:
    """An exception that nothing caught."""

    name: str
    value: str
    traceback: tuple[str, ...] = ()
    """Lines with ANSI colours."""


@dataclass(frozen=True, slots=True)
class InputRequest:
    """The cell waits for a line: :meth:`sandbox_gateway.sandbox.Sandbox.answer` gives it one."""

    prompt: str
    password: bool = False
    """What is typed is not to be shown."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last message of a cell."""

    status: str
    """``ok``, ``error`` or ``aborted``."""
    count: int | None = None
    """The cell's number."""


Message: TypeAlias = (
    Stream | DisplayData | UpdateDisplayData | ExecuteResult | ClearOutput | Error | InputRequest | Done
)
"""What :meth:`sandbox_gateway.sandbox.Sandbox.execute` gives."""


@dataclass(frozen=True, slots=True)
class Result:
    """All that a cell gave."""

    status: str
    """``ok``, ``error`` or ``aborted``."""
    count: int | None
    stdout: str
    stderr: str
    results: tuple[ExecuteResult | DisplayData | UpdateDisplayData, ...]
    """In the order in which they came."""
    error: Error | None
    left_out: int = 0
    """Characters of output beyond :data:`COLLECTED` that are not in here."""

    @property
    def ok(self) -> bool:
        """Whether the cell ran to its end."""
        return self.status == "ok"

    @property
    def value(self) -> str | None:
        """The text of the cell's value; None where it had none."""
        for found in reversed(self.results):
            if isinstance(found, ExecuteResult):
                text = found.data.get("text/plain")
                return text if isinstance(text, str) else None
        return None


class Collector:
    """Makes a :class:`Result` of messages."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._results: list[ExecuteResult | DisplayData | UpdateDisplayData] = []
        self._error: Error | None = None
        self._size = 0
        self._left_out = 0

    def add(self, message: Message) -> None:
        """Take one message."""
        if isinstance(message, Stream):
            if self._room(len(message.text)):
                self._texts["stdout" if message.name == "stdout" else "stderr"].append(message.text)
        elif isinstance(message, (ExecuteResult, DisplayData, UpdateDisplayData)):
            if self._room(sum(len(str(value)) for value in message.data.values())):
                self._results.append(message)
        elif isinstance(message, Error):
            self._error = message

    def result(self, done: Done) -> Result:
        """What was taken."""
        stdout, stderr = ("".join(self._texts[name]) for name in ("stdout", "stderr"))
        return Result(done.status, done.count, stdout, stderr, tuple(self._results), self._error, self._left_out)

    def _room(self, size: int) -> bool:
        if self._size + size > COLLECTED:
            self._left_out += size
            return False
        self._size += size
        return True


@dataclass(frozen=True, slots=True)
class Head:
    """A kernel's message as far as it has to be known where it belongs."""

    msg_type: str
    parent: str
    """The id of the request; empty where there is none."""
    session: str
    """The session that made the request."""
    content: Buffer


def head(key: bytes, parts: Sequence[Buffer]) -> Head | None:
    """``parts`` as a message that is signed with ``key``; None when it is malformed."""
    at = messages.delimiter_index(parts)
    if at is None or len(parts[at + 2]) > MAX_HEADER or len(parts[at + 3]) > MAX_HEADER:
        return None
    if key and not hmac.compare_digest(bytes(parts[at + 1]), messages.sign(key, parts[at + 2 : at + 6])):
        return None
    header, parent = _object(parts[at + 2]), _object(parts[at + 3])
    msg_type = header.get("msg_type")
    if not isinstance(msg_type, str) or len(msg_type) > MAX_TYPE:
        return None
    return Head(msg_type, _text(parent.get("msg_id")), _text(parent.get("session")), parts[at + 5])


def read(parts: Sequence[Buffer]) -> Message | None:
    """The output or question that a message, of which :func:`head` approved, is; None for any other."""
    at = messages.delimiter_index(parts)
    msg_type = _object(parts[at + 2]).get("msg_type") if at is not None else None
    found = _READERS.get(msg_type) if at is not None and isinstance(msg_type, str) else None
    return found(_object(parts[at + 5])) if at is not None and found is not None else None


def done(content: Buffer) -> Done:
    """The end that an ``execute_reply`` tells of."""
    found = _object(content)
    status = found.get("status")
    return Done(status if status in ("ok", "aborted") else "error", _count(found.get("execution_count")))


def state(content: Buffer) -> str:
    """The execution state that a ``status`` tells of."""
    return _text(_object(content).get("execution_state"))


def _stream(content: Mapping[str, Any]) -> Message:
    return Stream("stdout" if content.get("name") == "stdout" else "stderr", _text(content.get("text")))


def _display(content: Mapping[str, Any]) -> Message:
    return DisplayData(_mapping(content.get("data")), _mapping(content.get("metadata")), _display_id(content))


def _update(content: Mapping[str, Any]) -> Message:
    return UpdateDisplayData(_mapping(content.get("data")), _mapping(content.get("metadata")), _display_id(content))


def _result(content: Mapping[str, Any]) -> Message:
    count = _count(content.get("execution_count"))
    return ExecuteResult(_mapping(content.get("data")), _mapping(content.get("metadata")), count)


def _error(content: Mapping[str, Any]) -> Message:
    lines = content.get("traceback")
    traceback = tuple(line for line in lines if isinstance(line, str)) if isinstance(lines, list) else ()
    return Error(_text(content.get("ename")), _text(content.get("evalue")), traceback)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Message]] = {
    "stream": _stream,
    "display_data": _display,
    "update_display_data": _update,
    "execute_result": _result,
    "clear_output": lambda content: ClearOutput(content.get("wait") is True),
    "error": _error,
    "input_request": lambda content: InputRequest(_text(content.get("prompt")), content.get("password") is True),
}


def _display_id(content: Mapping[str, Any]) -> str | None:
    found = _mapping(content.get("transient")).get("display_id")
    return found if isinstance(found, str) else None


def _object(raw: Buffer) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(bytes(raw)))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if type(value) is int else None
