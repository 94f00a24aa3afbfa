"""Starting, driving and ending kernels for the benchmarks: jupyter_client, as an application uses it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from queue import Empty
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from bench import processes

PATIENCE = 120.0
"""Seconds after which a measure is given up as failed."""


class BenchError(Exception):
    """A measure that could not be taken, or gave a wrong result."""


class Unanswered(BenchError):
    """A kernel that never answered its first request."""


@dataclass
class Kernel:
    """A running kernel with one client."""

    manager: KernelManager
    client: BlockingKernelClient
    first_result: float
    """Seconds from the request to start until the result of a first execution was there."""

    def pids(self) -> set[int]:
        """Its processes on the host, all of them; the process that runs the benchmark is not among them."""
        provisioner: Any = self.manager.provisioner
        process = getattr(provisioner, "process", None)
        if process is not None:
            return processes.tree([process.pid])
        return processes.of_sandbox(str(provisioner.kernel_id))

    def execute(self, code: str) -> tuple[float, list[dict[str, Any]]]:
        """Run a cell: seconds until both its reply and its idle status have come, and its iopub messages."""
        messages: list[dict[str, Any]] = []
        begun = time.perf_counter()
        sent = self.client.execute(code, allow_stdin=False)
        while True:
            message = self.client.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") != sent:
                continue
            messages.append(message)
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        while True:
            reply = self.client.get_shell_msg(timeout=PATIENCE)
            if reply["parent_header"].get("msg_id") == sent:
                break
        seconds = time.perf_counter() - begun
        if reply["content"]["status"] != "ok":
            raise BenchError(f"{code!r}: {reply['content']}")
        return seconds, messages

    def stop(self) -> float:
        """End the kernel at once; seconds until the call came back and no process of it was left."""
        pids = self.pids()
        self.client.stop_channels()
        begun = time.perf_counter()
        self.manager.shutdown_kernel(now=True)
        while any(_runs(pid) for pid in pids):
            if time.perf_counter() - begun > PATIENCE:
                raise BenchError(f"processes of an ended kernel still run: {sorted(pids)}")
            time.sleep(0.001)
        return time.perf_counter() - begun


def _runs(pid: int) -> bool:
    """Whether a process runs; a zombie that waits to be reaped by somebody else does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def start(name: str) -> Kernel:
    """Start a kernel and have one thing computed.

    The first request goes out as soon as there is a channel. Its answer travels in the reply (``user_expressions``),
    so that nothing depends on when the iopub subscription arrives, and no client-side waiting time is in the figure
    (``wait_for_ready`` alone sits out 0.2 s).
    """
    begun = time.perf_counter()
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(stderr=subprocess.DEVNULL)  # the plain one's warnings about its own transport
    client = manager.blocking_client()
    client.start_channels()
    sent = client.execute("", silent=True, user_expressions={"answer": "6 * 7"}, allow_stdin=False)
    try:
        while True:
            reply = client.get_shell_msg(timeout=PATIENCE)
            if reply["parent_header"].get("msg_id") == sent:
                break
    except Empty:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        raise Unanswered(f"a kernel of {name} did not answer for {PATIENCE:.0f} s") from None
    seconds = time.perf_counter() - begun
    answer = reply["content"]["user_expressions"]["answer"]
    if answer.get("data", {}).get("text/plain") != "42":
        raise BenchError(f"{name}: wrong first result: {answer}")
    client.wait_for_ready(timeout=PATIENCE)
    return Kernel(manager, client, seconds)
