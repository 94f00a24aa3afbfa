"""The driver of sandboxes over the fake runtime: what becomes of a sandbox whatever happens to its caller."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.attachment import Remains
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef, wait_exit
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind, Image, KernelSpec, SandboxRecord, State
from sandbox_gateway.owner_lock import OwnerLock, holder
from sandbox_gateway.profiles import Profile
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.seat import Seat
from sandbox_gateway.starts import _Look
from sandbox_gateway.testing.fake import FakeRuntime

ID = "a-kernel"


class NoImages:
    """The fake runtime runs the host's own Python."""

    async def resolve(self, *arguments: Any, **options: Any) -> Image:
        return Image("host", (), interpreter=sys.executable)


class SlowToRemove(FakeRuntime):
    """Its removals begin, and end when :attr:`go` is set."""

    def __init__(self, paths: Paths) -> None:
        super().__init__(paths)
        self.begun = asyncio.Event()
        self.go = asyncio.Event()

    async def destroy(self, handle: Handle) -> None:
        self.begun.set()
        await self.go.wait()
        await super().destroy(handle)


@pytest.fixture
async def slow(paths: Paths) -> AsyncIterator[tuple[Lifecycle, SlowToRemove]]:
    runtime = SlowToRemove(paths)
    make: Callable[[str, Paths], Any] = lambda name, where: runtime  # noqa: E731
    lifecycle = Lifecycle(paths, runtimes=make, images=NoImages())  # type: ignore[arg-type]
    yield lifecycle, runtime
    runtime.go.set()
    await lifecycle.close()
    while _seats:
        _seats.pop().release()


@pytest.fixture
def quick(slow: tuple[Lifecycle, SlowToRemove]) -> Lifecycle:
    """With removals that wait for nothing."""
    lifecycle, runtime = slow
    runtime.go.set()
    return lifecycle


_seats: list[Seat] = []
"""Those of the test's kernels, which an application gives up itself."""


async def started(lifecycle: Lifecycle) -> LiveSandbox:
    seat = Seat(await lifecycle.claim(ID), b"key")
    _seats.append(seat)
    kernel = KernelSpec(argv=("sleep", "1000"), cwd="/")
    wanted = CreateRequest(ID, Profile("p", runtime="fake", argv=kernel.argv), kernel, b"key", Path("/tmp"))
    return await lifecycle.create(wanted, seat)


async def test_a_caller_who_gives_up_does_not_stop_a_removal(slow: tuple[Lifecycle, SlowToRemove]) -> None:
    """As an application does whose event loop ends over it: half a removal would never be finished by anybody."""
    lifecycle, runtime = slow
    sandbox = await started(lifecycle)
    asked = asyncio.create_task(sandbox.destroy(Death(DeathKind.STOPPED)))
    await runtime.begun.wait()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert lifecycle.store.get(ID).state is State.TERMINATING
    runtime.go.set()
    await sandbox.ended.wait()
    assert lifecycle.store.get(ID).state is State.TERMINATED
    assert await runtime.list() == []


