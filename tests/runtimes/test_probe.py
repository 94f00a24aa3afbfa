"""What the probe says of binaries that are missing, old, broken or something else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import namespaces
from sandbox_gateway.host.cgroups import CgroupTree
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Image, SandboxSpec
from sandbox_gateway.runtimes import gvisor_probe, gvisor_trial
from sandbox_gateway.runtimes.base import RuntimeReport
from sandbox_gateway.runtimes.gvisor import GvisorRuntime
from sandbox_gateway.testing import faults
from sandbox_gateway.testing.fake import FakeRuntime

NO_GROUPS = CgroupTree(2, {}, reason="none here")


def script(path: Path, text: str) -> Path:
    """A program in the place of runsc."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def probe(paths: Paths, binary: Path | None, tree: CgroupTree | None = None) -> RuntimeReport:
    """The runtime's report."""
    return await GvisorRuntime(paths, binary, cgroup_tree=tree).probe()


async def test_no_binary_is_missing_with_a_hint(paths: Paths) -> None:
    """Without a runsc the report says so and what to do."""
    run = (await probe(paths, None)).get("run")
    assert not run.available
    assert "missing" in run.reason
    assert "setup" in run.hint


@pytest.mark.parametrize("mode", [0o644, None])
async def test_what_cannot_be_executed_is_missing(paths: Paths, tmp_path: Path, mode: int | None) -> None:
    """A file without the right to run, or no file at all."""
    binary = tmp_path / "runsc"
    if mode is not None:
        script(binary, "exit 0").chmod(mode)
    if mode is not None and os.access(binary, os.X_OK):
        pytest.skip("this user may execute anything")
    assert "not an executable" in (await probe(paths, binary)).get("run").reason


@pytest.mark.parametrize("text", ["echo GNU coreutils", "exit 3", "echo boom >&2; exit 1"])
async def test_another_program_is_not_runsc(paths: Paths, tmp_path: Path, text: str) -> None:
    """Something else that happens to lie there is named, with what it said."""
    run = (await probe(paths, script(tmp_path / "runsc", text))).get("run")
    assert not run.available
    assert "does not run as runsc" in run.reason


async def test_old_runsc_lacks_features_not_a_version(paths: Paths, tmp_path: Path) -> None:
    """A runsc without the flags of the pinned generation is too old, whatever it calls itself."""
    text = 'case "$1" in --version) echo "runsc version release-20990101.0";; *) echo "  -bundle string";; esac'
    report = await probe(paths, script(tmp_path / "runsc", text))
    run = report.get("run")
    assert not run.available
    assert "too old" in run.reason and "exclude-committed-zero-pages" in run.reason
    assert report.version == "release-20990101.0"


async def test_runsc_that_cannot_boot_says_why(paths: Paths, tmp_path: Path) -> None:
    """All flags there, but no sandbox comes up: its own words are the reason."""
    flags = "\n".join(f"  -{flag} value" for _, flag in gvisor_probe.FEATURES)
    text = f"""case "$1" in
      --version) echo "runsc version 1";;
      flags) echo "{flags}" >&2;;
      *) echo "no luck with this kernel" >&2; exit 1;; esac"""
    run = (await probe(paths, script(tmp_path / "runsc", text))).get("run")
    assert not run.available
    assert "no luck with this kernel" in run.reason
    assert [path.name for path in paths.runtime.iterdir()] == []


