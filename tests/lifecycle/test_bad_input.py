"""What is wrong with a machine or a profile gives one error line with a hint, a status, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from acceptance import Product, environment, profile_kernelspec, short_directory

from sandbox_gateway.host.doctor import check_data_directory, check_runtime_directory
from sandbox_gateway.host.paths import discover
from sandbox_gateway.lifecycle import Lifecycle
from sandbox_gateway.store import Store

NOTEBOOK = {
    "cells": [
        {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": "print(6*7)"}
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}

EXECUTE = "from nbclient.cli import main; main()"
"""`jupyter execute`, without looking for its script."""

OLD_RUNSC = """#!/bin/sh
case "$1" in
--version) echo 'runsc version release-20201030.0'; echo 'spec: 1.0.1-dev' ;;
flags) echo '  -root string'; echo '        root directory' ;;
*) echo "unknown command $1" >&2; exit 128 ;;
esac
"""
"""What the probe asks of a runsc, answered as one of the year 2020 does: no flag of the pinned generation."""


@dataclass(frozen=True)
class Outcome:
    """How one run of `jupyter execute` ended."""

    status: int
    last: str
    """The last line of its standard error: what stands there after whatever the application shows of its own."""
    stderr: str


@dataclass(frozen=True)
class Machine:
    """An installation of a test's own with kernelspecs, on a machine that may lack anything."""

    product: Product

    @property
    def run(self) -> Path:
        """The runtime directory."""
        return self.product.home / "run"

    def profile(self, text: str, name: str = "odd") -> None:
        """Write the profile file: one profile."""
        (self.product.home / "profiles.toml").write_text(f'[profiles.{name}]\ndisplay_name = "Odd"\n{text}\n')

    def execute(self, profile: str = "odd", **variables: str) -> Outcome:
        """Run the notebook by `jupyter execute` with a kernelspec that names ``profile``."""
        notebook = self.product.home.parent / "notebook.ipynb"
        notebook.write_text(json.dumps(NOTEBOOK))
        with profile_kernelspec(self.product, profile) as name, environment(**variables):
            done = subprocess.run(
                [sys.executable, "-c", EXECUTE, f"--kernel_name={name}", "--inplace", str(notebook)],
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
        assert not json.loads(notebook.read_text())["cells"][0]["outputs"], "a cell ran"
        lines = done.stderr.strip().splitlines()
        return Outcome(done.returncode, lines[-1] if lines else "", done.stderr)

    def refused(self, outcome: Outcome, reason: str, hint: str) -> None:
        """Exactly one line at the end says what is wrong and what to do, and nothing of the kernel is left."""
        assert outcome.status not in (0, None), outcome.stderr
        assert re.search(reason, outcome.last), outcome.stderr[-3000:]
        assert re.search(hint, outcome.last), outcome.last
        assert outcome.last.startswith("sandbox_gateway.errors.SandboxGatewayError: ")
        self.nothing_left()

    def nothing_left(self) -> None:
        """No directory of a sandbox, no socket, no half-made layer, no record (processes: the common leak check)."""
        left = [path for path in self.run.glob("*") if path.name not in {"owners", "runsc", "empty"}]
        left += [*(self.run / "owners").glob("*"), *(self.run / "runsc").glob("*")]
        left += [*(self.product.home / "layers" / "tmp").glob("*")]
        assert left == []
        assert self.records() == []

    def nothing_built(self) -> None:
        """What was refused was refused before anything was built for it."""
        assert list((self.product.home / "layers").glob("*.erofs")) == []

    def records(self) -> list[dict[str, Any]]:
        """All that the store knows."""
        done = self.product.command("ps", "--all", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found


async def swept(home: Path) -> None:
    """What each start does about what others left."""
    lifecycle = Lifecycle(discover({"SANDBOX_GATEWAY_HOME": str(home)}))
    try:
        await lifecycle.sweep()
    finally:
        await lifecycle.close()


@contextlib.contextmanager
def machine(home: Path | None = None, **variables: str) -> Iterator[Machine]:
    """A fresh installation without a runsc, at ``home`` if given."""
    base = short_directory()
    try:
        found = Machine(Product(home or base / "home", base / "prefix"))
        found.product.home.mkdir(mode=0o700, exist_ok=True)
        with environment(SANDBOX_GATEWAY_HOME=str(found.product.home), **variables):
            yield found
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def bare() -> Iterator[Machine]:
    """Nothing is installed."""
    with machine() as found:
        yield found


@pytest.fixture
def ready(runsc_binary: Path) -> Iterator[Machine]:
    """There is a runsc that works."""
    with machine(SANDBOX_GATEWAY_RUNSC=str(runsc_binary)) as found:
        yield found


@contextlib.contextmanager
def mounted(point: Path, options: str) -> Iterator[Path]:
    """A small filesystem in memory; skips where we may not mount."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a filesystem of the test's own has to be mounted")
    point.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@contextlib.contextmanager
def removed(directory: Path) -> Iterator[None]:
    """Take ``directory`` away at the end."""
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_no_runsc(bare: Machine) -> None:
    outcome = bare.execute("python3-gvisor")
    bare.refused(outcome, "there is no runsc", "Run `jupyter sandbox setup`")
    bare.nothing_built()


def test_a_named_runsc_that_is_not_there(bare: Machine) -> None:
    outcome = bare.execute("python3-gvisor", SANDBOX_GATEWAY_RUNSC="/no/such/runsc")
    bare.refused(outcome, "SANDBOX_GATEWAY_RUNSC names /no/such/runsc", "Correct the variable")


def test_a_runsc_that_is_too_old(bare: Machine) -> None:
    old = bare.product.home.parent / "runsc"
    old.write_text(OLD_RUNSC)
    old.chmod(0o755)
    outcome = bare.execute("python3-gvisor", SANDBOX_GATEWAY_RUNSC=str(old))
    bare.refused(outcome, "too old: it lacks .*checkpoint -exclude-committed-zero-pages", "to get the pinned one")
    with environment(SANDBOX_GATEWAY_RUNSC=str(old)):
        done = bare.product.command("doctor", "--json")
    assert done.returncode == 1 and "too old" in done.stdout


def test_a_missing_interpreter(ready: Machine) -> None:
    ready.profile('image = "host:/no/such/python"')
    ready.refused(ready.execute(), "/no/such/python", "Name a Python interpreter")


def test_an_interpreter_that_is_none(ready: Machine) -> None:
    ready.profile('image = "host:/bin/true"')
    ready.refused(ready.execute(), "/bin/true", "Name a Python interpreter")


def test_a_directory_that_is_no_root_filesystem(ready: Machine) -> None:
    ready.profile(f'image = "directory:{ready.run.parent.parent / "prefix"}"')
    (ready.product.prefix / "share").mkdir(parents=True)
    ready.refused(ready.execute(), "not a root filesystem", "debootstrap")


def test_a_directory_without_python(ready: Machine) -> None:
    root = ready.product.home.parent / "root"
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "sh").write_bytes(b"")
    ready.profile(f'image = "directory:{root}"')
    ready.refused(ready.execute(), "no .*[Pp]ython", r"\(.+\)$")


def test_an_unknown_profile_named_by_a_kernelspec(ready: Machine) -> None:
    ready.profile("")
    ready.refused(ready.execute("nobody"), "nobody", "shows the profiles|Known|python3-gvisor")


def test_a_profile_with_a_wrong_key_names_file_line_and_key(ready: Machine) -> None:
    ready.profile('memmory = "1GiB"')
    outcome = ready.execute()
    assert outcome.status != 0
    assert "memmory" in outcome.last and "profiles.toml" in outcome.last and re.search(r"\b3\b", outcome.last)


@pytest.mark.parametrize("name, value", [("memory", '"1GiB"'), ("cpu", "1.0"), ("disk", '"1GiB"'), ("processes", "50")])
def test_a_required_limit_that_cannot_be_enforced(bare: Machine, name: str, value: str) -> None:
    """The fake runtime holds nothing back, and says so by its capabilities."""
    bare.profile(f'runtime = "fake"\n{name} = {value}')
    bare.refused(bare.execute(), f"the {name} limit cannot be enforced here", "leave the limit out|")
    bare.nothing_built()


def test_a_full_disk_while_the_image_is_built(runsc_binary: Path) -> None:
    base = short_directory()
    try:
        with (
            mounted(base / "full", "size=6m,mode=700") as home,
            machine(home, SANDBOX_GATEWAY_RUNSC=str(runsc_binary)) as full,
        ):
            full.refused(full.execute("python3-gvisor"), "no space left", "Free some space")
            built = full.product.command("image", "build", "python3-gvisor")
            assert built.returncode == 1
            assert [line[:6] for line in built.stderr.splitlines()][-2:] == ["error:", "hint: "], built.stderr
            full.nothing_left()
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("room", [0, 4096, 16384, 65536, 131072])
def test_a_full_disk_when_a_sandbox_is_made(product: Product, room: int) -> None:
    """The layers are there; not a byte (or not enough of them) is left for lock, record, pipes and bundle."""
    assert product.command("image", "build", "python3-gvisor").returncode == 0
    base = short_directory()
    with removed(base), mounted(base / "full", "size=8m,mode=700") as home:
        (home / "layers").symlink_to(product.home / "layers")
        (home / "bin").symlink_to(product.home / "bin")
        (home / "cache").mkdir()
        with machine(home) as full:
            Store(home / "store.sqlite").open().close()  # was there when the disk filled
            with (home / "filling").open("wb", buffering=0) as filling, contextlib.suppress(OSError):
                while True:
                    filling.write(b"x" * 4096)
            with (home / "filling").open("r+b") as filling:
                filling.truncate((home / "filling").stat().st_size - room)
            outcome = full.execute("python3-gvisor")
            (home / "filling").unlink()
            asyncio.run(swept(home))
            for row in full.records():
                # To take a record back needs room too: then it stays as that of a sandbox that ended, with its reason.
                assert row["state"] == "terminated" and "no space left" in row["death"]["reason"].lower(), row
                assert full.product.command("rm", row["id"]).returncode == 0
            full.refused(outcome, "[Nn]o space left", "Free some space")


def test_a_read_only_data_directory(runsc_binary: Path) -> None:
    base = short_directory()
    try:
        with (
            mounted(base / "ro", "size=1m,mode=700,ro") as home,
            machine(home, SANDBOX_GATEWAY_RUNSC=str(runsc_binary)) as sealed,
        ):
            outcome = sealed.execute("python3-gvisor")
            assert outcome.status != 0
            assert re.search(r"cannot be written|cannot create|Read-only", outcome.last), outcome.stderr[-2000:]
            assert "Point SANDBOX_GATEWAY_HOME at a local folder" in outcome.last
            for command in (["image", "build", "python3-gvisor"], ["setup", "--from", str(runsc_binary)]):
                done = sealed.product.command(*command)
                assert done.returncode == 1, (command, done.stdout, done.stderr)
                assert done.stderr.startswith("error: ") and "\nhint: " in done.stderr
            assert sealed.product.command("doctor").returncode == 1
            assert list(home.iterdir()) == []
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_filesystem_is_refused_by_doctor(tmp_path: Path, kind: str) -> None:
    lines = f"1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 0:40 / {tmp_path} rw - {kind} server:/export rw\n"
    for check in (check_data_directory(tmp_path / "home", lines), check_runtime_directory(tmp_path / "run", lines)):
        assert check.status == "fail" and kind in check.detail and check.hint


def test_the_store_of_a_newer_program_is_refused_and_kept(ready: Machine) -> None:
    assert ready.product.command("ps").returncode == 0
    import sqlite3

    database = sqlite3.connect(ready.product.home / "store.sqlite")
    with contextlib.closing(database):
        database.execute("PRAGMA user_version = 9999")
    outcome = ready.execute("python3-gvisor")
    assert outcome.status != 0 and "Upgrade sandbox_gateway" in outcome.last
    ready.nothing_built()
    assert not [path for path in ready.run.glob("*") if path.name not in {"owners", "runsc", "empty"}]
