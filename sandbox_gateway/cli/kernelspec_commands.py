"""``install`` and ``uninstall``: the kernelspecs of profiles."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_gateway.cli import remote_commands, template_commands
from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.failures import Usage
from sandbox_gateway.cli.output import write_json, write_line, write_table
from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.kernelspecs import Change, Installed
    from sandbox_gateway.profiles import Profiles


def add(commands: Commands) -> None:
    """Add both to the parser."""
    install = command(
        commands,
        "install",
        _install,
        "install kernelspecs, so that Jupyter offers the profiles",
        "Without names: the two built-in profiles and all of the profile file.",
    )
    install.add_argument("profiles", nargs="*", metavar="PROFILE", help="a profile's name")
    install.add_argument(
        "--list", action="store_true", help="show the profiles and where they are installed; do nothing"
    )
    install.add_argument(
        "--no-templates", action="store_true", help="do not build templates now: the first kernels then start cold"
    )
    _add_gateway(install)
    _add_places(install, "default: this environment when it is a venv or conda's, else the user's")
    uninstall = command(
        commands,
        "uninstall",
        _uninstall,
        "remove kernelspecs of ours",
        "Without names: all of them. Kernelspecs of others are never touched, nor are profiles.",
    )
    uninstall.add_argument("profiles", nargs="*", metavar="PROFILE", help="a kernelspec's name")
    uninstall.add_argument("--gateway", metavar="URL", default="", help="only those of this gateway")
    _add_places(uninstall, "default: everywhere Jupyter looks")


def _add_gateway(install: argparse.ArgumentParser) -> None:
    group = install.add_argument_group("a gateway's profiles, for applications on this machine")
    group.add_argument("--gateway", metavar="URL", default="", help="for example https://gateway.example.org:8888")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="where its token is; - for standard input")
    group.add_argument("--token", action="store_true", help="ask for its token")
    group.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates (PEM) to check it with")


def _add_places(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("where", default)
    places = group.add_mutually_exclusive_group()
    places.add_argument("--sys-prefix", action="store_true", help="this Python environment")
    places.add_argument("--user", action="store_true", help="this user's Jupyter data directory")
    places.add_argument("--prefix", type=Path, metavar="DIRECTORY", help="DIRECTORY/share/jupyter/kernels")


def _place(options: argparse.Namespace) -> Path | None:
    from sandbox_gateway import kernelspecs

    if options.sys_prefix:
        return kernelspecs.sys_prefix_directory()
    if options.user:
        return kernelspecs.user_directory()
    if options.prefix is not None:
        return kernelspecs.prefix_directory(options.prefix)
    return None


def _install(options: argparse.Namespace) -> int | None:
    from sandbox_gateway import kernelspecs
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.profiles import load_profiles

    if options.gateway:
        return remote_commands.install(options, _place(options) or kernelspecs.default_directory())
    if options.token or options.token_file is not None or options.ca_file is not None:
        raise Usage("jupyter sandbox install", "--token, --token-file and --ca-file belong to --gateway")
    paths = discover()
    profiles = load_profiles(paths)
    if options.list:
        return _list(options, profiles)
    chosen = [profiles.get(name) for name in dict.fromkeys(options.profiles or profiles)]
    directory = _place(options) or kernelspecs.default_directory()
    _report([kernelspecs.install(profile, directory) for profile in chosen], options.json)
    if not options.no_templates:
        template_commands.on_install(paths, chosen, options.json)
    return None


def _list(options: argparse.Namespace, profiles: Profiles) -> int | None:
    from sandbox_gateway import kernelspecs

    place = _place(options)
    directories = kernelspecs.search_directories() if place is None else (place,)
    found: dict[str, list[Installed]] = {}
    for spec in kernelspecs.find(directories):
        if spec.gateway:
            continue
        found.setdefault(spec.profile, []).append(spec)
    if options.json:
        write_json(
            [
                {**profile.as_dict(), "installed": [str(spec.path) for spec in found.get(profile.name, [])]}
                for profile in profiles.values()
            ]
        )
        return None
    rows = [
        (
            profile.name,
            profile.display_name,
            kernelspecs.describe(profile),
            ", ".join(str(spec.path) for spec in found.get(profile.name, [])) or "not installed",
        )
        for profile in profiles.values()
    ]
    write_table(("PROFILE", "SHOWN AS", "OPENS", "INSTALLED"), rows)
    orphans = [spec for specs in found.values() for spec in specs if spec.profile not in profiles]
    for spec in orphans:
        write_line(f"{spec.path} starts the profile {spec.profile!r}, which does not exist")
    return None


def _uninstall(options: argparse.Namespace) -> int | None:
    from sandbox_gateway import kernelspecs

    place = _place(options)
    directories = kernelspecs.search_directories() if place is None else (place,)
    installed = list(kernelspecs.find(directories))
    if options.gateway:
        from sandbox_gateway.remote.address import parse

        url = parse(options.gateway).url
        installed = [spec for spec in installed if spec.gateway == url]
    names = {spec.name for spec in installed}
    unknown = [name for name in options.profiles if name not in names]
    if unknown:
        have = f"There are: {', '.join(sorted(names))}." if names else "There is none of ours here."
        raise SandboxGatewayError(
            "unknown_profile", f"no kernelspec of ours is called {', '.join(map(repr, unknown))}", have
        )
    chosen = [spec for spec in installed if not options.profiles or spec.name in options.profiles]
    changes = [kernelspecs.uninstall(spec) for spec in chosen]
    _forget_gateways({spec.gateway for spec in chosen if spec.gateway}, directories)
    _report(changes, options.json)
    return None


def _forget_gateways(urls: set[str], directories: Sequence[Path]) -> None:
    """Forget the tokens of gateways that no kernelspec names any more."""
    from sandbox_gateway import kernelspecs

    everywhere = dict.fromkeys((*directories, *kernelspecs.search_directories()))
    for url in urls - {spec.gateway for spec in kernelspecs.find(everywhere)}:
        from sandbox_gateway.remote import credentials

        credentials.forget(url)


def _report(changes: list[Change], as_json: bool) -> None:
    if as_json:
        write_json([change.as_dict() for change in changes])
        return
    for change in changes:
        write_line(f"{change.action} {change.name} in {change.path.parent}")
    if not changes:
        write_line("nothing to do")
