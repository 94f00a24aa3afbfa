"""Pieces of the parser that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Commands = Any
"""What ``ArgumentParser.add_subparsers`` returns; argparse keeps its class private."""
Run = Callable[[argparse.Namespace], int | None]
"""Carries a command out; returns its exit status (None: 0)."""


def command(commands: Commands, name: str, run: Run, summary: str, more: str = "") -> argparse.ArgumentParser:
    """Add a command with ``--json``; ``summary`` is one line of the list of commands."""
    description = f"{summary[0].upper()}{summary[1:]}. {more}".strip()
    added: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    added.add_argument("--json", action="store_true", help="write JSON to stdout, for programs")
    added.set_defaults(run=run, command=name)
    return added
