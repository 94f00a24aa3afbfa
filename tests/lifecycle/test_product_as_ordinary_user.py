"""The whole product for a user without any privilege: tests of this folder, run once more under another uid.

The user gets a virtual environment of their own with the distributions that the product needs, copied from ours, so
that the `host` image is made from an environment as users have it. ``SANDBOX_TEST_USER_ALL=1`` runs all tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

USER = 61308
"""A uid that no one has."""

REPOSITORY = Path(__file__).resolve().parents[2]

NEEDED = (
    "sandbox_gateway",
    "ipykernel",
    "nbclient",
    "hypothesis",
    "psutil",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
)

CHOSEN = " or ".join(
    (
        "a_cell_runs_inside_gvisor",
        "an_interrupt_stops",
        "a_restart_keeps_files",
        "out_of_memory_is_named",
        "working_directory_and_its_files",
        "shutdown_leaves",
        "stop_asks_the_owner",
        "stop_works_without",
        "kill_9_leaves_nothing",
    )
)

pytestmark = pytest.mark.timeout(420)


@dataclass(frozen=True)
class User:
    """Somebody without privileges, with a home, a virtual environment and a runsc that they may run."""

    home: Path

    @property
    def python(self) -> Path:
        """Their interpreter."""
        return self.home / "venv" / "bin" / "python"

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program as this user, with nothing of our environment."""
        return subprocess.run(
            [str(argument) for argument in arguments],
            user=USER,
            group=USER,
            extra_groups=[],
            cwd=self.home,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(self.home),
                "TMPDIR": str(self.home / "t"),  # what they leave is found below a directory of ours
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONDONTWRITEBYTECODE": "1",
                "JUPYTER_PLATFORM_DIRS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )


def closure(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The named distributions of our environment and all that they need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or an extra
        for requirement in found[name].requires or ():
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement)):
                todo.append(match[0])
    return found


def furnish(user: User, base: str) -> str:
    """Make the user's environment with interpreter ``base``; a reason why not, empty when it works."""
    shutil.rmtree(user.home / "venv", ignore_errors=True)
    try:
        made = user.run(base, "-m", "venv", "--without-pip", user.home / "venv")
    except OSError as error:
        return f"{base}: {error.strerror}"
    if made.returncode != 0:
        return f"{base}: {(made.stderr or made.stdout).strip()[-300:]}"
    (packages,) = (user.home / "venv" / "lib").glob("python*/site-packages")
    for distribution in closure(NEEDED).values():
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and source.is_file() and source.suffix != ".pyc":
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    for path in (packages, *packages.rglob("*")):
        os.chown(path, USER, USER)
    tried = user.run(
        user.python, "-c", "import hypothesis, pytest, pytest_asyncio, ipykernel, nbclient, sandbox_gateway.provisioner"
    )
    return "" if tried.returncode == 0 else f"{base}: {tried.stderr.strip()[-300:]}"


@pytest.fixture(scope="module")
def user(runsc_binary: Path) -> Iterator[User]:
    """A user for these tests; skips, with the reason, where we cannot become one."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests of this folder run as an ordinary user already")
    found = User(Path(tempfile.mkdtemp(prefix="sg-")))
    try:
        for path in (found.home, found.home / "t"):
            path.mkdir(exist_ok=True)
            os.chown(path, USER, USER)
        shutil.copy(runsc_binary, found.home / "runsc")
        os.chown(found.home / "runsc", USER, USER)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        said = []
        for base in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
            reason = furnish(found, base)
            if not reason:
                break
            said.append(reason)
        else:
            pytest.skip("no interpreter that another user may run: " + "; ".join(said))
        yield found
    finally:
        shutil.rmtree(found.home, ignore_errors=True)


def test_the_life_of_kernels_as_an_ordinary_user(user: User) -> None:
    """Start, interrupt, restart, workspace, out of memory (held by looking), stop, rm, kill -9: as for root."""
    chosen = [] if os.environ.get("SANDBOX_TEST_USER_ALL") else ["-k", CHOSEN]
    files = [REPOSITORY / "tests" / "lifecycle" / name for name in ("test_kernel.py", "test_ownership.py")]
    run_tests(user, files, chosen)


def test_attacks_meet_the_same_walls_as_an_ordinary_user(user: User) -> None:
    """No capability, no way to PID 1 or its link: in a user namespace as for root."""
    run_tests(user, [REPOSITORY / "tests" / "isolation" / "test_privileges.py"], ["-k", "not test_a_signal"])


def run_tests(user: User, files: list[Path], chosen: list[str]) -> None:
    """Run tests of ours as ``user``; none may fail, and none of those that were chosen may be skipped."""
    outcome = user.run(
        user.python,
        "-m",
        "pytest",
        *files,
        "-q",
        "-rs",
        "--timeout=100",
        *chosen,
        "-p",
        "no:cacheprovider",
        f"--basetemp={user.home / 't' / 'p'}",
        f"--rootdir={REPOSITORY}",
        f"--config-file={REPOSITORY / 'pyproject.toml'}",
        SANDBOX_TEST_RUNSC=str(user.home / "runsc"),
    )
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
    assert " passed" in outcome.stdout
    assert not chosen or "skipped" not in outcome.stdout, outcome.stdout[-2000:]


def test_an_ordinary_user_is_told_what_is_only_soft(user: User) -> None:
    """`doctor` and the sandbox's record say so; the files of a workspace are the user's own on the host."""
    settings = {
        "SANDBOX_GATEWAY_HOME": str(user.home / "data"),
        "JUPYTER_PATH": str(user.home / "p" / "share" / "jupyter"),
    }
    command = (user.python, "-m", "sandbox_gateway.cli")
    for arguments in (("setup", "--from", user.home / "runsc"), ("install", "--prefix", user.home / "p")):
        done = user.run(*command, *arguments, **settings)
        assert done.returncode == 0, done.stderr
    doctor = json.loads(user.run(*command, "doctor", "--json", **settings).stdout)
    assert doctor["ok"], doctor
    soft = [check for check in doctor["checks"] if check["status"] == "warn" and "limits" in check["name"]]
    assert soft, "this user has no control group: the limits are soft, and doctor says so"
    script = f"""
import json, os, subprocess, sys
from jupyter_client.manager import start_new_kernel
os.makedirs({str(user.home / "work")!r}, exist_ok=True)
manager, client = start_new_kernel(kernel_name="python3-gvisor-files", cwd={str(user.home / "work")!r})
try:
    reply = client.execute_interactive("open('made.txt', 'w').write('x')", timeout=30)
    assert reply["content"]["status"] == "ok", reply
    listing = [sys.executable, "-m", "sandbox_gateway.cli", "ps", "--json"]
    subprocess.run(listing, stdout=open("ps.json", "w"), check=True)
finally:
    client.stop_channels()
    manager.shutdown_kernel()
"""
    done = user.run(user.python, "-c", script, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads((user.home / "ps.json").read_text())
    assert row["state"] == "running"
    assert any("memory limit: soft" in note for note in row["notes"]), row
    made = (user.home / "work" / "made.txt").stat()
    assert (made.st_uid, made.st_gid) == (USER, USER)
    assert not [
        path for path in (user.home / "data" / "run").iterdir() if path.name not in ("owners", "runsc", "empty")
    ]
