"""What ``start_kernel`` says, checked; and how operations answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sandbox_gateway.agent import process

_MAX_PRELOADS = 256


class KernelError(Exception):
    """An operation failed; ``code`` is one of the product's error codes."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


Answer = Callable[[dict[str, Any] | KernelError], None]


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that ``start_kernel`` may say."""

    command: process.Command
    key: str
    interrupt_mode: str = "signal"
    welcome: bool | None = None
    """Whether the kernel greets subscribers on IOPub; None: not known."""
    fast_iopub: bool = False
    preload: tuple[str, ...] | None = None
    """Modules that our ipykernel application imports before it is ready, for a template; None: it is not for one."""


def parse_launch(request: Mapping[str, Any], before: Launch | None = None) -> Launch:
    """The launch that a request describes; what it leaves out is taken from ``before``. Raises KernelError."""
    fields = {key: value for key, value in request.items() if value is not None}
    if before is None:
        missing = {"argv", "key"} - set(fields)
        if missing:
            raise KernelError("invalid_request", f"start_kernel lacks {', '.join(sorted(missing))}")
        own = (os.getuid(), os.getgid())
        before = Launch(process.Command((), {}, "/", *own), "")
    command = before.command
    argv = fields.get("argv", list(command.argv))
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) and "\0" not in word for word in argv):
        raise KernelError("invalid_request", "argv is not a list of words")
    mode = text_of(fields, "interrupt_mode", before.interrupt_mode)
    if mode not in ("signal", "message"):
        raise KernelError("invalid_request", "interrupt_mode is signal or message")
    return replace(
        before,
        command=process.Command(
            tuple(argv),
            environment_of(fields.get("env", command.environment)),
            text_of(fields, "cwd", command.cwd),
            _id(fields, "uid", command.uid),
            _id(fields, "gid", command.gid),
            _rlimits(fields["rlimits"]) if "rlimits" in fields else command.rlimits,
        ),
        key=text_of(fields, "key", before.key),
        interrupt_mode=mode,
        welcome=_flag(fields, "welcome", before.welcome),
        fast_iopub=bool(_flag(fields, "fast_iopub", before.fast_iopub)),
        preload=_modules(fields["preload"]) if "preload" in fields else before.preload,
    )


def environment_of(value: Any) -> dict[str, str]:
    """A table of names and texts that may be a process's environment. Raises KernelError."""
    if not isinstance(value, dict) or not all(
        isinstance(text, str) and name and "=" not in name and "\0" not in name + text for name, text in value.items()
    ):
        raise KernelError("invalid_request", "env is not a table of names and texts")
    return value


def text_of(fields: Mapping[str, Any], name: str, default: str) -> str:
    """A field that is a text. Raises KernelError."""
    value = fields.get(name, default)
    if not isinstance(value, str) or "\0" in value:
        raise KernelError("invalid_request", f"{name} is not a text")
    return value


def _flag(fields: Mapping[str, Any], name: str, default: bool | None) -> bool | None:
    value = fields.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise KernelError("invalid_request", f"{name} is not true or false")
    return value


def _id(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if type(value) is not int or not 0 <= value < 2**32 - 1:
        raise KernelError("invalid_request", f"{name} is not a user's or group's number")
    return value


def _rlimits(value: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(value, dict):
        raise KernelError("invalid_request", "rlimits is not a table")
    limits: dict[str, tuple[int, int]] = {}
    for name, limit in value.items():
        pair = [limit, limit] if type(limit) is int else limit
        if not process.known_rlimit(str(name)) or not isinstance(pair, list) or [type(n) for n in pair] != [int, int]:
            raise KernelError("invalid_request", f"the resource limit {name!r} is not known, or not a number")
        limits[name] = (pair[0], pair[1])
    return limits


def _modules(value: Any) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _MAX_PRELOADS
        or not all(isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) for name in value)
    ):
        raise KernelError("invalid_request", "preload is not a list of modules' names")
    return tuple(value)
