"""Giving the running kernel another identity after a restore (DESIGN 4.5): the agent's side of it.

The kernel is asked by a private message on its control channel, which it answers while a cell runs too. Until the
answer is here, what clients send waits; the new key and environment are also those of later restarts.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sandbox_gateway.agent import process
from sandbox_gateway.agent.launch import Answer, KernelError, Launch, environment_of, text_of
from sandbox_gateway.agent.loop import Loop, Timer

REQUEST: Final = "sandbox_identity_request"
"""Private to our ipykernel application (``kernel_identity.py``)."""
PATIENCE: Final = 20.0
"""Seconds for the kernel to answer: a cell may be inside a long call that lets no other thread run."""
_MAX_NAMES: Final = 64
_MAX_TEXT: Final = 300


@dataclass(frozen=True, slots=True)
class Identity:
    """What ``identify`` was called with."""

    environment: dict[str, str]
    cwd: str
    key: str | None
    """None: keep the present one."""
    session: str
    entropy: str
    """Base64."""
    time: float

    def message(self) -> dict[str, Any]:
        """The content of the request to the kernel."""
        content = {"env": self.environment, "cwd": self.cwd, "session": self.session, "entropy": self.entropy}
        return {**content, "time": self.time, **({} if self.key is None else {"key": self.key})}

    def applied(self, launch: Launch) -> Launch:
        """How the kernel is started from now on."""
        command = replace(launch.command, environment=self.environment, cwd=self.cwd)
        return replace(launch, command=command, preload=None, key=launch.key if self.key is None else self.key)


def parse_identity(request: Mapping[str, Any]) -> Identity:
    """The identity that a request describes. Raises KernelError."""
    session, entropy, time = (text_of(request, "session", ""), request.get("entropy"), request.get("time"))
    if not session or len(session) > 128 or not session.isascii():
        raise KernelError("invalid_request", "session is not a short text")
    try:
        if not isinstance(entropy, str) or len(binascii.a2b_base64(entropy)) < 32:
            raise KernelError("invalid_request", "entropy is not 32 bytes or more in base64")
    except ValueError:
        raise KernelError("invalid_request", "entropy is not base64") from None
    if isinstance(time, bool) or not isinstance(time, int | float):
        raise KernelError("invalid_request", "time is not a number of seconds")
    key = None if request.get("key") is None else text_of(request, "key", "")
    if "env" not in request or "cwd" not in request:
        raise KernelError("invalid_request", "identify lacks env or cwd")
    return Identity(environment_of(request["env"]), text_of(request, "cwd", "/"), key, session, entropy, float(time))


class Identification:
    """One identity on its way into the kernel. Answers exactly once; a reply that comes too late still counts.

    ``draft`` prepares, while the kernel is busy with it, what ``accepted`` makes valid when the kernel has become it;
    both may raise OSError, and ``accepted`` is told what ``draft`` has raised. Then ``opened`` is called, and then the
    answer leaves. Processes that the kernel had started are those of the moment at which it was asked.
    """

    def __init__(
        self,
        loop: Loop,
        answer: Answer,
        draft: Callable[[], None],
        accepted: Callable[[OSError | None], None],
        opened: Callable[[], None],
    ) -> None:
        self._answer: Answer | None = answer
        self._draft = draft
        self._accepted = accepted
        self._opened = opened
        self._timer: Timer = loop.later(PATIENCE, self._too_late)
        self.waiting = True
        """The kernel has not replied."""
        self.done = False
        """The kernel has become it: clients' messages may pass."""
        self._copies = False
        self._undrafted: OSError | None = None

    def asked(self) -> None:
        """The kernel has been asked, and takes a while: do what has to be done before the answer leaves."""
        try:
            # What the kernel had started is a copy that nobody can speak to.
            self._copies = len(process.descendants()) > 1
            self._draft()
        except OSError as error:
            self._undrafted = error

    def replied(self, content: Mapping[str, Any]) -> None:
        """The kernel has answered."""
        self.waiting = False
        if content.get("status") != "ok":
            self.failed(f"the kernel could not take its new identity: {str(content.get('evalue'))[:_MAX_TEXT]}")
            return
        try:
            self._accepted(self._undrafted)
        except OSError as error:
            self.failed(f"the kernel's connection file could not be written: {error.strerror}")
            return
        self.done = True
        self._opened()
        missing = _names(content.get("missing"))
        if self._copies:
            missing.append("processes")
        self._say({"seeded": _names(content.get("seeded")), "missing": missing})

    def failed(self, reason: str) -> None:
        """It will not come about."""
        self._say(KernelError("identity_failed", reason))

    def _too_late(self) -> None:
        self.failed("the kernel did not answer when it was given its identity")

    def _say(self, result: dict[str, Any] | KernelError) -> None:
        self._timer.cancel()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(result)


def _names(value: Any) -> list[str]:
    """A list of short names, from a kernel that may send anything."""
    found = value if isinstance(value, list) else []
    return [name[:_MAX_TEXT] for name in found[:_MAX_NAMES] if isinstance(name, str)]
