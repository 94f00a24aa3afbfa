"""Starting a sandbox through a launcher (:mod:`sandbox_gateway.host.launch`), which outlives us and reaps for it."""

from __future__ import annotations

import asyncio
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
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.runtimes import runsc
from sandbox_gateway.runtimes.forkserver import Forkserver

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
    """A launcher on its way, while what it shall launch is prepared. It does nothing before it is told."""

    def __init__(self, directory: Path, forkserver: Forkserver) -> None:
        self._directory = directory
        self._marker = f"{MARKER}={directory}"
        self._connecting = asyncio.create_task(self._connect(forkserver))
        self._told = False

    async def _connect(self, forkserver: Forkserver) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(sock=await forkserver.launcher(self._marker))

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
        inherited = {**(runsc.environment() if environment is None else environment), MARKER: str(self._directory)}
        request = {
            "argv": list(argv),
            "environment": inherited,
            "marker": self._marker,
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
        said = await self._tell(marshal.dumps(request, _MARSHAL), timeout)
        try:
            answer = json.loads(said)
        except ValueError:
            reason = runsc.last_line(said) or "it was killed"
            raise SandboxGatewayError("runtime_failed", f"the launcher failed: {reason}") from None
        if "error" in answer:
            message = runsc.last_line(answer["error"]) or "no reason given"
            raise program_error("runtime_failed", f"{Path(argv[0]).name}: {message}")
        reaper = ProcessRef.from_json(answer.get("holder"))
        process = ProcessRef.from_json(answer.get("process"))
        if reaper is None or process is None:
            raise SandboxGatewayError("runtime_failed", "the launcher gave no process ids")
        return Launched(reaper, process)

    async def _tell(self, request: bytes, timeout: float) -> str:
        reader, writer = await asyncio.shield(self._connecting)
        try:
            async with asyncio.timeout(timeout):
                self._told = True
                writer.write(request)
                writer.write_eof()
                return (await reader.read()).decode("utf-8", "replace")
        except TimeoutError as error:
            raise SandboxGatewayError("timeout", f"the launcher did not answer within {timeout:.0f} s") from error
        except OSError:
            return ""

    async def close(self) -> None:
        """End it where it was not told anything, and return when it is gone. Idempotent."""
        try:
            reader, writer = await self._connecting
        except SandboxGatewayError:
            return
        try:
            if not self._told:
                writer.write_eof()
                await asyncio.wait_for(reader.read(), runsc.TIMEOUT)
        except OSError:
            pass
        finally:
            writer.close()


async def launch(argv: Sequence[str], directory: Path, forkserver: Forkserver, **options: Any) -> Launched:
    """As :meth:`Launcher.launch`, by a launcher that is forked for it."""
    program = Launcher(directory, forkserver)
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
