"""The command line, in this process or as the real program, and sandboxes that somebody else owns."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox_gateway.cli.main import main
from sandbox_gateway.host.machine import boot_id
from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.owner import OwnerLock, OwnerServer
from sandbox_gateway.store import Store

PROGRESS = re.compile(
    r"^(?:suspending|resuming|pausing|stopping|removing|connecting|forking|saving|looking at) .*\n", re.MULTILINE
)
"""What a command says on stderr that takes more than a second, as any may on a busy machine."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended; its stderr without lines of progress."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """What it wrote to stdout, as JSON."""
        return json.loads(self.stdout)

    @property
    def error(self) -> dict[str, Any]:
        """The error object on stderr."""
        found: dict[str, Any] = json.loads(self.stderr)["error"]
        return found


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    """An installation in a short temporary folder."""
    with tempfile.TemporaryDirectory(prefix="sgc-") as home:
        monkeypatch.setenv("SANDBOX_GATEWAY_HOME", home)
        monkeypatch.delenv("SANDBOX_GATEWAY_DEBUG", raising=False)
        monkeypatch.delenv("SANDBOX_GATEWAY_RUNSC", raising=False)
        yield discover()


Run = Callable[..., Outcome]


@pytest.fixture
def run(paths: Paths, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def command(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        out = capfd.readouterr()
        return Outcome(status, out.out, PROGRESS.sub("", out.err))

    return command


@pytest.fixture
def program(paths: Paths) -> Run:
    """Run the real program."""

    def command(*arguments: str | Path, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "sandbox_gateway.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **environment},
        )
        return Outcome(done.returncode, done.stdout, PROGRESS.sub("", done.stderr))

    return command


def record(sandbox_id: str, state: State = State.RUNNING, **changes: Any) -> SandboxRecord:
    """A record as a lifecycle would write it."""
    now = time.time()
    values: dict[str, Any] = {
        "id": sandbox_id,
        "state": state,
        "profile": "python3-gvisor",
        "runtime": "fake",
        "created": now - 60,
        "changed": now - 30,
        "boot_id": boot_id(),
        **changes,
    }
    return SandboxRecord(**values)


@pytest.fixture
def store(paths: Paths) -> Iterator[Store]:
    """The store of the installation."""
    paths.ensure()
    with Store(paths.database) as opened:
        yield opened


class Owner:
    """A process that owns sandboxes, played by a thread: it holds their locks and answers as told."""

    def __init__(self, paths: Paths, store: Store) -> None:
        self.paths = paths
        self.store = store
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, Any] = {}
        self._locks: dict[str, OwnerLock] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = OwnerServer(paths, self._answer)
        self._call(self._server.start())

    def own(self, *records: SandboxRecord) -> None:
        """Put these on record and hold their locks."""
        for item in records:
            self.store.put(item)
            lock = OwnerLock(self.paths.sandbox(item.id))
            lock.acquire()
            self._locks[item.id] = lock

    def end(self, sandbox_id: str) -> None:
        """The sandbox ends: its record says so and its lock is free."""
        self.store.transition(sandbox_id, State.TERMINATING, time.time())
        self.store.transition(sandbox_id, State.TERMINATED, time.time())
        self._locks.pop(sandbox_id).release(remove=True)

    def close(self) -> None:
        """Stop answering and give everything up."""
        for lock in self._locks.values():
            lock.release(remove=True)
        self._call(self._server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _answer(self, op: str, sandbox_id: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append((op, sandbox_id))
        answer = self.answers[op]
        if isinstance(answer, Exception):
            raise answer
        result = answer(sandbox_id) if callable(answer) else answer
        if inspect.isawaitable(result):
            result = await result
        return {} if result is None else result

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


@pytest.fixture
def owner(paths: Paths, store: Store) -> Iterator[Owner]:
    """An owner that tells memory, gives a log and stops what it is asked to."""
    playing = Owner(paths, store)
    playing.answers = {
        "stats": {"memory": 3 * 1024**2, "cpu_seconds": 1.0, "processes": 9},
        "log": {"log": "hello\n"},
        "stop": playing.end,
    }
    yield playing
    playing.close()
