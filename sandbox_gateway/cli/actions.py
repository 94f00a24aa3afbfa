"""What the commands do to sandboxes and images: the one place where the command line meets the core's contracts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import LIVE, NOT_ISOLATED, Death, DeathKind, SandboxRecord, State, timestamp

if TYPE_CHECKING:
    from sandbox_gateway.snapshots import Snapshot
    from sandbox_gateway.store import Store

STATS_TIMEOUT = 1.0
"""Seconds in which an owner has to tell the memory of its sandbox; without an answer the column stays empty."""
FOLLOW_INTERVAL = 0.5
"""Seconds between two looks at a followed log."""
ENDED = frozenset({State.TERMINATED, State.FAILED, State.EXPIRED})
REACHED: Mapping[str, State] = {"suspend": State.SUSPENDED, "resume": State.RUNNING, "pause": State.PAUSED}
"""What each command leaves a sandbox as."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A sandbox as ``ps`` shows it: its record, corrected by what is true right now."""

    record: SandboxRecord
    state: State
    owner_pid: int | None
    """The process that holds its lock now; None where nobody does."""
    death: Death | None
    memory: int | None = None
    """Bytes in use."""
    disk: int | None = None
    """Bytes of the snapshot that it is suspended in."""
    kept: bool = False
    """Whether the owner is the keeper, and no application."""

    def as_dict(self) -> dict[str, Any]:
        """The object that ``ps --json`` lists."""
        record = self.record
        return {
            "id": record.id,
            "state": str(self.state),
            "profile": record.profile,
            "runtime": record.runtime,
            "isolated": record.runtime not in NOT_ISOLATED,
            "name": record.name,
            "created": timestamp(record.created),
            "since": timestamp(record.changed),
            "owner_pid": self.owner_pid,
            "keeper": self.kept,
            "on_owner_exit": str(record.on_owner_exit),
            "memory": self.memory,
            "disk": self.disk,
            "snapshot": record.snapshot,
            "parent": record.parent,
            "epoch": record.epoch,
            "death": None if self.death is None else {**self.death.as_dict(), "reason": self.death.describe()},
            "notes": list(record.notes),
        }


@contextlib.contextmanager
def opened(paths: Paths) -> Iterator[Store | None]:
    """The store, or None where nothing was ever stored: looking must not make anything."""
    from sandbox_gateway.store import Store

    if not paths.database.exists():
        yield None
        return
    store = Store(paths.database)
    try:
        yield store
    finally:
        store.close()


def seen(paths: Paths, *, everything: bool) -> list[Seen]:
    """All sandboxes, or (without ``everything``) those that have not ended, oldest first.

    What an owner that is gone has left is cleaned up first, if it is due, so that nothing is shown as running that is
    not (a killed ``jupyter execute`` cannot write its end down itself).
    """
    found = _looked_at(paths)
    if any(sandbox.record.state in LIVE and sandbox.owner_pid is None for sandbox in found):
        with contextlib.suppress(SandboxGatewayError):  # then it is shown as it is
            asyncio.run(sweep(paths))
            found = _looked_at(paths)
    shown = [one for one in found if everything or (one.state not in ENDED and not one.record.blank)]
    if any(sandbox.owner_pid is not None for sandbox in shown):
        shown = asyncio.run(_with_memory(paths, shown))
    return [_with_disk(paths, sandbox) for sandbox in shown]


def _looked_at(paths: Paths) -> list[Seen]:
    with opened(paths) as store:
        records = store.list() if store is not None else ()
    return [_look(paths, record) for record in records]


def _look(paths: Paths, record: SandboxRecord) -> Seen:
    if record.state in ENDED:
        return Seen(record, record.state, None, record.death)
    if record.state in LIVE and record.boot_id != boot_id():
        return Seen(record, State.FAILED, None, record.death or Death(DeathKind.MACHINE_RESTARTED))
    from sandbox_gateway.keeper import keeper_pid
    from sandbox_gateway.owner import holder

    # 0 means that somebody holds the lock who has not yet written who he is.
    pid = holder(paths.sandbox(record.id))
    owner = pid or (record.owner_pid if pid == 0 else None)
    return Seen(record, record.state, owner, record.death, kept=owner is not None and owner == keeper_pid(paths))


