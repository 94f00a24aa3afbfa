"""A gateway without sandboxes: records in a real store, and kernels that do what a test says."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox_gateway import messages
from sandbox_gateway.channels import KernelChannels
from sandbox_gateway.choices import chosen
from sandbox_gateway.clones import ForkOutcome
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.images.service import Progress
from sandbox_gateway.kernel_client import IDENTITY
from sandbox_gateway.messages import Buffer
from sandbox_gateway.model import (
    LIVE,
    Death,
    DeathKind,
    Image,
    KernelSpec,
    Launch,
    Limits,
    SandboxRecord,
    SandboxSpec,
    State,
)
from sandbox_gateway.owner import report_progress
from sandbox_gateway.profiles import Profile
from sandbox_gateway.quotas import Live, Quota, Stored, Usage
from sandbox_gateway.runtimes.base import GpuUse, Stats
from sandbox_gateway.server.callers import Caller
from sandbox_gateway.server.gateway import Start, Wanted
from sandbox_gateway.snapshots import Kind, Manifest, Snapshot
from sandbox_gateway.store import Store
from sandbox_gateway.wire.frames import Channel

KEY = b"a key"
PROFILE = Profile("python3-gvisor", "Python 3 (gVisor)", runtime="fake", limits=Limits(2.0, 1 << 30, 1 << 29, 256))
Script = Callable[["FakeLive", str], None]
"""What a kernel does with the code of a cell."""


class _Seat:
    def __init__(self) -> None:
        self.key = KEY
        self.channels = KernelChannels(KEY)

    def release(self) -> None:
        pass


class FakeLive:
    """The part of a LiveSandbox that the handlers and a kernel's client see."""

    def __init__(self, record: SandboxRecord, script: Script) -> None:
        self.record = record
        self.launch = launch_of(record.id)
        self.seat = _Seat()
        self.death: Death | None = None
        self.left = False
        self.ended = asyncio.Event()
        self.gone = asyncio.Event()
        self.interrupts = 0
        self.on_interrupt: Callable[[], None] = lambda: None
        self.requests: list[dict[str, Any]] = []
        self.answers: list[str] = []
        self._script = script
        self.seat.channels.connect(self)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> State:
        return self.record.state

    def send(self, channel: int, parts: Sequence[Buffer]) -> int:
        content = json.loads(bytes(parts[6]))
        if channel == Channel.STDIN:
            self.answers.append(content["value"])
            self.say(Channel.IOPUB, "stream", {"name": "stdout", "text": content["value"]})
            self.finish()
        else:
            self.requests.append({"header": json.loads(bytes(parts[3])), **content})
            asyncio.get_running_loop().call_soon(self._script, self, content["code"])
        return len(self.requests)

    def poll(self) -> int | None:
        return None if self.death is None else -9

    async def wait_kernel(self) -> int | None:
        await self.gone.wait()
        return self.poll()

    async def interrupt(self) -> None:
        self.interrupts += 1
        self.on_interrupt()

    # What the kernel does

    def say(self, channel: Channel, kind: str, content: Mapping[str, Any], *, raw: bytes | None = None) -> None:
        """A message of the cell that was sent last."""
        parent = json.dumps(self.requests[-1]["header"]).encode()
        prefix: list[Buffer] = [b"topic"] if channel is Channel.IOPUB else [IDENTITY]
        body = json.dumps(content).encode() if raw is None else raw
        self.seat.channels.received(int(channel), messages.compose(KEY, prefix, kind, body, parent=parent))

    def finish(self, status: str = "ok") -> None:
        """The end of the cell."""
        self.say(Channel.SHELL, "execute_reply", {"status": status, "execution_count": len(self.requests)})
        self.say(Channel.IOPUB, "status", {"execution_state": "idle"})

    def die(self) -> None:
        """The kernel and its sandbox end."""
        self.death = Death(DeathKind.OUT_OF_MEMORY)
        self.ended.set()
        self.gone.set()


def echo(live: FakeLive, code: str) -> None:
    """Prints the code."""
    live.say(Channel.IOPUB, "stream", {"name": "stdout", "text": code})
    live.finish()


def launch_of(sandbox_id: str) -> Launch:
    spec = SandboxSpec(sandbox_id, PROFILE.name, "fake", Image("host", ()), PROFILE.limits)
    return Launch(spec, KernelSpec(("python",)), KEY, 1000, 1000)


@dataclass
class _Lifecycle:
    store: Store
    live: dict[str, FakeLive] = field(default_factory=dict)


