"""``events``: what happened to the sandboxes, when and why."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.output import clean, write_json
from sandbox_gateway.model import timestamp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandbox_gateway.events import Event
    from sandbox_gateway.host.paths import Paths

INTERVAL: Final = 0.5
"""Seconds between two looks of ``--follow``."""
SHOWN: Final = 200
"""Events that are shown of all sandboxes together unless more are asked for."""


def add(commands: Commands) -> None:
    """Add it to the parser."""
    events = command(
        commands,
        "events",
        _events,
        "show what happened to the sandboxes",
        "The newest 1000 events of each sandbox are kept until it is removed.",
    )
    events.add_argument("id", metavar="ID", nargs="?", help="only one sandbox's: its id, or a beginning of it")
    events.add_argument("-f", "--follow", action="store_true", help="go on with what happens from now on")
    events.add_argument(
        "-n", "--limit", type=_count, default=SHOWN, metavar="N", help=f"show the newest N only; default: {SHOWN}"
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("a number from 0 on is expected")
    return number


def _events(options: argparse.Namespace) -> None:
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    paths = discover()
    sandbox_id = actions.resolve(paths, options.id).id if options.id is not None else None
    if options.follow:
        for batch in follow(paths, sandbox_id, options.limit):
            _write(batch, lines=True, as_json=options.json)
            sys.stdout.flush()
    else:
        with actions.opened(paths) as store:
            found = () if store is None else store.events(sandbox_id, limit=options.limit)
        _write(found, lines=False, as_json=options.json)


def follow(paths: Paths, sandbox_id: str | None, limit: int) -> Iterator[Sequence[Event]]:
    """Batches of events as they come: the newest ``limit`` that there are, then all others.

    Ends when the one sandbox that is followed has ended or is removed.
    """
    from sandbox_gateway.cli import actions

    since = 0
    first = True
    while True:
        with actions.opened(paths) as store:
            ended = sandbox_id is not None and (store is None or _has_ended(store, sandbox_id))
            found = () if store is None else store.events(sandbox_id, since=since)
        since = found[-1].id if found else since
        shown = found[max(0, len(found) - limit) :] if first else found
        if shown:
            yield shown
        if ended:
            return
        first = False
        time.sleep(INTERVAL)


def _has_ended(store: Any, sandbox_id: str) -> bool:
    from sandbox_gateway.cli.actions import ENDED
    from sandbox_gateway.errors import SandboxGatewayError

    try:
        return store.get(sandbox_id).state in ENDED
    except SandboxGatewayError as error:
        if error.code != "unknown_sandbox":
            raise
        return True


def _write(events: Sequence[Event], *, lines: bool, as_json: bool) -> None:
    told = [{**event.as_dict(), "time": timestamp(event.time)} for event in events]
    if as_json and not lines:
        write_json(told)
    elif as_json:
        for item in told:
            sys.stdout.write(json.dumps(item) + "\n")
    else:
        for event in events:
            # Not a table: lines that come later cannot widen a column.
            line = f"{timestamp(event.time)}  {event.sandbox[:8] or '-':8}  {event.kind!s:14}  {event.text}"
            sys.stdout.write(clean(line.rstrip()) + "\n")
