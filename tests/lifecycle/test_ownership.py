"""Who owns a sandbox, and what happens to it when the owner is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import KERNEL, Product, kernel, profile_kernelspec, until

OWNER = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name=sys.argv[1])
print(manager.provisioner.kernel_id, flush=True)
sys.stdin.read()
"""


class Owner:
    """Another process that owns a kernel."""

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.id = self.process.stdout.readline().strip()
        assert self.id, "the owner could not start its kernel"

    def kill(self) -> None:
        """``kill -9``."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End it and close its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()


@pytest.fixture
def owner(product: Product) -> Iterator[Owner]:
    """A process that started a kernel."""
    found = Owner(KERNEL)
    yield found
    found.close()
    product.command("rm", found.id)


def sandbox_processes(sandbox_id: str) -> list[int]:
    """Host processes whose command line names the sandbox."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if sandbox_id.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def state_of(product: Product, sandbox_id: str) -> str | None:
    """The state that ``ps --all`` shows."""
    done = product.command("ps", "--all", "--json")
    rows = json.loads(done.stdout)
    return next((row["state"] for row in rows if row["id"] == sandbox_id), None)


def test_ps_in_one_process_shows_what_another_started(product: Product, owner: Owner) -> None:
    row = next(row for row in product.ps() if row["id"] == owner.id)
    assert row["owner_pid"] == owner.process.pid


def test_stop_asks_the_owner_by_a_prefix_of_the_id(product: Product, owner: Owner) -> None:
    done = product.command("stop", owner.id[:13])
    assert done.returncode == 0, done.stderr
    assert state_of(product, owner.id) == "terminated"
    assert owner.process.poll() is None, "the owner itself goes on"
    assert sandbox_processes(owner.id) == []


def test_logs_come_from_the_owner(product: Product, owner: Owner) -> None:
    done = product.command("logs", owner.id)
    assert done.returncode == 0, done.stderr


def test_stop_works_without_an_owner(product: Product, owner: Owner) -> None:
    owner.kill()
    done = product.command("stop", owner.id)
    assert done.returncode == 0, done.stderr
    assert sandbox_processes(owner.id) == []
    assert not (product.home / "run" / owner.id).exists()


def test_a_sandbox_whose_owner_was_killed_ends_by_itself_and_the_next_start_removes_the_rest(
    product: Product, owner: Owner
) -> None:
    owner.kill()
    deadline = time.monotonic() + 75.0  # the profile's grace of 30 s, and the agent's own patience
    while sandbox_processes(owner.id) and time.monotonic() < deadline:
        threading.Event().wait(0.2)
    assert sandbox_processes(owner.id) == [], "the agent ends the kernel when its owner is gone"
    with kernel(KERNEL):
        until(lambda: not (product.home / "run" / owner.id).exists())
    assert state_of(product, owner.id) in {"terminated", "failed"}


@pytest.mark.parametrize("after", [0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_a_creation_cut_short_by_kill_9_leaves_nothing(product: Product, after: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, KERNEL], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 20
        run = product.home / "run"
        before = {path.name for path in run.iterdir()}
        while not (new := {path.name for path in run.iterdir()} - before - {"owners"}):
            assert time.monotonic() < deadline and process.poll() is None
            threading.Event().wait(0.005)
        threading.Event().wait(after)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    (sandbox_id,) = new
    done = product.command("rm", sandbox_id)
    assert done.returncode in (0, 1), done.stderr
    with kernel(KERNEL):
        until(lambda: not (run / sandbox_id).exists())
    assert sandbox_processes(sandbox_id) == []


@pytest.mark.parametrize(("policy", "lives"), [("terminate", False), ("keep", True)])
def test_an_application_that_just_ends_leaves_what_its_profile_says(product: Product, policy: str, lives: bool) -> None:
    profiles = product.home / "profiles.toml"
    before = profiles.read_text()
    profiles.write_text(before + f'\n[profiles.leaving]\non_owner_exit = "{policy}"\n')
    try:
        with profile_kernelspec(product, "leaving") as name:
            script = OWNER.replace("sys.stdin.read()", "")
            done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, timeout=60)
    finally:
        profiles.write_text(before)
    assert done.returncode == 0, done.stderr
    sandbox_id = done.stdout.strip()
    assert bool(sandbox_processes(sandbox_id)) is lives
    assert (sandbox_id in product.ids()) is lives
    assert (product.home / "run" / sandbox_id).exists() is lives
    if lives:
        assert product.command("rm", sandbox_id).returncode == 0
        assert sandbox_processes(sandbox_id) == []
