"""All sandboxes of one process, and the memory of the machine they share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.idle.watch import Watch
from sandbox_gateway.idle.world import World
from sandbox_gateway.model import Activity, State
from sandbox_gateway.policy import Action, Decision, choose_victims, decide, shortage

log = logging.getLogger(__name__)

MEMORY_INTERVAL: Final = 10.0
"""Seconds between two looks at the machine's memory."""
AT_A_TIME: Final = 2
"""Sandboxes that are saved to disk at the same time."""


class IdleDriver:
    """Watches the sandboxes of one process. Use it on one event loop.

    It hears of new sandboxes and changed states by the event log, or by :meth:`poke`.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._watches: dict[str, Watch] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._memory: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(AT_A_TIME)
        self._unlisten = world.events.listen(lambda event: self.poke(event.sandbox))
        self._stopped = False

    def poke(self, sandbox_id: str) -> None:
        """Something happened to a sandbox: look at it again, or for the first time."""
        if self._stopped or sandbox_id not in self._world.live:
            return
        if sandbox_id not in self._tasks:
            watch = self._watches[sandbox_id] = Watch(self._world, sandbox_id, self._room)
            task = self._tasks[sandbox_id] = asyncio.create_task(watch.run())
            task.add_done_callback(lambda done: self._forget(sandbox_id, done))
        self._watches[sandbox_id].poked.set()
        if self._memory is None:
            self._memory = asyncio.create_task(self._watch_memory())

    def _forget(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[sandbox_id], self._watches[sandbox_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the idle times of sandbox %s are not watched until it changes", sandbox_id, exc_info=error)

    async def stop(self) -> None:
        """End all watching; a step under way goes on in the sandbox itself. What was seen last is kept."""
        self._stopped = True
        self._unlisten()
        watches = tuple(self._watches.values())
        tasks = [*self._tasks.values(), *([self._memory] if self._memory is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for watch in watches:
            with contextlib.suppress(SandboxGatewayError):
                await watch.save()

    async def sweep(self, expire: Callable[[str, str], Awaitable[object]]) -> None:
        """Look once at suspended sandboxes that this process does not own: announce and carry out their ends.

        ``expire(id, reason)`` takes the lock of one and ends it; it may raise ``owned_elsewhere``, because its owner
        looks after it then.
        """
        world = self._world
        for record in await asyncio.to_thread(world.store.list, frozenset({State.SUSPENDED})):
            policy = await asyncio.to_thread(world.policy, record)
            if record.id in world.live or not policy.in_force:
                continue
            activity = await asyncio.to_thread(world.store.activity, record.id) or Activity(record.changed)
            decision = decide(policy, world.facts(record, activity))
            if decision.action in {Action.EXPIRE, Action.END}:
                with contextlib.suppress(SandboxGatewayError):
                    await expire(record.id, decision.reason)
            elif decision.action is not Action.NOTHING:
                activity = world.announce(record.id, activity, decision)
                await asyncio.to_thread(world.store.put_activity, record.id, activity)

    # Memory of the machine

    async def _watch_memory(self) -> None:
        while (reserve := await asyncio.to_thread(self._world.reserve)) is not None:
            try:
                await self.relieve(reserve)
            except Exception:
                log.exception("a shortage of memory could not be relieved; it is tried again")
            await self._world.wait(asyncio.Event(), MEMORY_INTERVAL)

    async def relieve(self, reserve: int | None) -> tuple[str, ...]:
        """Suspend idle sandboxes, longest idle first, as far as memory is short; returns their ids."""
        pressure = await asyncio.to_thread(self._world.pressure)
        if pressure.available is None:
            return ()
        needed = shortage(pressure.available, reserve, pressure.stalled)
        if not needed:
            return ()
        looks = [watch.candidate() for watch in tuple(self._watches.values())]
        candidates = [candidate for candidate in await asyncio.gather(*looks) if candidate is not None]
        decision = Decision(Action.SUSPEND, self._world.clock(), "the machine is short of memory")
        done = []
        for sandbox_id in choose_victims(candidates, needed):
            watch = self._watches.get(sandbox_id)
            if watch is not None and await watch.act(decision):
                done.append(sandbox_id)
        return tuple(done)
