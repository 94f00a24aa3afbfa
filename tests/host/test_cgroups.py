"""Control groups: the logic over a tree of files, and for real where this machine lets us."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import cgroups
from sandbox_gateway.host.cgroups import CgroupTree, discover, host_threads
from sandbox_gateway.host.processes import ProcessRef, kill_all
from sandbox_gateway.model import Limits

LIMITS = Limits(cpu=1.5, memory=256 << 20, processes=50)


def remove_directory(path: Path) -> None:
    """A control group's directory goes with its files; an ordinary one needs help, but not a full one."""
    if any(entry.is_dir() for entry in path.iterdir()):
        raise OSError(39, "not empty")
    shutil.rmtree(path)


def tree_v1(
    root: Path, names: tuple[str, ...] = ("memory", "cpu", "cpuacct", "pids", "cpuset", "freezer")
) -> CgroupTree:
    """Hierarchies of version 1 as files."""
    lines = []
    for name in names:
        (root / name).mkdir()
        lines.append(f"cgroup /{name} cgroup rw,relatime,{name} 0 0")
    (root / "systemd").mkdir()
    lines.append("cgroup /systemd cgroup rw,relatime,name=systemd 0 0")
    if "cpuset" in names:
        (root / "cpuset" / "cpuset.cpus").write_text("0-1\n")
        (root / "cpuset" / "cpuset.mems").write_text("0\n")
    tree = discover(mounts="\n".join(lines), own="", mount_root=root, user=0)
    return replace(tree, rmdir=remove_directory)


