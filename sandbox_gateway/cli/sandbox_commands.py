"""``ps``, ``logs``, ``stop`` and ``rm``: the sandboxes that exist, whoever started them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli import remote_commands
from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.each import AN_ID, chosen, each
from sandbox_gateway.cli.failures import Usage
from sandbox_gateway.cli.output import (
    age,
    clean_log,
    emit,
    size,
    write_json,
    write_table,
)

if TYPE_CHECKING:
    from sandbox_gateway.cli.actions import Seen
    from sandbox_gateway.host.paths import Paths


def add(commands: Commands) -> None:
    """Add them to the parser."""
    ps = command(commands, "ps", _ps, "list the sandboxes")
    ps.add_argument("-a", "--all", action="store_true", help="those that have ended too, with the reason")
    remote_commands.add_option(ps)
    logs = command(commands, "logs", _logs, "show what a kernel wrote to its raw stdout and stderr")
    logs.add_argument("id", metavar="ID", help=AN_ID)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the sandbox ends")
    stop = command(
        commands, "stop", _stop, "end sandboxes; their records stay for `ps --all`", "Asks the process that owns it."
    )
    stop.add_argument("ids", nargs="*", metavar="ID", help=AN_ID)
    stop.add_argument("--all", action="store_true", help="all that have not ended")
    remote_commands.add_option(stop)
    rm = command(commands, "rm", _rm, "end sandboxes and forget them and their logs")
    rm.add_argument("ids", nargs="*", metavar="ID", help=AN_ID)
    rm.add_argument("--all", action="store_true", help="all sandboxes, running ones included")
    rm.add_argument("--ended", action="store_true", help="all that have ended")


def _ps(options: argparse.Namespace) -> None:
    if options.gateway:
        remote_commands.ps(options)
        return
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    found = actions.seen(discover(), everything=options.all)
    if options.json:
        write_json([sandbox.as_dict() for sandbox in found])
        return
    short = _short_ids([sandbox.record.id for sandbox in found])
    headings = ("ID", "STATE", "PROFILE", "RUNTIME", "SINCE", "MEMORY", "DISK", "OWNER", "NAME", "REASON")
    write_table(headings, [_row(sandbox, short[sandbox.record.id]) for sandbox in found])


def _row(sandbox: Seen, short: str) -> Sequence[str]:
    from sandbox_gateway.model import NOT_ISOLATED

    record = sandbox.record
    return (
        short,
        str(sandbox.state),
        record.profile,
        f"{record.runtime} (not isolated)" if record.runtime in NOT_ISOLATED else record.runtime,
        age(record.changed),
        size(sandbox.memory),
        size(sandbox.disk),
        _owner(sandbox),
        record.name,
        sandbox.death.describe() if sandbox.death is not None else "",
    )


def _owner(sandbox: Seen) -> str:
    from sandbox_gateway.cli.actions import ENDED
    from sandbox_gateway.model import State

    if sandbox.owner_pid is not None:
        return f"{sandbox.owner_pid} (keeper)" if sandbox.kept else str(sandbox.owner_pid)
    if sandbox.state in ENDED:
        return ""
    # What is suspended needs no owner, and waits for one as long as it takes.
    return "none" if sandbox.state is State.SUSPENDED else f"none ({sandbox.record.on_owner_exit})"


def _short_ids(ids: Sequence[str]) -> dict[str, str]:
    """The shortest beginnings, of at least 8 characters, that tell the shown ids apart."""
    length = 8
    while len({sandbox_id[:length] for sandbox_id in ids}) < len(ids):
        length += 1
    return {sandbox_id: sandbox_id[:length] for sandbox_id in ids}


def _logs(options: argparse.Namespace) -> None:
    import asyncio

    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    paths = discover()
    record = actions.resolve(paths, options.id)
    if options.follow:
        asyncio.run(_follow(paths, record, options.json))
        return
    text = asyncio.run(actions.log(paths, record))
    if options.json:
        write_json({"id": record.id, "log": text})
    else:
        _write_log(text)
        if not text:
            sys.stderr.write("note: nothing was written, or nothing was kept\n")


async def _follow(paths: Paths, record: Any, as_json: bool) -> None:
    import json

    from sandbox_gateway.cli import actions

    async for text in actions.follow(paths, record):
        if as_json:
            sys.stdout.write(json.dumps({"id": record.id, "log": text}) + "\n")
        else:
            _write_log(text)
        sys.stdout.flush()


def _write_log(text: str) -> None:
    # What a kernel writes is hostile: a terminal gets it without what could drive it, a file or pipe gets it whole.
    emit(clean_log(text) if sys.stdout.isatty() else text)


def _stop(options: argparse.Namespace) -> int:
    if options.gateway:
        return remote_commands.change(options)
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.model import LIVE, State

    paths = discover()
    alive = LIVE | {State.SUSPENDED}
    ids = chosen(options, paths, lambda: actions.all_ids(paths, alive), "--all" if options.all else "")
    return each(ids, lambda sandbox_id, _: actions.stop(paths, sandbox_id), "stopping", options.json)


def _rm(options: argparse.Namespace) -> int:
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.model import State

    paths = discover()
    if options.all and options.ended:
        raise Usage("jupyter sandbox rm", "--all and --ended cannot be given together")
    states = actions.ENDED if options.ended else frozenset(State)
    by_option = "--all" if options.all else "--ended" if options.ended else ""
    ids = chosen(options, paths, lambda: actions.all_ids(paths, states), by_option)
    return each(ids, lambda sandbox_id, _: actions.remove(paths, sandbox_id), "removing", options.json)
