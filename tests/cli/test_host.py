"""``setup`` and ``doctor``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_harness import Run

from sandbox_gateway.host.paths import Paths


@pytest.fixture
def fake_runsc(tmp_path: Path) -> Path:
    """A file that answers like a runsc to the only question that set-up asks."""
    file = tmp_path / "runsc"
    file.write_text("#!/bin/sh\necho runsc version VERSION_MISSING\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("option", ["--runsc", "--file", "--from"])
def test_setup_takes_a_file_and_tells_where_it_is(run: Run, paths: Paths, fake_runsc: Path, option: str) -> None:
    done = run("setup", option, fake_runsc)
    assert done.status == 0, done.stderr
    assert done.stdout.startswith(f"runsc is installed: {paths.bin}/")


def test_setup_is_told_one_way_at_most(run: Run, fake_runsc: Path) -> None:
    done = run("setup", "--build", "--file", fake_runsc)
    assert done.status == 2 and "not allowed with" in done.stderr


def test_setup_as_json_names_path_and_hash(run: Run, paths: Paths, fake_runsc: Path) -> None:
    found = run("setup", "--runsc", fake_runsc, "--json").json
    assert Path(found["path"]).is_relative_to(paths.bin) and len(found["sha256"]) == 64
    assert os.access(found["path"], os.X_OK)


def test_setup_with_a_wrong_file_is_one_line_and_leaves_nothing(run: Run, paths: Paths, tmp_path: Path) -> None:
    wrong = tmp_path / "runsc"
    wrong.write_text("not a program")
    done = run("setup", "--runsc", wrong)
    assert done.status == 1 and done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not list(paths.bin.glob("*/runsc"))


def test_doctor_without_runsc_says_what_to_do_and_fails(program: Run) -> None:
    done = program("doctor")
    assert done.status == 1 and done.stderr == ""
    assert "FAIL  runsc" in done.stdout and "-> Run `jupyter sandbox setup`." in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Sandboxed kernels cannot run here yet")


def test_doctor_as_json_lists_every_check(program: Run) -> None:
    done = program("doctor", "--json")
    found = done.json
    assert done.status == 1 and found["ok"] is False
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["runsc"]["status"] == "fail" and checks["runsc"]["hint"]
    assert checks["profiles"]["status"] == "ok" and "python3-gvisor-files" in checks["profiles"]["detail"]


def test_doctor_names_what_is_wrong_with_the_profiles(run: Run, paths: Paths) -> None:
    paths.profiles.write_text("[profiles.x]\ncpu = 0\n")
    checks = {check["name"]: check for check in run("doctor", "--json").json["checks"]}
    assert checks["profiles"]["status"] == "fail" and "profiles.x.cpu" in checks["profiles"]["detail"]


def test_doctor_warns_of_profiles_that_isolate_nothing(run: Run, paths: Paths) -> None:
    paths.profiles.write_text('[profiles.demo]\nruntime = "fake"\n')
    checks = {check["name"]: check for check in run("doctor", "--json").json["checks"]}
    assert checks["profiles"]["status"] == "warn" and "not isolated: demo" in checks["profiles"]["detail"]
