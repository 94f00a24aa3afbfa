"""The client half imports and runs where there is no Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from remote_harness import Remote


@pytest.mark.parametrize(("platform", "transport"), [("win32", "tcp"), ("darwin", "ipc")])
@pytest.mark.parametrize("remote", ["fake"], indirect=True)
def test_it_needs_nothing_that_only_linux_has(
    remote: Remote, kernel_name: str, tmp_path: Path, platform: str, transport: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("portable.py")), platform, remote.url, kernel_name],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "PREFIX": str(tmp_path / "prefix")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"transport {transport}"
