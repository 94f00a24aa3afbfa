"""What is particular to gVisor's snapshots: faults of runsc and of the disk, other binaries, what may differ."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import processes
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.agent_layer import AGENT_PYTHON
from sandbox_gateway.model import Image, Limits, Mount, SandboxSpec
from sandbox_gateway.runtimes import gvisor_requirements
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.runtimes.gvisor import GvisorRuntime
from sandbox_gateway.testing.contract import created
from sandbox_gateway.testing.counting import refused, restored

ROOT = os.geteuid() == 0
MIB = 1 << 20

ANSWERS = """
import os, socket, sys, time
filled = os.urandom(1 << 20) * int(sys.argv[1])
for line in sys.stdin:
    print(eval(line), flush=True)
"""
"""PID 1 holds some MiB of data and answers questions on the link."""


class Answering:
    """A sandbox that answers."""

    def __init__(self, runtime: GvisorRuntime, spec: SandboxSpec, handle: Handle) -> None:
        self.runtime = runtime
        self.spec = spec
        self.handle = handle

    async def ask(self, question: str, seconds: float = 60) -> str:
        """What the expression gives inside."""
        fds = await self.runtime.attach(self.handle)
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(fds.read_fd, ready.set)
        try:
            os.write(fds.write_fd, question.encode() + b"\n")
            said = b""
            async with asyncio.timeout(seconds):
                while not said.endswith(b"\n"):
                    ready.clear()
                    with contextlib.suppress(BlockingIOError):
                        said += os.read(fds.read_fd, 1 << 16)
                        continue
                    await ready.wait()
            return said.decode().strip()
        finally:
            loop.remove_reader(fds.read_fd)
            os.close(fds.read_fd)
            os.close(fds.write_fd)

    async def clock(self, name: str) -> tuple[float, float, float]:
        """What a clock of :mod:`time` shows inside, between what the host's shows before and after the question."""
        read = getattr(time, name)
        before = read()
        inside = float(await self.ask(f"time.{name}()"))
        return before, inside, read()

    async def save(self, image: Path) -> Path:
        """Pause and save."""
        await self.runtime.pause(self.handle)
        await self.runtime.snapshot(self.handle, image)
        return image


@contextlib.asynccontextmanager
async def answering(
    runtime: GvisorRuntime, image: Image, *, start: bool = True, **changes: Any
) -> AsyncIterator[Answering]:
    """A sandbox of the runtime's, removed at the end."""
    sandbox_id = str(uuid.uuid4())
    directory = runtime.paths.sandbox(sandbox_id)
    directory.mkdir(mode=0o700)
    found = Answering(runtime, SandboxSpec(sandbox_id, "t", "gvisor", image, **changes), Handle("", "", directory))
    found.handle = Handle(sandbox_id, "gvisor", directory)
    try:
        found.handle = await created(runtime, found.spec, directory)
        if start:
            found.handle = await runtime.start(found.handle)
        yield found
    finally:
        await runtime.destroy(found.handle)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.asynccontextmanager
async def copied(sandbox: Answering, image: Path, **changes: Any) -> AsyncIterator[Answering]:
    """Another sandbox, made from an image of ``sandbox``."""
    sandbox_id = str(uuid.uuid4())
    directory = sandbox.runtime.paths.sandbox(sandbox_id)
    directory.mkdir(mode=0o700)
    spec = replace(sandbox.spec, id=sandbox_id, **changes)
    handle = Handle(sandbox_id, "gvisor", directory)
    try:
        handle = await restored(sandbox.runtime, spec, directory, image)
        yield Answering(sandbox.runtime, spec, handle)
        await sandbox.runtime.loaded(handle)
    finally:
        await sandbox.runtime.destroy(handle)
        shutil.rmtree(directory, ignore_errors=True)


def make(paths: Paths, binary: Path, megabytes: int = 1) -> GvisorRuntime:
    """The runtime whose PID 1 answers."""
    return GvisorRuntime(paths, binary, argv=(*AGENT_PYTHON, "-u", "-c", ANSWERS, str(megabytes)))


async def killed(sandbox: Answering, word: str, work: Awaitable[object], delay: float = 0.0) -> bool:
    """SIGKILL the runsc that does ``word`` for the sandbox, ``delay`` seconds after it is there; whether its work
    failed: it may have been quicker."""
    working = asyncio.ensure_future(work)
    while not working.done():
        found = processes.find(lambda argv, environment: word in argv and sandbox.handle.id in argv)
        if found:
            await asyncio.sleep(delay)
            for ref in found:
                ref.kill()
            break
        await asyncio.sleep(0.001)
    try:
        await working
    except SandboxGatewayError as error:
        assert error.code == "runtime_failed", error
        return True
    return False


