"""Calling the runsc binary: one call, one result; an error carries the end of what it said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_gateway.errors import SandboxGatewayError, program_error

TIMEOUT = 60.0
"""Seconds after which a call is given up; the longest ordinary one takes a few tenths."""

SIDECARS = "gvisor-bin"
"""The folder beside a release's runsc with the programs that it starts instead of itself."""

_SIDECARS_ELSEWHERE = "GVISOR_SIDECAR_BINARIES_DIR"
"""Variable that tells runsc another such folder (gVisor's ``runsc/gvisorbinaries/gvisorbinaries.go``)."""

_OUTPUT = 1 << 20
"""Characters that are kept of what a call prints."""
_STACK = re.compile(r"^goroutine \d+ \[", re.MULTILINE)
_VALUES = re.compile(r"&?[\w.]*\{.*\}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished call left."""

    code: int
    output: str
    error: str

    @property
    def reason(self) -> str:
        """The last line that says something, for people."""
        return last_line(self.error) or last_line(self.output) or f"exit status {self.code}"


def last_line(text: str) -> str:
    """The last non-empty line, shortened; of a program in Go that panicked, the last one before its stack.

    Values that Go prints of its own data are left out: they may be what is in a sandbox's memory.
    """
    said = _STACK.split(text, maxsplit=1)[0]
    lines = [line.strip() for line in (said if said.strip() else text).splitlines() if line.strip()]
    return _VALUES.sub("{...}", lines[-1])[-500:].rstrip(": ") if lines else ""


def environment() -> dict[str, str]:
    """The environment of runsc and of what it starts: nothing of ours but where programs are."""
    return {"PATH": os.environ.get("PATH") or os.defpath, "LANG": "C.UTF-8"}


def _everybody_reaches(folder: Path) -> bool:
    """Whether any user may run what is there; so may we, where sandboxes are of our own user."""
    if os.geteuid() != 0:
        return True
    try:
        way = (*folder.iterdir(), folder, *folder.resolve().parents)
        return all(path.stat().st_mode & stat.S_IXOTH for path in way)
    except OSError:
        return False


async def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    timeout: float = TIMEOUT,
    pass_fds: Sequence[int] = (),
) -> Outcome:
    """Run a short command to its end, without a shell; ends it when the caller is cancelled.

    Raises ``runtime_missing`` when there is no such program and ``timeout`` when it does not end.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(str(word) for word in argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(env) if env is not None else environment(),
            start_new_session=True,
            pass_fds=pass_fds,
        )
    except OSError as error:
        raise SandboxGatewayError("runtime_missing", f"{argv[0]} cannot be run: {error.strerror}") from error
    try:
        output, errors = await asyncio.wait_for(process.communicate(stdin), timeout)
    except TimeoutError as error:
        raise SandboxGatewayError("timeout", f"{Path(argv[0]).name} did not end within {timeout:.0f} s") from error
    finally:
        await _end(process)
    return Outcome(
        process.returncode or 0,
        output.decode("utf-8", "replace")[-_OUTPUT:],
        errors.decode("utf-8", "replace")[-_OUTPUT:],
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Runsc:
    """The binary with the flags that all its calls share."""

    def __init__(self, binary: Path, root: Path) -> None:
        self.binary = binary
        self.root = root
        """``--root``: where runsc keeps its state."""

    def environment(self) -> dict[str, str]:
        """The environment of a call that starts a sandbox.

        gVisor starts a sidecar by its path when it already is the user that the sandbox will be, as root mostly
        nobody. What that user cannot reach (an installation below a private home) is left aside: runsc then starts
        itself, by a way that needs no path.
        """
        # Where runsc looks, in its order: beside its name, then beside the file of that name.
        beside = [place / SIDECARS for place in (self.binary.parent, self.binary.resolve().parent)]
        found = next((folder for folder in beside if folder.is_dir()), None)
        aside = {} if found is None or _everybody_reaches(found) else {_SIDECARS_ELSEWHERE: os.devnull}
        return {**environment(), **aside}

    def argv(self, flags: Sequence[str], *command: str | Path) -> list[str]:
        """The full command line of one call."""
        return [str(self.binary), f"--root={self.root}", *flags, *(str(word) for word in command)]

    async def call(self, flags: Sequence[str], *command: str | Path, timeout: float = TIMEOUT) -> str:
        """Run a command that must succeed; return what it printed. Raises ``runtime_failed`` with its reason."""
        outcome = await run(self.argv(flags, *command), timeout=timeout)
        if outcome.code != 0:
            raise program_error("runtime_failed", f"runsc {command[0]}: {outcome.reason}")
        return outcome.output
