"""The fake runtime's faults do what their names say, and what they leave can be removed."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from executed import wait_until_executed

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.processes import ProcessRef, wait_exit
from sandbox_gateway.model import DeathKind, Image, Mount, SandboxSpec
from sandbox_gateway.runtimes import launcher
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.testing import fake, faults
from sandbox_gateway.testing.contract import created


def sandbox(paths: Paths) -> tuple[SandboxSpec, Handle]:
    """A specification and a handle that knows only the id."""
    sandbox_id = str(uuid.uuid4())
    directory = paths.sandbox(sandbox_id)
    directory.mkdir()
    return SandboxSpec(sandbox_id, "p", "fake", Image("none", ())), Handle(sandbox_id, "fake", directory)


@pytest.mark.parametrize(("step", "after"), [("files", False), ("files", True), ("created", False)])
async def test_fails_during_create(paths: Paths, step: str, after: bool) -> None:
    """It fails at its step, and destroy removes what was made."""
    runtime = fake.FailsDuringCreate(paths, step, after=after)
    spec, handle = sandbox(paths)
    with pytest.raises(SandboxGatewayError, match=f"fail at {step}"):
        await created(runtime, spec, handle.directory)
    await runtime.destroy(handle)
    assert list(handle.directory.iterdir()) == []


async def test_fails_during_start(paths: Paths) -> None:
    """The agent runs all the same, and destroy finds it."""
    runtime = fake.FailsDuringStart(paths)
    spec, handle = sandbox(paths)
    last = await created(runtime, spec, handle.directory)
    with pytest.raises(SandboxGatewayError, match="start"):
        await runtime.start(last)
    await runtime.destroy(last)


async def test_fails_during_attach(paths: Paths) -> None:
    """The link cannot be had."""
    runtime = fake.FailsDuringAttach(paths)
    with pytest.raises(SandboxGatewayError, match="attach"):
        await runtime.attach(sandbox(paths)[1])


async def test_dies_after(paths: Paths) -> None:
    """Its death comes by itself."""
    runtime = fake.DiesAfter(paths, 0.05)
    spec, handle = sandbox(paths)
    last = await runtime.start(await created(runtime, spec, handle.directory))
    death = await asyncio.wait_for(runtime.wait(last), 10)
    assert death.kind is DeathKind.AGENT_DIED
    await runtime.destroy(last)


async def test_fails_during_destroy(paths: Paths) -> None:
    """The first removal fails, the next one works."""
    runtime = fake.FailsDuringDestroy(paths)
    spec, handle = sandbox(paths)
    last = await created(runtime, spec, handle.directory)
    with pytest.raises(SandboxGatewayError, match="removal"):
        await runtime.destroy(last)
    await runtime.destroy(last)
    assert await runtime.list() == []


async def started(runtime: fake.FakeRuntime) -> tuple[SandboxSpec, Handle]:
    """A running sandbox."""
    spec, handle = sandbox(runtime.paths)
    return spec, await runtime.start(await created(runtime, spec, handle.directory))


async def suspended(runtime: fake.FakeRuntime) -> tuple[SandboxSpec, Handle, Path]:
    """A sandbox that was saved and removed, and its image."""
    spec, handle = await started(runtime)
    image = runtime.paths.home / "image"
    await runtime.pause(handle)
    await runtime.snapshot(handle, image)
    await runtime.destroy(handle)
    return spec, handle, image


async def gone(handle: Handle) -> None:
    """Return when no process of the sandbox is left."""
    refs = [ProcessRef.from_json(handle.data[name]) for name in ("holder", "sandbox")]
    for ref in refs:
        if ref is not None:
            await asyncio.wait_for(wait_exit(ref), 10)


async def test_removed_image_ends_what_is_parked(paths: Paths) -> None:
    """The parked processes live as long as their image, wherever it is moved to, and no longer."""
    runtime = fake.FakeRuntime(paths)
    _, handle, image = await suspended(runtime)
    image.rename(paths.home / "moved")
    agent = ProcessRef.from_json(handle.data["sandbox"])
    assert agent is not None and agent.alive()
    assert not await runtime.alive(handle)
    assert await runtime.list() == []
    shutil.rmtree(paths.home / "moved")
    await gone(handle)


async def test_removed_installation_ends_what_is_parked(paths: Paths) -> None:
    """Image and record may go at the same moment."""
    _, handle, _ = await suspended(fake.FakeRuntime(paths))
    shutil.rmtree(paths.home)
    await gone(handle)


async def test_new_sandbox_under_the_id_of_a_parked_one(paths: Paths) -> None:
    """A clean restart while the old life is still parked: neither harms the other."""
    runtime = fake.FakeRuntime(paths)
    spec, parked, image = await suspended(runtime)
    handle = await runtime.start(await created(runtime, spec, parked.directory))
    assert await runtime.alive(handle) and not await runtime.alive(parked)
    await runtime.destroy(handle)
    agent = ProcessRef.from_json(parked.data["sandbox"])
    assert agent is not None and agent.alive()
    back = [step async for step in runtime.restore(spec, parked.directory, image)][-1]
    assert await runtime.alive(back)
    shutil.rmtree(image)
    await runtime.destroy(back)
    await gone(back)


async def test_restart_of_the_machine_makes_images_unfit(paths: Paths) -> None:
    """Parked processes do not outlive the machine's boot, and it says so."""
    assert "restarted" in await fake.FakeRuntime(paths).unfit({"boot": "another"})


