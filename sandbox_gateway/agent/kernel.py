"""One kernel after the other in the same place: start, readiness, relay, end.

A *generation* is one run of the kernel's program. Everything here is driven by callbacks of the loop; what comes out
goes through the three functions of :class:`Hooks`.
"""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, Final

from sandbox_gateway.agent import process, relay
from sandbox_gateway.agent.activity import Activity
from sandbox_gateway.agent.channels import ChannelHooks, KernelChannels
from sandbox_gateway.agent.identify import REQUEST as IDENTITY_REQUEST
from sandbox_gateway.agent.identify import Identification, Identity
from sandbox_gateway.agent.launch import Answer, KernelError, Launch
from sandbox_gateway.agent.logring import LogRing, tail
from sandbox_gateway.agent.loop import Loop
from sandbox_gateway.agent.probe import REQUEST as PING_REQUEST
from sandbox_gateway.agent.probe import Probe

_APPEAR_INTERVAL: Final = 0.01
_LAST_WORDS: Final = 2.0
_FAREWELL_GRACE: Final = 0.5
_KILL_INTERVAL: Final = 0.02
_KILL_LIMIT: Final = 10.0
_TAIL: Final = 16 * 1024


class Phase(enum.Enum):
    """Where a generation is in its life."""

    NONE = "none"
    SPAWNING = "spawning"
    BOOTING = "booting"
    READY = "ready"
    EXITING = "exiting"
    """Its process has ended; what it published last is still being read."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Where a kernel's messages and news go."""

    message: Callable[[str, Sequence[bytes | memoryview]], None]
    """Channel name and parts."""
    event: Callable[[dict[str, Any]], None]
    log: Callable[[], None]
    """The log ring has grown."""
    hungry: Callable[[], bool] = field(default=lambda: True)
    """False while the buffer towards the host takes no more of what could wait in the kernel."""