def _with_disk(paths: Paths, sandbox: Seen) -> Seen:
    if sandbox.record.snapshot is None:
        return sandbox
    from sandbox_gateway.snapshots.files import disk_usage

    return replace(sandbox, disk=disk_usage(paths.snapshots / sandbox.record.snapshot) or None)


async def _with_memory(paths: Paths, sandboxes: Sequence[Seen]) -> list[Seen]:
    from sandbox_gateway.owner import ask

    async def one(sandbox: Seen) -> Seen:
        if sandbox.owner_pid is None or sandbox.state is State.SUSPENDED:
            return sandbox
        try:
            async with asyncio.timeout(STATS_TIMEOUT):
                stats = await ask(paths, sandbox.record.id, "stats", STATS_TIMEOUT)
        except (SandboxGatewayError, TimeoutError):
            return sandbox
        memory = stats.get("memory")
        return replace(sandbox, memory=memory if isinstance(memory, int) else None)

    return list(await asyncio.gather(*(one(sandbox) for sandbox in sandboxes)))


def resolve(paths: Paths, prefix: str) -> SandboxRecord:
    """The sandbox with this id or unique prefix; raises ``unknown_sandbox`` or ``ambiguous_id``."""
    with opened(paths) as store:
        if store is None:
            raise SandboxGatewayError("unknown_sandbox", f"there is no sandbox {prefix!r}")
        return store.find(prefix)


def all_ids(paths: Paths, states: frozenset[State]) -> list[str]:
    """Ids of all sandboxes in ``states``."""
    with opened(paths) as store:
        return [] if store is None else [record.id for record in store.list(states)]


OnProgress = Callable[[Mapping[str, Any]], None]


async def change(paths: Paths, sandbox_id: str, op: str, on_progress: OnProgress) -> str:
    """Suspend, resume or pause one sandbox, whoever owns it; returns its state when that is reached."""
    from sandbox_gateway.keeper import drive

    target = REACHED[op]
    _not_ended(resolve(paths, sandbox_id))
    try:
        await drive(paths, sandbox_id, op, on_progress=on_progress)
    except SandboxGatewayError as error:
        if error.code != "illegal_transition" or resolve(paths, sandbox_id).state is not target:
            raise
    return str(target)


async def connect(paths: Paths, sandbox_id: str, on_progress: OnProgress) -> str:
    """The path of a connection file by which clients reach the kernel; somebody owns it from now on."""
    from sandbox_gateway.keeper import drive

    _not_ended(resolve(paths, sandbox_id))
    answer = await drive(paths, sandbox_id, "connect", on_progress=on_progress)
    return str(answer["connection_file"])


async def fork(
    paths: Paths, source: str, count: int, name: str, on_progress: OnProgress
) -> list[tuple[str, SandboxGatewayError | None]]:
    """Make ``count`` children of a sandbox or a snapshot, kept by the keeper; their ids, each with what failed."""
    from sandbox_gateway import keeper

    try:
        sandbox = resolve(paths, source)
    except SandboxGatewayError as error:
        if error.code != "unknown_sandbox":
            raise
        children = await keeper.spawn(paths, _snapshot(paths, source), count, name, on_progress)
    else:
        _not_ended(sandbox)
        children = await keeper.fork(paths, sandbox.id, count, name, on_progress)
    return [
        (child["id"], SandboxGatewayError.from_dict(child["error"]) if child["error"] else None) for child in children
    ]


def _not_ended(record: SandboxRecord) -> None:
    """Raise the error with the reason of its end; nobody has to be asked, or started, for that."""
    if record.state in ENDED:
        raise record.over()


def _snapshot(paths: Paths, reference: str) -> str:
    from sandbox_gateway.snapshots import SnapshotStore

    try:
        return SnapshotStore(paths).find(reference).id
    except SandboxGatewayError as error:
        if error.code != "unknown_snapshot":
            raise
        text = f"there is neither a sandbox nor a snapshot {reference!r}"
        hint = "`jupyter sandbox ps` and `jupyter sandbox snapshot ls` list them."
        raise SandboxGatewayError("unknown_sandbox", text, hint) from error


