"""What applications asked a remote kernel for and have no answer to: who gets it, and what a broken connection lost.

Pure. A request that was written to a connection which then broke may or may not have reached the kernel. Running a
cell twice is worse than anything, so nothing is sent again on a guess. A kernel takes the requests of its shell channel
in order: after a reconnect a harmless question (the *barrier*) goes first, and when its answer comes, a request of
which nothing was ever heard (no ``busy`` under its header, no reply) was never received, and is sent again. One that
was heard of but has no reply has lost it, and is answered with an error.

A kernel that sleeps answers no barrier. Where it fell asleep with nothing to do, it had received nothing more. Where it
was put to sleep in the middle of a cell, what came behind that lies in its queue, saved with its memory: nothing can be
told before it is awake.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sandbox_gateway.messages import Buffer, Request
from sandbox_gateway.wire.frames import Channel

MAX_PENDING: Final = 10_000
"""Requests without a reply that are remembered; then the oldest are given up."""
MAX_KEPT: Final = 128 << 20
"""Bytes of requests that are kept to be sent again; the oldest then count as received."""


@dataclass(slots=True)
class Pending:
    """One message of an application's that went out."""

    channel: int
    msg_id: str
    request: Request
    """As far as it is needed to answer in the kernel's place."""
    frame: bytes
    """To be sent again; empty when something was heard of it."""
    apart: bool = False
    """Whether it goes to a subshell: it keeps no order with the others."""
    wakes: bool = False
    """Whether it wakes a kernel that sleeps."""

    @property
    def heard(self) -> bool:
        """Whether the kernel is known to have it."""
        return not self.frame


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the requests before a barrier."""

    again: tuple[Pending, ...]
    """Never received."""
    lost: tuple[Pending, ...]
    """Received, or it is not known, and no reply will come."""


class InFlight:
    """The requests of one remote kernel's applications."""

    def __init__(self) -> None:
        self._pending: OrderedDict[str, Pending] = OrderedDict()
        self._kept = 0
        self._input: Pending | None = None
        self._asking = ""

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def unheard(self) -> bool:
        """Whether there are shell requests of which nothing was heard yet."""
        return any(item.channel == Channel.SHELL and not item.heard for item in self._pending.values())

    def begun(self, msg_ids: Sequence[str]) -> bool:
        """Whether the kernel is known to have one of ``msg_ids`` that it has not answered, as far as was heard."""
        return any(self._pending[name].heard for name in msg_ids if name in self._pending)

    def sent(self, item: Pending) -> None:
        """A message goes out. An input is kept until the kernel goes on, all else until its reply."""
        if item.channel == Channel.STDIN:
            self._input = item
            return
        self._pending[item.msg_id] = item
        self._pending.move_to_end(item.msg_id)
        self._kept += len(item.frame)
        while len(self._pending) > MAX_PENDING:
            self._remove(next(iter(self._pending)))
        if self._kept > MAX_KEPT:
            for kept in tuple(self._pending.values())[:-1]:
                self._hear(kept)
                if self._kept <= MAX_KEPT:
                    break

    def heard(self, channel: int, parent: str) -> tuple[Buffer, ...] | None:
        """A message of the kernel under request ``parent``; returns the identities it goes to, None when nobody's.

        Of a message on iopub the answer has no meaning.
        """
        if channel == Channel.STDIN:
            self._input, self._asking = None, parent
        elif self._input is not None and parent == self._asking:
            self._input = None
        item = self._pending.get(parent)
        if item is None:
            return None
        self._hear(item)
        if channel == item.channel:
            self._remove(parent)
        elif channel == Channel.IOPUB and item.request.reply_type is None:
            # A widget's message has no reply: that the kernel took it up is all there is.
            self._remove(parent)
        return item.request.identities

    def judge(self, msg_ids: Sequence[str], *, settled: bool, forgotten: bool) -> Verdict:
        """What became of ``msg_ids``, the shell requests that went out before a break.

        ``settled``: the barrier's answer has come, so that no reply to them is under way. Without it the kernel sleeps,
        and fell asleep with nothing to do, so that what nothing was heard of never came: it would have woken it. Where
        it had begun with one of them that is not so, and nothing is said of any.
        ``forgotten``: the gateway may have forgotten the session meanwhile, and what it had for it, so that silence
        proves nothing. All that the verdict names are pending no longer.
        """
        if not settled and self.begun(msg_ids):
            return Verdict((), ())
        again, lost = [], []
        for item in [self._pending[name] for name in msg_ids if name in self._pending]:
            if item.heard and item.apart:
                continue
            if item.heard or item.apart or forgotten:
                lost.append(item)
                self._remove(item.msg_id)
            else:
                again.append(item)
                # It goes out anew, and is pending from then on; what it holds is not to be given up here.
                self._kept -= len(item.frame)
                del self._pending[item.msg_id]
        return Verdict(tuple(again), tuple(lost))

    def shell(self) -> tuple[str, ...]:
        """The shell requests that are pending, in order."""
        return tuple(item.msg_id for item in self._pending.values() if item.channel == Channel.SHELL)

    def repeatable(self) -> tuple[Pending, ...]:
        """What may be sent again at once: an input, and control requests, of which none runs code, unless the kernel
        was heard to have them."""
        found = [item for item in self._pending.values() if item.channel == Channel.CONTROL and not item.heard]
        return (*found, self._input) if self._input is not None else tuple(found)

    def everything(self) -> tuple[Pending, ...]:
        """All that is pending; nothing is any more."""
        found = tuple(self._pending.values())
        self.clear()
        return found

    def clear(self) -> None:
        """The kernel that had them is gone."""
        self._pending.clear()
        self._kept = 0
        self._input = None

    def _hear(self, item: Pending) -> None:
        self._kept -= len(item.frame)
        item.frame = b""

    def _remove(self, msg_id: str) -> None:
        self._hear(self._pending.pop(msg_id))
