"""Starting the keeper where there is none, and asking it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sandbox_gateway.errors import SandboxGatewayError, storage_error
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.owner import OWNERS, NoOwner, ask_holder, holder

OnProgress = Callable[[Mapping[str, Any]], None]

START_TIMEOUT: Final = 60.0
"""Seconds for a keeper to start; a busy machine takes long to import Python."""
SILENCE: Final = 60.0
"""Seconds without a word from an owner that does something, before it counts as stuck."""
LOG_LIMIT: Final = 1 << 20
"""Bytes of the keeper's log above which it is begun anew."""
_TRIES = 5
_PAUSE = 0.1
_KEPT_VARIABLES = (
    "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "TZ",
    "SANDBOX_GATEWAY_DEBUG", "SANDBOX_GATEWAY_RUNSC", "XDG_RUNTIME_DIR",
)  # fmt: skip
"""What a keeper takes over from its starter's environment: it must find Python, runsc and places for files. The
sandboxes it restores get theirs from their own records, never from here."""
_MARKER = "SANDBOX_GATEWAY_DIRECTORY"


def keeper_directory(paths: Paths) -> Path:
    """Where the keeper's lock and socket are."""
    return paths.runtime / OWNERS / "keeper"


def keeper_socket(paths: Paths) -> Path:
    """Where this process answers if it is the keeper; a name of its own, whatever becomes of the directory."""
    return keeper_directory(paths) / f"keeper-{os.getpid()}.sock"


def keeper_log(paths: Paths) -> Path:
    """The keeper's log file; its name cannot be that of a sandbox's log."""
    return paths.logs / "_keeper.log"


def keeper_pid(paths: Paths) -> int | None:
    """The process that is the keeper now; None where there is none."""
    return holder(keeper_directory(paths)) or None


async def ask_keeper(
    paths: Paths,
    op: str,
    sandbox_id: str = "",
    params: Mapping[str, Any] | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Ask the keeper, started if there is none. Raises ``owner_unreachable`` when it cannot be, or its own error."""
    problem: SandboxGatewayError | None = None
    for _ in range(_TRIES):
        try:
            directory = keeper_directory(paths)
            return await ask_holder(directory, sandbox_id, op, SILENCE, on_progress=on_progress, params=params)
        except NoOwner as error:
            if error.died and op not in _REPEATABLE:
                raise SandboxGatewayError("owner_unreachable", f"the keeper ended while it did {op!r}") from error
            problem = error
            await _start(paths)
        except SandboxGatewayError as error:
            if error.code != "owner_unreachable":
                raise
            # It was just ending: it refuses what it has not begun.
            problem = error
            await asyncio.sleep(_PAUSE)
    raise SandboxGatewayError("owner_unreachable", f"the keeper does not answer: {problem}", _hint(paths))


_REPEATABLE = frozenset({"ping", "adopt"})


async def ensure_keeper(paths: Paths) -> None:
    """Return when a keeper answers; it is started if there is none.

    Raises ``owner_unreachable`` with the reason when that fails, ``data_directory`` or ``disk_full``.
    """
    await ask_keeper(paths, "ping")


async def _start(paths: Paths) -> None:
    await asyncio.to_thread(_spawn, paths.ensure())


def _spawn(paths: Paths) -> None:
    """Start a keeper and return when it answers, or another one does in its place.

    The program forks itself into the background, so that it is nobody's child; what it has to say about its start
    comes through a pipe, which ends when it is up.
    """
    log = _opened_log(paths)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sandbox_gateway.keeper", os.fspath(paths.home), os.fspath(paths.runtime)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(paths),
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(log)
    try:
        said, _ = process.communicate(timeout=START_TIMEOUT)
    except subprocess.TimeoutExpired:
        # The program before its fork; what it became has the pipe too, and is not waited for.
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        message = f"the keeper did not start within {START_TIMEOUT:.0f} s"
        raise SandboxGatewayError("owner_unreachable", message, _hint(paths)) from None
    answer: object = None
    with contextlib.suppress(ValueError):
        answer = json.loads(said)
    if not isinstance(answer, dict):
        reason = _last_line(paths) or f"exit status {process.returncode}"
        raise SandboxGatewayError("owner_unreachable", f"the keeper could not start: {reason}", _hint(paths))
    if "error" in answer:
        raise SandboxGatewayError.from_dict(answer["error"])


def _opened_log(paths: Paths) -> int:
    path = keeper_log(paths)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if os.fstat(fd).st_size > LOG_LIMIT:
            os.ftruncate(fd, 0)
        return fd
    except OSError as error:
        raise storage_error(error, f"cannot write {path}") from error


def _environment(paths: Paths) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        "SANDBOX_GATEWAY_HOME": os.fspath(paths.home),
        "PYTHONUNBUFFERED": "1",
        _MARKER: os.fspath(keeper_directory(paths)),
    }


def _last_line(paths: Paths) -> str:
    try:
        with open(keeper_log(paths), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")


def _hint(paths: Paths) -> str:
    return f"The keeper's log is {keeper_log(paths)}."
