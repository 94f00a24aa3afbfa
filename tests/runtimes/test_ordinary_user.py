"""The contract holds for a user without any privilege: tests of this folder, run once more under another uid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

USER = 61307
"""A uid that no one has."""

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class User:
    """Somebody without privileges, with a home and an interpreter that they may run."""

    home: Path
    python: str

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run their Python."""
        return subprocess.run(
            [self.python, "-B", *arguments],
            user=USER,
            group=USER,
            extra_groups=[],
            cwd=self.home,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(self.home),
                "TMPDIR": str(self.home),  # what they leave is found below a directory of ours
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *(entry for entry in sys.path if entry)]),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )


@pytest.fixture
def user() -> Iterator[User]:
    """A user for this test; skips, with the reason, where we cannot become one."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests of this folder run as an ordinary user already")
    home = Path(tempfile.mkdtemp(prefix="sg-"))
    try:
        os.chown(home, USER, USER)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        candidates = [sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"]
        said = ""
        for python in candidates:
            try:
                tried = User(home, python).run("-c", "import pytest, pytest_asyncio, zmq, sandbox_gateway.link.host")
            except OSError as error:
                said = f"{python}: {error.strerror}"
                continue
            if tried.returncode == 0:
                break
            said = f"{python}: {tried.stderr.strip().splitlines()[-1:]}"
        else:
            pytest.skip(f"no interpreter that another user may run with our packages ({said})")
        yield User(home, python)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("module", ["test_contract.py", "test_gvisor.py", "test_gvisor_snapshots.py"])
def test_gvisor_passes_as_an_ordinary_user(user: User, runsc_binary: Path, module: str) -> None:
    """The same tests pass in a user namespace, with soft limits, and leave nothing either."""
    binary = user.home / "runsc"
    shutil.copy(runsc_binary, binary)
    os.chown(binary, USER, USER)
    outcome = user.run(
        "-m",
        "pytest",
        str(REPOSITORY / "tests" / "runtimes" / module),
        "-q",
        "-rs",
        "-k",
        "Gvisor or gvisor",
        "-p",
        "no:cacheprovider",
        f"--basetemp={user.home / 't'}",
        f"--rootdir={REPOSITORY}",
        f"--config-file={REPOSITORY / 'pyproject.toml'}",
        SANDBOX_GATEWAY_RUNSC=str(binary),
    )
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-2000:]
    assert " passed" in outcome.stdout
    assert " failed" not in outcome.stdout