class Kernel:
    """The kernel of this sandbox. Operations answer through a callback, exactly once."""

    def __init__(self, loop: Loop, directory: relay.KernelDirectory, hooks: Hooks) -> None:
        self._loop = loop
        self._directory = directory
        self._hooks = hooks
        self.log = LogRing()
        self.phase = Phase.NONE
        self.generation = 0
        self.pid: int | None = None
        self.launch: Launch | None = None
        self.last_exit: dict[str, Any] | None = None
        self._stderr = LogRing(_TAIL)
        self._child: process.Child | None = None
        self._channels: KernelChannels | None = None
        self._gated: list[tuple[str, Sequence[bytes | memoryview]]] = []
        self._status: int | None = None
        self._expected = False
        self._reason = ""
        self._started: Answer | None = None
        self._failed: Callable[[], None] | None = None
        self._busy: str | None = None
        self._identification: Identification | None = None
        self._probe: Probe | None = None
        self.activity = Activity(loop.now)

    @property
    def identity(self) -> bool:
        """Whether the kernel that runs here can be given another identity."""
        return self.phase is Phase.READY and self._channels is not None and self._channels.greeting.identity

    # -- operations -----------------------------------------------------------------------------------------------

    def start(self, launch: Launch, answer: Answer) -> None:
        """Run ``launch``; answers ``{pid, generation}`` once the program is running (not yet ready)."""
        if self.phase is not Phase.NONE or self._busy:
            answer(KernelError("invalid_request", "a kernel is already running here"))
            return
        self._spawn(launch, answer)

    def add_modules(self, data: bytes | memoryview) -> None:
        """Keep more of the file from which a template's kernel imports; before its start (OSError)."""
        self._directory.add_modules(data)

    def stop(self, grace: float, answer: Answer) -> None:
        """SIGTERM to every process of the kernel's, SIGKILL after ``grace`` seconds; answers ``{exit}``."""
        if self._claim("stop", answer):
            self._end(grace, lambda error: self._release(answer, error or {"exit": self.last_exit}))

    def restart(self, launch: Launch, answer: Answer) -> None:
        """End every process of the kernel's and run ``launch`` in the same place; answers like :meth:`start`."""
        if not self._claim("restart", answer):
            return

        def ended(error: KernelError | None) -> None:
            if self._busy == "end":
                error = KernelError("invalid_request", "the sandbox is ending")
            else:
                self._busy = None
            if error is not None:
                answer(error)
            else:
                self._spawn(launch, answer)

        self._end(0.0, ended)

    def end_for(self, reason: str, done: Callable[[], None]) -> None:
        """End the kernel for good; the exit report says why. Goes before any other operation."""
        self._reason = reason
        self._busy = "end"
        self._end(_FAREWELL_GRACE, lambda _error: done())

    def identify(self, identity: Identity, answer: Answer) -> None:
        """Give the running kernel another identity; answers ``{seeded, missing}`` when it has become that.

        Clients' messages wait from now on until it has, or until the kernel is restarted.
        """
        channels, launch = self._channels, self.launch
        if self.phase is not Phase.READY or self._busy or channels is None or launch is None:
            raise KernelError("invalid_request", "no kernel is ready here")
        if not channels.greeting.identity:
            raise KernelError("unsupported", "only the sandbox's own ipykernel application can change its identity")
        if self._identification is not None and self._identification.waiting:
            raise KernelError("identity_failed", "the kernel has not yet answered when it was given another identity")

        after = identity.applied(launch)

        def draft() -> None:
            self._directory.draft_connection_file(self.generation, after.key, after.command.uid, after.command.gid)

        def accepted(undrafted: OSError | None) -> None:
            self.launch = after  # the kernel has become it, whatever was written
            if undrafted is not None:
                raise undrafted
            self._directory.publish_connection_file()

        self._identification = identification = Identification(self._loop, answer, draft, accepted, self._open_gate)
        channels.ask(launch.key, IDENTITY_REQUEST, identity.message(), identification.replied)
        identification.asked()

    def ping(self, seconds: float, answer: Answer) -> None:
        """Whether the kernel answers within so many seconds: ``{heartbeat, control}``, else ``kernel_failed``."""
        channels, launch = self._channels, self.launch
        if self.phase is not Phase.READY or channels is None or launch is None:
            raise KernelError("invalid_request", "no kernel is ready here")
        ours = channels.greeting.identity
        self._probe = probe = Probe(self._loop, channels.look, seconds, ours, answer)
        channels.ping(probe.heart_beats)
        if ours:
            channels.ask(launch.key, PING_REQUEST, {}, probe.control_answers)

    def restored(self) -> None:
        """Another host has attached, perhaps after a restore: look at everything, whatever was signalled."""
        self.children_ended()
        if self._channels is not None:
            self._channels.look()

    def _open_gate(self) -> None:
        """Hand on what clients have sent meanwhile."""
        gated, self._gated = self._gated, []
        for channel, parts in gated:
            self.send(channel, parts)

    def interrupt(self) -> None:
        """Interrupt as the kernelspec says: SIGINT to the process group, or an ``interrupt_request``."""
        if self.pid is None or self.launch is None or self._status is not None:
            raise KernelError("invalid_request", "no kernel is running")
        self.activity.used()
        if self.launch.interrupt_mode == "message":
            if self._channels is None or not self._channels.ask(self.launch.key, "interrupt_request", {}):
                raise KernelError("invalid_request", "the kernel is not up yet")
        else:
            process.signal_group(self.pid, signal.SIGINT)

    def signal(self, number: int) -> None:
        """Send a signal to the kernel's process group; one that has ended, as the host may not know yet, takes none."""
        if self.pid is not None and self._status is None:
            process.signal_group(self.pid, number)

    def send(self, channel: str, parts: Sequence[bytes | memoryview]) -> None:
        """Hand a client's message to the kernel; held back until the kernel is ready, dropped when there is none."""
        identifying = self._identification is not None and not self._identification.done
        if self._busy == "restart" or identifying or self.phase in (Phase.SPAWNING, Phase.BOOTING):
            self._gated.append((channel, parts))
        elif self.phase is Phase.READY and self._channels is not None:
            self.activity.sent(channel, parts)
            self._channels.send(channel, parts)

    def children_ended(self) -> None:
        """Reap; called by the loop on SIGCHLD."""
        for pid, status in process.reap():
            if pid == self.pid and self._status is None:
                self._status = status
                self._exited()

    # -- start ----------------------------------------------------------------------------------------------------

    def _claim(self, operation: str, answer: Answer) -> bool:
        if self._busy or self.phase is Phase.SPAWNING:
            answer(KernelError("invalid_request", f"the kernel is busy with another {self._busy or 'start'}"))
            return False
        self._busy = operation
        return True

    def _release(self, answer: Answer, result: dict[str, Any] | KernelError) -> None:
        if self._busy != "end":
            self._busy = None
        answer(result)

    def _spawn(self, launch: Launch, answer: Answer) -> None:
        self.generation += 1
        self.launch = launch
        self._expected = False
        self._reason = ""
        self._status = None
        self._stderr = LogRing(_TAIL)
        command = launch.command
        try:
            self._directory.prepare(self.generation, launch.key, command.uid, command.gid)
            argv = process.substitute(command.argv, str(self._directory.connection_file))
            environment = dict(command.environment)
            fast = process.with_fast_iopub(argv) if launch.fast_iopub else None
            if fast is not None:
                argv = fast
                environment["SANDBOX_IOPUB_FD"] = str(process.EXTRA_FD)
                if launch.preload is not None:
                    environment["SANDBOX_PRELOAD"] = " ".join(launch.preload)
                    if self._directory.modules.exists():
                        environment["SANDBOX_MODULES"] = str(self._directory.modules)
            child = process.spawn(replace(command, argv=argv, environment=environment), extra_pipe=fast is not None)
        except OSError as error:
            self._directory.forget(self.generation)
            answer(KernelError("kernel_failed", f"the kernel's files could not be made: {error.strerror}"))
            return
        except process.SpawnError as error:
            self._directory.forget(self.generation)
            answer(KernelError("kernel_failed", str(error)))
            return
        self.phase = Phase.SPAWNING
        self.pid = child.pid
        self._child = child
        self._started = answer
        self._loop.watch(child.failure, self._exec_done)
        self._loop.watch(child.stdout, partial(self._read_log, child.stdout, is_error=False))
        self._loop.watch(child.stderr, partial(self._read_log, child.stderr, is_error=True))
        self.activity.began()
        hooks = ChannelHooks(self._message, self._ready, self._pipe_broken, self.activity.status, self._hooks.hungry)
        self._channels = KernelChannels(self._loop, hooks, child.extra, launch.welcome)

    def _exec_done(self) -> None:
        child = self._child
        assert child is not None
        try:
            text = os.read(child.failure, 4096).decode("utf-8", "replace")
        except BlockingIOError:
            return
        self._loop.forget(child.failure)
        os.close(child.failure)
        child.failure = -1
        answer, self._started = self._started, None
        assert answer is not None
        if text:
            # Answered when the child is reaped and its place is free again; there is no second report.
            self._failed = lambda: answer(KernelError("kernel_failed", text))
            self._gated.clear()
            self.phase = Phase.BOOTING
            if self._status is not None:
                self._exited()
            return
        self.phase = Phase.BOOTING
        self._hooks.event({"event": "kernel_started", "pid": child.pid, "generation": self.generation})
        answer({"pid": child.pid, "generation": self.generation})
        # Behind the answer: what is needed next takes a while to load, and the kernel boots meanwhile.
        self._loop.soon(_load_sockets)
        self._await_sockets(self.generation)
        if self._status is not None:
            self._exited()

    def _await_sockets(self, generation: int) -> None:
        if generation != self.generation or self.phase is not Phase.BOOTING or self._channels is None:
            return
        if self._directory.present(generation):
            self._channels.connect(self._directory.sockets(generation))
        else:
            self._loop.later(_APPEAR_INTERVAL, lambda: self._await_sockets(generation))

    def _ready(self) -> None:
        if self.phase is not Phase.BOOTING or self._channels is None:
            return
        self.phase = Phase.READY
        greeting = self._channels.greeting
        event = {"event": "kernel_ready", "generation": self.generation, "identity": greeting.identity}
        if self.launch is not None and self.launch.preload is not None:
            event["preloaded"], event["preload_failed"] = greeting.preloads(self.launch.preload)
            self._directory.forget_modules()
            import_module("sandbox_gateway.agent.own_requests")  # each restored sandbox will need it at once
        self._hooks.event(event)
        self._open_gate()

    def _message(self, channel: str, parts: Sequence[bytes | memoryview]) -> None:
        if channel == "stdin":
            self.activity.asked(parts)
        self._hooks.message(channel, parts)

    def _pipe_broken(self, reason: str) -> None:
        self._reason = f"the kernel was ended: {reason}"
        if self.pid is not None and self._status is None:
            process.signal_group(self.pid, signal.SIGKILL)

    def _read_log(self, fd: int, *, is_error: bool) -> bool:
        try:
            data = os.read(fd, 64 * 1024)
        except BlockingIOError:
            return False
        if not data:
            self._loop.forget(fd)
            return False
        self.log.write(data)
        if is_error:
            self._stderr.write(data)
        self._hooks.log()
        return True

    # -- end ------------------------------------------------------------------------------------------------------

    def _exited(self) -> None:
        """The kernel's process was reaped: read its last words, then report."""
        if self.phase is Phase.SPAWNING and self._started is not None:
            self._exec_done()
            return
        if self.phase in (Phase.BOOTING, Phase.READY, Phase.SPAWNING):
            self.phase = Phase.EXITING
            if self._busy != "restart":
                self._gated.clear()
            self._last_words(self._loop.now() + _LAST_WORDS)

    def _last_words(self, deadline: float) -> None:
        assert self._channels is not None
        if self._channels.last_words() or self._loop.now() >= deadline:
            self._report()
        else:
            self._loop.later(_APPEAR_INTERVAL, lambda: self._last_words(deadline))

    def _report(self) -> None:
        child, status = self._child, self._status
        assert child is not None and status is not None
        for fd, is_error in ((child.stdout, False), (child.stderr, True)):
            for _ in range(64):
                if not self._read_log(fd, is_error=is_error):
                    break
        self._close_generation(child)
        code, number = process.outcome(status)
        self.last_exit = {
            "generation": self.generation,
            "code": code,
            "signal": number,
            "stderr_tail": tail(self._stderr.read(0, _TAIL)[1]),
            "expected": self._expected or bool(self._busy),
            "reason": self._reason,
        }
        self.phase = Phase.NONE
        self.pid = None
        failed, self._failed = self._failed, None
        if failed is not None:
            failed()
        else:
            self._hooks.event({"event": "kernel_exit", **self.last_exit})

    def _close_generation(self, child: process.Child) -> None:
        if self._channels is not None:
            self._channels.close()
            self._channels = None
        identification, self._identification = self._identification, None
        if identification is not None:
            identification.failed("the kernel ended while it was given its identity")
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.failed("the kernel has ended")
        for fd in (child.stdout, child.stderr):
            self._loop.forget(fd)
            os.close(fd)
        self._child = None
        self._directory.forget(self.generation)

    def _end(self, grace: float, done: Callable[[KernelError | None], None]) -> None:
        """End every process of the kernel's, then call ``done``."""
        self._expected = True
        now = self._loop.now()
        if grace > 0:
            process.signal_all(signal.SIGTERM)
        self._kill_from(now + grace, now + grace + _KILL_LIMIT, done)

    def _kill_from(self, when: float, deadline: float, done: Callable[[KernelError | None], None]) -> None:
        self.children_ended()
        left = process.has_children()
        now = self._loop.now()
        if not left and self.phase is Phase.NONE:
            done(None)
            return
        if now >= deadline:
            done(KernelError("kernel_failed", "some of the kernel's processes could not be ended"))
            return
        if left and now >= when:
            process.signal_all(signal.SIGKILL)
        self._loop.later(_KILL_INTERVAL, lambda: self._kill_from(when, deadline, done))


def _load_sockets() -> None:
    """Import libzmq's binding; not before the first kernel runs, since it takes as long as all else of the agent."""
    import_module("sandbox_gateway.agent.sockets")
