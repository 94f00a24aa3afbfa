"""The contract of a runtime as tests: every runtime passes all of them, ``fake`` included.

Use it from a test module::

    class TestMine(RuntimeContract):
        @pytest.fixture
        def subject(self, paths): return Subject(paths, make_mine, image, kernel_uid=1000)

``make`` and everything in ``image`` must be picklable: some tests have another process create the sandbox and then kill
that process with SIGKILL, at a step that they name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sandbox_gateway
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.link.host import Link
from sandbox_gateway.model import Death, DeathKind, Image, Limits, SandboxSpec
from sandbox_gateway.runtimes.base import Handle, Runtime

TIMEOUT = 60.0
"""Seconds within which anything here ends, on a busy machine too."""


@dataclass(frozen=True)
class Subject:
    """What is under test."""

    paths: Paths
    make: Callable[[Paths], Runtime]
    image: Image
    limits: Limits = field(default_factory=Limits)
    python: tuple[str, ...] = (sys.executable, "-P")
    """A Python with pyzmq, as it is called inside."""
    copies: bool = True
    """Whether an image can be restored under other ids, and while the sandbox that it was made from runs on."""

    def spec(self, sandbox_id: str) -> SandboxSpec:
        """A specification for this runtime."""
        return SandboxSpec(sandbox_id, "contract", self.make(self.paths).name, self.image, self.limits)

    def directory(self, sandbox_id: str) -> Path:
        """A fresh runtime directory, as the lifecycle makes it."""
        path = self.paths.sandbox(sandbox_id)
        path.mkdir(mode=0o700)
        return path


async def created(runtime: Runtime, spec: SandboxSpec, directory: Path) -> Handle:
    """Take all steps of a creation; return the last handle."""
    last: Handle | None = None
    async for handle in runtime.create(spec, directory):
        last = handle
    assert last is not None
    return last


@contextlib.asynccontextmanager
async def attached(runtime: Runtime, handle: Handle) -> AsyncIterator[Link]:
    """A link to the sandbox's agent, detached at the end."""
    fds = await runtime.attach(handle)
    link = Link(
        fds.read_fd,
        fds.write_fd,
        on_message=lambda channel, parts: None,
        on_gap=lambda channel, count, size: None,
        on_event=lambda event: None,
        on_lost=lambda error: None,
    )
    try:
        await link.attach(owner="contract", timeout=TIMEOUT)
        yield link
    finally:
        await link.close()


@contextlib.asynccontextmanager
async def running(subject: Subject, runtime: Runtime) -> AsyncIterator[Handle]:
    """A started sandbox, destroyed at the end."""
    sandbox_id = str(uuid.uuid4())
    directory = subject.directory(sandbox_id)
    handle = Handle(sandbox_id, runtime.name, directory)
    try:
        handle = await created(runtime, subject.spec(sandbox_id), directory)
        handle = await runtime.start(handle)
        yield handle
    finally:
        await runtime.destroy(handle)
        shutil.rmtree(directory, ignore_errors=True)


Record = Callable[[str, Handle], None]
"""Told of every step's name and handle, as the lifecycle would record it."""


async def spawn_and_be_killed(work: Callable[[Any, Record], None], argument: object, step: str) -> Handle:
    """Have another process call ``work(argument, record)``; it is killed with SIGKILL when ``step`` is recorded.

    ``"start+0.03"`` is 0.03 seconds into what follows the recording of step ``start``. ``work`` is a function of a
    module, ``argument`` picklable. Returns the last handle that was recorded, as the store would give it back.
    """
    request = pickle.dumps((work, argument, step))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "sandbox_gateway.testing.contract",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
    )
    output, _ = await asyncio.wait_for(process.communicate(request), TIMEOUT)
    assert process.returncode == -signal.SIGKILL, f"the process ended with {process.returncode} before {step}"
    handle = pickle.loads(output)
    assert isinstance(handle, Handle)
    return handle


async def create_and_be_killed(subject: Subject, sandbox_id: str, step: str) -> Handle:
    """Have another process create (and, for step ``"running"``, start) the sandbox; it is killed at ``step``."""
    return await spawn_and_be_killed(_create, (subject, sandbox_id), step)


def _create(request: tuple[Subject, str], record: Record) -> None:
    subject, sandbox_id = request

    async def main() -> None:
        runtime = subject.make(subject.paths)
        directory = subject.directory(sandbox_id)
        handle: Handle | None = None
        async for handle in runtime.create(subject.spec(sandbox_id), directory):
            record(handle.step, handle)
        assert handle is not None
        record("start", handle)
        record("running", await runtime.start(handle))

    asyncio.run(main())


def _import_path() -> list[str]:
    own = str(Path(str(sandbox_gateway.__file__)).parent.parent)
    return [own, *(entry for entry in sys.path if entry and entry != own)]


