"""The doctor's answers, each from facts that the test gives."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host import cgroups, doctor
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.setup import ensure_runsc
from sandbox_gateway.runtimes.base import Capability, RuntimeReport

MOUNTS = """\
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /home rw - nfs4 server:/home rw
31 22 0:26 / /mnt/with\\040space rw - 9p share rw
32 22 0:27 / /mnt/ssh rw - fuse.sshfs host:/ rw
33 30 0:28 / /home/me/local rw - xfs /dev/vdb rw
34 22 0:29 / /over rw - nfs server:/over rw
35 34 0:30 / /over rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/elsewhere/x", "ext4"),
        ("/home/me/.local", "nfs4"),
        ("/home/me/local/data", "xfs"),
        ("/homework", "ext4"),
        ("/mnt/with space/x", "9p"),
        ("/mnt/ssh", "fuse.sshfs"),
        ("/over/x", "tmpfs"),
    ],
)
def test_the_filesystem_of_a_path_is_that_of_its_closest_mount(path: str, kind: str) -> None:
    assert doctor.filesystem_of(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "fuse.gcsfuse", "fuse"])
def test_network_filesystems_are_known(kind: str) -> None:
    assert doctor.is_network_filesystem(kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuse.fuse-overlayfs", ""])
def test_local_filesystems_are_not_refused(kind: str) -> None:
    assert not doctor.is_network_filesystem(kind)


def test_a_data_directory_on_a_network_filesystem_is_refused() -> None:
    check = doctor.check_data_directory(Path("/home/me/.local/share/sandbox_gateway"), MOUNTS)
    assert check.status == "fail"
    assert "nfs4" in check.detail
    assert "SANDBOX_GATEWAY_HOME" in check.hint


def test_a_data_directory_that_is_not_there_yet_is_fine_and_not_made(tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    assert doctor.check_data_directory(home, MOUNTS).status in {"ok", "warn"}
    assert not (tmp_path / "a").exists()


def test_little_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000_000})())
    assert doctor.check_data_directory(tmp_path, MOUNTS).status == "warn"


def test_a_long_runtime_directory_is_refused() -> None:
    check = doctor.check_runtime_directory(Path("/tmp/" + "x" * 60), MOUNTS)
    assert check.status == "fail"
    assert "107" in check.detail


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok")])
def test_python_is_to_be_3_11_or_newer(version: tuple[int, int, int], status: str) -> None:
    assert doctor.check_python(version).status == status


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (("Linux", "6.1.0-18-amd64", "x86_64"), "ok"),
        (("Linux", "6.18.0", "aarch64"), "ok"),
        (("Linux", "4.4.0-generic", "x86_64"), "fail"),
        (("Linux", "6.1.0", "riscv64"), "fail"),
        (("Darwin", "24.0", "arm64"), "fail"),
    ],
)
def test_the_kernel_is_to_be_one_that_gvisor_runs_on(facts: tuple[str, str, str], status: str) -> None:
    assert doctor.check_kernel(*facts).status == status


def test_a_missing_runsc_fails_with_the_command_that_brings_it(tmp_path: Path) -> None:
    check = doctor.check_runsc(Paths(tmp_path, tmp_path / "run"), {})
    assert (check.status, check.hint) == ("fail", "Run `jupyter sandbox setup`.")


def test_a_named_runsc_that_is_not_there_fails(tmp_path: Path) -> None:
    check = doctor.check_runsc(Paths(tmp_path, tmp_path / "run"), {"SANDBOX_GATEWAY_RUNSC": "/nowhere/runsc"})
    assert check.status == "fail"
    assert "/nowhere/runsc" in check.detail


def test_a_changed_runsc_fails(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "home", tmp_path / "home" / "run")
    file = tmp_path / "runsc"
    file.write_text("#!/bin/sh\necho runsc version 1\n")
    install = ensure_runsc(paths, source=file, environment={})
    assert doctor.check_runsc(paths, {}).status == "ok"
    with install.path.open("a") as handle:
        handle.write("# changed\n")
    assert doctor.check_runsc(paths, {}).status == "fail"


def test_root_needs_no_user_namespace() -> None:
    assert doctor.check_user(0, lambda: ("never asked", "")).status == "ok"


