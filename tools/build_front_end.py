"""Build the JupyterLab extension into ``sandbox_gateway/_labextension``, or prove that what lies there is up to date.

The built front end is part of the repository, so that neither a user nor ``pip install -e .`` needs Node. So it can be
forgotten: beside it lies a digest of the sources it was built from, which is compared without Node, and ``--check``
builds everything anew beside the checkout and compares each byte.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCES: Final = ROOT / "labextension"
BUNDLE: Final = ROOT / "sandbox_gateway" / "_labextension"
DIGEST: Final = "sources.sha256"
"""The file in the bundle that says what it was built from."""
NODE: Final = 20
"""The oldest major version of Node that builds it."""
_STAMP: Final = SOURCES / "node_modules" / ".installed"
_SETTINGS: Final = ("package.json", "package-lock.json", "rspack.config.cjs", "tsconfig.json")
INPUTS: Final = (*_SETTINGS, "schema/*.json", "style/*", "src/**/*.ts*")
"""All that the bundle depends on; the tests of ``src/test`` are no part of it."""


def sources(folder: Path = SOURCES) -> list[Path]:
    """The files that the bundle is built from."""
    found = {file for pattern in INPUTS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if "test" not in file.relative_to(folder).parts)


def digest(folder: Path = SOURCES) -> str:
    """One number for all sources, names included."""
    total = hashlib.sha256()
    for file in sources(folder):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def run(arguments: Sequence[str], folder: Path) -> None:
    """Run a tool in ``folder``; what it says is shown only where it fails."""
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def obstacle() -> str:
    """Why the front end cannot be built with what this machine has; empty where it can."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return f"no Node with npm here (Node {NODE} or newer builds the front end; using it needs none)"
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    major = said.removeprefix("v").partition(".")[0]
    if not major.isdecimal() or int(major) < NODE:
        return f"this is Node {said or 'of an unknown version'}, and the front end is built with Node {NODE} or newer"
    return ""


def installed() -> bool:
    """Whether the tools are there, as package-lock.json has them."""
    return _STAMP.is_file() and _STAMP.read_text() == _wanted()


def install() -> None:
    """The tools, where they are not there yet."""
    if not installed():
        print("front end: npm ci (some minutes the first time)", flush=True)
        run(["npm", "ci"], SOURCES)
        _STAMP.write_text(_wanted())


def _wanted() -> str:
    return hashlib.sha256((SOURCES / "package-lock.json").read_bytes()).hexdigest()


def install_where_possible() -> None:
    """For the tests, which skip what needs the tools where they cannot be had."""
    if why := obstacle():
        print(f"front end: {why}; its own checks are skipped")
        return
    try:
        install()
    except SystemExit as failed:
        print(f"front end: {failed}\nfront end: its own checks are skipped")


def build(folder: Path = SOURCES) -> Path:
    """Compile and bundle ``folder``, a labextension folder in a checkout; gives where the bundle is."""
    bundle = folder.parent / "sandbox_gateway" / "_labextension"
    shutil.rmtree(folder / "lib", ignore_errors=True)
    run(["npx", "tsc"], folder)
    shutil.rmtree(bundle, ignore_errors=True)  # names of old files hold old hashes
    bundle.parent.mkdir(exist_ok=True)
    run([str(Path(sys.executable).with_name("jupyter-builder")), "build", str(folder)], folder)
    (bundle / DIGEST).write_text(digest(folder) + "\n")
    return bundle


def check() -> list[str]:
    """Build anew beside the checkout; the files in which the result differs from what is committed."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="front-end-", dir=ROOT / "build") as base:
        # Names of modules come from where they lie below the folder: the tools have to be at the same place in it.
        copy = Path(base) / "labextension"
        shutil.copytree(SOURCES, copy, symlinks=True, copy_function=_link)
        return differences(BUNDLE, build(copy))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def differences(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same in both folders."""
    names = {file.relative_to(base).as_posix() for base in (one, other) for file in base.rglob("*") if file.is_file()}
    return sorted(
        name
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or not filecmp.cmp(one / name, other / name, shallow=False)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="prove that the bundle is what these sources give")
    parser.add_argument("--install", action="store_true", help="only get the tools, where that is possible, for tests")
    arguments = parser.parse_args()
    if arguments.install:
        install_where_possible()
        return
    if why := obstacle():
        sys.exit(f"front end: {why}")
    install()
    if not arguments.check:
        bundle = build()
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        print(f"front end: {bundle.relative_to(ROOT)}, {size / 1024:.0f} KiB")
    elif found := check():
        sys.exit(f"the bundle is not what its sources give; run {Path(__file__).name}: {', '.join(found)}")


if __name__ == "__main__":
    main()