async def test_a_start_whose_caller_gives_up_while_it_is_recorded_leaves_no_record(
    quick: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, begun, go, entered = quick.store.enter, asyncio.Event(), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(*arguments: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        go.wait(30)
        enter(*arguments)
        loop.call_soon_threadsafe(entered.set)

    monkeypatch.setattr(quick.store, "enter", slowly)
    asked = asyncio.create_task(started(quick))
    await begun.wait()
    asked.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await entered.wait()
    assert not quick.store.list() and ID not in quick.live


async def test_a_start_whose_caller_gives_up_when_it_is_made_leaves_nothing(
    slow: tuple[Lifecycle, SlowToRemove], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the tidying up after it, of which nobody knows how long it takes."""
    lifecycle, runtime = slow
    runtime.go.set()
    ready = asyncio.Event()

    async def close(look: _Look) -> None:
        ready.set()
        await asyncio.Event().wait()  # until it is cancelled

    monkeypatch.setattr(_Look, "close", close)
    asked = asyncio.create_task(started(lifecycle))
    await ready.wait()
    assert ID in lifecycle.live
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert ID not in lifecycle.live and not lifecycle.store.list() and await runtime.list() == []


async def test_a_sandbox_that_died_counts_as_live_until_all_of_it_is_gone(slow: tuple[Lifecycle, SlowToRemove]) -> None:
    """Whoever comes after a crash in between then still finds that there is something to remove."""
    lifecycle, runtime = slow
    sandbox = await started(lifecycle)
    sandbox._died(Death(DeathKind.AGENT_DIED, "silence"))
    await runtime.begun.wait()
    assert lifecycle.store.get(ID).state is State.TERMINATING
    runtime.go.set()
    await sandbox.ended.wait()
    record = lifecycle.store.get(ID)
    assert record.state is State.FAILED
    assert record.death is not None and "silence" in record.death.describe()


async def test_a_new_id_is_had_although_a_sweep_of_another_process_looks_at_its_directory(
    slow: tuple[Lifecycle, SlowToRemove],
) -> None:
    lifecycle, runtime = slow
    runtime.go.set()
    sweep = OwnerLock(lifecycle.paths.sandbox(ID))
    sweep.acquire()
    asyncio.get_running_loop().call_later(0.2, lambda: sweep.release(remove=True))
    sandbox = await started(lifecycle)
    assert sandbox.state is State.RUNNING
    other = OwnerLock(lifecycle.paths.sandbox("other"))
    with other:
        lifecycle.store.put(replace(sandbox.record, id="other"))
        with pytest.raises(SandboxGatewayError, match="is owned by") as caught:
            await lifecycle.claim("other")
        assert caught.value.code == "owned_elsewhere"
    lifecycle.store.delete("other")


# Between two owners


async def test_of_two_who_ask_for_it_at_once_neither_has_it_before_it_is_left(
    quick: Lifecycle,
) -> None:
    sandbox = await started(quick)
    async with sandbox._order.lock:  # it is in the middle of something
        asked = [asyncio.create_task(quick.hand_over(ID)) for _ in range(2)]
        await asyncio.wait(asked, timeout=0.1)
        assert not any(task.done() for task in asked) and holder(quick.paths.sandbox(ID)) is not None
    await asyncio.gather(*asked)
    assert ID not in quick.live and holder(quick.paths.sandbox(ID)) is None
    again = await quick.adopt(ID)
    assert again is not sandbox and quick.store.get(ID).owner_pid is not None
    await again.destroy(Death(DeathKind.STOPPED))


async def test_it_is_ours_until_it_is_left_also_when_who_asked_for_it_has_given_up(quick: Lifecycle) -> None:
    sandbox = await started(quick)
    async with sandbox._order.lock:
        asked = asyncio.create_task(quick.hand_over(ID))
        await asyncio.wait({asked}, timeout=0.05)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert ID in quick.live and holder(quick.paths.sandbox(ID)) is not None
        with pytest.raises(SandboxGatewayError, match="another owner's"):
            await sandbox.pause()
    async with asyncio.timeout(10):
        while ID in quick.live:
            await asyncio.sleep(0.01)  # nobody is told any more
    assert holder(quick.paths.sandbox(ID)) is None
    await quick.stop(ID)


async def test_a_stop_while_it_is_handed_over_ends_it_all_the_same(quick: Lifecycle) -> None:
    sandbox = await started(quick)
    async with sandbox._order.lock:
        handed_over = asyncio.create_task(quick.hand_over(ID))
        await asyncio.sleep(0)
        stopped = asyncio.create_task(quick.stop(ID))
        await asyncio.wait({stopped}, timeout=0.2)
    await handed_over
    assert (await stopped).state is State.TERMINATED
    assert await FakeRuntime(quick.paths).list() == []


def full(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch, *states: State) -> None:
    """From now on no record can be written, or none in these states."""
    put = lifecycle.store.put

    def refuse(record: SandboxRecord) -> None:
        if not states or record.state in states:
            raise SandboxGatewayError("disk_full", "no space left on device")
        put(record)

    monkeypatch.setattr(lifecycle.store, "put", refuse)


async def test_it_is_left_also_where_that_cannot_be_written_down(
    quick: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(quick)
    with monkeypatch.context() as patched:
        full(quick, patched)
        await quick.hand_over(ID)
    assert ID not in quick.live and holder(quick.paths.sandbox(ID)) is None
    assert (await quick.stop(ID)).state is State.TERMINATED


# Suspended, on a disk that fills up


async def test_one_whose_time_is_over_ends_also_on_a_full_disk(
    quick: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await started(quick)
    await sandbox.suspend()
    full(quick, monkeypatch)
    await sandbox.expire("nobody came")
    assert sandbox.ended.is_set() and not quick.live
    assert not quick.snapshots.list()


async def test_a_snapshot_stays_while_the_record_on_disk_names_it(
    quick: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await started(quick)
    await sandbox.suspend()
    with monkeypatch.context() as patched:
        full(quick, patched, State.RUNNING)
        await sandbox.resume()
    assert sandbox.state is State.RUNNING
    named = quick.store.get(ID).snapshot
    assert named is not None and quick.snapshots.get(named).id == named
    await sandbox.destroy(Death(DeathKind.STOPPED))


async def test_a_paused_one_that_could_not_be_suspended_goes_on_where_its_link_was_left(
    quick: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the slowest client is: all the others would have everything since then twice."""
    sandbox = await started(quick)
    await sandbox.pause()
    with monkeypatch.context() as patched:
        full(quick, patched, State.SUSPENDED)
        with pytest.raises(SandboxGatewayError):
            await sandbox.suspend()
    assert sandbox.state is State.PAUSED
    attached: list[Remains | None] = []
    attach = sandbox._incarnation.attach

    async def spy(epoch: int, remains: Remains | None = None, **options: Any) -> None:
        attached.append(remains)
        await attach(epoch, remains, **options)

    monkeypatch.setattr(sandbox._incarnation, "attach", spy)
    await sandbox.resume()
    assert sandbox.state is State.RUNNING
    [remains] = attached
    assert remains is not None and remains.outbox is not None
    await sandbox.destroy(Death(DeathKind.STOPPED))


async def test_one_that_ended_while_it_was_paused_and_nobody_watched_is_dead_when_it_is_woken(
    quick: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    await (await started(quick)).pause()
    await quick.hand_over(ID)
    sandbox = await quick.adopt(ID)  # a paused one is left alone by who adopts it
    process = ProcessRef.from_json(sandbox.record.handle["data"]["sandbox"])
    assert process is not None and sandbox.state is State.PAUSED
    os.kill(process.pid, signal.SIGKILL)
    await wait_exit(process)

    async def resume(runtime: SlowToRemove, handle: Handle) -> None:
        raise SandboxGatewayError("runtime_failed", "there is no such container")

    monkeypatch.setattr(SlowToRemove, "resume", resume)
    with pytest.raises(SandboxGatewayError):
        await sandbox.resume()
    await sandbox.ended.wait()
    assert quick.store.get(ID).state is State.FAILED