def test_an_ordinary_user_without_user_namespaces_is_told_the_reason() -> None:
    check = doctor.check_user(1000, lambda: ("not permitted", "Ask the administrator."))
    assert (check.status, check.detail, check.hint) == ("fail", "not permitted", "Ask the administrator.")
    assert doctor.check_user(1000, lambda: None).status == "ok"


def test_limits_that_the_kernel_cannot_enforce_are_named() -> None:
    tree = cgroups.CgroupTree(version=2, roots={"": Path("/g")}, controllers=("memory",), reason="not delegated")
    (check,) = doctor.check_cgroups(tree)
    assert check.status == "warn"
    assert "cpu, pids" in check.detail
    assert "not delegated" in check.detail
    whole = cgroups.CgroupTree(version=1, roots={"memory": Path("/g")}, controllers=cgroups.WANTED)
    assert doctor.check_cgroups(whole)[0].status == "ok"


def test_a_runtime_that_cannot_run_fails_and_a_missing_ability_does_not() -> None:
    report = RuntimeReport(
        "gvisor",
        True,
        capabilities=(
            Capability("run", False, "too old", "Run `jupyter sandbox setup`."),
            Capability("limits.disk", False, "no quota"),
            Capability("snapshots", False, "later"),
            Capability("pause", True),
        ),
    )
    found = {check.name: check.status for check in doctor.check_runtime(report)}
    assert found == {
        "gvisor run": "fail",
        "gvisor limits.disk": "warn",
        "gvisor snapshots": "skip",
        "gvisor pause": "ok",
    }


def test_a_report_without_the_ability_to_run_fails() -> None:
    assert [check.status for check in doctor.check_runtime(RuntimeReport("gvisor", True))] == ["fail"]


def test_a_probe_that_raises_is_a_failed_check_with_its_hint() -> None:
    (check,) = doctor.check_runtime(SandboxGatewayError("runtime_missing", "no runsc"))
    assert (check.status, check.detail) == ("fail", "no runsc")
    assert check.hint


def test_a_missing_ipykernel_fails() -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert doctor.check_ipykernel(missing).status == "fail"
    assert doctor.check_ipykernel(lambda name: "7.4.0").status == "ok"


def test_editable_installs_are_named_but_for_our_own() -> None:
    check = doctor.check_editable(["mylib", "sandbox-gateway"])
    assert check.status == "warn"
    assert check.detail.endswith(": mylib")
    assert doctor.check_editable(["sandbox_gateway"]).status == "ok"


def test_editable_installs_are_those_of_the_profiles_environments(tmp_path: Path) -> None:
    """Also what no metadata tells, as `setup.py develop` leaves it; not where the profile takes them in."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60)
    (tmp_path / "project").mkdir()
    (site,) = place.glob("lib/python3*/site-packages")
    (site / "theirs.egg-link").write_text(f"{tmp_path}/project\n.\n")
    source = f"host:{place}/bin/python"
    assert f"theirs in {place}/bin/python" in doctor.editable_left_out([("host", False), (source, False)])
    assert doctor.editable_left_out([(source, True), ("directory:/srv", False), ("host:/no/such/python", False)]) == []
    assert doctor.check_editable([f"sandbox_gateway in {place}"]).status == "ok"


def test_kernelspecs_that_are_not_installed_are_named(tmp_path: Path) -> None:
    (tmp_path / "python3-gvisor").mkdir()
    (tmp_path / "python3-gvisor" / "kernel.json").write_text("{}")
    check = doctor.check_kernelspecs([tmp_path])
    assert check.status == "warn"
    assert check.detail.endswith(": python3-gvisor-files")


def test_the_driver_of_a_gpu_is_read() -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    assert "570.86.15" in doctor.check_gpu(text).detail
    assert doctor.check_gpu("").detail == "no NVIDIA driver"


def test_a_diagnosis_is_json_and_not_ok_when_anything_fails(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "home", tmp_path / "home" / "run")
    found = asyncio.run(doctor.diagnose(paths, {"PATH": os.defpath}))
    assert not found.ok, "there is no runsc in an empty home"
    data = json.loads(json.dumps(found.as_dict()))
    assert data["ok"] is False
    assert {check["name"] for check in data["checks"]} >= {"python", "kernel", "runsc", "limits", "kernelspecs"}
    assert all(check["hint"] for check in data["checks"] if check["status"] in {"fail", "warn"})
    assert not (tmp_path / "home").exists(), "a doctor changes nothing"
