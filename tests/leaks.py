"""What a sandbox can leave behind, looked for after every test.

Only what belongs to directories that this very test process made counts: other runs, and other users of the machine,
are not our business. Processes are known by the variable that the launcher gives them and by runsc's own arguments,
never by a name.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_gateway.host import processes
from sandbox_gateway.host.cgroups import discover as discover_cgroups
from sandbox_gateway.host.paths import discover
from sandbox_gateway.host.processes import ProcessRef
from sandbox_gateway.runtimes.launcher import MARKER


@dataclass
class Watched:
    """The directories that this process made, and what of ours is in or around them."""

    roots: set[str] = field(default_factory=set)
    _runtimes: dict[str, Path] = field(default_factory=dict)
    """Of each installation that was ever seen, gone ones included."""

    def install(self) -> None:
        """Record every temporary directory that is made from now on."""
        make: Callable[..., Any] = tempfile.mkdtemp

        def recording(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            if isinstance(made, str):
                self.roots.add(os.path.realpath(made))
            return made

        tempfile.mkdtemp = recording

    def add(self, directory: Path) -> None:
        """Watch one more directory."""
        self.roots.add(os.path.realpath(directory))

    def runtimes(self) -> set[Path]:
        """Runtime directories of all installations in the watched directories, those that are gone included."""
        for root in self.roots:
            # A directory made for a test is often the home itself, and removed with the test.
            for home in (root, *_homes(root)):
                if home not in self._runtimes:
                    self._runtimes[home] = discover({"SANDBOX_GATEWAY_HOME": home}).runtime
        return set(self._runtimes.values())

    def remove_runtimes(self) -> None:
        """Remove the runtime directories that lie outside, as those of installations with long paths do."""
        for path in self.runtimes():
            if not str(path).startswith(tuple(f"{root}/" for root in self.roots)):
                shutil.rmtree(path, ignore_errors=True)

    def look(self) -> Found:
        """What is there now."""
        runtimes = self.runtimes()
        prefixes = tuple(f"{path}/" for path in {*self.roots, *map(str, runtimes)})
        return Found(
            frozenset(_processes(prefixes)),
            frozenset(_mounts(prefixes)),
            frozenset(_cgroups(runtimes)),
            frozenset(_pipes(runtimes)),
        )


@dataclass(frozen=True)
class Found:
    """Processes, mounts, control groups and named pipes (or bundles) of ours."""

    processes: frozenset[tuple[ProcessRef, str]]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    files: frozenset[str]

    def since(self, before: Found) -> list[str]:
        """What is there that was not before, in words."""
        known = {ref for ref, _ in before.processes}
        lines = [f"process {ref.pid}: {text}" for ref, text in self.processes if ref not in known]
        lines += [f"mount {path}" for path in self.mounts - before.mounts]
        lines += [f"cgroup {path}" for path in self.cgroups - before.cgroups]
        lines += [f"file {path}" for path in self.files - before.files]
        return sorted(lines)

    def end_processes(self, before: Found) -> None:
        """End what a test left, so that it harms no other."""
        known = {ref for ref, _ in before.processes}
        processes.kill_all([ref for ref, _ in self.processes if ref not in known], 5)


def _homes(root: str) -> Iterator[str]:
    """Installations in a directory made for tests: a few levels down at most."""
    todo = [(root, 0)]
    while todo:
        path, depth = todo.pop()
        try:
            names = os.listdir(path)
        except OSError:
            continue
        if {"run", "store.sqlite", "layers", "bin"} & set(names):
            yield path
        elif depth < 3 and len(names) < 100:
            todo += [(f"{path}/{name}", depth + 1) for name in names if os.path.isdir(f"{path}/{name}")]


@functools.cache
def _group(runtime: Path) -> str:
    return f"sandbox_gateway-{hashlib.sha256(os.fsencode(runtime)).hexdigest()[:10]}"


def _processes(prefixes: tuple[str, ...]) -> Iterator[tuple[ProcessRef, str]]:
    def ours(argv: list[str], environment: list[str]) -> bool:
        marked = (entry.partition("=")[2] for entry in environment if entry.startswith(f"{MARKER}="))
        rooted = (word.removeprefix("--root=") for word in argv if word.startswith("--root="))
        return any(f"{path}/".startswith(prefixes) for path in (*marked, *rooted))

    for ref in processes.find(ours):
        yield ref, " ".join(processes.command_line(ref.pid))[:200]


def marked(directory: str, sandbox_id: str) -> list[ProcessRef]:
    """Processes of one sandbox, whoever started them: by the launcher's variable, or by their arguments."""

    def of_it(argv: list[str], environment: list[str]) -> bool:
        return f"{MARKER}={directory}" in environment or sandbox_id in argv

    return list(processes.find(of_it))


def _mounts(prefixes: tuple[str, ...]) -> Iterator[str]:
    with open("/proc/self/mounts") as file:
        for line in file:
            point = line.split()[1]
            if f"{point}/".startswith(prefixes):
                yield point


def _cgroups(runtimes: set[Path]) -> Iterator[str]:
    parents = set(map(_group, runtimes))
    for root in discover_cgroups().roots.values():
        # Groups that go meanwhile are no error to this.
        for name in parents.intersection(os.listdir(root)):
            yield from (folder for folder, _, _ in os.walk(root / name))


def _pipes(runtimes: set[Path]) -> Iterator[str]:
    for runtime in filter(os.path.isdir, runtimes):
        for path in (*runtime.glob("*/*"), *runtime.glob("runsc/*")):
            try:
                if stat.S_ISFIFO(path.lstat().st_mode) or path.name == "bundle" or path.parent.name == "runsc":
                    yield str(path)
            except OSError:
                continue
