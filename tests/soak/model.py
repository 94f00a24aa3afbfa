"""What a kernel's clients must see, exactly: every line once and in order, one reply and one idle for each request.

The model is fed with what one client sends and receives, and knows nothing of sandboxes. Its one concession: what was
received before the kernel's owner was killed may come again afterwards, once for each kill, under the same ``msg_id``
(DESIGN, invariant 1); those repetitions are counted and otherwise ignored.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]

HISTORY = 40
"""Messages that are kept for a failure's report."""


@dataclass(frozen=True)
class Failure:
    """One thing that was not as it must be."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class Request:
    """One execute, what it must give, and what it has given so far."""

    msg_id: str
    tag: str
    lines: int = 0
    """Lines ``<tag>:<number>`` that it prints, numbered from 0."""
    first: int | None = 0
    """Number of the first line; None: any (a fork's child sees the rest of a cell that its parent began)."""
    values: tuple[str, ...] = ()
    """Other lines that it prints, each exactly this text, after the numbered ones."""
    displays: tuple[str, ...] = ()
    """SHA-256 of the payloads that it displays, in order."""
    threaded: bool = False
    """A thread prints the lines: an interrupt does not end it."""
    prompt: str | None = None
    """The question that it asks by ``input()``."""
    inherited: bool = False
    """It was begun in a fork's parent, which gets its reply."""
    free: bool = False
    """Its lines are anything at all; they are collected in ``said``."""
    cut: bool = False
    """It may end early, with an error or without any answer: it was interrupted, or the kernel was restarted."""
    ended: bool = False
    """Nothing more is expected of it: a restart ended it, or it was lost with the owner it had been sent to."""

    busy: int = 0
    idle: int = 0
    count: int | None = None
    replies: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: str | None = None
    next_line: int = 0
    next_value: int = 0
    shown: int = 0
    said: list[str] = field(default_factory=list)
    echoes: list[Any] = field(default_factory=list)
    error: str = ""
    rest: str = ""
    """Text after the last line's end."""

    def __post_init__(self) -> None:
        self.next_line = self.first or 0

    @property
    def seen(self) -> bool:
        """Whether the kernel gave any sign of it."""
        return bool(self.busy or self.replies or self.idle)

    @property
    def done(self) -> bool:
        """Whether all of it is there: the idle status, and the reply that its own client gets."""
        return self.ended or bool(self.idle and (self.replies or self.inherited))

    @property
    def waits_for_input(self) -> bool:
        """Whether the kernel asked and goes on only when it is answered."""
        return bool(self.asked) and not self.done

    def describe(self) -> str:
        """One line for a report."""
        return (
            f"{self.tag} busy={self.busy} idle={self.idle} count={self.count} replies={len(self.replies)}"
            f" lines={self.next_line}/{self.lines} values={self.next_value}/{len(self.values)}"
            f" displays={self.shown}/{len(self.displays)} asked={len(self.asked)}"
            f"{' cut' if self.cut else ''}{' ended' if self.ended else ''} {self.error}"
        )


class KernelModel:
    """One client's view of one kernel."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        """Execution count of the cell that ran last."""
        self.requests: dict[str, Request] = {}
        self.failures: list[Failure] = []
        self.crashes: list[float] = []
        """For each kill of the owner the time at which the next one was there; infinite before that."""
        self.unnoticed: Callable[[], bool] = lambda: False
        """Whether the owner was killed since :meth:`crash` was called last."""
        self.repeats = 0
        self.lost_requests = 0
        self.notices: list[str] = []
        self.lines = 0
        self.messages = 0
        self.recent: deque[str] = deque(maxlen=HISTORY)
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}
        self._order: list[str] = []

    # What the client does

    def sent(self, request: Request) -> Request:
        """An execute was sent."""
        self.requests[request.msg_id] = request
        self._order.append(request.msg_id)
        return request

    def crash(self) -> None:
        """The kernel's owner was killed: what came so far may come again, and what comes until :meth:`recovered`."""
        self.crashes.append(math.inf)

    def recovered(self) -> None:
        """The next owner is there."""
        now = time.monotonic()
        self.crashes = [min(end, now) for end in self.crashes]

    def restarted(self) -> None:
        """The kernel was restarted: it counts from 1, and what ran or waited is cut short."""
        self.count = 0
        for request in self.open():
            request.cut = request.ended = True

    def open(self) -> list[Request]:
        """Requests that are not done, in the order they were sent."""
        return [request for msg_id in self._order if not (request := self.requests[msg_id]).done]

    def settle(self, probe: Request) -> list[Request]:
        """After the kernel has begun ``probe``: what was sent before and gave no sign went down with the owner."""
        lost = []
        for msg_id in self._order[: self._order.index(probe.msg_id)]:
            request = self.requests[msg_id]
            if not request.seen and not request.done:
                request.ended = True
                lost.append(request)
        if lost and not self.crashes:
            self._fail("lost_request", f"{[request.tag for request in lost]} gave no sign, and no owner was killed")
        self.lost_requests += len(lost)
        return lost

    # What the client receives

    def received(self, channel: str, message: Message) -> None:
        """Take one message in."""
        header, kind = message["header"], str(message["header"]["msg_type"])
        content = message["content"]
        parent = message["parent_header"].get("msg_id", "")
        self.messages += 1
        self._remember(channel, kind, parent, content)
        identity = (channel, str(header["msg_id"]))
        first, times = self._seen.get(identity, (time.monotonic(), 0))
        self._seen[identity] = (first, times + 1)
        if times:
            if times <= sum(end >= first for end in self.crashes) + self.unnoticed():
                self.repeats += 1
            else:
                self._fail("doubled_message", f"{channel} {kind} {header['msg_id']} came {times + 1} times")
            return
        if kind == "stream" and content["name"] == "stderr" and "[sandbox]" in content["text"]:
            self._notice(content["text"])
            return
        request = self.requests.get(parent)
        if request is None:
            return
        if request.idle and channel == "iopub" and not (kind == "status" and request.ended):
            self._fail("after_idle", f"{kind} came after the idle of {request.describe()}")
        if channel == "iopub":
            self._iopub(request, kind, content)
        elif channel == "shell" and kind == "execute_reply":
            self._reply(request, content)
        elif channel == "stdin" and kind == "input_request":
            request.asked.append(dict(content))
            if request.prompt is None or content["prompt"] != request.prompt or len(request.asked) > 1:
                self._fail(
                    "wrong_input", f"{len(request.asked)} questions, {content['prompt']!r}: {request.describe()}"
                )

    def _notice(self, text: str) -> None:
        self.notices.append(text)
        if "left out" in text or "dropped" in text:
            self._fail("left_out", text.strip())

    def _iopub(self, request: Request, kind: str, content: Message) -> None:
        if kind == "status":
            if content["execution_state"] == "busy":
                request.busy += 1
                if request.busy > 1:
                    self._fail("doubled_busy", request.describe())
            elif content["execution_state"] == "idle":
                request.idle += 1
                self._finished(request)
            return
        if not request.busy:
            self._fail("before_busy", f"{kind} came before the busy of {request.describe()}")
        if kind == "execute_input":
            self._begun(request, int(content["execution_count"]))
        elif kind == "stream" and content["name"] == "stdout":
            self._text(request, content["text"])
        elif kind == "stream":
            request.error += content["text"]
        elif kind == "display_data":
            self._display(request, content)
        elif kind == "error":
            request.error = f"{content['ename']}: {content['evalue']}"
            if not request.cut:
                self._fail("unexpected_error", f"{request.error} in {request.describe()}")
        elif kind == "comm_msg":
            request.echoes.append(content["data"])

    def _begun(self, request: Request, count: int) -> None:
        if request.count is not None:
            self._fail("doubled_begin", request.describe())
        if not request.ended and count != self.count + 1:
            self._fail("wrong_count", f"cell {count} came after cell {self.count}: {request.describe()}")
        request.count = self.count = count

    def _text(self, request: Request, text: str) -> None:
        *lines, request.rest = (request.rest + text).split("\n")
        for line in lines:
            self.lines += 1
            if request.free:
                request.said.append(line)
            else:
                self._line(request, line)

    def _line(self, request: Request, line: str) -> None:
        if request.first is None:
            # The first line of a child's share of a cell says where that share begins; before it may come the rest of a
            # line whose beginning the parent has.
            tag, _, number = line.rpartition(":")
            if tag != request.tag:
                return
            request.first = request.next_line = int(number)
        tag, _, number = line.rpartition(":")
        if tag == request.tag and number.isdigit():
            found, expected = int(number), request.next_line
            if found == expected and found < request.lines:
                request.next_line += 1
            elif found < expected:
                self._fail("doubled_line", f"line {found} came again after line {expected - 1}: {request.describe()}")
            else:
                self._fail("lost_line", f"line {found} came after line {expected - 1}: {request.describe()}")
                request.next_line = found + 1
            return
        if request.next_value < len(request.values) and line == request.values[request.next_value]:
            request.next_value += 1
            return
        wanted = request.values[request.next_value : request.next_value + 1]
        self._fail("wrong_line", f"{line[:200]!r} in the place of {wanted}: {request.describe()}")

    def _display(self, request: Request, content: Message) -> None:
        found = hashlib.sha256(str(content["data"].get("text/plain", "")).encode()).hexdigest()
        if request.shown >= len(request.displays) or request.displays[request.shown] != found:
            at = request.displays.index(found) if found in request.displays else "unknown"
            self._fail("wrong_display", f"display {at} in the place of {request.shown}: {request.describe()}")
        request.shown += 1

    def _reply(self, request: Request, content: Message) -> None:
        request.replies.append({key: content.get(key) for key in ("status", "execution_count", "ename")})
        if len(request.replies) > 1:
            self._fail("doubled_reply", request.describe())
        if request.ended:
            return
        if content["status"] != "ok" and not request.cut:
            self._fail("unexpected_error", f"{content['status']} {content.get('ename')}: {request.describe()}")
        number = content.get("execution_count")
        if request.count is not None and number is not None and number != request.count:
            self._fail("wrong_count", f"the reply says {number}: {request.describe()}")

    def _finished(self, request: Request) -> None:
        if request.idle > 1:
            self._fail("doubled_idle", request.describe())
        if request.cut or request.ended:
            return
        if request.count is None and not request.inherited:
            self._fail("lost_begin", request.describe())
        if request.rest:
            self._fail("wrong_line", f"{request.rest[:200]!r} without an end: {request.describe()}")
        if request.free or request.first is None:
            return
        if request.next_line != request.lines:
            self._fail("lost_line", f"{request.lines - request.next_line} lines at the end: {request.describe()}")
        if request.next_value != len(request.values):
            self._fail("lost_line", f"{request.values[request.next_value :]} are missing: {request.describe()}")
        if request.shown != len(request.displays):
            self._fail("lost_display", request.describe())

    def check_end(self) -> None:
        """Nothing more is to come: what is still missing is lost."""
        for request in self.open():
            self._fail("unfinished", request.describe())

    def _fail(self, kind: str, text: str) -> None:
        self.failures.append(Failure(kind, text))

    def _remember(self, channel: str, kind: str, parent: str, content: Message) -> None:
        request = self.requests.get(parent)
        owner = request.tag if request is not None else parent[:8]
        if kind == "stream":
            text = repr(content["text"][:60]) + (f"+{len(content['text']) - 60}" if len(content["text"]) > 60 else "")
        elif kind == "status":
            text = content["execution_state"]
        else:
            text = ", ".join(f"{key}={str(value)[:40]}" for key, value in list(content.items())[:3])
        self.recent.append(f"{channel} {kind} [{owner}] {text}")


def payload_hashes(payloads: Iterable[str]) -> tuple[str, ...]:
    """What :attr:`Request.displays` holds of these payloads."""
    return tuple(hashlib.sha256(text.encode()).hexdigest() for text in payloads)
