"""``token add``, ``ls`` and ``rm``: the users of a gateway that serves more than one."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.failures import Usage
from sandbox_gateway.cli.output import age, size, write_json, write_line, write_table
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import timestamp

if TYPE_CHECKING:
    from sandbox_gateway.quotas import Quota
    from sandbox_gateway.tokens import Token, TokenFile

PROGRAM = "jupyter sandbox token"
_DURATION = re.compile(r"(?:[0-9]{1,9}[dhms])+")


def add(commands: Commands) -> None:
    """Add ``token`` and its commands to the parser."""
    token = commands.add_parser(
        "token",
        help="make, list and revoke tokens of a gateway's users",
        description="Users of a gateway, each with tokens of his own, in a file of hashes.",
    )
    parts = token.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(token))
    make = command(
        parts,
        "add",
        _add,
        "make a token for a user",
        "It is written to stdout once and kept as a hash only. A user may have several tokens; a running gateway knows"
        " a new one at once.",
    )
    make.add_argument("name", metavar="NAME", help="the user, who owns what is made with the token")
    make.add_argument("--admin", action="store_true", help="an administrator: sees and ends everybody's sandboxes")
    make.add_argument("--group", action="append", default=[], metavar="G", help="a group of the user; may be repeated")
    make.add_argument("--expires", default="never", metavar="TIME", help="when it ends: 30d, 12h or never (default)")
    make.add_argument(
        "--quota",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the user may have, in place of the gateway's default: live, suspended, memory, disk, gpus or"
        " creates_per_minute; several with commas; `none` for no limits",
    )
    make.add_argument("--label", default="", metavar="TEXT", help="for people: what it is for")
    listed = command(parts, "ls", _ls, "list the tokens")
    rm = command(
        parts,
        "rm",
        _rm,
        "revoke tokens",
        "A running gateway refuses them, and the browsers that logged in with them, from the next request on.",
    )
    rm.add_argument("names", nargs="+", metavar="NAME|ID", help="a token's id, or a user: all of his tokens")
    for part in (make, listed, rm):
        part.add_argument("--file", metavar="PATH", help="another file than tokens.jsonl in the data directory")


def _file(options: argparse.Namespace, *, make: bool = False) -> TokenFile:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.tokens import FILE_NAME, TokenFile

    if options.file is not None:
        return TokenFile(Path(options.file).absolute())
    paths = discover()
    return TokenFile((paths.ensure() if make else paths).home / FILE_NAME)


def _add(options: argparse.Namespace) -> None:
    now = time.time()
    quota, expires = _quota(options.quota), _end(options.expires, now)
    token, secret = _file(options, make=True).add(
        options.name,
        now,
        groups=options.group,
        admin=options.admin,
        quota=quota,
        expires=expires,
        label=options.label,
    )
    if options.json:
        write_json({**_shown(token), "token": secret})
        return
    write_line(secret)
    if sys.stderr.isatty():
        sys.stderr.write(f"A token of {token.name}, shown this once. `{PROGRAM} rm {token.id}` revokes it.\n")


def _ls(options: argparse.Namespace) -> None:
    tokens = _file(options).read()[0].tokens
    if options.json:
        write_json([_shown(token) for token in tokens])
        return
    now = time.time()
    rows = [
        (
            token.id,
            token.name,
            "admin" if token.admin else "",
            ",".join(token.groups),
            "" if token.quota is None else _quota_text(token.quota),
            age(token.created),
            "never" if token.expires is None else "expired" if token.expired(now) else timestamp(token.expires),
            token.label,
        )
        for token in tokens
    ]
    write_table(("ID", "NAME", "RIGHTS", "GROUPS", "QUOTA", "AGE", "EXPIRES", "LABEL"), rows)


def _rm(options: argparse.Namespace) -> int:
    from sandbox_gateway.cli.failures import fail

    file = _file(options)
    removed: list[Token] = []
    status = 0
    for name in dict.fromkeys(options.names):
        found = file.remove(name) if file.signature() is not None else ()
        if not found:
            error = SandboxGatewayError(
                "invalid_request", f"no token and no user {name}", f"`{PROGRAM} ls` lists the tokens."
            )
            status = fail(error, options.json)
        removed += found
    if options.json:
        write_json([_shown(token) for token in removed])
    else:
        for token in removed:
            write_line(f"revoked {token.id} of {token.name}")
    return status


def _shown(token: Token) -> dict[str, object]:
    end = None if token.expires is None else timestamp(token.expires)
    return {**token.public_dict(), "created": timestamp(token.created), "expires": end}


def _quota(given: list[str]) -> Quota | None:
    from sandbox_gateway.quotas import UNLIMITED, Quota

    if not given:
        return None
    if given == ["none"]:
        return UNLIMITED
    table = {}
    for part in ",".join(given).split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise Usage(f"{PROGRAM} add", f"--quota {part}: give KEY=VALUE, for example live=4,memory=16GiB")
        table[key.strip()] = value.strip()
    return Quota.read(table)


def _quota_text(quota: Quota) -> str:
    parts = quota.as_dict()
    return " ".join(f"{key}={_amount(key, value)}" for key, value in parts.items()) or "none"


def _amount(key: str, value: int) -> str:
    return size(value).replace(" ", "") if key in {"memory", "disk"} else str(value)


def _end(given: str, now: float) -> float | None:
    from sandbox_gateway.profiles.values import duration

    if given != "never" and not _DURATION.fullmatch(given):
        raise Usage(f"{PROGRAM} add", f"--expires {given}: give a duration such as 30d, 12h or 1d12h, or never")
    seconds = duration(given)
    return None if seconds is None else now + seconds
