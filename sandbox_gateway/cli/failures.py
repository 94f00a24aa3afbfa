"""How errors reach people and programs."""

from __future__ import annotations

import errno
import logging
import os
import sys

from sandbox_gateway.cli.output import clean, write_json
from sandbox_gateway.errors import SandboxGatewayError

DEBUG = "SANDBOX_GATEWAY_DEBUG"
"""Set and not empty: logs and tracebacks on stderr."""


class Usage(Exception):
    """The command line is wrong."""

    def __init__(self, program: str, message: str) -> None:
        super().__init__(message)
        self.program = program


def fail(error: SandboxGatewayError, as_json: bool) -> int:
    """Show ``error`` on stderr, one ``error:`` line for each of its own; returns the exit status 1."""
    if os.environ.get(DEBUG):
        logging.getLogger(__name__).debug("%s", error.code, exc_info=error)
    if as_json:
        write_json({"error": error.as_dict()}, sys.stderr)
        return 1
    for line in error.message.splitlines() or [error.code]:
        sys.stderr.write(f"error: {clean(line)}\n")
    if error.hint:
        sys.stderr.write(f"hint: {clean(error.hint)}\n")
    return 1


def fail_usage(error: Usage, as_json: bool) -> int:
    """Show what is wrong with the command line; returns the exit status 2."""
    hint = f"`{error.program} --help` shows how it is used."
    if as_json:
        write_json({"error": {"code": "usage", "message": str(error), "hint": hint}}, sys.stderr)
    else:
        sys.stderr.write(f"error: {clean(str(error))}\nhint: {hint}\n")
    return 2


def explained(error: Exception) -> SandboxGatewayError:
    """An error that no part of ours foresaw, in our own form."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return SandboxGatewayError("disk_full", text)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return SandboxGatewayError("data_directory", text)
    else:
        text = f"{type(error).__name__}: {error}"
    hint = f"Run it again with {DEBUG}=1 to see where; if it is a bug, please report it with that."
    return SandboxGatewayError("internal", text, hint)