async def test_real_runsc_runs_and_saves_and_is_not_tried_twice(
    paths: Paths, runsc_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial sandboxes leave nothing, and their good end is remembered."""
    report = await probe(paths, runsc_binary)
    for name in ("run", "pause", "snapshots", "prepared"):
        assert report.get(name).available, report.get(name)
    assert list(paths.runtime.iterdir()) == []
    monkeypatch.setattr(asyncio, "create_subprocess_exec", lambda *given, **more: pytest.fail(f"run again: {given}"))
    assert await probe(paths, runsc_binary) == report


def test_what_is_known_of_a_binary_outlives_a_link_to_it(paths: Paths, tmp_path: Path) -> None:
    """A backup links to files, which moves the time of their last change and says nothing about their content."""
    binary = script(tmp_path / "runsc", "exit 0")
    gvisor_probe.Cache(paths, binary, "topic").write("known")
    os.link(binary, tmp_path / "backup")
    assert gvisor_probe.Cache(paths, binary, "topic").read() == "known"
    script(binary, "exit 1; # another program")
    assert gvisor_probe.Cache(paths, binary, "topic").read() is None


@pytest.mark.parametrize(
    ("make", "works"),
    [
        (faults.FailsDuringPause, []),
        (faults.FailsDuringSnapshot, ["pause"]),
        (faults.FailsDuringRestore, ["pause"]),
    ],
)
async def test_what_the_trial_could_not_do_is_absent_with_its_reason(
    paths: Paths, runsc_binary: Path, make: Callable[[Paths], FakeRuntime], works: list[str]
) -> None:
    """Pausing may work where saving does not; the words of the failure are the reason, and nothing is left."""
    found = await gvisor_trial.capabilities(paths, runsc_binary, lambda place, argv: make(place))
    assert [each.name for each in found if each.available] == works
    assert all("asked to fail" in each.reason for each in found if not each.available)
    assert list(paths.runtime.iterdir()) == []


async def test_script_around_runsc_cannot_be_tried(paths: Paths, tmp_path: Path) -> None:
    """It could not run in the trial's empty root: what is said of it says so."""
    binary = script(tmp_path / "runsc", "exit 1")
    found = await gvisor_trial.capabilities(paths, binary, lambda place, argv: pytest.fail("tried"))
    assert all(each.available and "not tried" in each.reason for each in found)


async def test_full_disk_says_nothing_about_the_runtime(paths: Paths, runsc_binary: Path) -> None:
    """A trial that found no room is an error of its own, not an absent capability."""
    with pytest.raises(SandboxGatewayError) as caught:
        await gvisor_trial.capabilities(
            paths, runsc_binary, lambda place, argv: faults.FailsDuringSnapshot(place, "disk_full")
        )
    assert caught.value.code == "disk_full"


async def test_limits_without_control_groups_are_soft_and_say_so(paths: Paths, runsc_binary: Path) -> None:
    """Memory and processor limits hold in a weaker way; processes and disk do not need groups at all."""
    report = await probe(paths, runsc_binary, NO_GROUPS)
    for name in ("limits.memory", "limits.cpu"):
        assert report.get(name).available
        assert "soft" in report.get(name).reason and "none here" in report.get(name).reason
    for name in ("limits.processes", "limits.disk"):
        assert report.get(name).available and report.get(name).reason == ""
    assert not report.get("gpu").available


async def test_create_without_a_binary_is_refused(paths: Paths) -> None:
    """Nobody falls back to anything: no runsc, no sandbox."""
    with pytest.raises(SandboxGatewayError) as caught:
        async for _ in GvisorRuntime(paths).create(SandboxSpec("x", "p", "gvisor", Image("i", ())), paths.home):
            pass
    assert caught.value.code == "runtime_missing"


def test_refused_user_namespace_has_a_reason_and_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that allows none is told apart, with the switch that would allow it."""
    switch = tmp_path / "max_user_namespaces"
    switch.write_text("0\n")
    monkeypatch.setattr(namespaces, "_SWITCHES", ((str(switch), "0", "turn it on"),))
    refusing = script(tmp_path / "python", "echo 'OSError: [Errno 1] unshare: Operation not permitted' >&2; exit 1")
    monkeypatch.setattr(namespaces.sys, "executable", str(refusing))
    namespaces.why_no_user_namespace.cache_clear()
    try:
        found = namespaces.why_no_user_namespace()
    finally:
        namespaces.why_no_user_namespace.cache_clear()
    assert found is not None
    reason, hint = found
    assert "not permitted" in reason
    assert "turn it on" in hint
