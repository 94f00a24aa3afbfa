"""``suspend``, ``resume``, ``pause``, ``fork`` and ``connect``: sandboxes that exist change, whoever owns them.

Each returns when the state is reached, and with exit status 0 only then.
"""

from __future__ import annotations

import argparse
from typing import Any

from sandbox_gateway.cli import remote_commands
from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.each import AN_ID, Meter, OnProgress, chosen, each
from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import ProgressLine, emit, write_json, write_line
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import State

MOST_CHILDREN = 1000
"""Children of one fork; more are more than any machine of today takes at once."""

_FROM = {
    "suspend": frozenset({State.RUNNING, State.PAUSED}),
    "resume": frozenset({State.SUSPENDED, State.PAUSED}),
    "pause": frozenset({State.RUNNING}),
}
"""What ``--all`` means."""
_VERBS = {"suspend": "suspending", "resume": "resuming", "pause": "pausing"}


def add(commands: Commands) -> None:
    """Add them to the parser."""
    suspend = command(
        commands,
        "suspend",
        _change,
        "save sandboxes to disk, in the middle of a cell too, and free their memory",
        "They go on from there by `resume`, or when a client runs something. "
        "Example: `jupyter sandbox suspend 3f2a --json`.",
    )
    resume = command(
        commands,
        "resume",
        _change,
        "let paused or suspended sandboxes go on",
        "One that no application owns is looked after by a keeper, a process of its own that ends with its last "
        "sandbox. Example: `jupyter sandbox resume --all`.",
    )
    pause = command(
        commands,
        "pause",
        _change,
        "freeze sandboxes; their memory is kept, and they take no processor time",
        "Example: `jupyter sandbox pause 3f2a 91bc`.",
    )
    for added, which in ((suspend, "all that run or are paused"), (resume, "all that are paused or suspended")):
        added.add_argument("ids", nargs="*", metavar="ID", help=AN_ID)
        added.add_argument("--all", action="store_true", help=which)
    pause.add_argument("ids", nargs="*", metavar="ID", help=AN_ID)
    pause.add_argument("--all", action="store_true", help="all that run")
    for added in (suspend, resume, pause):
        remote_commands.add_option(added)
    fork = command(
        commands,
        "fork",
        _fork,
        "make copies of a running or suspended sandbox, or of a snapshot",
        "Each has the variables and files of its parent, and an id and random numbers of its own; the parent goes on. "
        "With --json: a list of the ids. Example: `jupyter sandbox fork 3f2a -n 3 --json`.",
    )
    fork.add_argument("id", metavar="ID", help=f"{AN_ID}; or the id or name of a snapshot")
    fork.add_argument("-n", type=int, default=1, metavar="N", dest="count", help="how many (default: 1)")
    fork.add_argument("--name", default="", help="a label for people, as `ps` shows it")
    remote_commands.add_option(fork)
    connect = command(
        commands,
        "connect",
        _connect,
        "print the path of a connection file, for `jupyter console --existing` and other clients",
        "Example: `jupyter console --existing $(jupyter sandbox connect 3f2a)`.",
    )
    connect.add_argument("id", metavar="ID", help=AN_ID)


def _change(options: argparse.Namespace) -> int:
    if options.gateway:
        return remote_commands.change(options)
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    op: str = options.command
    paths = discover()
    ids = chosen(options, paths, lambda: actions.all_ids(paths, _FROM[op]), "--all" if options.all else "")

    async def act(sandbox_id: str, on_progress: OnProgress) -> str:
        return await actions.change(paths, sandbox_id, op, on_progress)

    return each(ids, act, _VERBS[op], options.json)


def _connect(options: argparse.Namespace) -> None:
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    paths = discover()
    sandbox_id = actions.resolve(paths, options.id).id
    path = _with_meter("connecting", sandbox_id, lambda told: actions.connect(paths, sandbox_id, told))
    if options.json:
        write_json({"id": sandbox_id, "connection_file": path})
    else:
        emit(path + "\n")


def _fork(options: argparse.Namespace) -> int:
    from sandbox_gateway.cli import actions
    from sandbox_gateway.host.paths import discover

    if not 1 <= options.count <= MOST_CHILDREN:
        raise Usage("jupyter sandbox fork", f"-n takes a number from 1 to {MOST_CHILDREN}")
    if options.gateway:
        if options.name:
            raise Usage("jupyter sandbox fork", "--name cannot be given with --gateway")
        return remote_commands.fork(options)
    paths = discover()
    outcomes: list[tuple[str, SandboxGatewayError | None]] = _with_meter(
        "forking", options.id, lambda told: actions.fork(paths, options.id, options.count, options.name, told)
    )
    made = [child for child, problem in outcomes if problem is None]
    if options.json:
        write_json(made)
    for child in made if not options.json else ():
        write_line(child)
    status = 0
    for _, problem in outcomes:
        if problem is not None:
            status = fail(problem, options.json)
    return status


def _with_meter(verb: str, sandbox_id: str, act: Any) -> Any:
    import asyncio

    with ProgressLine() as line:
        meter = Meter(line, verb)
        meter.begin(sandbox_id)
        return asyncio.run(act(lambda progress: meter.update(sandbox_id, progress)))
