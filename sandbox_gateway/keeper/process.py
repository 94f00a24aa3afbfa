"""The keeper's own process: it adopts what it is asked to, and ends when it owns nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.keeper.start import keeper_directory, keeper_socket
from sandbox_gateway.model import Death, DeathKind, OnOwnerExit, State
from sandbox_gateway.owner import OwnerLock, OwnerServer, holder

log = logging.getLogger(__name__)

LINGER: Final = 2.0
"""Seconds that a keeper stays without a sandbox: a command may be about to ask for the next."""
LET_GO: Final = 300.0
"""Seconds after which a suspended sandbox without clients is let go: it needs no process, and is adopted on demand.
Also those after which a sandbox whose kernel has ended goes, though nobody has taken its last output."""
_LOOK = 0.5


class Keeps(Protocol):
    """What a keeper needs of :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    @property
    def live(self) -> Mapping[str, Any]:
        """The sandboxes that this process owns, by id."""

    async def adopt(self, sandbox_id: str) -> Any:
        """Own a sandbox that nobody owns. Raises ``owned_elsewhere``."""

    async def spawn(self, snapshot_id: str, count: int = 1) -> Sequence[Any]:
        """Make children from a snapshot and own them; an outcome with ``id`` and ``error`` for each."""

    async def hand_over(self, sandbox_id: str) -> None:
        """Let one go, as it is."""

    async def close(self) -> None:
        """Leave everything by its ``on_owner_exit``."""


