"""The entry point: the parser, and how every command ends (exit status, errors, Ctrl-C, a closed pipe).

Exit status: 0 done, 1 an error (one line ``error: ...`` and one ``hint: ...`` on stderr; with ``--json`` an object
``{"error": {...}}`` there), 2 wrong usage, 130 interrupted, 141 nobody reads our output.
``SANDBOX_GATEWAY_DEBUG=1`` adds logs and tracebacks.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sandbox_gateway import SandboxGatewayError, __version__
from sandbox_gateway.cli import (
    event_commands,
    host_commands,
    image_commands,
    kernelspec_commands,
    prune_command,
    sandbox_commands,
    serve_command,
    snapshot_commands,
    state_commands,
    template_commands,
    token_commands,
)
from sandbox_gateway.cli.failures import DEBUG, Usage, explained, fail, fail_usage

PROGRAM = "jupyter sandbox"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _log_quietly()
    _write_anything()
    try:
        status = _run(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more (`| head`): the rest goes nowhere, and the interpreter must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _run(given: list[str]) -> int:
    if given[:1] == ["serve"]:
        return serve_command.serve(given[1:])
    as_json = "--json" in given
    try:
        options = parser().parse_args(given)
        status: int | None = options.run(options)
        return status or 0
    except Usage as error:
        return fail_usage(error, as_json)
    except SandboxGatewayError as error:
        return fail(error, as_json)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        return fail(explained(error), as_json)


class _Parser(argparse.ArgumentParser):
    """Errors come out as ours, at the end of :func:`main`."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise Usage(self.prog, message)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog=PROGRAM,
        description="Jupyter kernels in sandboxes: set up, offer as kernelspecs, watch, suspend, fork and end.",
        epilog="Everything is stored below SANDBOX_GATEWAY_HOME (default: ~/.local/share/sandbox_gateway).",
    )
    top.add_argument("--version", action="version", version=f"sandbox_gateway {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    about_sandboxes = (sandbox_commands, state_commands, event_commands, snapshot_commands, prune_command)
    for part in (
        host_commands,
        serve_command,
        kernelspec_commands,
        image_commands,
        template_commands,
        *about_sandboxes,
        token_commands,
    ):
        part.add(commands)
    return top


def _log_quietly() -> None:
    if os.environ.get(DEBUG):
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    else:
        logging.getLogger("sandbox_gateway").addHandler(logging.NullHandler())


def _write_anything() -> None:
    """A character that the locale cannot write is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