async def stop(paths: Paths, sandbox_id: str) -> str:
    """End one sandbox, whoever owns it; returns its state then."""
    async with _lifecycle(paths) as lifecycle:
        return str((await lifecycle.stop(sandbox_id)).state)


async def remove(paths: Paths, sandbox_id: str) -> str:
    """End one sandbox and forget it, its log too; returns ``removed``."""
    async with _lifecycle(paths) as lifecycle:
        await lifecycle.remove(sandbox_id)
    paths.logs.joinpath(f"{sandbox_id}.log").unlink(missing_ok=True)
    return "removed"


async def snapshot(paths: Paths, sandbox_id: str, name: str, on_progress: OnProgress) -> Snapshot:
    """Save one sandbox under ``name``, whoever owns it; it runs on."""
    from sandbox_gateway.keeper import drive
    from sandbox_gateway.snapshots import SnapshotStore

    if resolve(paths, sandbox_id).state is State.SUSPENDED:
        short = sandbox_id[:8]
        raise SandboxGatewayError(
            "illegal_transition",
            f"sandbox {sandbox_id} is suspended",
            f"`jupyter sandbox resume {short}` wakes it; `jupyter sandbox fork {short}` makes others of it as it is.",
        )
    answer = await drive(paths, sandbox_id, "save", {"kind": "saved", "name": name}, on_progress)
    return await asyncio.to_thread(SnapshotStore(paths).find, str(answer["snapshot"]))


async def sweep(paths: Paths) -> list[str]:
    """Clean up what owners that are gone have left; returns the ids of sandboxes that were ended."""
    async with _lifecycle(paths) as lifecycle:
        return list(await lifecycle.sweep())


@contextlib.asynccontextmanager
async def _lifecycle(paths: Paths) -> AsyncIterator[Any]:
    from sandbox_gateway.lifecycle import Lifecycle

    lifecycle = Lifecycle(paths)
    try:
        yield lifecycle
    finally:
        await lifecycle.close()


async def log(paths: Paths, record: SandboxRecord) -> str:
    """The kernel's raw stdout and stderr, as far as they are kept (the agent's bound, 1 MiB).

    Of a suspended or ended sandbox: the kept log, else the last lines that its death recorded.
    """
    from sandbox_gateway.owner import NoOwner, ask

    if _look(paths, record).state in ENDED | {State.SUSPENDED}:
        return _kept(paths, record)
    try:
        return str((await ask(paths, record.id, "log"))["log"])
    except NoOwner as error:
        raise SandboxGatewayError(
            "owner_unreachable",
            f"sandbox {record.id} has no owner now, and its log is inside",
            f"`jupyter sandbox connect {record.id[:8]}` gives it one, `jupyter sandbox stop {record.id[:8]}` ends it.",
        ) from error


async def follow(paths: Paths, record: SandboxRecord) -> AsyncIterator[str]:
    """The log as it grows, until the sandbox ends."""
    shown = ""
    while True:
        try:
            text = await log(paths, record)
        except SandboxGatewayError:
            # It may have ended between two looks; only a sandbox that still is there has an error worth showing.
            record = resolve(paths, record.id)
            if _look(paths, record).state not in ENDED:
                raise
            return
        if fresh := news(shown, text):
            yield fresh
        shown = text
        record = resolve(paths, record.id)
        if _look(paths, record).state in ENDED:
            return
        await asyncio.sleep(FOLLOW_INTERVAL)


def news(before: str, now: str) -> str:
    """What ``now`` has that ``before`` had not; both are the ends of one growing text, cut at a bound in front."""
    if now.startswith(before):
        return now[len(before) :]
    tail = before[-4096:]
    at = now.rfind(tail)
    return now[at + len(tail) :] if at >= 0 else now


def _kept(paths: Paths, record: SandboxRecord) -> str:
    try:
        return paths.logs.joinpath(f"{record.id}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        tail = record.death.stderr_tail if record.death is not None else ""
        return tail if not tail or tail.endswith("\n") else tail + "\n"