class FakeGateway:
    """As :class:`sandbox_gateway.server.gateway.Gateway` for its callers."""

    def __init__(self, place: Path) -> None:
        self.lifecycle = _Lifecycle(Store(place / "store.sqlite"))
        self.script: Script = echo
        self.fails: dict[str, Exception] = {}
        """What an operation of this name raises."""
        self.holds: dict[str, asyncio.Event] = {}
        """An operation of this name waits for it."""
        self.wanted: list[Wanted] = []
        self.saved: dict[str, tuple[Snapshot, str, bool]] = {}
        self.happened: list[Event] = []
        self.reasons: list[str] = []

    def close(self) -> None:
        self.lifecycle.store.close()

    @property
    def kernels(self) -> dict[str, FakeLive]:
        """Those that are served: all that live here."""
        return self.lifecycle.live

    def add(self, owner: str = "default", state: State = State.RUNNING, **changes: Any) -> SandboxRecord:
        """A sandbox that is there."""
        now = time.time()
        record = SandboxRecord(
            **{
                "id": str(uuid.uuid4()),
                "state": state,
                "profile": PROFILE.name,
                "runtime": "fake",
                "created": now,
                "changed": now,
                "boot_id": "boot",
                "owner": owner,
                **changes,
            }
        )
        self.lifecycle.store.put(record)
        self.lifecycle.store.put_launch(record.id, launch_of(record.id))
        if state in {State.RUNNING, State.PAUSED, State.SUSPENDED}:
            self.lifecycle.live[record.id] = FakeLive(record, lambda live, code: self.script(live, code))
        return record

    async def _do(self, name: str) -> None:
        if name in self.holds:
            await self.holds[name].wait()
        if name in self.fails:
            raise self.fails[name]

    def _move(self, record: SandboxRecord, state: State) -> SandboxRecord:
        if record.state is state:
            raise SandboxGatewayError("illegal_transition", f"a sandbox that is {state} cannot become {state}")
        record = replace(record, state=state, changed=time.time())
        self.lifecycle.store.put(record)
        live = self.lifecycle.live.get(record.id)
        if live is not None:
            live.record = record
        return record

    async def records(self, caller: Caller, *, states: frozenset[State] | None = None) -> tuple[SandboxRecord, ...]:
        return tuple(one for one in self.lifecycle.store.list(states) if caller.may_use(one.owner))

    async def record(self, caller: Caller, sandbox_id: str) -> SandboxRecord:
        record = self.lifecycle.store.get(sandbox_id)
        if not caller.may_use(record.owner):
            raise SandboxGatewayError("unknown_sandbox", f"there is no sandbox {sandbox_id!r}")
        return record

    async def create(
        self, caller: Caller, wanted: Wanted, progress: Callable[[Progress], None] | None = None
    ) -> SandboxRecord:
        self.wanted.append(wanted)
        if wanted.profile not in ("", PROFILE.name):
            raise SandboxGatewayError("unknown_profile", f"there is no profile {wanted.profile!r} here")
        found = chosen(PROFILE, wanted.resources)
        if progress is not None:
            await asyncio.to_thread(progress, Progress("environment /home/ann/venv", 5, 10))
        await self._do("create")
        idle = found.idle if "idle" in found.chosen else None
        return self.add(caller.name, id=wanted.id or str(uuid.uuid4()), name=wanted.name, idle=idle)

    async def delete(self, caller: Caller, sandbox_id: str) -> None:
        record = await self.record(caller, sandbox_id)
        await self._do("delete")
        if record.state is not State.TERMINATED:
            death = Death(DeathKind.STOPPED)
            self.lifecycle.store.put(replace(record, state=State.TERMINATED, death=death))
        self.lifecycle.live.pop(sandbox_id, None)

    async def forget(self, caller: Caller, sandbox_id: str) -> None:
        await self.delete(caller, sandbox_id)
        self.lifecycle.store.delete(sandbox_id)

    async def live(self, caller: Caller, sandbox_id: str) -> FakeLive:
        record = await self.record(caller, sandbox_id)
        if sandbox_id not in self.lifecycle.live:
            raise record.over()
        return self.lifecycle.live[sandbox_id]

    async def suspend(self, caller: Caller, sandbox_id: str, reason: str = "") -> SandboxRecord:
        await self.live(caller, sandbox_id)
        self.reasons.append(reason)
        report_progress({"message": "saving the memory", "done": 7})
        await self._do("suspend")
        return self._move(await self.record(caller, sandbox_id), State.SUSPENDED)

    async def resume(self, caller: Caller, sandbox_id: str) -> SandboxRecord:
        await self._do("resume")
        return self._move((await self.live(caller, sandbox_id)).record, State.RUNNING)

    async def pause(self, caller: Caller, sandbox_id: str) -> SandboxRecord:
        return self._move((await self.live(caller, sandbox_id)).record, State.PAUSED)

    async def interrupt(self, caller: Caller, sandbox_id: str) -> None:
        await (await self.live(caller, sandbox_id)).interrupt()

    async def restart(self, caller: Caller, sandbox_id: str, *, clean: bool = False) -> SandboxRecord:
        return (await self.live(caller, sandbox_id)).record

    async def rename(self, caller: Caller, sandbox_id: str, name: str) -> SandboxRecord:
        await self.live(caller, sandbox_id)
        return self.lifecycle.store.update(sandbox_id, name=name)

    async def fork(self, caller: Caller, sandbox_id: str, count: int) -> list[ForkOutcome]:
        record = await self.record(caller, sandbox_id)
        await self._do("fork")
        made = [self.add(record.owner, parent=f"sandbox:{record.id}").id for _ in range(count - 1)]
        failed = ForkOutcome(str(uuid.uuid4()), SandboxGatewayError("disk_full", "no room"))
        return [*(ForkOutcome(child) for child in made), failed]

    async def snapshot(self, caller: Caller, sandbox_id: str, name: str) -> Snapshot:
        record = await self.record(caller, sandbox_id)
        await self._do("snapshot")
        snapshot = Snapshot(
            Path("/nowhere"),
            Manifest(
                id=uuid.uuid4().hex,
                owner=0,
                created=time.time(),
                files=(),
                kind=Kind.SAVED,
                sandbox=sandbox_id,
                profile=record.profile,
                runtime=record.runtime,
                name=name,
                parent="template:x",
                link_version=1,
            ),
        )
        self.saved[snapshot.id] = (snapshot, record.owner, False)
        return snapshot

    async def snapshots(self, caller: Caller) -> list[tuple[Snapshot, str, bool]]:
        return [one for one in self.saved.values() if one[2] or caller.may_use(one[1])]

    async def start_from(self, caller: Caller, snapshot: str, count: int = 1) -> list[ForkOutcome]:
        return [ForkOutcome(self.add(caller.name, parent=f"snapshot:{snapshot}").id) for _ in range(count)]

    async def remove_snapshot(self, caller: Caller, snapshot: str) -> None:
        for found, owner, _ in tuple(self.saved.values()):
            if snapshot in (found.id, found.name) and caller.may_use(owner):
                del self.saved[found.id]
                return
        raise SandboxGatewayError("unknown_snapshot", f"there is no snapshot {snapshot[:80]!r}", "")

    async def publish(self, caller: Caller, snapshot: str, published: bool) -> None:
        for found, owner, _ in tuple(self.saved.values()):
            if snapshot in (found.id, found.name):
                self.saved[found.id] = (found, owner, published)

    async def profiles(self, caller: Caller) -> tuple[Profile, ...]:
        return (PROFILE,)

    async def starts(self) -> Callable[[Profile], Start]:
        return lambda profile: Start(True, 0.2)

    async def logs(self, caller: Caller, sandbox_id: str) -> bytes:
        await self.record(caller, sandbox_id)
        return b"a log \xff\n"

    async def stats(self, caller: Caller, sandbox_id: str) -> Stats:
        await self.live(caller, sandbox_id)
        gpu = GpuUse(busy=0.25, memory=1 << 30, memory_limit=1 << 33)
        return Stats(memory=1 << 20, cpu_seconds=0.5, processes=3, disk=4096, gpu=gpu)

    async def sizes(self, ids: Collection[str]) -> dict[str, int]:
        return dict.fromkeys(ids, 5 << 20)

    async def quota(self, caller: Caller) -> tuple[Quota, Usage, int]:
        found = [one for one in await self.records(caller) if one.owner == caller.name]
        live = tuple(Live(one.id, 1 << 30) for one in found if one.state in LIVE)
        return Quota(live=4, disk=1 << 34), Usage(live=live, stored=(Stored("saved", 7),)), 2

    async def events(self, caller: Caller, *, since: int = 0, sandbox: str | None = None) -> tuple[Event, ...]:
        if sandbox is not None:
            await self.record(caller, sandbox)
        return tuple(one for one in self.happened if one.id > since and one.sandbox == sandbox)

    def note(self, sandbox_id: str, kind: EventKind) -> None:
        """Something happened."""
        self.happened.append(Event(sandbox_id, kind, "text", {}, time.time(), len(self.happened) + 1))