class FakeControl:
    """The write-only side of ``cgroup.subtree_control``: a fake kernel enables what the parent has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, available: tuple[str, ...]) -> None:
        real = cgroups._write

        def write(path: Path, text: str) -> None:
            if path.name != "cgroup.subtree_control":
                real(path, text)
                return
            name = text.removeprefix("+")
            if name not in available:
                raise OSError(2, "no such controller")
            enabled = path.read_text().split() if path.exists() else []
            path.write_text(" ".join(sorted({*enabled, name})))

        monkeypatch.setattr(cgroups, "_write", write)


def tree_v2(root: Path, monkeypatch: pytest.MonkeyPatch, *available: str) -> CgroupTree:
    """The unified hierarchy as files, seen by root."""
    FakeControl(monkeypatch, available)
    (root / "cgroup").mkdir()
    tree = discover(mounts="none /cgroup cgroup2 rw,nosuid 0 0", own="0::/x", mount_root=root, user=0)
    return replace(tree, rmdir=remove_directory)


def test_v1_group_is_made_everywhere_with_its_limits(tmp_path: Path) -> None:
    """Each hierarchy has the group; memory, time and threads are limited; a cpuset is filled from its parent."""
    tree = tree_v1(tmp_path)
    tree.create("parent", "one", LIMITS)
    read = lambda *parts: tmp_path.joinpath(*parts).read_text()  # noqa: E731
    assert tree.controllers == ("memory", "cpu", "pids") and tree.reason == ""
    assert read("memory", "parent", "one", "memory.limit_in_bytes") == str(256 << 20)
    assert read("cpu", "parent", "one", "cpu.cfs_quota_us") == "150000"
    assert read("cpu", "parent", "one", "cpu.cfs_period_us") == "100000"
    assert read("pids", "parent", "one", "pids.max") == str(host_threads(50))
    assert (tmp_path / "systemd" / "parent" / "one").is_dir()
    assert tree.path("parent", "one") == "/parent/one"
    assert len(tree.join_files("parent", "one")) == 7


def test_v1_missing_controller_is_said(tmp_path: Path) -> None:
    """What this kernel has not got is named."""
    tree = tree_v1(tmp_path, ("memory", "cpu"))
    assert tree.controllers == ("memory", "cpu")
    assert "pids" in tree.reason


def test_v1_is_for_root_only(tmp_path: Path) -> None:
    """An ordinary user is told why there are no groups."""
    (tmp_path / "memory").mkdir()
    tree = discover(mounts="cgroup /memory cgroup rw,memory 0 0", own="", mount_root=tmp_path, user=1000)
    assert not tree.usable
    assert "only root" in tree.reason


def test_v1_usage_is_read_back(tmp_path: Path) -> None:
    """Memory, time, threads and kills come from the controllers' files."""
    tree = tree_v1(tmp_path)
    tree.create("parent", "one", LIMITS)
    (tmp_path / "memory/parent/one/memory.usage_in_bytes").write_text("1000\n")
    (tmp_path / "memory/parent/one/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (tmp_path / "cpuacct/parent/one/cpuacct.usage").write_text("2500000000\n")
    (tmp_path / "pids/parent/one/pids.current").write_text("7\n")
    assert tree.usage("parent", "one") == cgroups.CgroupUsage(1000, 2.5, 7, 2)
    assert tree.usage("parent", "none") == cgroups.CgroupUsage()


def test_v2_group_has_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2: one directory, no swap, and the group dies as a whole."""
    tree = tree_v2(tmp_path, monkeypatch, "memory", "cpu", "pids")
    group = tmp_path / "cgroup" / "parent" / "one"
    group.mkdir(parents=True)
    for name in ("memory.swap.max", "memory.oom.group"):
        (group / name).write_text("")
    tree.create("parent", "one", LIMITS)
    assert (group / "memory.max").read_text() == str(256 << 20)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "memory.oom.group").read_text() == "1"
    assert (group / "cpu.max").read_text() == "150000 100000"
    assert (group / "pids.max").read_text() == str(host_threads(50))
    assert (tmp_path / "cgroup" / "parent" / "cgroup.subtree_control").read_text() == "cpu memory pids"


def test_v2_usage_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from the other files."""
    tree = tree_v2(tmp_path, monkeypatch, "memory", "cpu", "pids")
    tree.create("parent", "one", Limits())
    group = tmp_path / "cgroup" / "parent" / "one"
    (group / "memory.current").write_text("1000\n")
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 1\n")
    (group / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (group / "pids.current").write_text("7\n")
    assert tree.usage("parent", "one") == cgroups.CgroupUsage(1000, 2.5, 7, 1)


def test_v2_without_any_controller_is_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unified hierarchy whose controllers are all elsewhere is of no use, and says so."""
    assert tree_v2(tmp_path, monkeypatch).reason.startswith("no controller")


def test_v2_ordinary_user_gets_the_topmost_delegated_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delegation begins where everything above belongs to root; groups are made there, next to our own."""
    FakeControl(monkeypatch, ("memory", "pids"))
    top = tmp_path / "cgroup"
    service = top / "user.slice" / "user@1.service"
    own = service / "app.slice" / "lab.service"
    own.mkdir(parents=True)
    for group in (service, service / "app.slice", own):
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            (group / name).write_text("")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(service)) and real(path, mode))
    own_path = "0::/user.slice/user@1.service/app.slice/lab.service\n"
    tree = discover(mounts="none /cgroup cgroup2 rw 0 0", own=own_path, mount_root=tmp_path, user=1000)
    assert tree.roots[""] == service
    assert tree.controllers == ("memory", "pids")
    assert tree.path("p", "n") == "/user.slice/user@1.service/p/n"
    assert "cpu" in tree.reason


def test_v2_ordinary_user_without_delegation_is_told(tmp_path: Path) -> None:
    """A login session's own group is not delegated: no groups, with the reason."""
    (tmp_path / "cgroup" / "session.scope").mkdir(parents=True)
    tree = discover(mounts="none /cgroup cgroup2 rw 0 0", own="0::/session.scope\n", mount_root=tmp_path, user=1000)
    assert not tree.usable
    assert "delegated" in tree.reason


