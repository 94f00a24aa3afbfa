"""Whether the kernel inside a sandbox lives, as its agent tells: hostile input, once for each boot."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_gateway.kernel_exit import KernelExit

log = logging.getLogger(__name__)

_KILL_PATIENCE = 0.2


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a kernel that is to become a template said when it was ready."""

    identity: bool
    """It can be given another identity."""
    failed: Mapping[str, str]
    """Modules that it could not import, and why."""


class KernelWatch:
    """The kernels of one sandbox, one boot after the other.

    ``notice`` writes a line for its clients; ``hold`` is called when a kernel has ended: what clients send from now on
    is for the next one.
    """

    def __init__(self, sandbox_id: str, notice: Callable[[str], None], hold: Callable[[], None]) -> None:
        self.exit: KernelExit | None = None
        """How the kernel of this boot ended; None while it lives."""
        self.gone = asyncio.Event()
        """Set when it has ended."""
        self.ready: asyncio.Future[Preparation] | None = None
        """Resolved when it is ready, where somebody wants to know."""
        self.muted = False
        """The sandbox as a whole is ending: what its kernel does is no news."""
        self._id = sandbox_id
        self._notice = notice
        self._hold = hold
        self._boot = 0
        self._asked_to_exit: int | None = None

    def booting(self) -> None:
        """A kernel is started; what comes of earlier ones counts no more."""
        self._boot += 1
        self.exit = None
        self.gone.clear()

    def expect_exit(self) -> None:
        """It was asked to shut down: its end is no news. Thread-safe: it only sets a mark."""
        self._asked_to_exit = self._boot

    def ended(self, gone: KernelExit) -> None:
        """The kernel of this boot has ended."""
        self._ended(gone, self._boot)

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event of the agent's."""
        ready = self.ready
        if event.get("event") == "kernel_ready" and ready is not None and not ready.done():
            ready.set_result(_preparation(event))
        if event.get("event") != "kernel_exit":
            return
        gone = KernelExit.from_event(event)
        if gone is None:
            log.debug("sandbox %s: a malformed kernel_exit event was dropped", self._id)
        elif gone.signal == signal.SIGKILL and not gone.expected:
            # The host may have killed it for memory, and is then ending the rest: that reason comes a moment later.
            asyncio.get_running_loop().call_later(_KILL_PATIENCE, self._ended, gone, self._boot)
        else:
            self._ended(gone, self._boot)

    def _ended(self, gone: KernelExit, boot: int) -> None:
        if self.muted or boot != self._boot or self.exit is not None:
            # A kernel ends once: an agent that says so again and again fills neither the log nor the output.
            return
        self.exit = gone
        self._hold()
        self.gone.set()
        if not gone.expected and boot != self._asked_to_exit:
            # Indented, so that no line of it can pass for one of ours.
            tail = "".join(f"\n    {line}" for line in gone.stderr_tail.strip().splitlines())
            log.warning("sandbox %s: %s%s", self._id, gone.describe(), tail)
            self._notice(f"\n[sandbox] {gone.describe()}{tail}\n")


def _preparation(event: Mapping[str, Any]) -> Preparation:
    """Read what came from inside: it may be anything."""
    failed = event.get("preload_failed")
    texts = {str(name)[:200]: str(why)[:500] for name, why in failed.items()} if isinstance(failed, dict) else {}
    return Preparation(event.get("identity") is True, texts)
