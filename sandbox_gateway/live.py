"""One sandbox that this process owns: its link, its kernel, its end.

Everything here runs on one event loop (DESIGN 4.15). A sandbox ends in one of two ways: it is destroyed on request,
or it dies and the reason is recorded; in both its processes, mounts, cgroups and files are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.link.host import Link
from sandbox_gateway.model import Death, DeathKind, KernelSpec, SandboxRecord, SandboxSpec, State
from sandbox_gateway.owner import OwnerLock
from sandbox_gateway.request import Identity
from sandbox_gateway.runtimes.base import Handle, Runtime, Stats
from sandbox_gateway.store import Store

log = logging.getLogger(__name__)

ATTACH_TIMEOUT = 30.0
"""Seconds for PID 1 to answer the first attach; a cold start on a busy machine takes a few."""
HEARTBEAT = 5.0
"""Seconds between two signs of life to the agent."""
SILENCE = 60.0
"""Seconds without an answer after which a sandbox counts as dead."""
LOG_LIMIT = 16 << 20
"""Bytes of a kernel's raw output that are taken from the agent, who keeps 1 MiB, at most."""
_EXIT_NUMBERS = range(256)
_LOG_PATIENCE = 0.5
_KILL_PATIENCE = 0.2


@dataclass(frozen=True, slots=True)
class KernelExit:
    """How the kernel process ended."""

    code: int | None
    signal: int | None
    stderr_tail: str
    expected: bool
    reason: str = ""
    """Why the agent ended it, where it did so by itself."""

    @property
    def returncode(self) -> int:
        """As :attr:`subprocess.Popen.returncode`: negative for a signal."""
        if self.signal:
            return -self.signal
        return self.code if self.code is not None else 1

    def describe(self) -> str:
        """One line for people."""
        if self.reason:
            return self.reason
        if self.signal:
            with contextlib.suppress(ValueError):
                return f"the kernel was ended by {signal.Signals(self.signal).name}"
            return f"the kernel was ended by signal {self.signal}"
        return f"the kernel exited with code {self.code}"


