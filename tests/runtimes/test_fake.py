"""The fake runtime's faults do what their names say, and what they leave can be removed."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import DeathKind, Image, SandboxSpec
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.testing import fake
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


async def test_says_that_it_is_not_isolated(paths: Paths) -> None:
    """Wherever it shows."""
    report = await fake.FakeRuntime(paths).probe()
    assert not report.isolated
    assert "not isolated" in report.get("run").reason
    assert not report.get("limits.memory").available
