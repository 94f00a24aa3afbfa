"""What the commands do on a gateway instead of this machine (``--gateway URL``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox_gateway.cli.each import each
from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import ProgressLine, clean, write_json, write_line, write_table
from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.remote.address import Address
    from sandbox_gateway.remote.client import GatewayClient, RemoteSandbox

_FROM = {
    "suspend": frozenset({"running", "paused"}),
    "resume": frozenset({"suspended", "paused"}),
    "pause": frozenset({"running"}),
}
_VERBS = {"suspend": "suspending", "resume": "resuming", "pause": "pausing", "stop": "stopping"}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--gateway`` to a command that works on either side."""
    parser.add_argument("--gateway", metavar="URL", default="", help="ask this gateway, not this machine")


def connected(options: argparse.Namespace) -> GatewayClient:
    """The client of the gateway that is asked for; made on the loop that uses it."""
    from sandbox_gateway.remote import credentials
    from sandbox_gateway.remote.client import GatewayClient

    address = credentials.known(options.gateway)
    return GatewayClient(address, credentials.token(address))


def ps(options: argparse.Namespace) -> None:
    """List the caller's sandboxes there."""

    async def work(client: GatewayClient) -> tuple[RemoteSandbox, ...]:
        return await client.sandboxes(everything=options.all)

    found = _run(options, work)
    if options.json:
        write_json([dict(sandbox.data) for sandbox in found])
        return
    headings = ("ID", "STATE", "PROFILE", "OWNER", "NAME", "REASON")
    rows = [(one.id[:8], one.state, one.profile, one.owner, one.name, one.reason) for one in found]
    write_table(headings, rows)


def change(options: argparse.Namespace) -> int:
    """Suspend, resume, pause or stop some of them."""
    op: str = options.command
    if bool(options.ids) == bool(options.all):
        what = "--all and ids cannot be given together" if options.all else "name sandboxes by their ids, or give --all"
        raise Usage(f"jupyter sandbox {op}", what)

    async def choose(client: GatewayClient) -> list[str | SandboxGatewayError]:
        if options.all:
            return [one.id for one in await client.sandboxes() if op not in _FROM or one.state in _FROM[op]]
        chosen: dict[str, str | SandboxGatewayError] = {}
        for prefix in options.ids:
            try:
                found = (await client.find(prefix)).id
                chosen[found] = found
            except SandboxGatewayError as error:
                chosen[f"{prefix}?"] = error
        return list(chosen.values())

    async def act(sandbox_id: str, _: Any) -> str:
        async with connected(options) as client:
            if op == "stop":
                await client.delete(sandbox_id)
                return "terminated"
            changing: RemoteSandbox = await getattr(client, op)(sandbox_id)
            return changing.state

    return each(_run(options, choose), act, _VERBS[op], options.json)


def fork(options: argparse.Namespace) -> int:
    """Make copies of one of them."""

    async def work(client: GatewayClient) -> list[RemoteSandbox | SandboxGatewayError]:
        source = await client.find(options.id)
        return list(await client.fork(source.id, options.count))

    with ProgressLine() as line:
        line.update(f"forking {options.id[:8]}")
        outcomes = _run(options, work)
    made = [one.id for one in outcomes if not isinstance(one, SandboxGatewayError)]
    if options.json:
        write_json(made)
    for child in made if not options.json else ():
        write_line(child)
    status = 0
    for one in outcomes:
        if isinstance(one, SandboxGatewayError):
            status = fail(one, options.json)
    return status


def install(options: argparse.Namespace, directory: Path) -> int | None:
    """Write kernelspecs for the gateway's profiles, and keep the token."""
    from sandbox_gateway import kernelspecs
    from sandbox_gateway.remote import credentials
    from sandbox_gateway.remote.address import parse
    from sandbox_gateway.remote.client import GatewayClient
    from sandbox_gateway.remote.kernelspecs import kernel_json, name_of, variables_of

    certificates = options.ca_file
    address = (
        parse(options.gateway, str(certificates.absolute())) if certificates else credentials.known(options.gateway)
    )
    given = _given_token(options, address)
    token = given or credentials.token(address)

    async def ask() -> Any:
        async with GatewayClient(address, token) as client:
            return await client.profiles()

    import asyncio

    offered = {profile.name: profile for profile in asyncio.run(ask())}
    if options.list:
        if options.json:
            write_json([{"name": one.name, "display_name": one.display_name} for one in offered.values()])
        else:
            rows = [(one.name, one.display_name, one.description) for one in offered.values()]
            write_table(("PROFILE", "SHOWN AS", "OPENS"), rows)
        return None
    unknown = [name for name in options.profiles if name not in offered]
    if unknown:
        text = f"{address.place} offers no profile {', '.join(map(repr, unknown))}"
        raise SandboxGatewayError("unknown_profile", text, f"It offers: {', '.join(offered) or 'none'}.")
    if given or address.ca_file:
        credentials.keep(address, token)
    chosen = [offered[name] for name in dict.fromkeys(options.profiles or offered)]
    changes = [kernelspecs.put(name_of(one, address), kernel_json(one, address), directory) for one in chosen]
    if options.json:
        write_json([change.as_dict() for change in changes])
    else:
        for change in changes:
            write_line(f"{change.action} {change.name} in {change.path.parent}")
        if not changes:
            write_line("nothing to do")
    variables = sorted({name for one in chosen for name in variables_of(one)})
    if variables:
        _note(f"kernels there get these variables of your applications, if set: {', '.join(variables)}, KERNEL_*")
    if not address.private:
        _note(f"{address.url} is not encrypted: the token and all code and output can be read on the way")
    return None


def _given_token(options: argparse.Namespace, address: Address) -> str:
    if options.token_file is not None and options.token:
        raise Usage("jupyter sandbox install", "--token and --token-file cannot be given together")
    if options.token_file is not None:
        try:
            text = sys.stdin.read() if str(options.token_file) == "-" else options.token_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise SandboxGatewayError("invalid_request", f"cannot read {options.token_file}: {why}") from error
    elif options.token:
        import getpass

        text = getpass.getpass(f"Token for {address.place}: ")
    else:
        return ""
    if not (token := text.strip()) or any(character.isspace() for character in token):
        raise SandboxGatewayError("invalid_request", "that is no token", "It is one word.")
    return token


def _note(text: str) -> None:
    sys.stderr.write(f"note: {clean(text)}\n")


def _run(options: argparse.Namespace, work: Callable[[GatewayClient], Awaitable[Any]]) -> Any:
    import asyncio

    async def whole() -> Any:
        async with connected(options) as client:
            return await work(client)

    return asyncio.run(whole())
