"""The server's log: no secret in it, and as JSON lines where a program reads it.

jupyter_server writes the addresses of requests, and with them whatever a client put there. What looks like a token is
taken out of each finished line, whoever wrote it: of the message, its arguments and its tracebacks.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from jupyter_server.base.call_context import CallContext

SECRET: Final = "[secret]"
_IN_ADDRESS = re.compile(r"(?i)([?&;](?:[a-z_-]*token|password|key|code|xsrf|_xsrf)=)[^&;#\s\"'<>\\]+")
_IN_HEADER = re.compile(
    r"(?i)((?:proxy-)?authorization\"?'?\s*[:=,]\s*[\"']?\s*(?:token|bearer|basic)?\s*)(?!token\b|bearer\b|basic\b)[^\s\"',;)]+"
)
_SCHEME = re.compile(r"(?i)\b((?:token|bearer)\s+)(?=[a-z0-9._~+/=-]*[0-9])[a-z0-9._~+/=-]{16,}")
_COOKIE = re.compile(r"(?i)((?:set-)?cookie\"?'?\s*[:=,]\s*[\"']?)[^\r\n\"']+")
_OURS = re.compile(r"sgt_[A-Za-z0-9_-]{8,}")
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_SANDBOX = re.compile(rf"(?i)\b(?:sandbox|kernel|sandboxes/|kernels/)[ :'\"]{{0,3}}({_UUID})\b")
_IN_PATH = re.compile(rf"/api/(?:sandboxes|kernels)/({_UUID})\b")
_MAX_LINE: Final = 64 << 10
"""Characters of one record; the rest is cut off, for a part of it may come from a client."""


def redact(text: str, known: Iterable[str] = ()) -> str:
    """``text`` without what looks like a secret, and without those of ``known``."""
    for secret in known:
        if len(secret) >= 4:
            text = text.replace(secret, SECRET)
    text = _IN_ADDRESS.sub(rf"\1{SECRET}", text)
    text = _OURS.sub(f"sgt_{SECRET}", text)
    text = _IN_HEADER.sub(rf"\1{SECRET}", text)
    text = _COOKIE.sub(rf"\1{SECRET}", text)
    return _SCHEME.sub(rf"\1{SECRET}", text)


def sandbox_of(record: logging.LogRecord, message: str) -> str:
    """The id of the sandbox that a record is about: said by who wrote it (``extra={"sandbox": id}``), named in the
    message, or that of the request which is being served; empty when none is known."""
    said = getattr(record, "sandbox", None)
    if isinstance(said, str) and said:
        return said
    named = _SANDBOX.search(message)
    if named is not None:
        return named[1].lower()
    request = getattr(CallContext.get(CallContext.JUPYTER_HANDLER), "request", None)
    asked = _IN_PATH.search(getattr(request, "path", None) or "")
    return asked[1].lower() if asked is not None else ""


class Secrets:
    """What must not be in the log besides what looks like a secret: the server's one shared token."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider

    def __iter__(self) -> Any:
        token = getattr(self._provider, "token", "")
        if isinstance(token, str) and token and token != "<generated>":
            yield token


class Redacting(logging.Formatter):
    """Another formatter's lines without secrets."""

    def __init__(self, inner: logging.Formatter, known: Iterable[str] = ()) -> None:
        super().__init__()
        self._inner = inner
        self._known = known

    def format(self, record: logging.LogRecord) -> str:
        """One finished record."""
        return redact(self._inner.format(record)[:_MAX_LINE], self._known)


class JsonLines(logging.Formatter):
    """A JSON object on each line: ``time``, ``level``, ``logger``, ``message``; ``sandbox``, ``user`` and ``error``
    where there are any. Without secrets."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        super().__init__()
        self._known = known

    def format(self, record: logging.LogRecord) -> str:
        """One finished record."""
        message = record.getMessage()
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(message[:_MAX_LINE], self._known),
        }
        sandbox = sandbox_of(record, message)
        if sandbox:
            line["sandbox"] = sandbox
        user = getattr(getattr(CallContext.get(CallContext.JUPYTER_HANDLER), "current_user", None), "username", None)
        if isinstance(user, str):
            line["user"] = user
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = redact(self.formatException(record.exc_info)[-_MAX_LINE:], self._known)
        return json.dumps(line, ensure_ascii=True)


def install(log: logging.Logger, provider: Any = None, *, as_json: bool = False) -> None:
    """Make the handlers of ``log`` (a jupyter_server's) write no secrets, and JSON lines if asked; give our own loggers
    the same handlers.

    ``provider`` is the server's identity provider. A token that jupyter_server made itself it also shows, once, for the
    person who started it: that stays on a terminal, and elsewhere ``jupyter server list`` shows it.
    """
    found = _handlers(log)
    for handler in found:
        if isinstance(handler.formatter, Redacting | JsonLines) and not as_json:
            continue
        shown = getattr(provider, "token_generated", False) is True and _on_terminal(handler)
        known: Iterable[str] = () if shown else Secrets(provider)
        inner = handler.formatter or logging.Formatter()
        if as_json:
            handler.setFormatter(JsonLines(known))
        else:
            handler.setFormatter(_Shown(inner, provider.token) if shown else Redacting(inner, known))
    ours = logging.getLogger("sandbox_gateway")
    ours.parent, ours.propagate = log, True
    ours.setLevel(log.level)


class _Shown(Redacting):
    """As its base, but for the one line that tells who started the server how to get in."""

    def __init__(self, inner: logging.Formatter, token: str) -> None:
        super().__init__(inner)
        self._token = token

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.CRITICAL and f"token={self._token}" in record.getMessage():
            return self._inner.format(record)
        return super().format(record)


def quiet_pings() -> None:
    """Drop what tornado says at each WebSocket: it takes jupyter_server's milliseconds for seconds."""
    logging.getLogger("tornado.general").addFilter(_no_ping_timeout)


def _no_ping_timeout(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("The websocket_ping_timeout")


def _handlers(log: logging.Logger) -> list[logging.Handler]:
    """Those that get what ``log`` is told."""
    found: list[logging.Handler] = []
    at: logging.Logger | None = log
    while at is not None:
        found += at.handlers
        at = at.parent if at.propagate else None
    return found


def _on_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    try:
        return bool(stream is not None and stream.isatty())
    except ValueError:
        return False


def warn_of_arguments(log: logging.Logger, arguments: Sequence[str] | None = None) -> None:
    """Say so when a secret is on the command line, where each user of the machine can read it."""
    given = sys.argv[1:] if arguments is None else arguments
    if any(re.match(r"--[\w.]*(?:\.token|\.password)(?:=.|$)", each) for each in given):
        log.warning(
            "a token on the command line can be read by every user of this machine (`ps`): set JUPYTER_TOKEN or"
            " JUPYTER_TOKEN_FILE instead, or give each user a token of his own (`jupyter sandbox token add`)"
        )
