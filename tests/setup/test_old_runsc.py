"""Older runsc binaries are kept while something needs them, and no longer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.host.setup import installed, remove_unused_runsc, unused_runsc

CURRENT, NEEDED, OLD = "1" * 64, "2" * 64, "3" * 64


@pytest.fixture
def three(paths: Paths) -> Paths:
    """The current one, one that a snapshot names, and one that nobody needs."""
    for digest in (CURRENT, NEEDED, OLD):
        folder = paths.bin / digest
        (folder / "gvisor-bin").mkdir(parents=True)
        shutil.copy("/bin/sleep", folder / "runsc")
        (folder / "gvisor-bin" / "sentry").write_bytes(b"x" * 1000)
    data = {"schema": 1, "sha256": CURRENT, "origin": "x", "pin": "p", "files": {"runsc": CURRENT}}
    (paths.bin / "runsc.json").write_text(json.dumps(data))
    return paths


def left(paths: Paths) -> set[str]:
    return {path.name[:1] for path in paths.bin.iterdir() if path.is_dir()}


def test_what_nobody_needs_goes_with_all_its_files(three: Paths) -> None:
    (old,) = unused_runsc(three, {NEEDED})
    assert old.sha256 == OLD and old.size == 1000 + Path("/bin/sleep").stat().st_size
    assert remove_unused_runsc(three, lambda: {NEEDED}) == (old,)
    assert left(three) == {"1", "2"} and installed(three) is not None
    assert remove_unused_runsc(three, lambda: {NEEDED}) == ()
    assert [gone.sha256 for gone in remove_unused_runsc(three, set)] == [NEEDED]


def test_what_a_process_runs_stays(three: Paths) -> None:
    running = subprocess.Popen([three.bin / OLD / "runsc", "1000"])
    try:
        assert remove_unused_runsc(three, lambda: {NEEDED}) == ()
    finally:
        running.kill()
        running.wait()
    assert len(remove_unused_runsc(three, lambda: {NEEDED})) == 1


def test_what_became_needed_meanwhile_stays(three: Paths) -> None:
    """It is asked again while nothing else can be installed."""
    answers = iter([{NEEDED}, {NEEDED, OLD}])
    assert remove_unused_runsc(three, lambda: next(answers)) == ()
    assert left(three) == {"1", "2", "3"}


def test_other_things_in_the_folder_are_left_alone_and_nothing_is_followed(three: Paths, tmp_path: Path) -> None:
    (tmp_path / "runsc").write_text("x")
    (three.bin / ("4" * 64)).symlink_to(tmp_path)
    (three.bin / "mine").mkdir()
    remove_unused_runsc(three, set)
    assert (tmp_path / "runsc").exists() and (three.bin / "mine").is_dir()


def test_a_fresh_installation_has_none(paths: Paths) -> None:
    assert unused_runsc(paths, set()) == () and remove_unused_runsc(paths, set) == ()
    assert not os.path.lexists(paths.bin)
