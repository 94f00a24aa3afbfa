"""What gVisor's sandboxes hold back, and what their ends are called."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_gvisor

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.host.processes import ProcessRef, descendants, usage
from sandbox_gateway.host.setup import installed
from sandbox_gateway.images.agent_layer import AGENT_PYTHON
from sandbox_gateway.images.erofs import write_image
from sandbox_gateway.images.tree import Tree
from sandbox_gateway.model import Death, DeathKind, Image, Layer, Limits, Mount, SandboxSpec
from sandbox_gateway.runtimes import gvisor_bundle
from sandbox_gateway.runtimes.base import Handle
from sandbox_gateway.runtimes.gvisor import GvisorRuntime
from sandbox_gateway.testing.contract import Subject, attached, created, running

ROOT = os.geteuid() == 0
MIB = 1 << 20


class Sandbox:
    """A sandbox whose PID 1 is a Python program of the test's, writing to the link."""

    def __init__(self, runtime: GvisorRuntime, handle: Handle, read_fd: int) -> None:
        self.runtime = runtime
        self.handle = handle
        self._read_fd = read_fd

    async def line(self) -> str:
        """The next line that the program prints."""
        loop = asyncio.get_running_loop()
        data = b""
        while not data.endswith(b"\n"):
            ready = asyncio.Event()
            loop.add_reader(self._read_fd, ready.set)
            try:
                await asyncio.wait_for(ready.wait(), 30)
            finally:
                loop.remove_reader(self._read_fd)
            data += os.read(self._read_fd, 1)
        return data.decode().rstrip("\n")


@contextlib.asynccontextmanager
async def program(
    paths: Paths, binary: Path, image: Image, code: str, *, uid: int = 1000, **changes: object
) -> AsyncIterator[Sandbox]:
    """Run ``code`` as PID 1; ``run_as`` inside it is the kernel's uid, to which ``drop()`` switches."""
    prologue = (
        "import os, sys, errno\n"
        "def drop():\n"
        "    import ctypes, struct\n"
        f"    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n"
        "    ctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24))\n"
    )
    runtime = GvisorRuntime(paths, binary, argv=(*AGENT_PYTHON, "-u", "-c", prologue + code))
    sandbox_id = str(uuid.uuid4())
    directory = paths.sandbox(sandbox_id)
    directory.mkdir(mode=0o700)
    spec = replace(SandboxSpec(sandbox_id, "test", "gvisor", image, kernel_uid=uid), **changes)  # type: ignore[arg-type]
    handle = Handle(sandbox_id, "gvisor", directory)
    try:
        handle = await created(runtime, spec, directory)
        handle = await runtime.start(handle)
        fds = await runtime.attach(handle)
        try:
            yield Sandbox(runtime, handle, fds.read_fd)
        finally:
            os.close(fds.read_fd)
            os.close(fds.write_fd)
    finally:
        await runtime.destroy(handle)
        directory.rmdir()


async def wait(sandbox: Sandbox, seconds: float = 60) -> Death:
    """The sandbox's death."""
    return await asyncio.wait_for(sandbox.runtime.wait(sandbox.handle), seconds)


