"""``ps``, ``logs``, ``stop`` and ``rm``: the sandboxes that exist, whoever started them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import (
    ProgressLine,
    age,
    clean,
    clean_log,
    emit,
    size,
    write_json,
    write_line,
    write_table,
)
from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.cli.actions import Seen
    from sandbox_gateway.host.paths import Paths

_AN_ID = "a sandbox's id (the kernel's), or an unambiguous beginning of it"


def add(commands: Commands) -> None:
    """Add them to the parser."""
    ps = command(commands, "ps", _ps, "list the sandboxes")
    ps.add_argument("-a", "--all", action="store_true", help="those that have ended too, with the reason")
    logs = command(commands, "logs", _logs, "show what a kernel wrote to its raw stdout and stderr")
    logs.add_argument("id", metavar="ID", help=_AN_ID)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the sandbox ends")
    stop = command(
        commands, "stop", _stop, "end sandboxes; their records stay for `ps --all`", "Asks the process that owns it."
    )
    stop.add_argument("ids", nargs="*", metavar="ID", help=_AN_ID)
    stop.add_argument("--all", action="store_true", help="all that have not ended")
    rm = command(commands, "rm", _rm, "end sandboxes and forget them and their logs")
    rm.add_argument("ids", nargs="*", metavar="ID", help=_AN_ID)
    rm.add_argument("--all", action="store_true", help="all sandboxes, running ones included")
    rm.add_argument("--ended", action="store_true", help="all that have ended")


def _ps(options: argparse.Namespace) -> None:
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    found = actions.seen(discover(), everything=options.all)
    if options.json:
        write_json([sandbox.as_dict() for sandbox in found])
        return
    short = _short_ids([sandbox.record.id for sandbox in found])
    headings = ("ID", "STATE", "PROFILE", "RUNTIME", "SINCE", "MEMORY", "OWNER", "NAME", "REASON")
    write_table(headings, [_row(sandbox, short[sandbox.record.id]) for sandbox in found])


def _row(sandbox: Seen, short: str) -> Sequence[str]:
    from sandbox_gateway.cli.actions import ENDED, NOT_ISOLATED

    record = sandbox.record
    ended = sandbox.state in ENDED
    owner = (
        "" if ended else str(sandbox.owner_pid) if sandbox.owner_pid is not None else f"none ({record.on_owner_exit})"
    )
    return (
        short,
        str(sandbox.state),
        record.profile,
        f"{record.runtime} (not isolated)" if record.runtime in NOT_ISOLATED else record.runtime,
        age(record.changed),
        size(sandbox.memory),
        owner,
        record.name,
        sandbox.death.describe() if sandbox.death is not None else "",
    )


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
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.model import LIVE

    paths = discover()
    chosen = _chosen(options, paths, lambda: actions.all_ids(paths, LIVE), "--all" if options.all else "")
    return _each(chosen, lambda sandbox_id: actions.stop(paths, sandbox_id), "stopping", options.json)


def _rm(options: argparse.Namespace) -> int:
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.model import State

    paths = discover()
    if options.all and options.ended:
        raise Usage("jupyter sandbox rm", "--all and --ended cannot be given together")
    states = actions.ENDED if options.ended else frozenset(State)
    by_option = "--all" if options.all else "--ended" if options.ended else ""
    chosen = _chosen(options, paths, lambda: actions.all_ids(paths, states), by_option)
    return _each(chosen, lambda sandbox_id: actions.remove(paths, sandbox_id), "removing", options.json)


def _chosen(
    options: argparse.Namespace, paths: Paths, many: Callable[[], list[str]], by_option: str
) -> list[str | SandboxGatewayError]:
    """Full ids of what was asked for, and in their places the errors of what there is not."""
    from sandbox_gateway.cli import actions

    if bool(options.ids) == bool(by_option):
        what = (
            f"{by_option} and ids cannot be given together"
            if by_option
            else "name sandboxes by their ids, or give --all"
        )
        raise Usage(f"jupyter sandbox {options.command}", what)
    if by_option:
        return list(many())
    found: dict[str, str | SandboxGatewayError] = {}
    for prefix in options.ids:
        try:
            sandbox_id = actions.resolve(paths, prefix).id
            found[sandbox_id] = sandbox_id
        except SandboxGatewayError as error:
            found[f"{prefix}?"] = error
    return list(found.values())


def _each(
    chosen: list[str | SandboxGatewayError], act: Callable[[str], Awaitable[str]], verb: str, as_json: bool
) -> int:
    """Do it to every one, whatever becomes of the others; 1 when any failed."""
    import asyncio

    outcomes: list[tuple[str, str | SandboxGatewayError]] = []

    async def one(item: str | SandboxGatewayError, progress: ProgressLine, room: asyncio.Semaphore) -> None:
        if isinstance(item, SandboxGatewayError):
            outcomes.append(("", item))
            return
        async with room:
            progress.update(f"{verb} {item}")
            try:
                outcomes.append((item, await act(item)))
            except SandboxGatewayError as error:
                outcomes.append((item, error))

    async def everything() -> None:
        room = asyncio.Semaphore(8)
        with ProgressLine() as progress:
            await asyncio.gather(*(one(item, progress, room) for item in chosen))

    asyncio.run(everything())
    status = 0
    done = [(sandbox_id, result) for sandbox_id, result in outcomes if not isinstance(result, SandboxGatewayError)]
    if as_json:
        write_json([{"id": sandbox_id, "state": state} for sandbox_id, state in done])
    for sandbox_id, state in done if not as_json else ():
        write_line(f"{clean(sandbox_id)} {state}")
    for _, result in outcomes:
        if isinstance(result, SandboxGatewayError):
            status = fail(result, as_json)
    return status
