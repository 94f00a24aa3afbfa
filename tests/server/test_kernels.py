"""The gateway's kernels over the fake runtime: what several callers do at once, and what becomes of the dead."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.model import Death, DeathKind, Image, SandboxSpec, State
from sandbox_gateway.quotas import Quota
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.server import gateway as gateway_module
from sandbox_gateway.server.callers import Caller
from sandbox_gateway.server.gateway import Gateway, Wanted
from sandbox_gateway.server.kernel import ServedKernel
from sandbox_gateway.server.settings import Settings
from sandbox_gateway.testing.fake import FakeRuntime

ANN = Caller("ann")
PROFILES = """
[profiles.sleeper]
runtime = "fake"
argv = ["sh", "-c", "sleep 1000", "{connection_file}"]

[profiles.folder]
runtime = "fake"
argv = ["sh", "-c", "sleep 1000", "{connection_file}"]
workspace = "rw"
"""


class NoImages:
    """The fake runtime runs the host's own Python."""

    async def resolve(self, *arguments: Any, **options: Any) -> Image:
        return Image("host", (), interpreter=sys.executable)

    def collect(self, *arguments: Any, **options: Any) -> tuple[()]:
        return ()


class Slow(FakeRuntime):
    """What it makes or removes while it is held is made or removed when it is let go."""

    def __init__(self, paths: Paths) -> None:
        super().__init__(paths)
        self.go = asyncio.Event()
        self.go.set()
        self.waits = asyncio.Event()

    def hold(self) -> None:
        self.go.clear()
        self.waits.clear()

    async def create(self, spec: SandboxSpec, directory: Path) -> AsyncIterator[Handle]:
        await self._turn()
        async for handle in super().create(spec, directory):
            yield handle

    async def destroy(self, handle: Handle) -> None:
        await self._turn()
        await super().destroy(handle)

    async def _turn(self) -> None:
        self.waits.set()
        await self.go.wait()


@dataclass
class Served:
    gateway: Gateway
    runtime: Slow

    async def kernel(self, profile: str = "sleeper", directory: Path | None = None) -> ServedKernel:
        record = await self.gateway.create(ANN, Wanted(profile, directory=directory))
        return self.gateway.kernels[record.id]

    async def dead(self) -> ServedKernel:
        kernel = await self.kernel()
        kernel.live._died(Death(DeathKind.AGENT_DIED, "silence"))
        await kernel.live.ended.wait()
        return kernel

    def running(self) -> list[str]:
        """Ids of the sandboxes that have processes, whatever is on record."""
        return [found for found, live in self.gateway.lifecycle.live.items() if live.state is State.RUNNING]


@pytest.fixture
async def served(paths: Paths) -> AsyncIterator[Served]:
    paths.profiles.write_text(PROFILES)
    runtime = Slow(paths)

    def lifecycle(paths: Paths, **more: Any) -> Lifecycle:
        return Lifecycle(paths, runtimes=lambda name, where: runtime, images=NoImages(), **more)  # type: ignore[arg-type]

    gateway = Gateway(paths, Settings(quota=Quota(live=2)), lifecycle=lifecycle)
    await gateway.start()
    yield Served(gateway, runtime)
    runtime.go.set()
    for sandbox_id in tuple(gateway.kernels):
        await gateway.delete(ANN, sandbox_id)
    await gateway.close()


async def test_of_two_restarts_of_a_dead_kernel_the_second_leaves_the_new_one_alone(served: Served) -> None:
    kernel = await served.dead()
    served.runtime.hold()
    first = asyncio.create_task(kernel.restart())
    await served.runtime.waits.wait()
    second = asyncio.create_task(kernel.restart())
    await asyncio.sleep(0)
    served.runtime.go.set()
    await first
    made = kernel.live
    await second
    assert kernel.live is made and made.death is None and served.running() == [kernel.id]
    assert served.gateway.lifecycle.store.get(kernel.id).state is State.RUNNING


async def test_a_kernel_that_is_deleted_while_it_is_made_anew_is_gone(served: Served) -> None:
    kernel = await served.dead()
    served.runtime.hold()
    restart = asyncio.create_task(kernel.restart())
    await served.runtime.waits.wait()
    async with asyncio.timeout(10):
        await served.gateway.delete(ANN, kernel.id)
    assert restart.done(), "what was being made is given up before the delete is answered"
    with pytest.raises(SandboxGatewayError):
        await restart
    assert served.gateway.kernels == {} and served.running() == []
    assert not served.gateway.lifecycle.live


async def test_a_clean_restart_keeps_its_place_in_the_quota(served: Served) -> None:
    await served.kernel()
    kernel = await served.kernel()
    served.runtime.hold()
    restart = asyncio.create_task(kernel.restart(clean=True))
    await served.runtime.waits.wait()
    with pytest.raises(SandboxGatewayError) as caught:
        await served.kernel()
    assert caught.value.code == "over_quota"
    served.runtime.go.set()
    await restart
    assert len(served.running()) == 2


async def test_a_clean_restart_opens_the_folder_that_its_parent_or_an_earlier_server_opened(
    served: Served, tmp_path: Path
) -> None:
    kernel = await served.kernel("folder", tmp_path)
    kernel._directory = None  # as of one that was adopted, or forked
    before = kernel.live
    await kernel.restart(clean=True)
    assert kernel.live is not before and kernel.live.launch.spec.mounts == before.launch.spec.mounts


async def test_a_clean_restart_whose_folder_is_gone_ends_nothing(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    kernel = await served.kernel("folder", folder)
    folder.rmdir()
    with pytest.raises(SandboxGatewayError) as caught:
        await kernel.restart(clean=True)
    assert caught.value.code == "invalid_request" and kernel.live.death is None


async def test_a_dead_kernel_is_deleted_also_when_its_record_is_gone(served: Served) -> None:
    kernel = await served.dead()
    served.gateway.lifecycle.store.delete(kernel.id)
    with pytest.raises(SandboxGatewayError):
        await served.gateway.delete(Caller("bob"), kernel.id)
    await served.gateway.forget(ANN, kernel.id)
    assert served.gateway.kernels == {}


async def test_records_of_kernels_that_a_server_lists_are_not_trimmed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_gateway.unowned.KEPT_TOMBSTONES", 0)
    listed, gone = await served.dead(), await served.kernel()
    await served.gateway.delete(ANN, gone.id)
    await served.gateway.lifecycle.sweep()
    assert [record.id for record in served.gateway.lifecycle.store.list()] == [listed.id]


async def test_of_many_dead_kernels_of_one_owner_the_last_ones_are_listed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "DEAD_KEPT", 2)
    living = await served.kernel()
    died = [await served.dead() for _ in range(4)]
    async with asyncio.timeout(10):
        while len(served.gateway.kernels) > 3:
            await asyncio.sleep(0.01)
    assert set(served.gateway.kernels) == {living.id, died[2].id, died[3].id}