async def test_gvisor_brings_the_floating_point_registers_of_each_thread_back(
    paths: Paths, runsc_binary: Path, agent_image: Image, tmp_path: Path
) -> None:
    """A thread that rounds upwards does so in the copy, and one that does not does not."""
    upwards = {"x86_64": 0x800, "aarch64": 0x400000}[os.uname().machine]
    rounds = "ROUNDS = __import__('ctypes').CDLL('libm.so.6')\n"
    threads = "from concurrent.futures import ThreadPoolExecutor\nOTHER = ThreadPoolExecutor(1)\n"
    runtime = GvisorRuntime(paths, runsc_binary, argv=(*AGENT_PYTHON, "-u", "-c", f"{rounds}{threads}{ANSWERS}", "1"))
    here, there = "ROUNDS.fegetround()", "OTHER.submit(ROUNDS.fegetround).result()"
    async with answering(runtime, agent_image) as sandbox:
        usual = await sandbox.ask(here)
        assert await sandbox.ask(f"OTHER.submit(ROUNDS.fesetround, {upwards}).result()") == "0"
        image = await sandbox.save(tmp_path / "image")
        async with copied(sandbox, image) as copy:
            assert await copy.ask(here) == usual == "0"
            assert await copy.ask(there) == str(upwards)


async def test_gvisor_killed_checkpoint_leaves_a_sandbox_that_runs_on(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """A runsc that is killed while it saves is an error; resumed, the sandbox answers, and the next save works."""
    async with answering(make(paths, runsc_binary, 300), agent_image) as sandbox:
        assert await sandbox.ask("len(filled)") == str(300 * MIB)
        image = paths.home / "image"
        await sandbox.runtime.pause(sandbox.handle)
        for _ in range(10):
            struck = await killed(sandbox, "checkpoint", sandbox.runtime.snapshot(sandbox.handle, image))
            shutil.rmtree(image)
            if struck:
                break
        else:
            pytest.fail("each of the saves was quicker")
        await sandbox.runtime.resume(sandbox.handle)
        assert await sandbox.ask("6 * 7") == "42"
        await sandbox.save(image)
        await sandbox.runtime.destroy(sandbox.handle)
        sandbox.handle = await restored(sandbox.runtime, sandbox.spec, sandbox.handle.directory, image)
        assert await sandbox.ask("len(filled)") == str(300 * MIB)


async def test_gvisor_killed_restore_leaves_nothing_and_the_image_as_good_as_before(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """A runsc that is killed while it restores is an error; what it left is removed, and the next restore works."""
    async with answering(make(paths, runsc_binary, 100), agent_image) as sandbox:
        await sandbox.ask("0")
        image = await sandbox.save(paths.home / "image")
        await sandbox.runtime.destroy(sandbox.handle)
        struck = 0
        for delay in (0.0, 0.0, 0.02, 0.05, 0.1):
            restoring = asyncio.ensure_future(
                restored(sandbox.runtime, sandbox.spec, sandbox.handle.directory, image)  # which checks what is left
            )
            if await killed(sandbox, "restore", restoring, delay):
                struck += 1
            else:
                await sandbox.runtime.destroy(restoring.result())
        assert struck, "each of the restores was quicker"
        sandbox.handle = await restored(sandbox.runtime, sandbox.spec, sandbox.handle.directory, image)
        assert await sandbox.ask("len(filled)") == str(100 * MIB)


async def test_gvisor_image_of_another_size_is_named_before_anything_is_made(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """The sizes of the files tell a damaged image at once, and which file it is."""
    async with answering(make(paths, runsc_binary), agent_image) as sandbox:
        image = await sandbox.save(paths.home / "image")
        size = (image / "pages.img").stat().st_size
        os.truncate(image / "pages.img", size - 1)
        with pytest.raises(SandboxGatewayError, match=f"pages.img is damaged: {size - 1} of {size} bytes"):
            await anext(sandbox.runtime.restore(sandbox.spec, sandbox.handle.directory, image))


async def test_gvisor_cancelled_snapshot_leaves_a_sandbox_that_runs_on(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """Who gives up waiting for a save can resume and save again."""
    async with answering(make(paths, runsc_binary, 300), agent_image) as sandbox:
        await sandbox.ask("0")
        await sandbox.runtime.pause(sandbox.handle)
        saving = asyncio.ensure_future(sandbox.runtime.snapshot(sandbox.handle, paths.home / "given-up"))
        await asyncio.wait({saving}, timeout=0.05)
        saving.cancel()
        await asyncio.wait({saving})
        shutil.rmtree(paths.home / "given-up", ignore_errors=True)
        await sandbox.runtime.resume(sandbox.handle)
        assert await sandbox.ask("6 * 7") == "42"


@pytest.fixture
def small_disk(paths: Paths) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    if not ROOT:
        pytest.skip("only root mounts a small filesystem")
    place = paths.home / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


async def test_gvisor_full_disk_is_told_and_the_sandbox_runs_on(
    paths: Paths, runsc_binary: Path, agent_image: Image, small_disk: Path
) -> None:
    """A save that finds no room is disk_full; the sandbox is still paused, runs on, and is saved elsewhere."""
    async with answering(make(paths, runsc_binary, 20), agent_image) as sandbox:
        await sandbox.ask("0")
        with refused("disk_full"):
            await sandbox.save(small_disk / "image")
        await sandbox.runtime.pause(sandbox.handle)
        with pytest.raises(TimeoutError):
            await sandbox.ask("'late'", 0.5)
        await sandbox.runtime.resume(sandbox.handle)
        assert (await sandbox.ask("6 * 7")).startswith("late")
        await sandbox.save(paths.home / "image")
        async with copied(sandbox, paths.home / "image") as copy:
            assert await copy.ask("len(filled)") == str(20 * MIB)


@pytest.mark.parametrize("name", ["pages.img", "pages_meta.img", "checkpoint.img"])
async def test_gvisor_image_cut_short_unseen_is_an_error_of_the_restore_or_of_the_loading(
    paths: Paths, runsc_binary: Path, agent_image: Image, name: str
) -> None:
    """Where our own record of the sizes lies too, runsc refuses, or the sandbox ends and the loading says so."""
    async with answering(make(paths, runsc_binary, 20), agent_image) as sandbox:
        await sandbox.ask("0")
        image = await sandbox.save(paths.home / "image")
        size = (image / name).stat().st_size // 2
        os.truncate(image / name, size)
        record = json.loads((image / "runtime.json").read_text())
        record["sizes"][name] = size
        (image / "runtime.json").write_text(json.dumps(record))
        begun = time.monotonic()
        with refused("runtime_failed"):
            async with copied(sandbox, image):
                pass
        assert time.monotonic() - begun < 30


async def test_gvisor_restore_takes_what_its_host_enforces_from_the_new_specification(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """Hostname, sources of mounts, memory and processor limits are the new one's; the environment of PID 1 is not."""
    for name in ("one", "two"):
        (paths.home / name).mkdir()
        (paths.home / name / f"in-{name}").touch()
    paths.home.chmod(0o711)
    limits = Limits(cpu=1, memory=512 * MIB, disk=64 * MIB, processes=64)
    mounts = (Mount(str(paths.home / "one"), "/home/jovyan/work"),)
    runtime = make(paths, runsc_binary)
    async with answering(runtime, agent_image, limits=limits, mounts=mounts, hostname="one") as sandbox:
        assert await sandbox.ask("socket.gethostname(), os.listdir('/home/jovyan/work')") == "('one', ['in-one'])"
        image = await sandbox.save(paths.home / "image")
        changes = {
            "hostname": "two",
            "mounts": (Mount(str(paths.home / "two"), "/home/jovyan/work"),),
            "limits": replace(limits, cpu=2, memory=256 * MIB),
        }
        async with copied(sandbox, image, **changes) as copy:
            assert await copy.ask("socket.gethostname(), os.listdir('/home/jovyan/work')") == "('two', ['in-two'])"
            assert await copy.ask("os.environ['SANDBOX_ID']") == sandbox.spec.id
            if "memory" in runtime.tree.controllers:
                assert await copy.ask("open('/proc/meminfo').readline().split()[1]") == str(256 * 1024)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"limits": Limits(disk=65 * MIB)}, "mounts"),
        ({"limits": Limits(disk=64 * MIB, processes=7)}, "process limits"),
        ({"kernel_uid": 1001}, "mounts"),
        ({"agent_uid": 64998}, "users"),
        ({"mounts": (Mount("/usr", "/mnt"),)}, "mounts"),
    ],
)
async def test_gvisor_restore_in_another_shape_is_refused_with_what_differs(
    paths: Paths, runsc_binary: Path, agent_image: Image, changes: dict[str, Any], part: str
) -> None:
    """What gVisor cannot change in a saved sandbox is named before anything is made."""
    runtime = make(paths, runsc_binary)
    async with answering(runtime, agent_image, limits=Limits(disk=64 * MIB)) as sandbox:
        image = await sandbox.save(paths.home / "image")
        other = replace(sandbox.spec, **changes)
        assert runtime.shape(other) != runtime.shape(sandbox.spec)
        with pytest.raises(SandboxGatewayError, match=part) as caught:
            async with copied(sandbox, image, **changes):
                pass
        assert caught.value.code == "snapshot_unfit"


async def test_gvisor_shape_is_what_gvisor_checks(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """A specification that gVisor takes for an image has the shape of the saved one."""
    runtime = make(paths, runsc_binary)
    spec = SandboxSpec("a", "t", "gvisor", agent_image, Limits(memory=64 * MIB), (Mount("/a", "/mnt"),))
    same = replace(spec, id="b", hostname="b", mounts=(Mount("/b", "/mnt"),), limits=Limits(memory=64 * MIB, cpu=1))
    assert runtime.shape(spec) == runtime.shape(same)
    # Half of the memory is the size of /dev/shm.
    assert runtime.shape(spec) != runtime.shape(replace(spec, limits=Limits(memory=65 * MIB)))


async def test_gvisor_time_goes_on_over_a_snapshot(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """Wall time is right after a restore, and monotonic time has gone on by what passed."""
    async with answering(make(paths, runsc_binary), agent_image) as sandbox:
        first, before, last = await sandbox.clock("monotonic")
        image = await sandbox.save(paths.home / "image")
        await sandbox.runtime.destroy(sandbox.handle)
        await asyncio.sleep(1.0)
        sandbox.handle = await restored(sandbox.runtime, sandbox.spec, sandbox.handle.directory, image)
        earliest, now, latest = await sandbox.clock("time")
        assert earliest - 1.0 < now < latest + 1.0
        earliest, now, latest = await sandbox.clock("monotonic")
        assert earliest - last - 0.5 < now - before < latest - first + 0.5


async def test_gvisor_restores_onto_a_prepared_sandbox(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """What was created before takes an image of its shape and then runs; one of another shape is refused."""
    runtime = make(paths, runsc_binary)
    assert (await runtime.probe()).get("prepared").available
    async with answering(runtime, agent_image) as sandbox:
        await sandbox.ask("globals().update(seen=7)")
        image = await sandbox.save(paths.home / "image")
        async with answering(runtime, agent_image, start=False, hostname="prepared") as prepared:
            prepared.handle = await runtime.restore_into(prepared.handle, image)
            assert prepared.handle.step == "started"
            assert await prepared.ask("seen, socket.gethostname()") == "(7, 'prepared')"
            await runtime.loaded(prepared.handle)
        async with answering(runtime, agent_image, start=False, limits=Limits(processes=9)) as prepared:
            with refused("snapshot_unfit"):
                await runtime.restore_into(prepared.handle, image)


@pytest.fixture
def other_binary(paths: Paths, runsc_binary: Path) -> Path:
    """The same runsc with another hash."""
    copy = paths.home / "other-runsc"
    shutil.copy(runsc_binary, copy)
    with copy.open("ab") as file:
        file.write(b"\0")
    copy.chmod(0o755)
    return copy


async def test_gvisor_restores_with_the_very_runsc_that_saved(
    paths: Paths, runsc_binary: Path, other_binary: Path, agent_image: Image
) -> None:
    """An image of a runsc that is no longer the chosen one is restored by that one where it is kept, else refused."""
    async with answering(make(paths, runsc_binary), agent_image) as sandbox:
        image = await sandbox.save(paths.home / "image")
        digest = hashlib.sha256(runsc_binary.read_bytes()).hexdigest()
        needs = await sandbox.runtime.requirements(sandbox.handle)
        assert needs["runsc"] == digest
        await sandbox.runtime.destroy(sandbox.handle)
        sandbox.runtime = make(paths, other_binary)
        assert digest[:12] in await sandbox.runtime.unfit(needs)
        with pytest.raises(SandboxGatewayError, match=digest[:12]) as caught:
            await restored(sandbox.runtime, sandbox.spec, sandbox.handle.directory, image)
        assert caught.value.code == "snapshot_unfit"
        kept = paths.bin / digest / "runsc"
        kept.parent.mkdir(parents=True)
        shutil.copy(runsc_binary, kept)
        assert await sandbox.runtime.unfit(needs) == ""
        sandbox.handle = await restored(sandbox.runtime, sandbox.spec, sandbox.handle.directory, image)
        assert sandbox.handle.data["binary"] == str(kept)
        assert (await sandbox.runtime.requirements(sandbox.handle))["runsc"] == digest
        assert await sandbox.ask("6 * 7") == "42"
        await sandbox.runtime.pause(sandbox.handle)
        await sandbox.runtime.resume(sandbox.handle)
        assert await sandbox.ask("6 * 7") == "42"


async def test_gvisor_requirements_are_taken_once_per_file(
    paths: Paths, runsc_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is remembered by what the file is, in later processes too."""
    first = await GvisorRuntime(paths, runsc_binary).requirements()
    monkeypatch.setattr(gvisor_requirements.hashlib, "file_digest", lambda *given: pytest.fail("hashed again"))
    assert await GvisorRuntime(paths, runsc_binary).requirements() == first


async def test_gvisor_missing_feature_of_the_processor_is_named(paths: Paths, runsc_binary: Path) -> None:
    """An image from a better processor is refused by the feature's name; one from a lesser one is not."""
    runtime = GvisorRuntime(paths, runsc_binary)
    needs = await runtime.requirements()
    features = needs["cpu"].split(",")
    assert len(features) > 10
    assert "quantum" in await runtime.unfit({**needs, "cpu": ",".join([*features, "quantum"])})
    assert await runtime.unfit({**needs, "cpu": ",".join(features[:-3])}) == ""


OPENS = """
import mmap, os, sys, time
work = '/home/jovyan/work/'
opened = open(work + 'opened')
with open(work + 'mapped', 'r+b') as file:
    mapped = mmap.mmap(file.fileno(), 0)
os.stat(work + 'looked')
open(work + 'closed').read()
deleted = open(work + 'deleted')
os.unlink(work + 'deleted')
deep = open(work + 'deep/er', 'a')
inner = open('/home/jovyan/mine', 'w')
for line in sys.stdin:
    print(eval(line), flush=True)
"""


async def test_gvisor_names_files_of_the_host_that_are_open_or_mapped(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """After a snapshot it is exactly those; a file that was looked at, read, deleted or is the sandbox's own is not."""
    workspace = paths.home / "work space"
    (workspace / "deep").mkdir(parents=True)
    for name in ("opened", "mapped", "looked", "closed", "deleted", "deep/er"):
        (workspace / name).write_text("text")
    paths.home.chmod(0o711)
    runtime = GvisorRuntime(paths, runsc_binary, argv=(*AGENT_PYTHON, "-u", "-c", OPENS))
    mounts = (Mount(str(workspace), "/home/jovyan/work", readonly=False),)
    async with answering(runtime, agent_image, agent_uid=0, kernel_uid=0, mounts=mounts) as sandbox:
        assert await sandbox.ask("mapped[:4]") == "b'text'"
        held = {str(workspace / name) for name in ("opened", "mapped", "deep/er")}
        before = set(await runtime.host_files(sandbox.handle))
        assert held <= before and str(workspace / "looked") not in before
        image = await sandbox.save(paths.home / "image")
        assert set(await runtime.host_files(sandbox.handle)) == held
        await runtime.destroy(sandbox.handle)
        with refused("runtime_failed"):
            await runtime.host_files(sandbox.handle)
        sandbox.handle = await restored(runtime, sandbox.spec, sandbox.handle.directory, image)
        assert await sandbox.ask("deleted.read(), opened.read()") == "('text', 'text')"


async def test_gvisor_saved_sandbox_is_destroyed_in_a_tenth_of_a_second(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """A suspend ends with a removal: one of some is quick; a busy machine may delay others."""
    times = [1.0]
    while min(times) > 0.1 and len(times) <= 20:
        async with answering(make(paths, runsc_binary), agent_image) as sandbox:
            await sandbox.ask("0")
            await sandbox.save(paths.home / uuid.uuid4().hex)
            begun = time.monotonic()
            await sandbox.runtime.destroy(sandbox.handle)
            times.append(time.monotonic() - begun)
    assert min(times) <= 0.1
