"""What is told of a runsc that failed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.runtimes.runsc import Outcome, Runsc

FULL = (
    'checkpoint failed: checkpointing container "a": error serializing object &wire.Array{Contents:[]wire.Object'
    f"{{0x73, 0x65, 0x63, 0x72, 0x65, 0x74}}}}: {os.strerror(ENOSPC).lower()}:\n"
    "goroutine 64 [running]:\n"
    "gvisor.dev/gvisor/pkg/state.safely.func1()\n"
    "\tgvisor.dev/gvisor@v0.0.0/pkg/state/state.go:309 +0x19e\n"
)
"""As runsc says it when the disk is full: with what was in the sandbox's memory, and a stack."""


def test_the_reason_of_a_panic_is_what_comes_before_its_stack_without_the_sandboxs_memory() -> None:
    reason = Outcome(128, "", FULL).reason
    assert reason == (
        'checkpoint failed: checkpointing container "a": error serializing object {...}: no space left on device'
    )


def test_an_ordinary_reason_is_the_last_line() -> None:
    assert Outcome(1, "", "warning\nstarting container: no such file\n\n").reason == "starting container: no such file"
    assert Outcome(1, "", "goroutine 1 [running]:\nmain.main()\n").reason == "main.main()"
    assert Outcome(7, "", "").reason == "exit status 7"


async def test_a_full_disk_has_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "said").write_text(FULL)
    program = tmp_path / "runsc"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2\nexit 128\n")
    program.chmod(0o755)
    with pytest.raises(SandboxGatewayError, match="no space left") as caught:
        await Runsc(program, tmp_path).call([], "checkpoint", "a")
    assert caught.value.code == "disk_full"


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runsc with a program beside it, in a folder that everybody reaches, seen by root."""
    place = Path(tempfile.mkdtemp(prefix="sg-"))
    place.chmod(0o755)
    try:
        if not all(path.stat().st_mode & stat.S_IXOTH for path in place.parents):
            pytest.skip(f"{place.parent} is not for everybody")
        monkeypatch.setattr("os.geteuid", lambda: 0)
        (place / "gvisor-bin").mkdir(mode=0o755)
        for file in (place / "runsc", place / "gvisor-bin" / "gvisor_sentry"):
            file.touch(mode=0o755)
        yield place
    finally:
        shutil.rmtree(place)


def left_aside(binary: Path) -> bool:
    """Whether runsc is told to look for its sidecars elsewhere."""
    return "GVISOR_SIDECAR_BINARIES_DIR" in Runsc(binary, Path("/nowhere")).environment()


def test_sidecars_that_everybody_may_run_are_used_also_by_a_link_to_their_runsc(release: Path, tmp_path: Path) -> None:
    assert not left_aside(release / "runsc")
    (tmp_path / "runsc").symlink_to(release / "runsc")
    assert not left_aside(tmp_path / "runsc")


def test_sidecars_that_somebody_may_not_run_are_left_aside(release: Path) -> None:
    (release / "gvisor-bin" / "gvisor_sentry").chmod(0o750)
    assert left_aside(release / "runsc")
    (release / "gvisor-bin" / "gvisor_sentry").chmod(0o755)
    release.chmod(0o700)
    assert left_aside(release / "runsc")


def test_without_sidecars_runsc_looks_where_it_always_does(release: Path) -> None:
    shutil.rmtree(release / "gvisor-bin")
    assert not left_aside(release / "runsc")
