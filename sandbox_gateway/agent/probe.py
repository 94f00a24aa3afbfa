"""Does the kernel answer? Asked after a restore, where an epoll listener can have gone deaf (GVISOR.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sandbox_gateway.agent.launch import Answer, KernelError
from sandbox_gateway.agent.loop import Loop

REQUEST: Final = "sandbox_ping_request"
"""Private to our ipykernel application, which answers on its control thread."""
_LOOK: Final = 0.05
_CONTROL: Final = 1.0
"""Seconds for the control thread beyond the heartbeat: a cell may hold the interpreter for longer than that."""


class Probe:
    """One question, answered once: ``{heartbeat, control}``, or an error when neither answered in time.

    Looks at the sockets by the clock, too: it is their signals that may be lost.
    """

    def __init__(self, loop: Loop, look: Callable[[], None], seconds: float, control: bool, answer: Answer) -> None:
        self._loop = loop
        self._look = look
        self._answer: Answer | None = answer
        self._until = loop.now() + seconds
        self._seconds = seconds
        self._heartbeat = False
        self._control: bool | None = False if control else None
        loop.later(_LOOK, self._check)

    def heart_beats(self) -> None:
        """The heartbeat's echo came."""
        self._heartbeat = True
        self._until = min(self._until, self._loop.now() + _CONTROL)
        self._done()

    def control_answers(self, _content: dict[str, Any]) -> None:
        """The reply on the control channel came."""
        self._control = True
        self._done()

    def failed(self, reason: str) -> None:
        """There is nobody left to ask."""
        self._say(KernelError("kernel_failed", reason))

    def _done(self) -> None:
        if self._heartbeat and self._control is not False:
            self._say({"heartbeat": True, "control": self._control is True})

    def _check(self) -> None:
        if self._answer is None:
            return
        self._look()
        if self._answer is not None and self._loop.now() >= self._until:
            if self._heartbeat or self._control:
                self._say({"heartbeat": self._heartbeat, "control": self._control is True})
            else:
                self.failed(f"the kernel has not answered for {self._seconds:g} s")
        elif self._answer is not None:
            self._loop.later(_LOOK, self._check)

    def _say(self, result: dict[str, Any] | KernelError) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(result)
