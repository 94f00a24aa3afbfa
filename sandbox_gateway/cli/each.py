"""The same thing done to several sandboxes at once, each with an outcome of its own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import ProgressLine, clean, size, write_json, write_line
from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.host.paths import Paths

AN_ID = "a sandbox's id (the kernel's), or an unambiguous beginning of it"
AT_ONCE = 8
"""Sandboxes that are worked on at the same time."""

OnProgress = Callable[[Mapping[str, Any]], None]
Act = Callable[[str, OnProgress], Awaitable[str]]
"""Does it to the sandbox of this id; returns its state then, or raises."""


def chosen(
    options: argparse.Namespace, paths: Paths, many: Callable[[], list[str]], by_option: str
) -> list[str | SandboxGatewayError]:
    """Full ids of what was asked for, and in their places the errors of what there is not."""
    from sandbox_gateway.cli import actions

    if bool(options.ids) == bool(by_option):
        what = (
            f"{by_option} and ids cannot be given together"
            if by_option
            else "name sandboxes by their ids, or give --all"
        )
        raise Usage(f"jupyter sandbox {options.command}", what)
    if by_option:
        return list(many())
    found: dict[str, str | SandboxGatewayError] = {}
    for prefix in options.ids:
        try:
            sandbox_id = actions.resolve(paths, prefix).id
            found[sandbox_id] = sandbox_id
        except SandboxGatewayError as error:
            found[f"{prefix}?"] = error
    return list(found.values())


def each(ids: list[str | SandboxGatewayError], act: Act, verb: str, as_json: bool) -> int:
    """Do it to every one, whatever becomes of the others; 1 when any failed."""
    import asyncio

    outcomes: list[tuple[str, str | SandboxGatewayError]] = []

    async def one(item: str | SandboxGatewayError, meter: Meter, room: asyncio.Semaphore) -> None:
        if isinstance(item, SandboxGatewayError):
            outcomes.append(("", item))
            return
        async with room:
            meter.begin(item)
            try:
                outcomes.append((item, await act(item, lambda progress: meter.update(item, progress))))
            except SandboxGatewayError as error:
                outcomes.append((item, error))
            finally:
                meter.end(item)

    async def everything() -> None:
        room = asyncio.Semaphore(AT_ONCE)
        with ProgressLine() as line:
            meter = Meter(line, verb)
            await asyncio.gather(*(one(item, meter, room) for item in ids))

    asyncio.run(everything())
    status = 0
    done = [(sandbox_id, result) for sandbox_id, result in outcomes if not isinstance(result, SandboxGatewayError)]
    if as_json:
        write_json([{"id": sandbox_id, "state": state} for sandbox_id, state in done])
    for sandbox_id, state in done if not as_json else ():
        write_line(f"{clean(sandbox_id)} {state}")
    for _, result in outcomes:
        if isinstance(result, SandboxGatewayError):
            status = fail(result, as_json)
    return status


class Meter:
    """What owners report of their work (``message``, ``done`` and ``total`` bytes), on one line, with rates."""

    def __init__(self, line: ProgressLine, verb: str, now: Callable[[], float] = time.monotonic) -> None:
        self._line = line
        self._verb = verb
        self._now = now
        self._under_way: dict[str, _Part] = {}

    def begin(self, sandbox_id: str) -> None:
        """Work on one more has begun."""
        self._under_way[sandbox_id] = _Part(self._now())
        self._show(sandbox_id)

    def update(self, sandbox_id: str, progress: Mapping[str, Any]) -> None:
        """One tells how far it is."""
        part = self._under_way.setdefault(sandbox_id, _Part(self._now()))
        message, done, total = progress.get("message"), progress.get("done"), progress.get("total")
        if isinstance(message, str) and message and message != part.message:
            # Bytes are counted anew in each phase.
            part.message, part.begun, part.done, part.total = message, self._now(), 0, 0
        if isinstance(done, int):
            part.done = done
        if isinstance(total, int):
            part.total = total
        self._show(sandbox_id)

    def end(self, sandbox_id: str) -> None:
        """It is done, or has failed."""
        self._under_way.pop(sandbox_id, None)
        for other in self._under_way:
            self._show(other)
            break

    def _show(self, sandbox_id: str) -> None:
        part = self._under_way[sandbox_id]
        text = f"{self._verb} {sandbox_id[:8]}"
        if len(self._under_way) > 1:
            text += f" and {len(self._under_way) - 1} more"
        if part.message:
            text += f": {part.message}"
        self._line.update(text, part.detail(self._now()))


class _Part:
    def __init__(self, begun: float) -> None:
        self.begun = begun
        self.message = ""
        self.done = 0
        self.total = 0

    def detail(self, now: float) -> str:
        """``12 MiB of 40 MiB, 310 MiB/s``: as much of it as is known and worth saying."""
        if not self.done:
            return size(self.total) if self.total else ""
        text = f"{size(self.done)} of {size(self.total)}" if self.total else size(self.done)
        seconds = now - self.begun
        return f"{text}, {size(int(self.done / seconds))}/s" if seconds >= 0.1 else text
