"""The fixtures of the command line's tests."""

from __future__ import annotations

from cli_harness import owner, paths, program, run, store

__all__ = ["owner", "paths", "program", "run", "store"]
