"""Doing something to a sandbox through whoever owns it, and changing who that is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.keeper.start import SILENCE, OnProgress, ask_keeper
from sandbox_gateway.model import State
from sandbox_gateway.owner import NoOwner, ask, progress_to

PATIENCE: Final = 12.0
"""Seconds that owners may take to change; longer than one needs to see that its socket was removed."""
_PAUSE = 0.1
_ONCE = frozenset({"save"})
_ALONE = frozenset({"suspend"})
_PASSING = frozenset({"unknown_sandbox", "owner_unreachable"})


async def drive(
    paths: Paths,
    sandbox_id: str,
    op: str,
    params: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Do something to a sandbox through the process that owns it; where none does, one that will.

    ``op`` is one of the requests that :class:`~sandbox_gateway.lifecycle.Lifecycle` answers for its sandboxes.
    ``suspend`` leaves nothing that would need an owner: this process adopts, does it and lets go. For anything else
    the keeper adopts first. Owners that come and go meanwhile are followed for :data:`PATIENCE` seconds. Raises the
    owner's own error; ``owner_unreachable`` when none answers, or one ended over something that must not be done twice.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while True:
        try:
            return await ask(paths, sandbox_id, op, SILENCE, on_progress=on_progress, **(params or {}))
        except NoOwner as error:
            if error.died and op in _ONCE:
                text = f"the owner of sandbox {sandbox_id} ended over it"
                raise SandboxGatewayError(
                    "owner_unreachable", text, "`jupyter sandbox ps` shows what was done."
                ) from error
            if loop.time() > deadline:
                raise
        except SandboxGatewayError as error:
            # Somebody holds the lock and does not own it yet, or not any more.
            if error.code not in _PASSING or loop.time() > deadline:
                raise
            await asyncio.sleep(_PAUSE)
            continue
        try:
            if op in _ALONE:
                return await _alone(paths, sandbox_id, op, params, on_progress)
            await ask_keeper(paths, "adopt", sandbox_id)
        except SandboxGatewayError as error:
            if error.code != "owned_elsewhere" or loop.time() > deadline:
                raise


async def _alone(
    paths: Paths, sandbox_id: str, op: str, params: Mapping[str, Any] | None, on_progress: OnProgress | None
) -> dict[str, Any]:
    from sandbox_gateway.lifecycle import Lifecycle

    lifecycle: Any = Lifecycle(paths)
    try:
        sandbox = await lifecycle.adopt(sandbox_id)
        try:
            with progress_to(on_progress):
                await getattr(sandbox, op)(**(params or {}))
            return {"state": str(sandbox.state)}
        finally:
            # Whatever became of it: it had no owner before, and is left as it is.
            if sandbox_id in lifecycle.live:
                await lifecycle.hand_over(sandbox_id)
    finally:
        await lifecycle.close()


class Takes(Protocol):
    """What :func:`take_over` needs of :class:`~sandbox_gateway.lifecycle.Lifecycle`."""

    paths: Paths

    async def adopt(self, sandbox_id: str) -> Any:
        """Own a sandbox that nobody owns. Raises ``owned_elsewhere``."""


async def take_over(lifecycle: Takes, sandbox_id: str) -> Any:
    """Own a sandbox from now on, whoever owned it before: its present owner is asked to hand it over.

    Returns what ``lifecycle.adopt`` does. An owner that hands over flushes, detaches, gives its lock up and then
    answers. Of several that ask at once each gets it in turn; ``owned_elsewhere`` when this one's does not come in
    :data:`PATIENCE` seconds. Raises what the present owner says, or what stands in the way of adopting.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while True:
        try:
            return await lifecycle.adopt(sandbox_id)
        except SandboxGatewayError as error:
            if error.code != "owned_elsewhere" or loop.time() > deadline:
                raise
        try:
            await ask(lifecycle.paths, sandbox_id, "hand_over", SILENCE)
        except NoOwner:
            continue
        except SandboxGatewayError as error:
            if error.code not in _PASSING or loop.time() > deadline:
                raise
            await asyncio.sleep(_PAUSE)


async def fork(
    paths: Paths, source: str, count: int, name: str = "", on_progress: OnProgress | None = None
) -> list[dict[str, Any]]:
    """``count`` children of a sandbox, owned by the keeper; an ``id`` and an ``error`` (or None) for each.

    A running one is saved for it by its owner, and goes on; a suspended one stays as it is.
    """
    from sandbox_gateway.snapshots import SnapshotStore
    from sandbox_gateway.store import Store

    with Store(paths.database) as store:
        record = store.get(source)
    if record.state is State.SUSPENDED and record.snapshot is not None:
        children = await spawn(paths, record.snapshot, count, name, on_progress)
        return await asyncio.to_thread(_forked, paths, record.id, children)
    saved = str((await drive(paths, source, "save", {"kind": "fork"}, on_progress))["snapshot"])
    try:
        children = await spawn(paths, saved, count, name, on_progress)
        return await asyncio.to_thread(_forked, paths, record.id, children)
    finally:
        with contextlib.suppress(SandboxGatewayError):  # what is left of it is collected later
            await asyncio.to_thread(SnapshotStore(paths).remove, saved)


def _forked(paths: Paths, source: str, children: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same children, written down among the events of their parent, of which their owner knows nothing."""
    from sandbox_gateway.store import Store

    made = [child["id"] for child in children if child["error"] is None]
    if made:
        with contextlib.suppress(SandboxGatewayError), Store(paths.database) as store:
            store.add_events([Event(source, EventKind.FORKED, data={"children": made}, time=time.time())])
    return children


async def spawn(
    paths: Paths, snapshot: str, count: int, name: str = "", on_progress: OnProgress | None = None
) -> list[dict[str, Any]]:
    """As :func:`fork`, from a snapshot by its id."""
    params = {"count": count, "name": name}
    answer = await ask_keeper(paths, "spawn", snapshot, params, on_progress=on_progress)
    return list(answer["children"])
