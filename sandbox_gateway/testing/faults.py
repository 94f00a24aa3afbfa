"""Fake runtimes that fail or hang at one place of a pause, a snapshot or a restore (others: with the fake runtime)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import SandboxSpec
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.testing.fake import FakeRuntime


class FailsDuringPause(FakeRuntime):
    """Its first ``times`` pauses fail; the sandbox runs on."""

    def __init__(self, paths: Paths, times: int = 1) -> None:
        super().__init__(paths)
        self.times = times

    async def pause(self, handle: Handle) -> None:
        """Raise ``runtime_failed`` while failures are left."""
        if self.times > 0:
            self.times -= 1
            raise SandboxGatewayError("runtime_failed", "asked to fail at the pause")
        await super().pause(handle)


class HangsDuringPause(FakeRuntime):
    """Its pauses stop the sandbox and then do not return until they are cancelled."""

    async def pause(self, handle: Handle) -> None:
        """Stop everything and hang."""
        await super().pause(handle)
        await asyncio.Event().wait()


class FailsDuringResume(FakeRuntime):
    """Its first ``times`` resumes fail; the sandbox stays paused."""

    def __init__(self, paths: Paths, times: int = 1) -> None:
        super().__init__(paths)
        self.times = times

    async def resume(self, handle: Handle) -> None:
        """Raise ``runtime_failed`` while failures are left."""
        if self.times > 0:
            self.times -= 1
            raise SandboxGatewayError("runtime_failed", "asked to fail at the resume")
        await super().resume(handle)


class FailsDuringSnapshot(FakeRuntime):
    """Its first ``times`` snapshots fail with ``code`` and leave half an image; the sandbox stays paused."""

    def __init__(self, paths: Paths, code: str = "runtime_failed", times: int = 1) -> None:
        super().__init__(paths)
        self.code = code
        self.times = times

    async def snapshot(self, handle: Handle, image: Path) -> None:
        """Raise the error while failures are left."""
        if self.times > 0:
            self.times -= 1
            await asyncio.to_thread(image.mkdir, mode=0o700)
            await asyncio.to_thread((image / "half").touch)
            raise SandboxGatewayError(self.code, "asked to fail at the snapshot")
        await super().snapshot(handle, image)


class HangsDuringSnapshot(FakeRuntime):
    """Its snapshots do not return until they are cancelled."""

    async def snapshot(self, handle: Handle, image: Path) -> None:
        """Make the directory and hang."""
        await asyncio.to_thread(image.mkdir, mode=0o700)
        await asyncio.Event().wait()


class FailsDuringRestore(FakeRuntime):
    """Its first ``times`` restores fail at one step (``files``, ``thaw``, ``started``): when it is to be taken, or with
    ``after`` when it has been. What was saved can be restored all the same."""

    def __init__(self, paths: Paths, step: str = "thaw", times: int = 1, *, after: bool = False) -> None:
        super().__init__(paths)
        self.step = step
        self.times = times
        self.after = after

    async def restore(self, spec: SandboxSpec, directory: Path, image: Path) -> AsyncIterator[Handle]:
        """As usual up to the step, then ``runtime_failed`` while failures are left."""
        reached = False
        async for handle in super().restore(spec, directory, image):
            if self.times > 0 and (reached or (handle.step == self.step and not self.after)):
                break
            reached = handle.step == self.step
            yield handle
        if self.times > 0:
            self.times -= 1
            raise SandboxGatewayError("runtime_failed", f"asked to fail at {self.step}")


class IsUnfit(FakeRuntime):
    """Says of every image that it does not fit."""

    async def unfit(self, requirements: Mapping[str, str]) -> str:
        """The reason."""
        return "this machine was asked to fit nothing"
