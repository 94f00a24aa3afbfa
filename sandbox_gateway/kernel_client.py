"""A program's own client of a kernel that its process owns: no sockets, the channels are asked directly.

It runs on the background loop. Cells are sent one at a time, the next when the last has ended, so that whoever gives a
cell up that has not begun takes it away and hits no other. Every cell has an end: the kernel's reply and its idle
status; or the reason why these will not come (the kernel died, was restarted, or has another owner now).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final

from sandbox_gateway import messages, results
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.execution import Execution
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.messages import Buffer
from sandbox_gateway.results import Done, Head
from sandbox_gateway.wire.frames import Channel

log = logging.getLogger(__name__)

IDENTITY: Final = b"sandbox-api"
"""Who asks, to the kernel. The same in each process, so that a reply finds the next owner's client."""
MAX_QUEUED: Final = 1000
"""Cells that wait for the kernel at most."""
MAX_LEFT: Final = 8
"""Cells of earlier owners whose output is kept for :meth:`KernelClient.follow`."""
LAST_WORDS: Final = 0.3
"""Seconds for what a kernel printed before its death to arrive."""
IDLE_PATIENCE: Final = 10.0
"""Seconds after a reply without a word of the cell, after which its idle status is not waited for any more."""
INTERRUPT_PATIENCE: Final = 5.0
"""Seconds that a cell whose time is over is given to end by itself after it was interrupted."""
_LOOK = 0.5

_OF_A_CELL = frozenset(
    {
        "execute_input",
        "stream",
        "display_data",
        "update_display_data",
        "execute_result",
        "clear_output",
        "error",
        "input_request",
        "execute_reply",
    }
)

_clients: dict[LiveSandbox, KernelClient] = {}


def client_of(live: LiveSandbox) -> KernelClient:
    """The process's client of a sandbox, made on first use."""
    if live not in _clients:
        _clients[live] = KernelClient(live)
    return _clients[live]


def left(sandbox_id: str) -> SandboxGatewayError:
    """The error for who still uses a sandbox that another process owns by now, or none does."""
    text = f"sandbox {sandbox_id} is not this process's any more"
    return SandboxGatewayError("owned_elsewhere", text, "`Sandbox.connect(id)` takes it back.")


