"""A process that has only just been started."""

from __future__ import annotations

import time

from sandbox_gateway.host import processes


def wait_until_executed(pid: int) -> None:
    """Wait until a process that was started with an environment can be found by it.

    Whoever starts one goes on when the kernel closes what is to be closed at the exec, and /proc shows an empty
    environment for a moment longer.
    """
    deadline = time.monotonic() + 10
    while not processes.environment(pid):
        assert time.monotonic() < deadline, f"process {pid} has no environment"
        time.sleep(0.001)