@pytest.mark.parametrize("mounts", ["", "cgroup2 /cgroup cgroup2 ro,nosuid 0 0", "proc /proc proc rw 0 0\nshort"])
def test_no_writable_cgroup_filesystem_is_no_error(mounts: str, tmp_path: Path) -> None:
    """Containers often have none, or a read-only one."""
    tree = discover(mounts=mounts, own="", mount_root=tmp_path, user=0)
    assert not tree.usable
    assert tree.reason
    tree.remove("parent", "one")
    assert tree.names("parent") == [] and tree.processes("parent", "one") == [] and tree.memory_alarm("p", "o") is None


def test_removal_takes_the_parent_with_the_last_group(tmp_path: Path) -> None:
    """The parent stays while another sandbox is in it, and goes with the last one; twice is no error."""
    tree = tree_v1(tmp_path)
    tree.create("parent", "one", Limits())
    tree.create("parent", "two", Limits())
    assert tree.names("parent") == ["one", "two"]
    tree.remove("parent", "one")
    tree.remove("parent", "one")
    assert tree.names("parent") == ["two"]
    tree.remove("parent", "two")
    assert not (tmp_path / "memory" / "parent").exists()


def test_refused_limit_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the kernel refuses a value the caller learns which group and why."""
    tree = tree_v1(tmp_path)

    def refuse(path: Path, text: str) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(cgroups, "_write", refuse)
    with pytest.raises(SandboxGatewayError, match="Invalid argument") as caught:
        tree.create("parent", "one", LIMITS)
    assert caught.value.code == "limit_unsupported"


# For real


@pytest.fixture
def real() -> CgroupTree:
    """This machine's tree; skips, with the reason, where we cannot make groups."""
    tree = discover()
    if not tree.usable:
        pytest.skip(f"no control groups for us here: {tree.reason}")
    return tree


def test_real_group_holds_a_process_and_goes_after_it(real: CgroupTree) -> None:
    """A process enters by the files that are named, is listed, and the group can be removed after its end."""
    parent = f"sandbox_gateway-test-{os.getpid()}"
    real.create(parent, "one", LIMITS)
    try:
        with subprocess.Popen(["sleep", "100"]) as process:
            for path in real.join_files(parent, "one"):
                Path(path).write_text(str(process.pid))
            ref = ProcessRef.of(process.pid)
            assert ref in real.processes(parent, "one")
            assert real.usage(parent, "one").processes == 1
            kill_all([ref] if ref else [], 10)
            process.wait(10)
    finally:
        real.remove(parent, "one")
    assert real.names(parent) == []


def test_real_groups_are_made_and_removed_at_the_same_time(real: CgroupTree) -> None:
    """Making a group while the last other one takes the parent along always succeeds."""
    parent = f"sandbox_gateway-test-{os.getpid()}"
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(30):
                real.create(parent, name, Limits(memory=64 << 20))
                real.remove(parent, name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"n{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert real.names(parent) == []


def test_to_expect_moves_moves_nobody(real: CgroupTree) -> None:
    before = Path("/proc/self/cgroup").read_text()
    real.expect_moves()
    assert Path("/proc/self/cgroup").read_text() == before


def test_a_group_is_made_though_its_parent_came_and_went_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent is there when we make it, and gone with its last group when we look at it."""
    tree = tree_v1(tmp_path, ("memory",))
    make, raced = os.mkdir, []

    def race(path: Path, mode: int = 0o777) -> None:
        if path == tmp_path / "memory/parent" and not raced:
            raced.append(path)
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", race)
    tree.create("parent", "one", Limits(memory=64 << 20))
    assert raced and tree.names("parent") == ["one"]


def test_version_2_for_real_is_tried_where_it_exists(real: CgroupTree) -> None:
    """On a machine with version 2 the tests above used it; elsewhere the skip says what stood in for it."""
    if real.version != 2:
        pytest.skip("this machine has control groups version 1; version 2 was tried over files only")
    assert set(real.controllers) <= set(cgroups.WANTED)