class Keeper:
    """Runs on one event loop until it is told to end, or owns nothing for :data:`LINGER` seconds."""

    def __init__(self, paths: Paths, lock: OwnerLock, make: Callable[[], Awaitable[Keeps]]) -> None:
        self._lock = lock
        self._make = make
        self._made: asyncio.Future[Keeps] | None = None
        self._server = OwnerServer(paths, self._answer, socket_path=keeper_socket(paths))
        self._told = asyncio.Event()
        self._asleep: dict[str, float] = {}
        self._over: dict[str, float] = {}

    def end(self) -> None:
        """End in order."""
        self._told.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve to the end; ``ready`` is called once everything is up. Raises what keeps it from starting."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        self._made = asyncio.ensure_future(self._make())
        try:
            await self._server.start()
            keeps = await self._made
        except BaseException:
            self._made.cancel()
            await asyncio.gather(self._made, return_exceptions=True)
            await self._server.stop()
            raise
        try:
            ready()
            await self._serve(keeps)
        finally:
            # A new keeper may start from here on: each sandbox has a lock of its own.
            await self._server.stop()
            self._lock.release(remove=True)
            await keeps.close()

    async def _serve(self, keeps: Keeps) -> None:
        loop = asyncio.get_running_loop()
        alone_since = loop.time()
        while not self._told.is_set():
            await self._let_go(keeps)
            await self._end_the_dead(keeps)
            if keeps.live or self._server.busy:
                alone_since = loop.time()
            elif loop.time() - alone_since >= LINGER:
                log.info("nothing to keep any more")
                return
            try:
                async with asyncio.timeout(_LOOK):
                    await self._told.wait()
            except TimeoutError:
                continue

    async def _let_go(self, keeps: Keeps) -> None:
        now = asyncio.get_running_loop().time()
        asleep = {
            sandbox_id
            for sandbox_id, sandbox in keeps.live.items()
            if sandbox.state is State.SUSPENDED and not sandbox.seat.connected
        }
        self._asleep = {sandbox_id: self._asleep.get(sandbox_id, now) for sandbox_id in asleep}
        for sandbox_id, since in tuple(self._asleep.items()):
            if now - since >= LET_GO and not self._server.busy:
                log.info("letting go of sandbox %s, which is suspended", sandbox_id)
                with contextlib.suppress(SandboxGatewayError):  # somebody was quicker
                    await keeps.hand_over(sandbox_id)

    async def _end_the_dead(self, keeps: Keeps) -> None:
        """End what has no kernel any more: there is no application here that would start it again, or end it."""
        now = asyncio.get_running_loop().time()
        over = {sandbox_id: one for sandbox_id, one in keeps.live.items() if one.kernel.exit is not None}
        self._over = {sandbox_id: self._over.get(sandbox_id, now) for sandbox_id in over}
        for sandbox_id, since in tuple(self._over.items()):
            sandbox = over[sandbox_id]
            # Its clients, those to come included, are given what it said last.
            if now - since < (_LOOK if sandbox.seat.channels.settled else LET_GO):
                continue
            gone = sandbox.kernel.exit
            log.info("ending sandbox %s: %s", sandbox_id, gone.describe())
            death = Death(DeathKind.EXITED, gone.describe(), gone.code, gone.signal, gone.stderr_tail)
            try:
                await sandbox.destroy(death)
            except SandboxGatewayError as error:
                log.warning("sandbox %s could not be ended: %s", sandbox_id, error)

    async def _answer(self, op: str, sandbox_id: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._made is not None
        keeps = await asyncio.shield(self._made)
        if op == "ping":
            return {"sandboxes": len(keeps.live)}
        if op == "adopt":
            if sandbox_id not in keeps.live:
                await self._kept(await keeps.adopt(sandbox_id))
            return {}
        if op == "spawn":
            return {"children": await self._spawn(keeps, sandbox_id, params)}
        raise SandboxGatewayError("invalid_request", f"unknown request {op!r}")

    async def _spawn(self, keeps: Keeps, snapshot_id: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        count, name = params.get("count", 1), params.get("name", "")
        if type(count) is not int or not isinstance(name, str):
            raise SandboxGatewayError("invalid_request", "count is a number, name a text")
        children = []
        for outcome in await keeps.spawn(snapshot_id, count):
            child = keeps.live.get(outcome.id)
            if child is not None:
                await self._kept(child, **({"name": name} if name else {}))
            children.append({"id": outcome.id, "error": None if outcome.error is None else outcome.error.as_dict()})
        return children

    async def _kept(self, sandbox: Any, **changes: Any) -> None:
        """What a keeper owns belongs to no script any more whose end would be its own."""
        if sandbox.record.on_owner_exit is OnOwnerExit.TERMINATE:
            changes["on_owner_exit"] = OnOwnerExit.KEEP
        if changes:
            await sandbox.amend(**changes)
        log.info("keeping sandbox %s", sandbox.id)


def keep(home: str, runtime: str, say: Callable[[Mapping[str, Any]], None]) -> int:
    """Be the keeper of an installation, or leave that to the one there is; returns the exit status.

    ``say`` takes the one answer to the starter, when this one is up, when there is another, or why there is none.
    """
    os.umask(0o077)
    logging.basicConfig(
        level=logging.DEBUG if os.environ.get("SANDBOX_GATEWAY_DEBUG") else logging.INFO,
        format=f"%(asctime)s {os.getpid()} %(levelname)s %(name)s: %(message)s",
    )
    paths = Paths(Path(home), Path(runtime))
    directory = keeper_directory(paths)
    lock = OwnerLock(directory, server=keeper_socket(paths))
    said = False

    def ready() -> None:
        nonlocal said
        said = True
        say({"pid": os.getpid()})

    async def make() -> Keeps:
        return await asyncio.to_thread(_lifecycle, paths)

    problem = None
    try:
        paths.ensure()
        if not lock.try_acquire():
            say({"pid": holder(directory)})
            return 0
        log.info("started")
        asyncio.run(Keeper(paths, lock, make).run(ready))
        log.info("ended")
    except SandboxGatewayError as error:
        problem = error
        log.error("%s", error.message)
    finally:
        lock.release(remove=True)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()
    if problem is not None and not said:
        say({"error": problem.as_dict()})
    return 0 if problem is None else 1


def _lifecycle(paths: Paths) -> Any:
    from sandbox_gateway.lifecycle import Lifecycle

    lifecycle = Lifecycle(paths)
    lifecycle.store.open()
    return lifecycle
