"""Suspend, resume, pause and fork: what the plain kernel has no counterpart for, and large states."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any

from bench import processes
from bench.kernels import PATIENCE, BenchError, Kernel, start
from bench.measures import Measure, Plan
from sandbox_gateway.background import background_loop
from sandbox_gateway.embedded import lifecycle
from sandbox_gateway.live import LiveSandbox

GIB = 1 << 30
_COUNTING = "import time\nfor number in range({count}):\n    print(number, flush=True)\n    time.sleep(0.005)"


def do(work: Coroutine[Any, Any, Any]) -> Any:
    """Run something on the loop that owns the kernels of this process."""
    return background_loop().run(work).result(PATIENCE)


def live(kernel: Kernel) -> LiveSandbox:
    """The sandbox of a kernel that this process owns."""
    provisioner: Any = kernel.manager.provisioner
    return lifecycle().live[str(provisioner.kernel_id)]


def naps(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """A small kernel in the middle of a printing cell: suspended, resumed, paused; every line once, in order."""
    suspend = Measure(
        "suspend a small kernel", "s", "lower", target_value=0.15, target_from="issue, plus writing its memory"
    )
    writing = Measure("of it, writing as much into a file", "s", "lower")
    resume = Measure("resume to first output", "s", "lower", target_value=0.25, target_from="issue")
    paused = Measure("the same from paused", "s", "lower", target_value=0.03, target_from="issue")
    left = Measure("processes of a suspended kernel", "processes", "lower", target_value=0.0, target_from="issue")
    kernel = start(names["sandboxed"])
    try:
        for number in range(plan.naps):
            sandbox = live(kernel)
            cell = Counting(kernel, 400)
            cell.until(10)
            begun = time.perf_counter()
            do(sandbox.suspend())
            seconds = time.perf_counter() - begun
            size = _disk(sandbox)
            written = _write(size)
            suspend.samples["sandboxed"].append(seconds - written)
            writing.samples["sandboxed"].append(written)
            suspend.note = f"without writing its {size / 1e6:.0f} MB, which is the next row"
            left.samples["sandboxed"].append(float(len(processes.of_sandbox(sandbox.id))))
            resume.samples["sandboxed"].append(cell.first_after(sandbox.resume))
            do(sandbox.pause())
            paused.samples["sandboxed"].append(cell.first_after(sandbox.resume))
            cell.finish()
            say(f"suspend and resume {number + 1} of {plan.naps}")
    finally:
        kernel.stop()
    return [suspend, writing, resume, paused, left]


def _write(size: int) -> float:
    """Seconds that it takes to write so many bytes where snapshots are written, as they are: into the page cache."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=os.environ["SANDBOX_GATEWAY_HOME"]) as file:
        begun = time.perf_counter()
        for done in range(0, size, len(data)):
            file.write(data[: size - done])
        file.flush()
        return time.perf_counter() - begun


class Counting:
    """A cell that prints numbers, each of which has to come once and in order."""

    def __init__(self, kernel: Kernel, count: int) -> None:
        self._client = kernel.client
        self._count = count
        self._sent = self._client.execute(_COUNTING.format(count=count), allow_stdin=False)
        self.text = ""

    def _take(self) -> bool:
        while True:
            message = self._client.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") != self._sent:
                continue
            if message["msg_type"] == "stream":
                self.text += message["content"]["text"]
            return not (message["msg_type"] == "status" and message["content"]["execution_state"] == "idle")

    def until(self, number: int) -> None:
        """Read on to a line."""
        while f"{number}\n" not in self.text.splitlines(keepends=True):
            if not self._take():
                raise BenchError("the cell ended too early")

    def first_after(self, wake: Callable[[], Coroutine[Any, Any, Any]]) -> float:
        """Seconds from a call to the first output that was not there before it."""
        while self._client.iopub_channel.msg_ready():
            self._take()
        begun = time.perf_counter()
        woken = background_loop().run(wake())
        before = len(self.text)
        while len(self.text) == before:
            if not self._take():
                raise BenchError("the cell ended too early")
        seconds = time.perf_counter() - begun
        woken.result(PATIENCE)
        return seconds

    def finish(self) -> None:
        """Read to the end; raises when a line is lost or doubled."""
        while self._take():
            pass
        self._client.get_shell_msg(timeout=PATIENCE)
        if self.text != "".join(f"{number}\n" for number in range(self._count)):
            raise BenchError("a line was lost or doubled by suspend and resume")


def _disk(sandbox: LiveSandbox) -> int:
    snapshot = sandbox.record.snapshot
    return lifecycle().snapshots.get(snapshot).size if snapshot is not None else 0


def forks(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """From the wish to fork a kernel to the child's first result."""
    measure = Measure(
        "fork to first result", "s", "lower", target_value=0.35, target_from="issue", note="aim 0.2; one child"
    )
    kernel = start(names["sandboxed"])
    try:
        kernel.execute("x = 6 * 7")
        for number in range(plan.naps):
            measure.samples["sandboxed"].append(do(_forked(live(kernel))))
            say(f"fork {number + 1} of {plan.naps}")
    finally:
        kernel.stop()
    return [measure]


async def _forked(parent: LiveSandbox) -> float:
    from sandbox_gateway import messages
    from sandbox_gateway.model import Death, DeathKind
    from sandbox_gateway.wire.frames import Channel

    begun = time.perf_counter()
    outcome = (await lifecycle().fork(parent.id))[0]
    if outcome.error is not None:
        raise BenchError(f"the fork failed: {outcome.error}")
    child = lifecycle().live[outcome.id]
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def take(channel: int, parts: Any) -> None:
        if channel == Channel.SHELL and not answered.done():
            answered.set_result(b"".join(map(bytes, parts)))

    child.seat.channels.subscribe(take)
    content = {"code": "", "silent": True, "user_expressions": {"x": "x"}, "allow_stdin": False}
    request = messages.build(child.launch.key, "execute_request", content)
    child.seat.channels.request(int(Channel.SHELL), [b"bench", *request])
    async with asyncio.timeout(PATIENCE):
        reply = await answered
    seconds = time.perf_counter() - begun
    await child.destroy(Death(DeathKind.STOPPED))
    if b"42" not in reply:
        raise BenchError("the child does not have its parent's state")
    return seconds


def states(names: dict[str, str], plan: Plan, say: Callable[[str], None]) -> list[Measure]:
    """Kernels with much data: to disk, and back to the first output."""
    measures = []
    for size in plan.states:
        shown = f"{size / GIB:.3g} GiB"
        suspend = Measure(f"suspend with {shown} of data", "s", "lower")
        speed = Measure(f"the same, written with {shown}", "MB/s", "higher")
        resume = Measure(f"resume with {shown} to first output", "s", "lower")
        if size == GIB:
            resume.target_value, resume.target_from = 1.2, "issue"
        kernel = start(names["sandboxed"])
        try:
            kernel.execute(f"import os\ndata = bytearray(os.urandom(1 << 20) * {size >> 20})")
            for _ in range(plan.large):
                sandbox = live(kernel)
                cell = Counting(kernel, 300)
                cell.until(5)
                begun = time.perf_counter()
                do(sandbox.suspend())
                seconds = time.perf_counter() - begun
                suspend.samples["sandboxed"].append(seconds)
                speed.samples["sandboxed"].append(_disk(sandbox) / 1e6 / seconds)
                resume.samples["sandboxed"].append(cell.first_after(sandbox.resume))
                cell.finish()
            say(f"{shown} of data")
        finally:
            kernel.stop()
        measures += [suspend, speed, resume]
    return measures
