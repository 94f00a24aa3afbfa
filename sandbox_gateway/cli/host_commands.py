"""``doctor`` and ``setup``: what this machine can do, and getting the pinned runsc."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.output import ProgressLine, clean, write_json, write_line
from sandbox_gateway.errors import SandboxGatewayError

if TYPE_CHECKING:
    from sandbox_gateway.host.doctor import Check
    from sandbox_gateway.host.paths import Paths


def add(commands: Commands) -> None:
    """Add both to the parser."""
    command(
        commands,
        "doctor",
        _doctor,
        "tell what works on this machine, what does not, and what to do",
        "Exit status 1 when no sandboxed kernel can run here.",
    )
    setup = command(
        commands,
        "setup",
        _setup,
        "put the pinned runsc into the product's own data directory",
        "Downloads a gVisor release, else builds it through the Go module proxy. Does nothing when it is there.",
    )
    way = setup.add_mutually_exclusive_group()
    way.add_argument(
        "--runsc",
        "--file",
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="take this runsc (or gVisor release tarball) instead: nothing is downloaded",
    )
    way.add_argument(
        "--build",
        action="store_true",
        help="build it from gVisor's sources (a minute or two), for kernels that start and resume quicker",
    )


_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "-   "}
_COLOURS = {"ok": "32", "warn": "33", "fail": "31", "skip": "2"}


def _doctor(options: argparse.Namespace) -> int:
    import asyncio

    from sandbox_gateway.host.doctor import Diagnosis, diagnose
    from sandbox_gateway.host.paths import discover

    paths = discover()
    check, images = _profiles(paths)
    with ProgressLine() as progress:
        progress.update("looking at this machine")
        found = asyncio.run(diagnose(paths, images=images))
    diagnosis = Diagnosis((*found.checks, check))
    if options.json:
        write_json(diagnosis.as_dict())
        return 0 if diagnosis.ok else 1
    width = max(len(check.name) for check in diagnosis.checks)
    for check in diagnosis.checks:
        mark = _MARKS[check.status]
        if sys.stdout.isatty():
            mark = f"\x1b[{_COLOURS[check.status]}m{mark}\x1b[0m"
        sys.stdout.write(f"{mark}  {check.name.ljust(width)}  {clean(check.detail)}\n")
        if check.hint and check.status != "skip":
            sys.stdout.write(f"{' ' * (width + 8)}-> {clean(check.hint)}\n")
    failed = sum(check.status == "fail" for check in diagnosis.checks)
    if failed:
        things = "1 thing is" if failed == 1 else f"{failed} things are"
        write_line(f"Sandboxed kernels cannot run here yet: {things} missing.")
        return 1
    write_line("Sandboxed kernels can run here.")
    return 0


def _profiles(paths: Paths) -> tuple[Check, list[tuple[str, bool]]]:
    """What is to be said of the profiles, and their images with whether editable installs are taken in."""
    from sandbox_gateway.host.doctor import Check
    from sandbox_gateway.profiles import load_profiles

    try:
        profiles = load_profiles(paths)
    except SandboxGatewayError as error:
        return Check("profiles", "fail", error.message, error.hint), [("host", False)]
    images = [(profile.image, profile.editable) for profile in profiles.values()]
    unsafe = [profile.name for profile in profiles.values() if profile.runtime == "fake"]
    if unsafe:
        hint = 'Use runtime = "gvisor" but for tests.'
        return Check("profiles", "warn", f"not isolated: {', '.join(unsafe)}", hint), images
    source = f", with {profiles.file}" if profiles.file.exists() else ""
    return Check("profiles", "ok", f"{', '.join(profiles)}{source}"), images


def _setup(options: argparse.Namespace) -> None:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.host.setup import ensure_runsc

    with ProgressLine() as progress:
        install = ensure_runsc(discover(), source=options.source, build=options.build, progress=progress.update)
    if options.json:
        write_json(install.as_dict())
        return
    state = "installed" if install.fresh else "already there"
    write_line(f"runsc is {state}: {install.path} ({install.origin})")
    if install.fresh and install.origin.startswith("release"):
        write_line("`jupyter sandbox setup --build` builds one whose kernels start and resume quicker.")
