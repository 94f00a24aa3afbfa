"""The agent's process: puts the parts together and turns the loop."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.agent import privileges, relay
from sandbox_gateway.agent.control import Control
from sandbox_gateway.agent.kernel import Hooks, Kernel
from sandbox_gateway.agent.link import Link
from sandbox_gateway.agent.logs import LogStreams
from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.agent.owner import OwnerWatch
from sandbox_gateway.wire.events import Attached, Event, Message
from sandbox_gateway.wire.frames import Buffer, Channel
from sandbox_gateway.wire.messages import MAX_MESSAGE, MAX_PARTS

DIRECTORY: Final = "/run/kernel"
"""Where the kernel's sockets are, in a sandbox. Elsewhere a temporary directory is made."""
_FAREWELL: Final = 2.0

_CHANNELS: Final = {"shell": Channel.SHELL, "control": Channel.CONTROL, "stdin": Channel.STDIN, "iopub": Channel.IOPUB}
_NAMES: Final = {channel: name for name, channel in _CHANNELS.items() if name != "iopub"}


class Agent:
    """One process, one kernel at a time, one link."""

    def __init__(self, read_fd: int, write_fd: int, directory: Path) -> None:
        self._loop = Loop()
        self._ending = False
        self._done = False
        info = {"pid": os.getpid(), "uid": os.getuid(), "phase": "none", "generation": 0, "identity": False}
        self._link = Link(self._loop, read_fd, write_fd, info, self._on_event, self._on_link_end)
        hooks = Hooks(self._to_host, self._event, self._log_grown, self._link.hungry)
        self._directory = relay.KernelDirectory(directory)
        self._kernel = Kernel(self._loop, self._directory, hooks)
        self._owner = OwnerWatch(self._loop, lambda: self._shut_down("the process that owned it is gone"))
        self._link.heard = self._owner.alive
        self._logs = LogStreams(self._link.endpoint, self._kernel.log)
        self._control = Control(
            self._kernel, self._owner, self._to_owner, lambda: self._shut_down("stopped on request"), self._link.stats
        )
        self._loop.on_child(self._kernel.children_ended)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def run(self) -> None:
        """Turn the loop until the agent is told to end and everything is said."""
        link, turn = self._link, self._loop.turn
        while not self._done:
            link.flush()
            turn()
        deadline = time.monotonic() + _FAREWELL
        while link.busy and time.monotonic() < deadline:
            link.flush()
            self._loop.later(0.05, lambda: None)
            turn()
        self._directory.remove()

    # -- from the host

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Attached):
            self._loop.renew()
            self._loop.soon(self._kernel.restored)
        if not isinstance(event, Message):
            self._logs.handle(event)
        elif event.channel == Channel.AGENT:
            if event.parts:
                self._control.request(*event.parts[:2])
        elif event.channel in _NAMES:
            self._kernel.send(_NAMES[Channel(event.channel)], event.parts)

    def _on_link_end(self) -> None:
        self._shut_down("the link was closed")

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == signal.SIGTERM:
            self._loop.soon(lambda: self._shut_down("stopped on request"))

    # -- to the host

    def _to_host(self, channel: str, parts: Sequence[Buffer]) -> None:
        size = sum(map(len, parts))
        if len(parts) > MAX_PARTS or size > MAX_MESSAGE:
            # What the link cannot carry is left out and logged: user code must not be able to end PID 1 with it.
            text = f"[sandbox] a message of {len(parts)} parts and {size} bytes on {channel} was left out: too big\n"
            self._kernel.log.write(text.encode())
            return
        self._link.send(_CHANNELS[channel], parts)

    def _to_owner(self, value: dict[str, Any]) -> None:
        self._link.send(Channel.AGENT, [json.dumps(value, separators=(",", ":")).encode()])

    def _event(self, event: dict[str, Any]) -> None:
        kernel = self._kernel
        self._link.endpoint.info.update(
            phase=kernel.phase.value, generation=kernel.generation, identity=kernel.identity
        )
        self._to_owner(event)

    def _log_grown(self) -> None:
        self._logs.grown()

    # -- the end

    def _shut_down(self, reason: str) -> None:
        if not self._ending:
            self._ending = True
            self._kernel.end_for(reason, self._finish)

    def _finish(self) -> None:
        self._done = True


def take_link() -> tuple[int, int]:
    """Move standard input and output, which are the link, to descriptors that no child gets, and put null there."""
    read_fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)
    write_fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 10)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if null > 2:
        os.close(null)
    return read_fd, write_fd


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent on standard input and output; returns the exit status."""
    wanted = _directory_option(sys.argv[1:] if argv is None else argv)
    read_fd, write_fd = take_link()
    privileges.protect_self()
    with contextlib.suppress(OSError):
        os.chdir("/")
    os.umask(0o022)
    own = None
    directory = wanted or (DIRECTORY if os.getpid() == 1 else None)
    if directory is None:
        import tempfile

        own = tempfile.mkdtemp(prefix="kernel-")
        directory = own
    agent = Agent(read_fd, write_fd, Path(directory))
    gc.freeze()
    agent.run()
    if own is not None:
        import shutil

        shutil.rmtree(own, ignore_errors=True)
    return 0


def _directory_option(argv: Sequence[str]) -> str | None:
    """Where the kernel's sockets go, if it was said. By hand: ``argparse`` is a tenth of PID 1's time to start."""
    if not argv:
        return None
    if len(argv) == 2 and argv[0] == "--directory":
        return argv[1]
    raise SystemExit("usage: agent [--directory DIRECTORY]")