async def test_gvisor_memory_bomb_is_called_out_of_memory(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """A program that takes ever more memory ends with the sandbox, and the reason says so."""
    code = "drop()\na = []\nprint('go')\nwhile True: a.append(bytearray(b'x' * (4 << 20)))"
    limits = Limits(memory=192 * MIB)
    async with program(paths, runsc_binary, agent_image, code, limits=limits) as sandbox:
        assert await sandbox.line() == "go"
        death = await wait(sandbox)
    assert death.kind is DeathKind.OUT_OF_MEMORY


async def test_gvisor_memory_bomb_in_files_counts_too(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """Files written inside live in memory and meet the memory limit where no disk limit is set."""
    code = "drop()\nprint('go')\nf = open('/tmp/f', 'wb')\nwhile True: f.write(b'x' * (1 << 20))"
    limits = Limits(memory=192 * MIB)
    async with program(paths, runsc_binary, agent_image, code, limits=limits) as sandbox:
        assert await sandbox.line() == "go"
        death = await wait(sandbox)
    assert death.kind is DeathKind.OUT_OF_MEMORY


async def test_gvisor_memory_bomb_beside_the_agent_ends_the_sandbox(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """The bomb may be any process inside: the sandbox ends as out of memory, not with a kernel killed by nobody."""
    code = """
print('go')
if os.fork() == 0:
    drop()
    a = []
    while True: a.append(bytearray(b'x' * (4 << 20)))
os.wait()
import time; time.sleep(100)
"""
    limits = Limits(memory=192 * MIB)
    async with program(paths, runsc_binary, agent_image, code, limits=limits) as sandbox:
        waiting = asyncio.create_task(wait(sandbox))
        assert await sandbox.line() == "go"
        assert (await waiting).kind is DeathKind.OUT_OF_MEMORY


FORK_BOMB = """
drop()
import time
children = 0
try:
    while children < 1000:
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
        children += 1
except OSError as error:
    print(errno.errorcode[error.errno], children)
else:
    print('unbounded', children)
time.sleep(100)
"""


@pytest.mark.parametrize("uid", [1000, 0])
async def test_gvisor_fork_bomb_meets_its_limit(paths: Paths, runsc_binary: Path, agent_image: Image, uid: int) -> None:
    """The kernel's user cannot have more processes than the limit, whatever its uid; the sandbox lives on."""
    limits = Limits(processes=40)
    async with program(paths, runsc_binary, agent_image, FORK_BOMB, uid=uid, limits=limits) as sandbox:
        word, count = (await sandbox.line()).split()
        assert word == "EAGAIN"
        assert 20 <= int(count) <= 40
        assert await sandbox.runtime.alive(sandbox.handle)


DISK = """
drop()
for path in sys.argv[1:] or ('/home/jovyan/f', '/tmp/f', '/dev/shm/f'):
    written = 0
    try:
        with open(path, 'wb') as file:
            while written < 200:
                file.write(b'x' * (1 << 20))
                written += 1
    except OSError as error:
        print(path, errno.errorcode[error.errno], written)
    else:
        print(path, 'unbounded', written)
import time; time.sleep(100)
"""


async def test_gvisor_disk_limit_bounds_every_writable_place(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """Home, temporary files and shared memory each end at the disk limit with ENOSPC."""
    async with program(paths, runsc_binary, agent_image, DISK, limits=Limits(disk=24 * MIB)) as sandbox:
        for _ in range(3):
            path, word, count = (await sandbox.line()).split()
            assert (word, int(count)) == ("ENOSPC", 24), path


async def test_gvisor_init_keeps_its_link_from_the_kernels_user(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """Neither the kernel's uid nor uid 0 without capabilities can open PID 1's descriptors or trace or kill it."""
    code = """
for uid in (1000, 0):
    child = os.fork()
    if child == 0:
        import ctypes, struct
        os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
        ctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24))
        said = []
        for attempt in (lambda: open('/proc/1/fd/1', 'w'), lambda: os.kill(1, 9), lambda: os.setuid(64999)):
            try:
                attempt()
                said.append('done')
            except OSError as error:
                said.append(errno.errorcode[error.errno])
        print(uid, *said)
        os._exit(0)
    os.waitpid(child, 0)
import time; time.sleep(100)
"""
    async with program(paths, runsc_binary, agent_image, code) as sandbox:
        assert await sandbox.line() == "1000 EACCES EPERM EPERM"
        assert await sandbox.line() == "0 EACCES EPERM EPERM"


async def test_gvisor_executed_program_of_uid_0_gets_no_capability_back(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """An exec as guest root regains nothing: no_new_privs holds inside gVisor."""
    code = f"""
drop()
show = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'CapPrm'))])"
os.execv({AGENT_PYTHON[0]!r}, [*{AGENT_PYTHON!r}, '-u', '-c', show + '; import time; time.sleep(100)'])
"""
    async with program(paths, runsc_binary, agent_image, code, uid=0) as sandbox:
        assert await sandbox.line() == "['0000000000000000', '0000000000000000']"


@pytest.mark.parametrize("host_files", [True, False])
async def test_gvisor_processes_on_the_host_have_nothing_to_fall_back_on(
    paths: Paths, runsc_binary: Path, agent_image: Image, tmp_path: Path, host_files: bool
) -> None:
    """Each thread of each of them is filtered and can gain no privilege by a program that it runs; the host's /proc is
    out of reach, no descriptor is a directory, and without files of the host there is no capability at all."""
    image = agent_image if host_files else nobodys(agent_image, tmp_path)
    async with program(paths, runsc_binary, image, "print('runs'); import time; time.sleep(100)") as sandbox:
        assert await sandbox.line() == "runs"
        sentry = ProcessRef.from_json(sandbox.handle.data["sandbox"])
        assert sentry is not None
        threads = [task for pid in descendants([sentry.pid]) for task in Path(f"/proc/{pid}/task").iterdir()]
        root = Path(f"/proc/{sentry.pid}/root")
        unmounted = not (root / "proc" / "self").exists() and (root / "proc").exists()
        if not host_files:
            fds = Path(f"/proc/{sentry.pid}/fd")
            assert [os.readlink(fd) for fd in fds.iterdir() if fd.is_dir()] == []
            assert not [link for link in map(os.readlink, fds.iterdir()) if link.startswith(("/proc/", "/sys/"))]
        states = [dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines()) for task in threads]
    assert unmounted
    assert len(states) > 5
    assert {(state["NoNewPrivs"], state["Seccomp"]) for state in states} == {("1", "2")}
    if ROOT and not host_files:
        held = {state[name] for state in states for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
        assert held == {"0" * 16}


async def test_gvisor_sees_no_network_and_no_host(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """The only interface is the loopback; the environment and the process list are the sandbox's own."""
    code = """
import socket
print(sorted(name for _, name in socket.if_nameindex()))
print(sorted(os.environ))
print([name for name in os.listdir('/proc') if name.isdigit()])
import time; time.sleep(100)
"""
    async with program(paths, runsc_binary, agent_image, code) as sandbox:
        assert await sandbox.line() in ("['lo']", "[]")
        assert await sandbox.line() == "['HOME', 'LANG', 'PATH', 'SANDBOX_ID']"
        assert await sandbox.line() == "['1']"


@pytest.mark.parametrize("readonly", [True, False])
async def test_gvisor_files_in_a_workspace_belong_to_its_owner(
    paths: Paths, runsc_binary: Path, agent_image: Image, readonly: bool
) -> None:
    """What the kernel's uid writes into a writable workspace is the host user's; a read-only one takes nothing."""
    workspace = paths.home / "workspace"
    workspace.mkdir()
    owner = 54321 if ROOT else os.geteuid()
    if ROOT:
        os.chown(workspace, owner, owner)
    uid = owner if ROOT else 0
    code = """
drop()
try:
    open('/home/jovyan/work/made', 'w').close()
    print('written')
except OSError as error:
    print(errno.errorcode[error.errno])
import time; time.sleep(100)
"""
    mounts = (Mount(str(workspace), "/home/jovyan/work", readonly),)
    paths.home.chmod(0o711)
    async with program(paths, runsc_binary, agent_image, code, uid=uid, mounts=mounts) as sandbox:
        if readonly:
            assert await sandbox.line() == "EROFS"
            assert list(workspace.iterdir()) == []
        else:
            assert await sandbox.line() == "written"
            assert (workspace / "made").stat().st_uid == owner


@pytest.mark.parametrize("with_workspace", [True, False])
async def test_gvisor_writable_layer_takes_writes_in_memory_only(
    paths: Paths, runsc_binary: Path, agent_image: Image, with_workspace: bool
) -> None:
    """A writable EROFS layer takes writes, beside a writable workspace too, and its file stays as it was."""
    assert agent_image.agent is not None
    layer = replace(agent_image.agent, destination="/layer", writable=True)
    readonly = replace(agent_image.agent, destination="/fixed")
    image = replace(agent_image, layers=(*agent_image.layers, layer, readonly))
    before = os.stat(layer.source)
    workspace = paths.home / "workspace"
    workspace.mkdir()
    mounts = (Mount(str(workspace), "/home/jovyan/work", readonly=False),) if with_workspace else ()
    code = """
for path in ('/layer/made', '/fixed/made'):
    try:
        open(path, 'w').close()
        print('written')
    except OSError as error:
        print(errno.errorcode[error.errno])
import time; time.sleep(100)
"""
    # PID 1 runs as uid 0 here: the files of the layer are root's.
    changes = {"agent_uid": 0, "mounts": mounts}
    if layer.source == readonly.source:
        copy = paths.home / "copy.erofs"
        os.link(layer.source, copy)
        image = replace(image, layers=(*agent_image.layers, replace(layer, source=str(copy)), readonly))
    async with program(paths, runsc_binary, image, code, **changes) as sandbox:
        assert await sandbox.line() == "written"
        assert await sandbox.line() == "EROFS"
    after = os.stat(layer.source)
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def everybodys(folder: Path) -> Path:
    """A new folder that every user of this machine reaches; skips where the temporary directory is not one."""
    place = Path(tempfile.mkdtemp(prefix="sg-", dir=folder))
    place.chmod(0o711)
    if not all(path.stat().st_mode & stat.S_IXOTH for path in place.parents):
        pytest.skip(f"{folder} is not for everybody")
    return place


def nobodys(image: Image, folder: Path) -> Image:
    """The same with no file of the host in it: the process of such a sandbox is nobody's."""
    tree = Tree()
    tree.directory("home")
    with (folder / "root.erofs").open("wb") as file:
        write_image(file.fileno(), tree)
    return replace(image, layers=(Layer(str(folder / "root.erofs"), "/"),))


@pytest.mark.parametrize("private", [True, False], ids=["private", "everybodys"])
async def test_gvisor_release_runs_a_sandbox_wherever_it_was_installed(
    paths: Paths, runsc_binary: Path, agent_image: Image, private: bool
) -> None:
    """A release brings programs beside runsc, started by their path as the user that the sandbox will be. They are
    used where that user gets there, and left aside where he does not: below root's home, which is for root only."""
    assert agent_image.agent is not None
    place = everybodys(Path(tempfile.gettempdir()))
    try:
        binary, beside = place / "bin" / "runsc", place / "bin" / "gvisor-bin"
        beside.mkdir(parents=True)
        shutil.copy(runsc_binary, binary)
        shutil.copy(runsc_binary, beside / "gvisor_sentry")  # which knows the command that starts a sandbox
        binary.parent.chmod(0o700 if private else 0o755)
        image = nobodys(agent_image, place)
        async with program(paths, binary, image, "print('runs'); import time; time.sleep(100)") as sandbox:
            assert await sandbox.line() == "runs"
            process = ProcessRef.from_json(sandbox.handle.data["sandbox"])
            assert process is not None
            program_file = os.readlink(f"/proc/{process.pid}/exe")
        assert Path(program_file).name == ("runsc" if private and ROOT else "gvisor_sentry")
    finally:
        shutil.rmtree(place)


def built_by_setup(binary: Path) -> bool:
    """Whether it is what set-up has built here; another installation that tests made of it does not know that."""
    elsewhere = {name: value for name, value in os.environ.items() if name != "SANDBOX_GATEWAY_HOME"}
    found = [installed(discover(environment)) for environment in (os.environ, elsewhere)]
    return any(it is not None and it.sha256 == binary.parent.name and "filters compiled" in it.origin for it in found)


@pytest.mark.parametrize("host_files", [True, False])
async def test_gvisor_of_our_build_has_its_filters_compiled(
    paths: Paths,
    runsc_binary: Path,
    agent_image: Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host_files: bool,
) -> None:
    """A sandbox does not compute its filter for system calls when it starts, whichever of the two it has."""
    if not built_by_setup(runsc_binary):
        pytest.skip("this runsc was not built by our set-up")
    log = (*gvisor_bundle.HARDENING, "--debug", f"--debug-log={tmp_path}/")
    monkeypatch.setattr(gvisor_bundle, "HARDENING", log)
    image = agent_image if host_files else nobodys(agent_image, tmp_path)
    async with program(paths, runsc_binary, image, "print('runs'); import time; time.sleep(100)") as sandbox:
        assert await sandbox.line() == "runs"
    (said,) = (path.read_text(errors="replace") for path in tmp_path.glob("*.boot.txt"))
    assert "Loaded precompiled seccomp instructions" in said
    assert f"HostFilesystem={str(host_files or not ROOT).lower()}" in said


async def test_gvisor_death_brings_the_last_words_of_init(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """What PID 1 said on its standard error before it ended comes with the death."""
    code = "sys.stderr.write('cannot go on\\n'); sys.stderr.flush(); sys.exit(3)"
    async with program(paths, runsc_binary, agent_image, code) as sandbox:
        death = await wait(sandbox)
    assert death.kind is DeathKind.AGENT_DIED
    assert "cannot go on" in death.stderr_tail


async def test_gvisor_flood_on_standard_error_does_not_grow_the_host(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """PID 1's standard error is a pipe of fixed size that never blocks: a flood is refused, not stored."""
    code = """
import time
for _ in range(1000):
    try:
        os.write(2, b'x' * 65536)
    except BlockingIOError:
        pass
print('go')
time.sleep(100)
"""
    async with program(paths, runsc_binary, agent_image, code) as sandbox:
        assert await sandbox.line() == "go"
        assert await sandbox.runtime.alive(sandbox.handle)
        sizes = [path.stat().st_size for path in sandbox.handle.directory.rglob("*") if path.is_file()]
        assert sum(sizes) < MIB


async def test_gvisor_missing_mount_is_named(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """A mount whose source is missing fails the creation; the error names it and nothing is left."""
    mounts = (Mount("/nonexistent/for/this/test", "/data"),)
    with pytest.raises(SandboxGatewayError, match="/nonexistent/for/this/test") as caught:
        async with program(paths, runsc_binary, agent_image, "", mounts=mounts):
            pass
    assert caught.value.code == "invalid_request"
    assert not [path for path in paths.runtime.iterdir() if path.name != "runsc"]


async def test_gvisor_failure_of_runsc_is_told_with_its_reason(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """A program that is not in the image fails the start with runsc's own words; nothing is left."""
    with pytest.raises(SandboxGatewayError, match="not/there") as caught:
        image = replace(agent_image, agent=None)
        runtime = GvisorRuntime(paths, runsc_binary, argv=("/not/there",))
        async with running(Subject(paths, lambda _: runtime, image), runtime):
            pass
    assert caught.value.code == "runtime_failed"
    assert not [path for path in paths.runtime.iterdir() if path.name != "runsc"]


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.04, 0.06, 0.09])
async def test_gvisor_creation_cancelled_in_the_middle_leaves_nothing(
    paths: Paths, runsc_binary: Path, agent_image: Image, delay: float
) -> None:
    """A caller that is cancelled while runsc works destroys by the last announced step alone."""
    runtime = GvisorRuntime(paths, runsc_binary)
    sandbox_id = str(uuid.uuid4())
    directory = paths.sandbox(sandbox_id)
    directory.mkdir()
    last = Handle(sandbox_id, "gvisor", directory)

    async def create() -> None:
        nonlocal last
        async for handle in runtime.create(SandboxSpec(sandbox_id, "t", "gvisor", agent_image), directory):
            last = handle

    task = asyncio.create_task(create())
    await asyncio.wait({task}, timeout=delay)
    task.cancel()
    await asyncio.wait({task})
    await runtime.destroy(last)
    assert list(directory.iterdir()) == []
    assert await runtime.list() == []


async def test_gvisor_survives_the_death_of_any_one_of_its_processes(
    paths: Paths, runsc_binary: Path, agent_image: Image
) -> None:
    """Killing the holder leaves the sandbox working; killing the sandbox ends the wait; both leave nothing."""
    make = functools.partial(make_gvisor, runsc_binary)
    subject = Subject(paths, make, agent_image)
    runtime = make(paths)
    async with running(subject, runtime) as handle:
        waiting = asyncio.create_task(runtime.wait(handle))
        holder = ProcessRef.from_json(handle.data["holder"])
        sandbox = ProcessRef.from_json(handle.data["sandbox"])
        assert holder is not None and sandbox is not None
        assert holder.kill()
        async with attached(runtime, handle) as link:
            await link.ping(30)
        assert sandbox.kill()
        assert (await asyncio.wait_for(waiting, 30)).kind is DeathKind.AGENT_DIED


async def test_gvisor_holder_is_tiny_and_asleep(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """The process that stays for each sandbox costs less than a megabyte and no processor time."""
    make = functools.partial(make_gvisor, runsc_binary)
    runtime = make(paths)
    async with running(Subject(paths, make, agent_image), runtime) as handle:
        holder = ProcessRef.from_json(handle.data["holder"])
        assert holder is not None
        assert descendants([holder.pid])[0] == holder.pid
        used = usage([holder.pid])
        assert used.memory < MIB
        assert used.threads == 1


async def test_gvisor_destroys_in_a_tenth_of_a_second(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """One of some removals is within the target; a busy machine may delay others."""
    make = functools.partial(make_gvisor, runsc_binary)
    runtime = make(paths)
    times = [1.0]
    while min(times) > 0.1 and len(times) <= 20:
        async with running(Subject(paths, make, agent_image), runtime) as handle:
            async with attached(runtime, handle) as link:
                await link.ping(30)
            start = time.monotonic()
            await runtime.destroy(handle)
            times.append(time.monotonic() - start)
    assert min(times) <= 0.1


@pytest.mark.skipif(not ROOT, reason="as an ordinary user there is no control group on this kind of machine")
async def test_gvisor_shows_its_limits_inside(paths: Paths, runsc_binary: Path, agent_image: Image) -> None:
    """Inside, the memory of the machine is the limit (as root, by control group)."""
    code = "print(open('/proc/meminfo').readline().split()[1])\nimport time; time.sleep(100)"
    async with program(paths, runsc_binary, agent_image, code, limits=Limits(memory=256 * MIB)) as sandbox:
        if "memory" not in sandbox.runtime.tree.controllers:
            pytest.skip(f"no memory controller: {sandbox.runtime.tree.reason}")
        assert int(await sandbox.line()) * 1024 == 256 * MIB