def _die() -> None:
    """Do the work that is asked for on standard input, and be killed in the middle of it."""
    work, argument, step = pickle.loads(sys.stdin.buffer.read())
    name, _, delay = step.partition("+")

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def record(recorded: str, handle: Handle) -> None:
        if recorded != name:
            return
        sys.stdout.buffer.write(pickle.dumps(handle))
        sys.stdout.buffer.flush()
        if not delay:
            end()
        threading.Timer(float(delay), end).start()

    work(argument, record)
    signal.pause()


class RuntimeContract:
    """The tests. A subclass gives the fixture ``subject``; coroutine tests run in pytest-asyncio's auto mode."""

    async def test_probe_says_that_it_can_run(self, subject: Subject) -> None:
        """A runtime that is tested can run here, and says whether it isolates."""
        runtime = subject.make(subject.paths)
        report = await runtime.probe()
        assert report.get("run").available
        assert report.runtime == runtime.name
        assert report.isolated is runtime.isolated

    async def test_agent_answers_on_the_link(self, subject: Subject) -> None:
        """Create, start and attach lead to an agent that answers."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            assert await runtime.alive(handle)
            async with attached(runtime, handle) as link:
                assert await link.ping(TIMEOUT) < TIMEOUT
            assert handle.id in await runtime.list()

    async def test_steps_are_announced_before_they_are_taken(self, subject: Subject) -> None:
        """The first handle comes before anything exists, the last is the finished one; all can be stored as JSON."""
        runtime = subject.make(subject.paths)
        sandbox_id = str(uuid.uuid4())
        directory = subject.directory(sandbox_id)
        steps: list[Handle] = []
        async for handle in runtime.create(subject.spec(sandbox_id), directory):
            if not steps:
                assert list(directory.iterdir()) == []
            assert json.loads(json.dumps(dict(handle.data))) == dict(handle.data)
            steps.append(handle)
        await runtime.destroy(steps[-1])
        assert steps[-1].step == "created"
        assert len({handle.step for handle in steps}) == len(steps)

    async def test_a_sandbox_that_is_expected_is_made_or_not(self, subject: Subject) -> None:
        """What was begun for it serves the next one in its directory, once, and is gone when none was made."""
        runtime = subject.make(subject.paths)
        spec = subject.spec(str(uuid.uuid4()))
        directory = subject.directory(spec.id)
        async with runtime.expecting(directory):
            pass
        assert (list(directory.iterdir()), await runtime.list()) == ([], [])
        async with runtime.expecting(directory):
            for _ in range(2):  # an attempt that failed, and the next one
                handle = await created(runtime, spec, directory)
                await runtime.destroy(handle)
        assert await runtime.list() == []

    async def test_second_attach_continues_where_the_first_left(self, subject: Subject) -> None:
        """A link can be given up and taken up again; the agent is the same."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            async with attached(runtime, handle) as link:
                await link.ping(TIMEOUT)
            async with attached(runtime, handle) as link:
                assert (await link.call("stats"))["phase"] == "none"

    async def test_sandbox_outlives_the_process_that_made_it(self, subject: Subject) -> None:
        """After a ``kill -9`` of its creator another process attaches by the recorded handle alone."""
        runtime = subject.make(subject.paths)
        sandbox_id = str(uuid.uuid4())
        handle = await create_and_be_killed(subject, sandbox_id, "running")
        try:
            assert await runtime.alive(handle)
            assert sandbox_id in await runtime.list()
            async with attached(runtime, handle) as link:
                await link.ping(TIMEOUT)
        finally:
            await runtime.destroy(handle)
        assert not await runtime.alive(handle)

    async def test_creator_killed_at_any_step_leaves_what_destroy_removes(self, subject: Subject) -> None:
        """Whatever step its creator was killed at, the sandbox is listed if it exists, and destroy removes it all."""
        steps = await self._steps(subject)
        in_between = [f"{steps[-2]}+{delay}" for delay in (0.01, 0.03, 0.05, 0.08)]
        for step in (*steps, "start", "start+0.01", "start+0.03", *in_between):
            runtime = subject.make(subject.paths)
            sandbox_id = str(uuid.uuid4())
            handle = await create_and_be_killed(subject, sandbox_id, step)
            directory = subject.paths.sandbox(sandbox_id)
            assert list(directory.iterdir()) == [] or sandbox_id in await runtime.list()
            await runtime.destroy(handle)
            assert list(directory.iterdir()) == []
            assert sandbox_id not in await runtime.list()

    async def _steps(self, subject: Subject) -> list[str]:
        runtime = subject.make(subject.paths)
        sandbox_id = str(uuid.uuid4())
        handle = None
        steps = []
        async for handle in runtime.create(subject.spec(sandbox_id), subject.directory(sandbox_id)):
            steps.append(handle.step)
        assert handle is not None
        await runtime.destroy(handle)
        return steps

    async def test_creation_given_up_at_any_step_leaves_nothing(self, subject: Subject) -> None:
        """A caller that stops asking for steps and destroys by the last handle leaves nothing."""
        for step in await self._steps(subject):
            runtime = subject.make(subject.paths)
            sandbox_id = str(uuid.uuid4())
            directory = subject.directory(sandbox_id)
            steps = runtime.create(subject.spec(sandbox_id), directory)
            last = Handle(sandbox_id, runtime.name, directory)
            async for last in steps:
                if last.step == step:
                    break
            await runtime.destroy(last)
            assert list(directory.iterdir()) == []
            assert sandbox_id not in await runtime.list()

    async def test_destroy_by_id_alone(self, subject: Subject) -> None:
        """A sandbox whose record was lost is found by list() and removed with a handle that knows only its id."""
        runtime = subject.make(subject.paths)
        sandbox_id = str(uuid.uuid4())
        recorded = await create_and_be_killed(subject, sandbox_id, "running")
        assert sandbox_id in await runtime.list()
        await runtime.destroy(Handle(sandbox_id, runtime.name, subject.paths.sandbox(sandbox_id)))
        assert sandbox_id not in await runtime.list()
        assert not await runtime.alive(recorded)

    async def test_destroy_is_idempotent(self, subject: Subject) -> None:
        """Destroying twice, at once or one after the other, is no error."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            await asyncio.gather(runtime.destroy(handle), runtime.destroy(handle))
            await runtime.destroy(handle)
            assert handle.id not in await runtime.list()
            assert not await runtime.alive(handle)

    async def test_destroy_spares_the_owners_files(self, subject: Subject) -> None:
        """Files whose names begin with ``owner`` are not the runtime's."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            (handle.directory / "owner.lock").write_text("")
            await runtime.destroy(handle)
            assert [path.name for path in handle.directory.iterdir()] == ["owner.lock"]

    async def test_wait_returns_when_init_ends(self, subject: Subject) -> None:
        """An agent that is told to shut down ends the sandbox, and wait() says so."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            waiting = asyncio.create_task(runtime.wait(handle))
            async with attached(runtime, handle) as link:
                with contextlib.suppress(SandboxGatewayError):
                    await link.call("shutdown", timeout=TIMEOUT)
                death = await asyncio.wait_for(waiting, TIMEOUT)
            assert isinstance(death, Death)
            assert death.kind is DeathKind.AGENT_DIED
            assert not await runtime.alive(handle)

    async def test_wait_tells_a_destruction_from_a_death(self, subject: Subject) -> None:
        """A sandbox that we end was stopped, it did not die."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            waiting = asyncio.create_task(runtime.wait(handle))
            await asyncio.sleep(0)
            await runtime.destroy(handle)
            assert (await asyncio.wait_for(waiting, TIMEOUT)).kind is DeathKind.STOPPED

    async def test_wait_on_what_has_ended_returns_at_once(self, subject: Subject) -> None:
        """Nobody waits for ever on a sandbox that is gone."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            await runtime.destroy(handle)
            await asyncio.wait_for(runtime.wait(handle), TIMEOUT)

    async def test_stats_count_something(self, subject: Subject) -> None:
        """A running sandbox uses memory, time and processes; one that is gone gives no numbers and no error."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as handle:
            async with attached(runtime, handle) as link:
                await link.ping(TIMEOUT)
            stats = await runtime.stats(handle)
            assert stats.memory is not None and stats.memory > 1 << 20
            assert stats.cpu_seconds is not None and stats.cpu_seconds > 0
            assert stats.processes is not None and stats.processes >= 1
            await runtime.destroy(handle)
            await runtime.stats(handle)

    async def test_two_at_once_do_not_mix(self, subject: Subject) -> None:
        """Two sandboxes made at the same time have links of their own, and the end of one is not the other's."""
        runtime = subject.make(subject.paths)
        async with running(subject, runtime) as one, running(subject, runtime) as two:
            assert {one.id, two.id} <= set(await runtime.list())
            async with attached(runtime, one) as first, attached(runtime, two) as second:
                await asyncio.gather(first.ping(TIMEOUT), second.ping(TIMEOUT))
                await runtime.destroy(one)
                await second.ping(TIMEOUT)
            assert await runtime.alive(two)
            assert not await runtime.alive(one)

    async def test_many_created_and_destroyed_together(self, subject: Subject) -> None:
        """Creations and removals of several sandboxes at the same time do not disturb each other."""
        runtime = subject.make(subject.paths)

        async def one() -> None:
            async with running(subject, runtime) as handle, attached(runtime, handle) as link:
                await link.ping(TIMEOUT)

        await asyncio.gather(*(one() for _ in range(4)))
        assert await runtime.list() == []


if __name__ == "__main__":
    _die()