class KernelClient:
    """Use it on the loop of ``live``."""

    def __init__(self, live: LiveSandbox) -> None:
        self.live = live
        self.gone: SandboxGatewayError | None = None
        """Why this process has nothing to do with the sandbox any more."""
        self.has_seat = False
        """Whether the sandbox's seat is this client's to release."""
        self._key = live.seat.key
        self._session = uuid.uuid4().hex
        self._queued: deque[Execution] = deque()
        self._current: _Running | None = None
        self._left: dict[str, _Running] = {}
        self._any: _Running | None = None
        self._asked = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription = live.seat.channels.subscribe(self._deliver, identity=IDENTITY)
        self._watching = self._task(self._watch())

    # Cells

    def submit(self, execution: Execution) -> None:
        """Run a cell after those that were submitted before. Raises what makes that impossible now."""
        why = self.gone or self._dead()
        if why is not None:
            raise why
        if len(self._queued) >= MAX_QUEUED:
            raise SandboxGatewayError("invalid_request", f"{MAX_QUEUED} cells wait for this kernel already")
        if self._watching.done() and not self._watching.cancelled():
            # Somebody else has restarted the kernel; the end of this one has to be seen too.
            self._watching = self._task(self._watch())
        self._queued.append(execution)
        self._pump()

    def withdraw(self, execution: Execution) -> bool:
        """Take back a cell that was not sent yet; False when it was."""
        if execution not in self._queued:
            return False
        self._queued.remove(execution)
        execution.end(Done("aborted"))
        return True

    def runs(self, execution: Execution) -> bool:
        """Whether the kernel has this cell now."""
        running = self._current
        return running is not None and running.execution is execution and not running.over

    def follow(self, execution: Execution) -> None:
        """Let ``execution`` be a cell of an earlier owner: the one of its id, or else the first that is known of."""
        first = next((known for known in self._left.values() if not known.followed), self._any)
        found = self._left.get(execution.id) or (None if execution.id else first)
        if found is not None:
            execution.take_over(found.execution)
            found.execution = execution
        else:
            found = _Running(execution)
            if execution.id:
                self._left[execution.id] = found
            else:
                self._any = found
        found.followed = True
        if not found.over:
            # Cells run in order: when one that was sent now has ended, so have all before.
            self.submit(Execution("", self._key, silent=True))

    def answer(self, text: str) -> None:
        """Give the cell that waits for it a line. Raises ``illegal_transition`` when none waits."""
        asker = next((known for known in self._all() if known.execution.asked), None)
        if asker is None:
            raise SandboxGatewayError("illegal_transition", "no cell waits for input", "Answer an InputRequest.")
        asker.execution.asked = False
        self._send(Channel.STDIN, "input_reply", {"status": "ok", "value": text}, parent=self._asked)

    def cut_off(self, why: SandboxGatewayError) -> None:
        """End every cell with ``why``."""
        for running in self._all():
            running.finish(why)
        for execution in self._queued:
            execution.end(why)
        self._queued.clear()
        self._left.clear()
        self._current = self._any = None

    def _cut_off_some(self, executions: Sequence[Execution], why: SandboxGatewayError) -> None:
        for running in self._all():
            if running.execution in executions:
                running.finish(why)
        for execution in [one for one in self._queued if one in executions]:
            self._queued.remove(execution)
            execution.end(why)
        self._left = {key: known for key, known in self._left.items() if not known.over}
        self._any = None if self._any is not None and self._any.over else self._any
        self._current = None if self._current is not None and self._current.over else self._current
        self._pump()

    def restarting(self) -> None:
        """The kernel is ended for a new one: :meth:`restarted` has to follow, whatever becomes of that."""
        self._watching.cancel()
        self.cut_off(SandboxGatewayError("kernel_died", "the kernel was restarted", "Run the cell again."))

    def restarted(self) -> None:
        """The kernel is a new one."""
        if self.gone is None:
            self._watching = self._task(self._watch())

    def leave(self, why: SandboxGatewayError) -> None:
        """This process has nothing to do with the sandbox any more."""
        if self.gone is None:
            self.gone = why
            self.cut_off(why)
            _clients.pop(self.live, None)
            self._subscription.close()
            if self.has_seat:
                self.live.seat.release()
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    # To the kernel

    def _pump(self) -> None:
        if self._current is not None or not self._queued:
            return
        running = _Running(self._queued.popleft())
        self._current = running
        execution = running.execution
        content = {
            "code": execution.code,
            "silent": execution.silent,
            "store_history": not execution.silent,
            "user_expressions": {},
            "allow_stdin": execution.stdin,
            "stop_on_error": False,
        }
        self._send(Channel.SHELL, "execute_request", content, msg_id=execution.id)
        if execution.timeout is not None:
            self._task(self._expire(running, execution.timeout))

    def _send(
        self, channel: Channel, msg_type: str, content: Mapping[str, Any], *, msg_id: str = "", parent: bytes = b"{}"
    ) -> None:
        parts = messages.build(
            self._key, msg_type, content, topic=IDENTITY, parent=parent, session=self._session, msg_id=msg_id
        )
        self.live.seat.channels.request(int(channel), parts)

    async def _expire(self, running: _Running, timeout: float) -> None:
        """Interrupt a cell whose time is over; a sleeping kernel's time stands still."""
        if await self._awake_for(running, timeout):
            return
        # Before: the cell may have ended when the interrupt returns.
        running.late = SandboxGatewayError("timeout", f"the cell ran longer than {timeout:g} s", "It was interrupted.")
        try:
            await self.live.interrupt()
        except SandboxGatewayError as error:
            log.warning("sandbox %s: a cell whose time was over could not be interrupted: %s", self.live.id, error)
        if not await self._awake_for(running, INTERRUPT_PATIENCE):
            text = f"the cell ran longer than {timeout:g} s and does not heed an interrupt"
            running.execution.end(SandboxGatewayError("timeout", text, "`restart()` ends it; until then it runs on."))

    async def _awake_for(self, running: _Running, seconds: float) -> bool:
        """Let ``seconds`` pass in which the kernel is awake; True as soon as the cell has ended."""
        loop = asyncio.get_running_loop()
        left = seconds
        while left > 0:
            begun, asleep = loop.time(), self.live.seat.channels.asleep
            try:
                async with asyncio.timeout(min(left, _LOOK)):
                    await running.ended.wait()
                return True
            except TimeoutError:
                if not asleep:
                    left -= loop.time() - begun
        return running.over

    # From the kernel

    def _deliver(self, channel: int, parts: Sequence[Buffer]) -> None:
        head = results.head(self._key, parts)
        running = self._find(head) if head is not None else None
        if head is None or running is None or running.over:
            return
        running.heard = asyncio.get_running_loop().time()
        if channel == Channel.IOPUB and head.msg_type == "status":
            running.idle = results.state(head.content) == "idle"
        elif channel == Channel.SHELL and head.msg_type == "execute_reply":
            running.reply = results.done(head.content)
            self._task(self._await_idle(running))
        elif channel == Channel.IOPUB or (channel == Channel.STDIN and head.msg_type == "input_request"):
            if head.msg_type == "error":
                running.failed = True
            elif channel == Channel.STDIN:
                at = messages.delimiter_index(parts) or 0
                self._asked = bytes(parts[at + 2])
                running.execution.asked = True
            running.execution.add(parts)
        if running.idle and running.reply is not None:
            self._finish(running, running.reply)

    def _find(self, head: Head) -> _Running | None:
        current = self._current
        if current is not None and head.parent == current.execution.id:
            return current
        if not head.parent or head.session == self._session:
            return None
        if head.parent not in self._left and head.msg_type in _OF_A_CELL and len(self._left) < MAX_LEFT:
            found, self._any = self._any or _Running(Execution("", self._key, id="")), None
            found.execution.id = head.parent
            self._left[head.parent] = found
        return self._left.get(head.parent)

    async def _await_idle(self, running: _Running) -> None:
        """A reply came; the idle status comes with the last of the output, at the other end of a busy machine."""
        loop = asyncio.get_running_loop()
        while not running.over and running.reply is not None:
            if not self.live.seat.channels.asleep and loop.time() - running.heard > IDLE_PATIENCE:
                self._finish(running, running.reply)
                return
            try:
                async with asyncio.timeout(_LOOK):
                    await running.ended.wait()
            except TimeoutError:
                continue

    def _finish(self, running: _Running, how: Done) -> None:
        running.finish(running.late or how)
        if running is self._current:
            self._current = None
            # Cells run in order, so whatever another owner sent before this one has ended too.
            for known in (*self._left.values(), *((self._any,) if self._any is not None else ())):
                if not known.over:
                    known.finish(known.reply or Done("error" if known.failed else "ok"))
            self._any = None
            self._pump()

    # The end

    def _dead(self) -> SandboxGatewayError | None:
        if self.live.poll() is None:
            return None
        if self.live.death is not None:
            return SandboxGatewayError("kernel_died", f"the kernel died: {self.live.death.describe()}")
        told = self.live.kernel.exit
        return SandboxGatewayError("kernel_died", told.describe() if told is not None else "the kernel died")

    async def _watch(self) -> None:
        if await self.live.wait_kernel() is None and self.live.left:
            self.has_seat = False  # it was released by who handed over
            self.leave(left(self.live.id))
            return
        why = self._dead() or SandboxGatewayError("kernel_died", "the kernel died")
        ended = [*(running.execution for running in self._all()), *self._queued]
        await asyncio.sleep(LAST_WORDS)
        if self._dead() is None:
            # Somebody else has restarted it meanwhile; what was sent since then is the new one's.
            self._cut_off_some(ended, why)
            self._watching = self._task(self._watch())
            return
        self.cut_off(why)
        if self.live.death is not None:
            await self.live.ended.wait()
            self.leave(why)

    def _all(self) -> list[_Running]:
        found = [known for known in (self._current, self._any) if known is not None]
        return [*found, *self._left.values()]

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Running:
    """A cell that the kernel has, and how far it is."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.reply: Done | None = None
        self.idle = False
        self.failed = False
        self.over = False
        self.followed = False
        self.late: SandboxGatewayError | None = None
        self.heard = 0.0
        self.ended = asyncio.Event()

    def finish(self, how: Done | SandboxGatewayError) -> None:
        self.over = True
        self.ended.set()
        self.execution.asked = False
        self.execution.end(how)