async def test_names_open_files_of_its_mounts(paths: Paths) -> None:
    """What a process has open below a mount's source."""
    runtime = fake.FakeRuntime(paths)
    spec, handle = sandbox(paths)
    workspace = paths.home / "workspace"
    workspace.mkdir()
    (workspace / "open").touch()
    spec = replace(spec, mounts=(Mount(str(workspace), "/work"),))
    last = await runtime.start(await created(runtime, spec, handle.directory))
    assert await runtime.host_files(last) == ()
    marked = {launcher.MARKER: str(handle.directory)}
    with (workspace / "open").open() as file:
        beside = subprocess.Popen(["sleep", "60"], stdin=file, env=marked)
    try:
        wait_until_executed(beside.pid)
        assert await runtime.host_files(last) == (str(workspace / "open"),)
    finally:
        beside.kill()
        beside.wait()
        await runtime.destroy(last)


async def test_fails_during_pause_and_resume(paths: Paths) -> None:
    """The first one fails and changes nothing, the next one works."""
    runtime = faults.FailsDuringPause(paths)
    _, handle = await started(runtime)
    with pytest.raises(SandboxGatewayError, match="pause"):
        await runtime.pause(handle)
    await runtime.pause(handle)
    other = faults.FailsDuringResume(paths)
    with pytest.raises(SandboxGatewayError, match="resume"):
        await other.resume(handle)
    await other.resume(handle)
    await runtime.destroy(handle)


async def test_hangs_during_pause_and_snapshot(paths: Paths) -> None:
    """It returns only to who gives up; the sandbox can be resumed and removed."""
    runtime = faults.HangsDuringPause(paths)
    _, handle = await started(runtime)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(runtime.pause(handle), 0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(faults.HangsDuringSnapshot(paths).snapshot(handle, paths.home / "image"), 0.2)
    await runtime.resume(handle)
    await runtime.destroy(handle)


async def test_fails_during_snapshot(paths: Paths) -> None:
    """The error is the one that was asked for, half an image is left, and the next one works."""
    runtime = faults.FailsDuringSnapshot(paths, "disk_full")
    _, handle = await started(runtime)
    await runtime.pause(handle)
    with pytest.raises(SandboxGatewayError, match="snapshot") as caught:
        await runtime.snapshot(handle, paths.home / "half")
    assert caught.value.code == "disk_full"
    assert [path.name for path in (paths.home / "half").iterdir()] == ["half"]
    await runtime.snapshot(handle, paths.home / "image")
    shutil.rmtree(paths.home / "image")
    await runtime.destroy(handle)
    await gone(handle)


@pytest.mark.parametrize(("step", "after"), [("files", False), ("files", True), ("thaw", True), ("started", True)])
async def test_fails_during_restore(paths: Paths, step: str, after: bool) -> None:
    """It fails at its step; removed, and asked once more, it restores."""
    runtime = faults.FailsDuringRestore(paths, step, after=after)
    spec, handle, image = await suspended(runtime)
    last = handle
    with pytest.raises(SandboxGatewayError, match=f"fail at {step}"):
        async for each in runtime.restore(spec, handle.directory, image):
            last = each
    await runtime.destroy(last)
    assert list(handle.directory.iterdir()) == []
    back = [each async for each in runtime.restore(spec, handle.directory, image)][-1]
    assert await runtime.alive(back)
    shutil.rmtree(image)
    await runtime.destroy(back)
    await gone(back)


async def test_is_unfit(paths: Paths) -> None:
    """Its own images do not fit either."""
    runtime = faults.IsUnfit(paths)
    assert await runtime.unfit(await runtime.requirements()) != ""


async def test_says_that_it_is_not_isolated(paths: Paths) -> None:
    """Wherever it shows."""
    report = await fake.FakeRuntime(paths).probe()
    assert not report.isolated
    assert "not isolated" in report.get("run").reason
    assert not report.get("limits.memory").available
