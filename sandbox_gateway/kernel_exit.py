"""How a kernel process ended, as its agent reports it: hostile input, made safe for logs and notebooks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EXIT_NUMBERS = range(256)
_TAIL = 4000
_REASON = 500


@dataclass(frozen=True, slots=True)
class KernelExit:
    """How the kernel process ended."""

    code: int | None
    signal: int | None
    stderr_tail: str
    expected: bool
    reason: str = ""
    """Why the agent ended it, where it did so by itself."""

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> KernelExit | None:
        """Read a ``kernel_exit`` report; None when it is malformed."""
        code, number, tail = event.get("code"), event.get("signal"), event.get("stderr_tail", "")
        if not (_is_number(code) and _is_number(number) and isinstance(tail, str)):
            return None
        reason = event.get("reason", "")
        reason = reason[:_REASON] if isinstance(reason, str) else ""
        return cls(code, number, _printable(tail[-_TAIL:]), bool(event.get("expected")), reason)

    @property
    def returncode(self) -> int:
        """As :attr:`subprocess.Popen.returncode`: negative for a signal."""
        if self.signal:
            return -self.signal
        return self.code if self.code is not None else 1

    def describe(self) -> str:
        """One line for people."""
        if self.reason:
            return self.reason
        if self.signal:
            with contextlib.suppress(ValueError):
                return f"the kernel was ended by {signal.Signals(self.signal).name}"
            return f"the kernel was ended by signal {self.signal}"
        return f"the kernel exited with code {self.code}"


def _is_number(value: Any) -> bool:
    return value is None or (type(value) is int and value in _EXIT_NUMBERS)


def _printable(text: str) -> str:
    """``text`` without control characters but newline and tab: it goes to terminals, logs and notebooks."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
