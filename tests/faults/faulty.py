"""A runsc that fails on command, and the kernel that it is tried on."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from acceptance import KERNEL, START, Product, until
from jupyter_client import KernelManager
from leaks import marked
from model import KernelModel, Request
from watcher import Watcher

from sandbox_gateway.host.paths import discover
from sandbox_gateway.runtimes.launcher import Fifos
from sandbox_gateway.store import Store

WRAPPER = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    create|start|pause|resume|checkpoint|restore)
      if [ -e "{faults}/$word" ]; then . "{faults}/$word"; fi
      break;;
    run) trial=yes;;
    --bundle=*)
      if [ "$trial" ]; then
        ln -f "{runsc}" "${{0%/*}}/real" 2>/dev/null || cp "{runsc}" "${{0%/*}}/real"
        sed -i 's#"/bin/runsc"#"/bin/real"#' "${{word#--bundle=}}/config.json"
      fi;;
  esac
done
exec "{runsc}" "$@"
"""
"""Sources a file of the name of runsc's command, where there is one.

The probe's trial runs the binary itself in a sandbox, where no script can run: there it is the real one.
"""

WAYS = {
    "fails": 'echo "injected fault" >&2; exit 1',
    "is killed": "kill -9 $$",
    "fails when it has done its work": '"{runsc}" "$@"; echo "injected fault" >&2; exit 1',
    "hangs": "exec sleep 1000",
}


def wrapper(base: Path, runsc: Path) -> Path:
    """A runsc that does what the files in ``<base>/faults`` say."""
    faults = base / "faults"
    faults.mkdir(mode=0o700)
    (faults / "runsc").symlink_to(runsc)
    path = base / "runsc"
    path.write_text(WRAPPER.format(faults=faults, runsc=runsc))
    path.chmod(0o755)
    return path


class Faults:
    """What goes wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def set(self, command: str, way: str) -> None:
        """From now on runsc's ``command`` does so, one of :data:`WAYS`."""
        (self.directory / command).write_text(WAYS[way].format(runsc=self.directory / "runsc") + "\n")

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        for path in self.directory.iterdir():
            if path.name != "runsc":
                path.unlink()


@dataclass
class Subject:
    """A kernel, the client that watches it, and the command line."""

    product: Product
    manager: KernelManager
    watcher: Watcher

    @property
    def id(self) -> str:
        """The sandbox's."""
        return str(self.manager.provisioner.kernel_id)  # type: ignore[union-attr]

    @property
    def state(self) -> str:
        """The recorded state."""
        with Store(discover().database) as store:
            return str(store.get(self.id).state)

    def long_cell(self) -> Request:
        """A cell that prints for two seconds, and has begun to."""
        request = self.watcher.execute("lines('long', 200, 0.01, 'each')", "long", lines=200)
        self.watcher.wait(lambda: request.next_line > 5, "the first lines")
        return request

    def ask(self, *words: str, timeout: float = 180) -> str:
        """``jupyter sandbox <words>`` that must succeed."""
        done = self.product.command(*words, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *words: str, timeout: float = 180) -> str:
        """``jupyter sandbox <words>`` that must fail; what it said."""
        done = self.product.command(*words, timeout=timeout)
        assert done.returncode != 0, f"it succeeded: {done.stdout}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr

    def works(self, *open_requests: Request) -> None:
        """All that was under way ends well, and the next cell counts right."""
        self.watcher.finish(*open_requests)
        self.watcher.finish(self.watcher.execute("counter += 1; print('counter', counter)", values=("counter 1",)))
        self.watcher.finish(self.watcher.execute("counter -= 1"))
        self.watcher.model.check_end()
        self.watcher.check()

    def sleeps(self) -> bool:
        """Whether no process of it is there, and its owner, which is this process, has none of its pipes open."""
        directory = discover().sandbox(self.id)
        pipes = Fifos.inside(directory)
        return not marked(str(directory), self.id) and not _open_files() & {str(pipes.stdin), str(pipes.stdout)}

    def snapshot(self) -> Path:
        """The directory of its only snapshot."""
        (found,) = [
            path.parent
            for path in (self.product.home / "snapshots").glob("*/manifest.json")
            if self.id in path.read_text()
        ]
        return found

    def snapshots(self) -> set[str]:
        """Everything in the snapshots' directory but the lock and templates."""
        return self.product.snapshots()

    def no_more_snapshots_than(self, before: set[str]) -> None:
        """Nothing is left in the snapshots' directory, not even a draft, once a template on its way is finished."""
        until(lambda: self.snapshots() <= before, found=lambda: self.snapshots() - before)


@contextmanager
def own_kernel(product: Product) -> Iterator[Subject]:
    """A kernel that this process owns, removed at the end."""
    manager = KernelManager(kernel_name=KERNEL)
    manager.start_kernel()
    watcher = None
    try:
        watcher = Watcher(Path(manager.connection_file), KernelModel(), random.Random(0))
        watcher.wait(lambda: watcher is not None, "nothing", START)
        watcher.setup()
        yield Subject(product, manager, watcher)
    finally:
        if watcher is not None:
            watcher.close()
        manager.shutdown_kernel(now=True)


def _open_files() -> set[str]:
    """The paths of what this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            found.add(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
    return found
