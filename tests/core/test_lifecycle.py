"""The driver of sandboxes over the fake runtime: what becomes of a sandbox whatever happens to its caller."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.live import LiveSandbox
from sandbox_gateway.model import Death, DeathKind, Image, KernelSpec, State
from sandbox_gateway.owner_lock import OwnerLock
from sandbox_gateway.profiles import Profile
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.seat import Seat
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
