"""``python -m sandbox_gateway.keeper HOME RUNTIME``: started by :func:`sandbox_gateway.keeper.ensure_keeper`.

Forks itself into the background. On standard output comes one JSON object, ``{"pid": ...}`` (another process's, where
that is the keeper already) or ``{"error": {...}}``; then it is closed, and the log takes its place.
"""

from __future__ import annotations

import json
import os
import sys


def main(arguments: list[str]) -> int:
    """Become the keeper of the installation in ``arguments`` (home, runtime directory); returns the exit status."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m sandbox_gateway.keeper HOME RUNTIME\n")
        return 2
    # Before anything else is imported: one thread, little memory, and whoever started us has its child back at once.
    if os.fork() > 0:
        os._exit(0)
    from sandbox_gateway.keeper.process import keep

    return keep(arguments[0], arguments[1], _say)


def _say(answer: object) -> None:
    """The one answer to the starter; standard output is the log from then on."""
    try:
        sys.stdout.write(json.dumps(answer))
        sys.stdout.flush()
    except OSError:
        pass  # it did not wait
    os.dup2(2, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