class LiveSandbox:
    """Drives one running sandbox; made by :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    def __init__(
        self,
        spec: SandboxSpec,
        record: SandboxRecord,
        who: Identity,
        *,
        runtime: Runtime,
        store: Store,
        lock: OwnerLock,
        channels: KernelChannels,
        key: bytes,
        on_end: Callable[[LiveSandbox], object],
        log_file: Path,
    ) -> None:
        self.spec = spec
        self.record = record
        self.channels = channels
        self.death: Death | None = None
        self.kernel_exit: KernelExit | None = None
        self.ended = asyncio.Event()
        self._kernel_gone = asyncio.Event()
        self._who = who
        self._runtime = runtime
        self._store = store
        self._lock = lock
        self._key = key
        self._on_end = on_end
        self._log_file = log_file
        self._handle: Handle | None = None
        self._link: Link | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False
        self._removal: asyncio.Task[None] | None = None
        self._boots = 0
        self._asked_to_exit: int | None = None
        self._serial = asyncio.Lock()

    @property
    def kernel_uid(self) -> int:
        """The kernel's uid inside."""
        return self._who.uid

    @property
    def id(self) -> str:
        """The sandbox's id, which is the kernel's."""
        return self.record.id

    @property
    def link(self) -> Link:
        """The link; raises ``link_failed`` before the first attach and after the end."""
        if self._link is None:
            raise SandboxGatewayError("link_failed", f"sandbox {self.id} is not running")
        return self._link

    # Creation, driven by Lifecycle.create

    async def create(self) -> None:
        """Take the runtime's steps, each recorded before it is taken, and attach to the agent."""
        directory = self._lock.directory
        async for handle in self._runtime.create(self.spec, directory):
            self._handle = handle
            await self._save(step=handle.step, handle=_handle_json(handle))
        assert self._handle is not None
        await self._save(step="start")
        self._handle = await self._runtime.start(self._handle)
        await self._save(step="attach", handle=_handle_json(self._handle))
        await self._attach()

    async def _attach(self) -> None:
        assert self._handle is not None
        handle = self._handle
        fds = await self._runtime.attach(handle)
        link = Link(
            fds.read_fd,
            fds.write_fd,
            on_message=self.channels.received,
            on_gap=self.channels.dropped,
            on_event=self._event,
            on_lost=self._lost,
        )
        self._link = link
        death = asyncio.ensure_future(self._runtime.wait(handle))
        attached = asyncio.ensure_future(link.attach(owner=str(self._lock.pid), timeout=ATTACH_TIMEOUT))
        try:
            await asyncio.wait({death, attached}, return_when=asyncio.FIRST_COMPLETED)
            if not attached.done():
                reason = death.result()
                raise SandboxGatewayError("runtime_failed", f"the sandbox ended while starting: {reason.describe()}")
            attached.result()
            await link.call("policy", on_owner_exit=str(self.record.on_owner_exit), grace=self.record.grace)
        except BaseException:
            death.cancel()
            attached.cancel()
            raise
        self._tasks = [asyncio.create_task(self._watch(death)), asyncio.create_task(self._heartbeat())]

    # The kernel inside

    async def boot(self, kernel: KernelSpec) -> None:
        """Start the kernel process; returns when it is spawned. Raises ``kernel_failed`` when it cannot be."""
        self.kernel_exit = None
        self._kernel_gone.clear()
        await self.link.call("start_kernel", **self._kernel_parameters(kernel))
        self.channels.connect(self.link)
        await self._move(State.RUNNING)

    async def reboot(self, kernel: KernelSpec) -> None:
        """Restart in place (DESIGN, Restart): end every process of the kernel's uid, keep the files, boot again."""
        async with self._serial:
            await self._move(State.RESTARTING)
            self.channels.disconnect()
            await self.link.call("restart_kernel", timeout=30.0, **self._kernel_parameters(kernel))
            self._boots += 1
            self.kernel_exit = None
            self._kernel_gone.clear()
            self.channels.connect(self.link)
            await self._move(State.RUNNING)

    def _kernel_parameters(self, kernel: KernelSpec) -> dict[str, Any]:
        return {
            "argv": list(kernel.argv),
            "env": dict(kernel.environment),
            "cwd": kernel.cwd,
            "uid": self._who.uid,
            "gid": self._who.gid,
            "interrupt_mode": kernel.interrupt_mode,
            "key": self._key.decode("ascii"),
            "rlimits": {},
            # The agent takes its own way for ipykernel's output; it knows that command and leaves others alone.
            "fast_iopub": True,
        }

    async def signal(self, number: int) -> None:
        """Send a signal to the kernel's process group; a kernel that is gone takes none."""
        if self.kernel_exit is None and self.death is None:
            await self.link.call("signal", signum=number)

    def expect_exit(self) -> None:
        """The kernel was asked to shut down: its end is no news. Thread-safe: it only sets a mark."""
        self._asked_to_exit = self._boots

    async def interrupt(self) -> None:
        """Interrupt what runs, in the kernelspec's own way."""
        await self.link.call("interrupt")

    async def stop_kernel(self, grace: float) -> None:
        """SIGTERM, ``grace`` seconds, SIGKILL; the sandbox stays."""
        if self.kernel_exit is None and self.death is None:
            await self.link.call("stop_kernel", timeout=grace + 30.0, grace=grace)

    def poll(self) -> int | None:
        """None while the kernel lives, else its return code (negative: a signal)."""
        if self.kernel_exit is not None:
            return self.kernel_exit.returncode
        if self.death is not None:
            return self.death.exit_code if self.death.exit_code is not None else -signal.SIGKILL
        return None

    async def wait_kernel(self) -> int:
        """Return when the kernel or the whole sandbox has ended."""
        while (code := self.poll()) is None:
            await self._kernel_gone.wait()
        return code

    async def stats(self) -> Stats:
        """Resource use of the sandbox now."""
        return await self._runtime.stats(self._handle) if self._handle is not None else Stats()

    async def log(self) -> bytes:
        """What the kernel wrote to its raw stdout and stderr, up to the agent's bound."""
        stream = await self.link.open_stream("log", {"follow": False})
        try:
            text = bytearray()
            while len(text) < LOG_LIMIT and (chunk := await stream.read()):
                text += chunk
            return bytes(text[:LOG_LIMIT])
        finally:
            await stream.close()

    # The end

    async def _keep_log(self) -> None:
        """Keep the kernel's raw output for `jupyter sandbox logs`: a short try, never a reason to fail."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_LOG_PATIENCE):
                text = await self.log()
            if text:
                await asyncio.to_thread(_write_private, self._log_file, text)

    async def destroy(self, death: Death) -> None:
        """End and remove everything; idempotent. ``death`` is recorded unless there is an earlier reason.

        Goes on to its end when the caller is cancelled: nobody else would finish what is half removed.
        """
        await self._end(death, State.TERMINATED)

    async def _end(self, death: Death, final: State) -> None:
        if self._removal is None:
            if self._ending:
                return
            self._ending = True
            self._removal = asyncio.create_task(self._finish(death, final))
        await asyncio.shield(self._removal)

    async def detach(self) -> None:
        """Leave the sandbox running for its next owner (``on_owner_exit`` is not ``terminate``)."""
        async with self._serial:
            if self._ending:
                return
            self._ending = True
            self.channels.disconnect()
            for task in self._tasks:
                task.cancel()
            await self.link.close(detach=True)
            await self._save(owner_pid=None)

    async def _finish(self, death: Death, final: State) -> None:
        async with self._serial:
            if final is State.TERMINATED and self._link is not None:
                await self._keep_log()
            self.death = self.death or death
            # Live until all of it is gone: whoever comes after a crash of ours still finds something to remove.
            with contextlib.suppress(SandboxGatewayError):
                await self._move(State.TERMINATING, death=self.death)
            self.channels.disconnect()
            for task in self._tasks:
                task.cancel()
            link, self._link = self._link, None
            if link is not None:
                with contextlib.suppress(Exception):
                    await link.close(detach=False)
            try:
                if self._handle is not None:
                    await self._runtime.destroy(self._handle)
                with contextlib.suppress(SandboxGatewayError):
                    await self._move(final, owner_pid=None)
            finally:
                self._kernel_gone.set()
                self.ended.set()
                self._on_end(self)

    async def _watch(self, death: asyncio.Future[Death]) -> None:
        self._died(self._explained(await death))

    def _died(self, death: Death) -> None:
        if self._ending:
            return
        log.warning("sandbox %s died: %s", self.id, death.describe())
        self.channels.kernel_died(f"\n[sandbox] The kernel died: {death.describe()}\n")
        self._ending = True
        self._removal = asyncio.create_task(self._finish(death, State.FAILED))
        self._removal.add_done_callback(self._removed)

    def _removed(self, removal: asyncio.Task[None]) -> None:
        if not removal.cancelled() and removal.exception() is not None:
            log.error("sandbox %s could not be removed; the next start tries again: %s", self.id, removal.exception())

    def _explained(self, death: Death) -> Death:
        if death.kind is DeathKind.OUT_OF_MEMORY and not death.detail and self.spec.limits.memory:
            size = self.spec.limits.memory / 2**20
            return replace(death, detail=f"out of memory at {size:.0f} MiB; its files are lost")
        return death

    async def _heartbeat(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT)
            try:
                await self.link.ping(HEARTBEAT)
                last = time.monotonic()
            except (TimeoutError, SandboxGatewayError):
                if time.monotonic() - last > SILENCE:
                    self._lost(TimeoutError(f"no sign of life for {SILENCE:.0f} seconds"))
                    return

    def _lost(self, error: Exception) -> None:
        """The link is beyond repair: a sandbox that does not speak is ended."""
        log.error("sandbox %s: link lost: %s", self.id, error)
        self._died(Death(DeathKind.AGENT_DIED, f"the sandbox stopped speaking: {error}"))

    def _event(self, event: Mapping[str, Any]) -> None:
        if event.get("event") != "kernel_exit":
            return
        gone = _kernel_exit(event)
        if gone is None:
            log.debug("sandbox %s: a malformed kernel_exit event was dropped", self.id)
            return
        if gone.signal == signal.SIGKILL and not gone.expected:
            # The host may have killed it for memory, and is then ending the rest: that reason comes a moment later.
            asyncio.get_running_loop().call_later(_KILL_PATIENCE, self._kernel_ended, gone, self._boots)
        else:
            self._kernel_ended(gone, self._boots)

    def _kernel_ended(self, gone: KernelExit, boot: int) -> None:
        if self._ending or boot != self._boots or self.kernel_exit is not None:
            # A kernel ends once: an agent that says so again and again fills neither the log nor the output.
            return
        self.kernel_exit = gone
        self._kernel_gone.set()
        if not gone.expected and boot != self._asked_to_exit:
            # Indented, so that no line of it can pass for one of ours.
            tail = "".join(f"\n    {line}" for line in gone.stderr_tail.strip().splitlines())
            log.warning("sandbox %s: %s%s", self.id, gone.describe(), tail)
            self.channels.notice(f"\n[sandbox] {gone.describe()}{tail}\n")

    # The record

    async def _move(self, state: State, **changes: Any) -> None:
        if state is not self.record.state:
            self.record = self.record.moved(state, time.time(), **changes)
            await asyncio.to_thread(self._store.put, self.record)

    async def _save(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        await asyncio.to_thread(self._store.put, self.record)


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)


def _kernel_exit(event: Mapping[str, Any]) -> KernelExit | None:
    code, number, tail = event.get("code"), event.get("signal"), event.get("stderr_tail", "")
    if any(value is not None and (type(value) is not int or value not in _EXIT_NUMBERS) for value in (code, number)):
        return None
    if not isinstance(tail, str):
        return None
    reason = event.get("reason", "")
    reason = reason[:500] if isinstance(reason, str) else ""
    return KernelExit(code, number, _printable(tail[-4000:]), bool(event.get("expected")), reason)


def _printable(text: str) -> str:
    """``text`` without control characters but newline and tab: it goes to terminals, logs and notebooks."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _handle_json(handle: Handle) -> dict[str, Any]:
    return {
        "id": handle.id,
        "runtime": handle.runtime,
        "directory": str(handle.directory),
        "step": handle.step,
        "data": dict(handle.data),
    }
