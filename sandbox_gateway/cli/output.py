"""What the commands write: tables, JSON, sizes and times for people, progress on stderr.

Names and reasons may come from inside a sandbox, so nothing reaches a terminal with its control characters.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO, Any

PATIENCE = 1.0
"""Seconds of silence before progress is shown where there is no terminal."""
_PIECE = 8192
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SGR = re.compile(r"\x1b\[[0-9;]{0,30}m")
_LOG_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """``text`` on one line, without control characters."""
    return _CONTROL.sub("�", " ".join(text.splitlines()))


def clean_log(text: str) -> str:
    """A log for a terminal: lines, tabs and colours stay, whatever else could drive the terminal does not."""
    kept, last = [], 0
    for colour in _SGR.finditer(text):
        kept += [_LOG_CONTROL.sub("�", text[last : colour.start()]), colour[0]]
        last = colour.end()
    return "".join([*kept, _LOG_CONTROL.sub("�", text[last:])])


def write_json(value: Any, stream: IO[str] | None = None) -> None:
    """``value`` as indented JSON and a newline."""
    emit(json.dumps(value, indent=2, ensure_ascii=True) + "\n", stream)


def emit(text: str, stream: IO[str] | None = None) -> None:
    """``text`` as it is, to stdout; raises BrokenPipeError when nobody reads it.

    In pieces: with PYTHONUNBUFFERED set, a long write that ends half-way loses its rest without any error.
    """
    out = sys.stdout if stream is None else stream
    for start in range(0, len(text), _PIECE):
        out.write(text[start : start + _PIECE])


def write_line(text: str = "") -> None:
    """One cleaned line on stdout."""
    sys.stdout.write(clean(text) + "\n")


def write_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns for people; the last one is not padded. Empty columns are left out."""
    cleaned = [[clean(cell) for cell in row] for row in rows]
    shown = [column for column in range(len(headings)) if any(row[column] for row in cleaned) or not cleaned]
    lines = [[headings[column] for column in shown], *([row[column] for column in shown] for row in cleaned)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def size(count: int | None) -> str:
    """``count`` bytes for people: ``1.4 GiB``; empty for None."""
    if count is None:
        return ""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 10 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def age(then: float, now: float | None = None) -> str:
    """How long ago ``then`` (seconds since the epoch) was: ``3 min``, ``2 days``."""
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for limit, step, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // step)} {unit}"
    return f"{int(seconds // 86400)} days"


class ProgressLine:
    """Progress on stderr: a moving line on a terminal, else plain lines, one a second at most and none in the first.

    Use as a context manager; :meth:`update` may be called from any thread.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._next = time.monotonic() + PATIENCE
        self._lock = threading.Lock()
        self._shown = ""
        self._waiting = ""
        self._timer: threading.Timer | None = None

    def update(self, text: str, detail: str = "") -> None:
        """Say what goes on; ``detail`` (how far it is) moves on a terminal only."""
        text = clean(text)
        with self._lock:
            if self._terminal:
                line = f"{text} {clean(detail)}".rstrip()[:200]
                self._write(f"\r\x1b[K{line}")
                self._shown = line
            elif text != self._shown:
                self._waiting = text
                if self._timer is None:
                    self._timer = threading.Timer(max(0.0, self._next - time.monotonic()), self._due)
                    self._timer.daemon = True
                    self._timer.start()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._waiting = ""
            if self._terminal and self._shown:
                self._write("\r\x1b[K")

    def _due(self) -> None:
        with self._lock:
            self._timer = None
            if self._waiting:
                self._shown, self._waiting = self._waiting, ""
                self._next = time.monotonic() + PATIENCE
                self._write(self._shown + "\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads our stderr: the work goes on all the same
