"""Starting a sandbox through :mod:`sandbox_gateway.host.launch`, a process that outlives us and reaps for it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import marshal
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_gateway.errors import SandboxGatewayError, program_error
from sandbox_gateway.host.namespaces import launch_code, launch_program
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.runtimes import runsc

MARKER = "SANDBOX_GATEWAY_DIRECTORY"
"""Environment variable by which a process of a sandbox is known, whatever was recorded of it."""

PIPE_SIZE = 1 << 20
"""Bytes that each direction of the link can hold while nobody reads."""

_WORDS = 1 << 20

_MARSHAL = 2
"""The format that every Python 3 reads."""

_HOLDER_INTERVAL = 20
"""Seconds between the holder's looks whether its sandbox still lives; destroy() does not wait for them."""


@dataclass(frozen=True, slots=True)
class Fifos:
    """The named pipes of one sandbox: its init's standard streams."""

    stdin: Path
    stdout: Path
    stderr: Path

    @classmethod
    def inside(cls, directory: Path) -> Fifos:
        """Where they are in a sandbox's runtime directory."""
        return cls(directory / "in", directory / "out", directory / "err")

    def make(self) -> None:
        """Create them, private to this user."""
        for path in (self.stdin, self.stdout, self.stderr):
            os.mkfifo(path, 0o600)

    def remove(self) -> None:
        """Remove those that are there."""
        for path in (self.stdin, self.stdout, self.stderr):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Launched:
    """What the launcher reported."""

    holder: ProcessRef
    process: ProcessRef


class Launcher:
    """The launcher's program, on its way while what it shall launch is prepared. It does nothing before it is told."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        environment = {**runsc.environment(), MARKER: str(directory)}
        self._program = asyncio.create_task(self._start(environment))

    @staticmethod
    async def _start(environment: Mapping[str, str]) -> asyncio.subprocess.Process:
        program = await runsc.spawn(launch_program(), env=environment)
        assert program.stdin is not None
        program.stdin.write(launch_code())
        return program

    async def launch(
        self,
        argv: Sequence[str],
        *,
        pid_file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        join: Sequence[str] = (),
        cores: Sequence[int] | None = None,
        user_namespace: bool = False,
        holder: Sequence[str] | None = None,
        timeout: float = runsc.TIMEOUT,
    ) -> Launched:
        """Run ``argv`` under a holder, its standard streams on the FIFOs of the directory. Once.

        With ``pid_file`` the command is waited for and the file names the process that stays. Raises
        ``runtime_failed`` with the end of what the command said. ``holder`` is what the launcher becomes, ``{pid}``
        standing for the process (default: :func:`holder_command`).
        """
        fifos = Fifos.inside(self._directory)
        marker = f"{MARKER}={self._directory}"
        inherited = {**(runsc.environment() if environment is None else environment), MARKER: str(self._directory)}
        request = {
            "argv": list(argv),
            "environment": inherited,
            "marker": marker,
            "pid_file": str(pid_file) if pid_file is not None else None,
            "stdin": str(fifos.stdin),
            "stdout": str(fifos.stdout),
            "stderr": str(fifos.stderr),
            "pipe_size": PIPE_SIZE,
            "join": list(join),
            "cores": list(cores) if cores is not None else None,
            "user_namespace": user_namespace,
            "holder": list(holder) if holder is not None else holder_command(),
        }
        program = await asyncio.shield(self._program)
        outcome = await runsc.finish(program, "the launcher", marshal.dumps(request, _MARSHAL), timeout)
        try:
            answer = json.loads(outcome.output)
        except ValueError:
            raise SandboxGatewayError("runtime_failed", f"the launcher failed: {outcome.reason}") from None
        if "error" in answer:
            message = runsc.last_line(answer["error"]) or "no reason given"
            raise program_error("runtime_failed", f"{Path(argv[0]).name}: {message}")
        reaper = ProcessRef.from_json(answer.get("holder"))
        process = ProcessRef.from_json(answer.get("process"))
        if reaper is None or process is None:
            raise SandboxGatewayError("runtime_failed", "the launcher gave no process ids")
        return Launched(reaper, process)

    async def close(self) -> None:
        """End it where it was not told anything, or has not done it."""
        with contextlib.suppress(SandboxGatewayError):
            await runsc.end(await self._program)


async def launch(argv: Sequence[str], directory: Path, **options: Any) -> Launched:
    """As :meth:`Launcher.launch`, by a launcher that is started for it."""
    program = Launcher(directory)
    try:
        return await program.launch(argv, **options)
    finally:
        await program.close()


@functools.cache
def holder_command() -> list[str] | None:
    """Something tiny that waits for a process to end: GNU tail; None where it is not (then Python stays, 8 MB)."""
    tail = shutil.which("tail")
    if tail is None:
        return None
    try:
        text = subprocess.run([tail, "--help"], capture_output=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    if b"--pid" not in text or b"--sleep-interval" not in text:
        return None
    return [tail, "--pid={pid}", f"--sleep-interval={_HOLDER_INTERVAL}", "-f", os.devnull]


class LastWords:
    """What init writes to its standard error and nobody has read.

    Held open by who waits for the end: a pipe's contents go with the last one that has it open. Never blocks.
    """

    def __init__(self, directory: Path) -> None:
        try:
            path = Fifos.inside(directory).stderr
            self._fd: int | None = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._fd = None

    def __enter__(self) -> LastWords:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def read(self) -> str:
        """Everything that is there now, the last 4,000 characters of it."""
        data = b""
        try:
            while self._fd is not None and (chunk := os.read(self._fd, 1 << 16)):
                # No more than a pipe's worth, even when somebody writes faster than we read.
                data += chunk
                if len(data) > _WORDS:
                    break
        except OSError:
            pass
        return data.decode("utf-8", "replace")[-4000:]
