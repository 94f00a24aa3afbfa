"""What goes wrong while a process adopts a kernel leaves it as it was, with all its output, for the next one."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance import KERNEL, START, Product
from application import Application
from faulty import Faults, Subject
from model import KernelModel, Request
from watcher import Watcher

from sandbox_gateway.host.paths import discover


class Orphan(Subject):
    """A kernel whose application was killed in the middle of a cell."""

    def __init__(self, product: Product, sandbox_id: str, watcher: Watcher) -> None:
        super().__init__(product, None, watcher)  # type: ignore[arg-type]
        self._id = sandbox_id

    @property
    def id(self) -> str:
        """The sandbox's."""
        return self._id

    def row(self) -> dict[str, object]:
        """What ``ps`` tells of it."""
        return next(row for row in json.loads(self.ask("ps", "--json")) if row["id"] == self.id)

    def adopted(self, cell: Request) -> None:
        """The next one that tries has it, and nothing is missing."""
        self.ask("connect", self.id)
        self.watcher.idle(0.1)
        self.watcher.model.recovered()
        assert self.row()["keeper"] is True
        self.works(cell)


@pytest.fixture
def orphan(product: Product, faults: Faults, tmp_path: Path) -> Iterator[tuple[Orphan, Request]]:
    """Such a kernel, and the cell that it is in."""
    application = Application(tmp_path / "application.log")
    sandbox_id = str(uuid.uuid4())
    watcher = None
    try:
        connection_file = application.call("start", KERNEL, sandbox_id)
        watcher = Watcher(Path(connection_file), KernelModel(), random.Random(0))
        watcher.wait(lambda: watcher is not None and watcher.welcomed, "the welcome", START)
        watcher.setup()
        found = Orphan(product, sandbox_id, watcher)
        cell = found.long_cell()
        application.kill()
        watcher.model.crash()
        yield found, cell
    finally:
        faults.clear()
        if watcher is not None:
            watcher.close()
        application.close()
        product.command("rm", sandbox_id)


@pytest.mark.parametrize("way", ["fails", "is killed"])
def test_an_adoption_whose_runsc_fails_leaves_the_kernel_to_the_next_one(
    orphan: tuple[Orphan, Request], faults: Faults, way: str
) -> None:
    """Whoever adopts a kernel lets it go on first, in case that its owner was killed in a pause; where it runs
    anyway, that may fail."""
    kernel, cell = orphan
    faults.set("resume", way)
    kernel.adopted(cell)


@pytest.mark.parametrize("way", ["fails", "is killed"])
def test_a_frozen_kernel_that_cannot_be_thawed_is_told_and_waits_for_the_next_one(
    orphan: tuple[Orphan, Request], faults: Faults, way: str
) -> None:
    kernel, cell = orphan
    root = discover().runsc_root
    runsc = str(faults.directory / "runsc")
    subprocess.run([runsc, f"--root={root}", "pause", kernel.id], check=True, capture_output=True)
    faults.set("resume", way)
    assert "Traceback" not in kernel.refused("connect", kernel.id)
    assert (kernel.row()["state"], kernel.row()["owner_pid"]) == ("running", None)
    faults.clear()
    kernel.adopted(cell)


def test_an_adoption_while_the_store_is_locked_leaves_the_kernel_to_the_next_one(
    orphan: tuple[Orphan, Request],
) -> None:
    kernel, cell = orphan
    blocker = sqlite3.connect(kernel.product.home / "store.sqlite", isolation_level=None)
    try:
        blocker.execute("BEGIN EXCLUSIVE")
        said = kernel.refused("connect", kernel.id)
        assert "store" in said or "locked" in said, said
    finally:
        blocker.close()
    kernel.adopted(cell)
