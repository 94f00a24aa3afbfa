"""The contract of pausing and saving as tests: every runtime that reports ``pause`` and ``snapshots`` passes them.

Used beside :class:`~sandbox_gateway.testing.contract.RuntimeContract`, with the same fixture ``subject``. What runs in
the sandbox is the real agent and the kernel of :mod:`sandbox_gateway.testing.counting`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import DeathKind, SandboxSpec
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.testing.contract import TIMEOUT, Record, Subject, spawn_and_be_killed
from sandbox_gateway.testing.counting import Saving, new_image, printing, refused, restored, saved, saving


def _restore(request: tuple[Subject, SandboxSpec, Path], record: Record) -> None:
    subject, spec, image = request

    async def main() -> None:
        async for handle in saving(subject).restore(spec, subject.paths.sandbox(spec.id), image):
            record(handle.step, handle)

    asyncio.run(main())


class SnapshotContract:
    """The tests. A subclass gives the fixture ``subject``; coroutine tests run in pytest-asyncio's auto mode."""

    async def test_probe_says_that_it_can_save(self, subject: Subject) -> None:
        """A runtime that is tested here reports both abilities."""
        report = await saving(subject).probe()
        assert report.get("pause").available
        assert report.get("snapshots").available

    async def test_pause_stops_output_and_processor_and_resume_goes_on(self, subject: Subject) -> None:
        """Paused, nothing is printed, answered or computed; resumed, it goes on where it was."""
        async with printing(subject) as (runtime, _, handle, printer), printer.link(runtime, handle) as link:
            await runtime.pause(handle)
            with refused("timeout"):
                await link.ping(1.0)
            before, used = len(printer.numbers), (await runtime.stats(handle)).cpu_seconds
            with refused("timeout"):
                await link.ping(1.0)
            assert len(printer.numbers) == before
            after = (await runtime.stats(handle)).cpu_seconds
            assert used is not None and after is not None and after - used < 0.05
            assert await runtime.alive(handle)
            await runtime.resume(handle)
            await link.ping(TIMEOUT)
            await printer.until(before + 5)
            printer.check()

    async def test_pause_and_resume_may_be_repeated(self, subject: Subject) -> None:
        """A second pause is no error and takes no second resume; nor is a resume of what runs."""
        async with printing(subject) as (runtime, _, handle, printer):
            await runtime.resume(handle)
            await runtime.pause(handle)
            await runtime.pause(handle)
            await runtime.resume(handle)
            await runtime.resume(handle)
            async with printer.link(runtime, handle) as link:
                await link.ping(TIMEOUT)

    async def test_cancelled_pause_is_whole_or_not_at_all(self, subject: Subject) -> None:
        """Whoever gives up waiting for a pause can resume, and then it runs."""
        async with printing(subject) as (runtime, _, handle, printer):
            for delay in (0.0, 0.005, 0.01):
                task = asyncio.ensure_future(runtime.pause(handle))
                await asyncio.wait({task}, timeout=delay)
                task.cancel()
                await asyncio.wait({task})
                await runtime.resume(handle)
                async with printer.link(runtime, handle) as link:
                    await link.ping(TIMEOUT)

    async def test_paused_sandbox_is_destroyed(self, subject: Subject) -> None:
        """A removal needs no resume, and is no death."""
        async with printing(subject) as (runtime, _, handle, _):
            waiting = asyncio.create_task(runtime.wait(handle))
            await runtime.pause(handle)
            await runtime.destroy(handle)
            assert (await asyncio.wait_for(waiting, TIMEOUT)).kind is DeathKind.STOPPED
            assert list(handle.directory.iterdir()) == []

    async def test_snapshot_leaves_it_paused_and_resumable(self, subject: Subject) -> None:
        """Saved, it is still paused; resumed, it has lost nothing."""
        async with printing(subject) as (runtime, _, handle, printer), printer.link(runtime, handle) as link:
            image = await saved(subject, runtime, handle)
            with refused("timeout"):
                await link.ping(1.0)
            assert image.stat().st_mode & 0o077 == 0
            assert all(path.stat().st_mode & 0o077 == 0 for path in image.iterdir())
            await runtime.resume(handle)
            await printer.until(len(printer.numbers) + 5)
            printer.check()

    async def test_snapshot_into_what_is_there_is_refused(self, subject: Subject) -> None:
        """An image is a new directory; what is there already is not touched, and the sandbox can go on."""
        async with printing(subject) as (runtime, _, handle, printer):
            image = new_image(subject)
            image.mkdir()
            (image / "mine").touch()
            await runtime.pause(handle)
            with refused("data_directory"):
                await runtime.snapshot(handle, image)
            assert [path.name for path in image.iterdir()] == ["mine"]
            await runtime.resume(handle)
            async with printer.link(runtime, handle) as link:
                await link.ping(TIMEOUT)

    async def test_restore_goes_on_with_memory_and_loses_no_line(self, subject: Subject) -> None:
        """Suspended while it prints and removed, then restored under the same id: every line once, several times over;
        it runs though it was paused, and the image is not needed any more."""
        async with printing(subject) as (runtime, spec, handle, printer):
            for _ in range(3):
                async with printer.link(runtime, handle, new_epoch=False):
                    await printer.until(len(printer.numbers) + 20)
                image = await saved(subject, runtime, handle)
                await runtime.destroy(handle)
                assert not await runtime.alive(handle)
                assert spec.id not in await runtime.list()
                assert list(handle.directory.iterdir()) == []
                handle = await restored(runtime, spec, handle.directory, image)
                assert await runtime.alive(handle)
                assert spec.id in await runtime.list()
                async with printer.link(runtime, handle) as link:
                    await printer.echo(link, uuid.uuid4().bytes)
                    await printer.until(len(printer.numbers) + 20)
                await runtime.loaded(handle)
                shutil.rmtree(image)
            printer.check()
            await runtime.destroy(handle)

    async def test_what_was_on_its_way_at_the_snapshot_arrives(self, subject: Subject) -> None:
        """A host that did not even detach names what it has, and gets the rest from the restored sandbox."""
        async with printing(subject) as (runtime, spec, handle, printer):
            async with printer.link(runtime, handle, new_epoch=False) as link:
                await printer.until(len(printer.numbers) + 20)
                image = await saved(subject, runtime, handle)
                await link.close(detach=False)
            await runtime.destroy(handle)
            handle = await restored(runtime, spec, handle.directory, image)
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 20)
            printer.check()
            await runtime.loaded(handle)
            shutil.rmtree(image)
            await runtime.destroy(handle)

    async def test_image_may_be_removed_as_soon_as_the_restore_is_done(self, subject: Subject) -> None:
        """The last step comes when no file of the image is looked for by its name any more."""
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.destroy(handle)
            handle = await restored(runtime, spec, handle.directory, image)
            shutil.rmtree(image)
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 20)
            await runtime.loaded(handle)
            assert await runtime.alive(handle)
            printer.check()
            await runtime.destroy(handle)

    async def test_death_after_a_restore_is_a_death(self, subject: Subject) -> None:
        """What was removed for a suspend and restored by the same process can die, and wait() says so."""
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.destroy(handle)
            handle = await restored(runtime, spec, handle.directory, image)
            shutil.rmtree(image)
            waiting = asyncio.create_task(runtime.wait(handle))
            async with printer.link(runtime, handle) as link:
                with contextlib.suppress(SandboxGatewayError):
                    await link.call("shutdown", timeout=TIMEOUT)
                assert (await asyncio.wait_for(waiting, TIMEOUT)).kind is DeathKind.AGENT_DIED
            await runtime.destroy(handle)

    async def test_restore_steps_are_announced_before_they_are_taken(self, subject: Subject) -> None:
        """As in a creation; given up after any step, the last handle removes all and the image is as good as before."""
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.destroy(handle)
            steps = []
            async for step in runtime.restore(spec, handle.directory, image):
                if step.linked:
                    fds = await runtime.attach(step)
                    os.close(fds.read_fd)
                    os.close(fds.write_fd)
                steps.append(step)
            await runtime.destroy(steps[-1])
            assert [step.step for step in steps][-1] == "started"
            assert len({step.step for step in steps}) == len(steps)
            for given_up in steps:
                restoring = runtime.restore(spec, handle.directory, image)
                async for step in restoring:
                    handle = step
                    if step.step == given_up.step:
                        break
                await runtime.destroy(handle)
                assert list(handle.directory.iterdir()) == []
                assert spec.id not in await runtime.list()
            handle = await restored(runtime, spec, handle.directory, image)
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 5)
            printer.check()
            shutil.rmtree(image)
            await runtime.destroy(handle)

    async def test_restorer_killed_at_any_step_leaves_what_destroy_removes(self, subject: Subject) -> None:
        """Killed with SIGKILL at a step or shortly after: destroy by the last record leaves nothing but the image."""
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.destroy(handle)
            steps = [step async for step in _each(runtime, spec, handle.directory, image)]
            await runtime.destroy(steps[-1])
            names = [step.step for step in steps]
            for moment in (*names, *(f"{names[-2]}+{delay}" for delay in (0.02, 0.05, 0.1, 0.15))):
                handle = await spawn_and_be_killed(_restore, (subject, spec, image), moment)
                assert list(handle.directory.iterdir()) == [] or spec.id in await runtime.list()
                await runtime.destroy(handle)
                assert list(handle.directory.iterdir()) == []
                assert spec.id not in await runtime.list()
            handle = await restored(runtime, spec, handle.directory, image)
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 5)
            printer.check()
            shutil.rmtree(image)
            await runtime.destroy(handle)

    async def test_restored_sandbox_outlives_the_process_that_restored_it(self, subject: Subject) -> None:
        """After a ``kill -9`` of the restorer another process attaches, pauses and saves by the recorded handle."""
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.destroy(handle)
            handle = await spawn_and_be_killed(_restore, (subject, spec, image), "started")
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 5)
            again = await saved(subject, runtime, handle)
            shutil.rmtree(image)
            await runtime.destroy(handle)
            handle = await restored(runtime, spec, handle.directory, again)
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 5)
            printer.check()
            shutil.rmtree(again)
            await runtime.destroy(handle)

    async def test_damaged_image_is_refused_and_leaves_nothing(self, subject: Subject) -> None:
        """Each file of an image, cut short or missing, is an error and not a hang; the whole one works after that."""
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.destroy(handle)
            for path in sorted(image.iterdir()):
                for cut in (0, path.stat().st_size // 2, None):
                    damaged = new_image(subject)
                    shutil.copytree(image, damaged)
                    if cut is None:
                        (damaged / path.name).unlink()
                    else:
                        os.truncate(damaged / path.name, cut)
                    with refused("runtime_failed"):
                        await asyncio.wait_for(restored(runtime, spec, handle.directory, damaged), TIMEOUT)
            handle = await restored(runtime, spec, handle.directory, image)
            async with printer.link(runtime, handle):
                await printer.until(len(printer.numbers) + 5)
            shutil.rmtree(image)
            await runtime.destroy(handle)

    async def test_two_restores_under_other_ids_at_once(self, subject: Subject) -> None:
        """One image, two new sandboxes, and the one that was saved runs on: each goes its own way from there."""
        if not subject.copies:
            async with printing(subject) as (runtime, _, handle, _):
                image = await saved(subject, runtime, handle)
                other = str(uuid.uuid4())
                with refused("unsupported"):
                    await restored(runtime, subject.spec(other), subject.directory(other), image)
            return
        async with printing(subject) as (runtime, spec, handle, printer):
            image = await saved(subject, runtime, handle)
            await runtime.resume(handle)

            async def child() -> None:
                sandbox_id = str(uuid.uuid4())
                directory = subject.directory(sandbox_id)
                changed = replace(spec, id=sandbox_id, hostname="child")
                copied = printer.copy()
                last = await restored(runtime, changed, directory, image)
                try:
                    async with copied.link(runtime, last) as link:
                        await copied.echo(link, b"child")
                        await copied.until(len(copied.numbers) + 20)
                    copied.check()
                finally:
                    await runtime.destroy(last)

            await asyncio.gather(child(), child())
            async with printer.link(runtime, handle, new_epoch=False) as link:
                await printer.echo(link, b"parent")
                await printer.until(len(printer.numbers) + 20)
            printer.check()
            assert b"child" not in printer.echoes

    async def test_own_requirements_fit_and_others_do_not(self, subject: Subject) -> None:
        """What an image needs is there where it was made; each need that is changed is told."""
        runtime = saving(subject)
        needs = await runtime.requirements()
        assert needs and await runtime.unfit(needs) == ""
        for name in needs:
            assert await runtime.unfit({**needs, name: "something else"}) != ""


async def _each(runtime: Saving, spec: SandboxSpec, directory: Path, image: Path) -> AsyncIterator[Handle]:
    async for handle in runtime.restore(spec, directory, image):
        yield handle
