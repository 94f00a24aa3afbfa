"""One kernel of the gateway: its sandbox, its seat and its sessions under one id, through restarts and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandbox_gateway import request as requests
from sandbox_gateway.choices import images
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.service import Progress
from sandbox_gateway.kernelspecs import kernel_argv
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind, KernelSpec, State
from sandbox_gateway.profiles import WORKSPACE, Profile, load_profiles
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.seat import Seat
from sandbox_gateway.server.hub import Hub

if TYPE_CHECKING:
    from sandbox_gateway.server.gateway import Gateway, Wanted

log = logging.getLogger(__name__)

RESTARTS: Final = 5
"""Times that a kernel which ends by itself is started again within :data:`WINDOW`."""
WINDOW: Final = 60.0
"""Seconds."""
LAST_WORDS: Final = 0.3
"""Seconds for what a kernel printed before its end to arrive."""
_ON_PURPOSE = frozenset({DeathKind.STOPPED, DeathKind.EXPIRED, DeathKind.OWNER_GONE})


class ServedKernel:
    """Made by :class:`~sandbox_gateway.server.gateway.Gateway`; use it on its loop."""

    def __init__(self, gateway: Gateway, kernel_id: str, owner: str, directory: Path | None) -> None:
        self.id = kernel_id
        self.owner = owner
        self.muted = False
        """Whether its end is wanted, and no news."""
        self._gateway = gateway
        self._directory = directory
        self._live: LiveSandbox | None = None
        self._seat: Seat | None = None
        self._hub: Hub | None = None
        self._watching: asyncio.Task[None] | None = None
        self._restarts: deque[float] = deque(maxlen=RESTARTS)
        self._order = asyncio.Lock()

    @property
    def live(self) -> LiveSandbox:
        """Its sandbox, which may have ended."""
        assert self._live is not None
        return self._live

    @property
    def seat(self) -> Seat:
        """Its place in this process."""
        assert self._seat is not None
        return self._seat

    @property
    def hub(self) -> Hub:
        """Its WebSocket sessions."""
        assert self._hub is not None
        return self._hub

    @property
    def alive(self) -> bool:
        """Whether the kernel lives; one that is paused or suspended does."""
        return self.live.left or self.live.poll() is None

    @property
    def restarting(self) -> bool:
        """Whether it is being started again, or asked back from another process."""
        return self._order.locked()

    @property
    def dead(self) -> bool:
        """Whether its sandbox has died, for good unless its owner restarts it, and all of it is removed."""
        death = self.live.death
        over = death is not None and death.kind not in _ON_PURPOSE and self.live.ended.is_set()
        return over and not self.muted and not self.restarting

    @property
    def reason(self) -> str:
        """Why it is dead; empty while it is not."""
        if self.alive:
            return ""
        if self.live.death is not None:
            return self.live.death.describe()
        return self.live.kernel.exit.describe() if self.live.kernel.exit is not None else "the kernel ended"

    # Beginnings

    async def launch(self, profile: Profile, wanted: Wanted, progress: Callable[[Progress], None] | None) -> None:
        """Start it; on any failure nothing is left."""
        spec = KernelSpec(kernel_argv(profile), interrupt_mode=profile.interrupt_mode)
        request = CreateRequest(
            self.id,
            profile,
            spec,
            secrets.token_hex(32).encode(),
            self._directory,
            {**wanted.offered, **wanted.environment},
            wanted.name,
            self._gateway.settings.private,
            self.owner,
        )
        lifecycle = self._gateway.lifecycle
        lock = await lifecycle.claim(self.id)
        seat = Seat(lock, request.key, missing_file_hint=requests.missing_file_hint(request))
        try:
            hub = self._gateway.new_hub(seat)
            live = await lifecycle.create(request, seat, progress)
        except BaseException:
            seat.release()
            raise
        self.adopted(live, seat, hub)

    def adopted(self, live: LiveSandbox, seat: Seat, hub: Hub) -> None:
        """Be the kernel of ``live`` from now on."""
        self._live, self._seat, self._hub = live, seat, hub
        self._subject_to_quota(live)
        if live.record.parent is not None:
            # It was ready before it was anybody's, and says nothing at its start.
            hub.ready()
        self._watch()

    async def ours(self) -> LiveSandbox:
        """The sandbox, asked back where another process has it; raises what its record says when it has ended."""
        async with self._order:
            if self.live.left:
                from sandbox_gateway.keeper import take_over

                live: LiveSandbox = await take_over(self._gateway.lifecycle, self.id)
                self._gateway.taken_back(self, live)
        if self.live.death is not None:
            raise self.live.record.over()
        return self.live

    # The kernel inside

    async def restart(self, *, clean: bool = False) -> None:
        """Start the kernel anew; raises ``expired`` for one whose time was over.

        ``clean``: in a new sandbox, with nothing of the old one.
        """
        live = self.live
        if live.death is None:
            live = await self.ours()
        async with self._order:
            self._stays()
            if self.live is not live:
                return  # somebody else has just restarted it
            takes_a_place = clean or live.death is not None or live.state is State.SUSPENDED
            async with self._gateway.admission(live) if takes_a_place else contextlib.nullcontext():
                self._unwatch()
                try:
                    if clean and live.death is None:
                        # What cannot be made again is not ended.
                        requests.identity(await self._again(live), root=os.geteuid() == 0)
                        await live.destroy(Death(DeathKind.STOPPED, "restarted clean"))
                        if live.left:
                            raise SandboxGatewayError("owned_elsewhere", f"another process has taken sandbox {self.id}")
                    if live.death is not None or not await self._rebooted(live):
                        self.hub.publish_restart()
                        await self._make_again(live)
                finally:
                    self._watch()

    def _stays(self) -> None:
        if self.muted:
            raise SandboxGatewayError("unknown_sandbox", f"sandbox {self.id} is being ended", "Start a new one.")

    async def _rebooted(self, live: LiveSandbox) -> bool:
        try:
            await live.reboot(live.launch.kernel, self.hub.publish_restart)
        except SandboxGatewayError as error:
            if not await live.beyond_waking(error):
                raise
            return False
        return True

    async def _make_again(self, dead: LiveSandbox) -> None:
        """A new sandbox under the same id, for the sessions that are here."""
        death = dead.death
        assert death is not None
        if death.kind is DeathKind.EXPIRED:
            raise dead.record.over()
        await dead.ended.wait()
        wanted = await self._again(dead)
        self._stays()
        self._live = await self._gateway.lifecycle.create(wanted, self.seat)
        self._subject_to_quota(self._live)
        text = f"[sandbox] A new sandbox was made ({death.describe()}); variables and earlier files are lost\n"
        self.seat.channels.notice(text)

    async def _again(self, dead: LiveSandbox) -> CreateRequest:
        """What makes another like it, as its profile is by now; raises ``unknown_profile``, ``invalid_profile``."""
        launch = dead.launch
        directory = self._directory or next(
            (Path(it.source) for it in launch.spec.mounts if it.destination == WORKSPACE), None
        )
        profiles = await asyncio.to_thread(load_profiles, self._gateway.paths)
        profile = replace(profiles.get(dead.record.profile), limits=launch.spec.limits, required_limits=frozenset())
        if launch.spec.image.name in images(profile):
            profile = replace(profile, image=launch.spec.image.name)
        if dead.record.idle is not None:
            profile = replace(profile, idle=dead.record.idle, chosen=frozenset({"idle"}))
        environment = launch.kernel.environment
        return CreateRequest(
            self.id,
            replace(profile, client_environment=(*profile.client_environment, *environment)),
            KernelSpec(kernel_argv(profile), interrupt_mode=profile.interrupt_mode),
            self.seat.key,
            directory,
            environment,
            dead.record.name,
            self._gateway.settings.private,
            self.owner,
        )

    def _subject_to_quota(self, live: LiveSandbox) -> None:
        live.admission = lambda: self._gateway.admission(live)

    def _watch(self) -> None:
        self._unwatch()
        if not self.muted:
            self._watching = asyncio.create_task(self._wait(self.live))

    def _unwatch(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None and watching is not asyncio.current_task():
            watching.cancel()

    async def _wait(self, live: LiveSandbox) -> None:
        """See to what ends: a kernel process is started again in its sandbox, a dead sandbox is left to its owner."""
        if await live.wait_kernel() is None or self.muted or live.left:
            return
        if live.death is not None:
            await live.ended.wait()
            if live.death.kind not in _ON_PURPOSE:
                self._gateway.died(self)
            elif not self.muted:
                self._gateway.gone(self)
            return
        await asyncio.sleep(LAST_WORDS)
        now = time.monotonic()
        often = len(self._restarts) == RESTARTS and now - self._restarts[0] < WINDOW
        if not self._gateway.settings.autorestart or often:
            if often:
                self.seat.channels.notice(f"[sandbox] The kernel ended {RESTARTS} times in a minute and stays so\n")
            self.hub.publish_status("dead")
            return
        self._restarts.append(now)
        async with self._order:
            try:
                await live.reboot(live.launch.kernel, lambda: self.hub.publish_status("restarting"))
            except SandboxGatewayError as error:
                log.warning("kernel %s could not be started again: %s", self.id, error)
                self.hub.publish_status("dead")
                return
        self._watch()

    # The end

    async def shutdown(self, reason: str) -> None:
        """End it for good."""
        self.muted = True
        self._unwatch()
        try:
            await self._end(reason)
            async with self._order:  # a restart that is under way may make another one
                await self._end(reason)
        except BaseException:
            self.muted = False
            if not self.restarting:  # that watches when it is done
                self._watch()
            raise

    async def _end(self, reason: str) -> None:
        lifecycle = self._gateway.lifecycle
        for live in {self.live, lifecycle.live.get(self.id, self.live)}:
            if not live.left:
                await live.destroy(Death(DeathKind.STOPPED, reason))
            elif await asyncio.to_thread(lifecycle.store.has, self.id):
                await lifecycle.stop(self.id)

    def close(self, *, remove: bool) -> None:
        """Give everything of this process up."""
        self.muted = True
        self._unwatch()
        seat = self._seat
        if seat is not None:
            with contextlib.suppress(OSError):
                seat.release(remove=remove)
