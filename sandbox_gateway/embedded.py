"""One sandboxed kernel for an application that speaks ZMQ: sandbox, channels and bridge under one id.

Everything here runs on the background loop (:mod:`sandbox_gateway.background`). The bridge's endpoints stay the same
across restarts and across the death of a sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sandbox_gateway import request as requests
from sandbox_gateway.background import background_loop
from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.images.service import Progress
from sandbox_gateway.keeper import take_over
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import LIVE, Death, DeathKind, KernelSpec, OnOwnerExit, State
from sandbox_gateway.profiles import load_profiles
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.seat import Seat

log = logging.getLogger(__name__)

SAVING = 60.0
"""Seconds that the end of the process is held up at most for each kernel that its profile has suspended then."""

SETTLING = 2.0
"""Seconds that the end of the process waits for a start that goes on, which takes some hundredths."""

_LOOK = 1.0
"""Seconds between two looks at a kernel that another process owns."""
_ENDED = frozenset({"unknown_sandbox", "illegal_transition", "expired"})
_lifecycles: dict[Paths, Lifecycle] = {}
_of_parents: list[Lifecycle] = []
_open_kernels: set[SandboxedKernel] = set()


def _after_fork() -> None:
    """A forked child owns nothing of its parent's: not its sandboxes, nor its socket, nor locks of its loop.

    They are kept, unused, so that no finaliser touches what they share with the parent.
    """
    _of_parents.extend(_lifecycles.values())
    _lifecycles.clear()
    _open_kernels.clear()


os.register_at_fork(after_in_child=_after_fork)


def lifecycle() -> Lifecycle:
    """This process's lifecycle for the current environment's paths; made on first use, closed at exit."""
    paths = discover()
    if paths not in _lifecycles:
        made = Lifecycle(paths)
        _lifecycles[paths] = made

        async def close() -> None:
            _lifecycles.pop(paths, None)
            await asyncio.gather(*(kernel.settle(SETTLING) for kernel in _open_kernels))
            await made.close()
            for kernel in tuple(_open_kernels):
                kernel.let_go()

        def saving() -> float:
            policies = [sandbox.record.on_owner_exit for sandbox in tuple(made.live.values())]
            return SAVING * policies.count(OnOwnerExit.SUSPEND)

        background_loop().on_shutdown(close, saving)
    return _lifecycles[paths]


class SandboxedKernel:
    """A kernel under one id: launch, restart in place, signal, stop, close."""

    def __init__(self, kernel_id: str, profile: str, *, key: bytes) -> None:
        self.id = requests.chosen_id(kernel_id)
        self._profile_name = profile
        self._key = key
        self._sandbox: LiveSandbox | None = None
        self._seat: Seat | None = None
        self._starting: asyncio.Task[None] | None = None
        self._exit_expected = False
        self._closing: asyncio.Task[None] | None = None

    async def launch(
        self,
        kernel: KernelSpec,
        *,
        directory: Path,
        client_environment: Mapping[str, str],
        name: str,
        private: tuple[Path, ...] = (),
        progress: Callable[[str], None],
    ) -> Any:
        """Start the kernel, or boot it again in the sandbox it has; returns jupyter_client's connection info.

        Where the kernel is restored it returns as soon as that runs: while it gets its identity an application can
        connect, and its requests wait. Should that fail, the kernel starts in another way, and where none is left, it
        has died.
        """
        owner = lifecycle()
        profile = load_profiles(owner.paths).get(self._profile_name)
        wanted = CreateRequest(self.id, profile, kernel, self._key, directory, client_environment, name, private)
        await self._taken_back()
        if self._seat is None:
            hint = requests.missing_file_hint(wanted)
            self._seat = Seat(await owner.claim(self.id), self._key, missing_file_hint=hint)
            _open_kernels.add(self)
        try:
            with _stored(owner):
                return await self._start(owner, self._seat, wanted, progress)
        except BaseException:
            if self._sandbox is None:
                self.let_go()
            raise

    async def _start(self, owner: Lifecycle, seat: Seat, wanted: CreateRequest, progress: Callable[[str], None]) -> Any:
        bridge = seat.bridge()
        sandbox = self._sandbox
        if sandbox is None or sandbox.death is not None or not await self._rebooted(owner, sandbox, wanted):
            lost = sandbox.death if sandbox is not None else None
            if lost is not None and lost.kind is DeathKind.EXPIRED:
                # An application that restarts dead kernels by itself would put an empty one in its place.
                text = f"kernel {self.id} has expired: {lost.describe()}"
                raise SandboxGatewayError("expired", text, "Its memory and files are gone; start a new kernel.")
            await self._created(owner, seat, wanted, progress)
        bridge.publish_endpoints()
        return bridge.connection_info

    async def _created(
        self, owner: Lifecycle, seat: Seat, wanted: CreateRequest, progress: Callable[[str], None]
    ) -> None:
        """Return when there is a sandbox, or one that needs but its identity."""
        self._exit_expected = False
        seat.restored.clear()
        self._starting = starting = asyncio.create_task(self._create(owner, seat, wanted, progress))
        restored = asyncio.create_task(seat.restored.wait())
        try:
            await asyncio.wait({starting, restored}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            await self._give_up_start()
            raise
        finally:
            restored.cancel()
        if starting.done():
            self._starting = None
            await starting
        else:
            starting.add_done_callback(self._report)

    async def _create(
        self, owner: Lifecycle, seat: Seat, wanted: CreateRequest, progress: Callable[[str], None]
    ) -> None:
        lost = self._sandbox.death if self._sandbox is not None else None
        with _stored(owner):
            sandbox = await owner.create(wanted, seat, _phases(progress))
        if self._exit_expected:
            sandbox.expect_exit()
        self._sandbox = sandbox
        if lost is not None:
            seat.channels.notice(f"[sandbox] A new sandbox was made ({lost.describe()}); earlier files are lost\n")

    def _report(self, starting: asyncio.Task[None]) -> None:
        """A start has ended whose application was told already that it goes well."""
        error = None if starting.cancelled() else starting.exception()
        if error is not None:
            log.error("kernel %s could not be started: %s", self.id, error)
            if self._seat is not None:
                self._seat.channels.kernel_died(f"\n[sandbox] The kernel could not be started: {error}\n")

    async def settle(self, patience: float | None = None) -> None:
        """Return when a start that goes on has ended, well or not; given up after ``patience`` seconds."""
        if self._starting is not None:
            _, going_on = await asyncio.wait({self._starting}, timeout=patience)
            if going_on:
                await self._give_up_start()

    async def _give_up_start(self) -> None:
        """End a start that goes on; nothing of it is left."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})

    async def _rebooted(self, owner: Lifecycle, sandbox: LiveSandbox, wanted: CreateRequest) -> bool:
        """Boot the kernel again in its sandbox; False when that had to be given up, and is gone."""
        image = await owner.image(wanted.profile, sandbox.launch.uid)
        try:
            await sandbox.reboot(requests.kernel(wanted, image))
        except SandboxGatewayError as error:
            if not await sandbox.beyond_waking(error):
                raise
            return False
        return True

    def let_go(self) -> None:
        """Close the endpoints and give the id up; the directory goes with it."""
        _open_kernels.discard(self)
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.release()

    async def _taken_back(self) -> LiveSandbox | None:
        """The sandbox; one that was handed over to another process is asked back. None when it has ended there."""
        await self.settle()
        sandbox = self._sandbox
        if sandbox is None or not sandbox.left:
            return sandbox
        owner = lifecycle()
        try:
            self._sandbox = await take_over(owner, self.id)
            self._seat = owner.entrust(self.id)
            self._seat.bridge()
        except SandboxGatewayError as error:
            if error.code not in _ENDED:
                raise
            self._sandbox = self._seat = None
        return self._sandbox

    def poll(self) -> int | None:
        """None while the kernel lives, else its return code. Thread-safe: it only reads."""
        starting = self._starting
        if starting is not None and not starting.done():
            return None
        sandbox = self._sandbox  # set before a start has ended
        if sandbox is None:
            return 0
        return _poll_elsewhere(self.id) if sandbox.left else sandbox.poll()

    async def wait(self) -> int:
        """Return when the kernel has ended."""
        await self.settle()
        while (sandbox := self._sandbox) is not None:
            code = await (asyncio.to_thread(self.poll) if sandbox.left else sandbox.wait_kernel())
            if code is not None:
                return code
            await asyncio.sleep(_LOOK)
        return 0

    async def signal(self, number: int) -> None:
        """Send a signal to the kernel's process group inside; nothing while it starts, when nothing of it runs yet."""
        if self._starting is not None and not self._starting.done():
            return
        sandbox = await self._taken_back()
        if sandbox is not None:
            await sandbox.signal(number)

    def expect_exit(self) -> None:
        """The application asks the kernel to shut down. Thread-safe: it only sets a mark."""
        self._exit_expected = True
        if self._sandbox is not None:
            self._sandbox.expect_exit()

    async def stop(self, grace: float) -> None:
        """End the kernel's processes; the sandbox stays for a restart."""
        await self._give_up_start()
        if self.poll() is None:
            sandbox = await self._taken_back()
            if sandbox is not None:
                await sandbox.stop_kernel(grace)

    async def close(self) -> None:
        """End the sandbox and the endpoints; nothing of this kernel is left. One that was handed over goes on.

        Goes on to its end when the caller is cancelled.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._give_up_start()
        if self._sandbox is not None:
            await self._sandbox.destroy(Death(DeathKind.STOPPED, "shut down by its application"))
        self.let_go()


@contextlib.contextmanager
def _stored(owner: Lifecycle) -> Iterator[None]:
    """What the operating system refuses is told with what to do about it."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, f"the kernel could not be started in {owner.paths.home}") from error


def _poll_elsewhere(sandbox_id: str) -> int | None:
    """As :meth:`SandboxedKernel.poll`, of a kernel that another process owns: what the store tells."""
    try:
        record = lifecycle().store.get(sandbox_id)
    except SandboxGatewayError as error:
        # It was removed; of a store that cannot be read just now nothing is known.
        return -signal.SIGKILL if error.code == "unknown_sandbox" else None
    if record.state in LIVE or record.state is State.SUSPENDED:
        return None
    code = record.death.exit_code if record.death is not None else None
    return code if code is not None else -signal.SIGKILL


def _phases(say: Callable[[str], None]) -> Callable[[Progress], None]:
    """Tell the phases of a long step, not each of its bytes."""

    def tell(step: Progress) -> None:
        if step.message:
            say(step.message)

    return tell
