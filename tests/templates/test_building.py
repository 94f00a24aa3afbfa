"""Building templates from several processes, and what a crash in the middle leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from acceptance import KERNEL, Product, until
from snapshot_helpers import launch, make
from templating import Driver

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths, discover
from sandbox_gateway.kernel_watch import Preparation
from sandbox_gateway.profiles import Profile
from sandbox_gateway.snapshots import Kind, Snapshot, SnapshotStore
from sandbox_gateway.standby import Standby
from sandbox_gateway.templates import Builder, Plan, TemplateKey, TemplateRecord, TemplateRecords

PROFILES = """
[profiles.slow-to-prepare]
display_name = "Slow"
preload = ["sched", "xmlrpc.server", "unittest.mock", "concurrent.futures", "no_such_module"]
"""


@pytest.fixture
def slow(product: Product) -> Iterator[str]:
    """A profile of its own, without a template."""
    file = product.home / "profiles.toml"
    before = file.read_text() if file.exists() else ""
    file.write_text(before + PROFILES)
    yield "slow-to-prepare"
    for row in json.loads(product.command("template", "ls", "--json").stdout):
        if row["profile"] == "slow-to-prepare":
            product.command("template", "rm", row["key"])
    file.write_text(before)


def builder(product: Product, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox_gateway.cli", "template", "build", name, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_several_processes_build_a_template_once(product: Product, slow: str) -> None:
    processes = [builder(product, slow) for _ in range(3)]
    outcomes = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({outcome[0]["snapshot"] for outcome in outcomes}) == 1
    store = SnapshotStore(discover({"SANDBOX_GATEWAY_HOME": str(product.home)}))
    made = [one for one in store.list() if one.manifest.kind is Kind.TEMPLATE and one.manifest.profile == slow]
    assert len(made) == 1
    assert "no_such_module" in " ".join(outcomes[0][0]["missing"])


@pytest.mark.parametrize(("which", "moment"), [(1, 0.3), (1, 1.0), (2, 0.1), (2, 0.8), (2, 1.6)])
def test_killed_in_the_middle_it_leaves_nothing(product: Product, slow: str, which: int, moment: float) -> None:
    """So many seconds into the first or the second sandbox that is made for it. The check after each test looks for
    processes, mounts, groups and pipes; here is what is in files."""
    paths = discover({"SANDBOX_GATEWAY_HOME": str(product.home)})
    process = builder(product, slow)
    seen: set[str] = set()

    def begun() -> bool:
        rows = json.loads(product.command("ps", "--all", "--json").stdout)
        seen.update(row["id"] for row in rows if row["id"].startswith("template-"))
        return len(seen) >= which or process.poll() is not None

    until(begun, 120)
    assert len(seen) == which
    time.sleep(moment)
    process.kill()
    process.communicate()
    assert product.command("prune").returncode == 0
    rows = json.loads(product.command("ps", "--all", "--json").stdout)
    assert [row["id"] for row in rows if row["id"].startswith("template-")] == []
    assert [path.name for path in paths.snapshots.iterdir() if path.name.endswith((".new", ".gone"))] == []
    assert [path.name for path in paths.runtime.iterdir() if path.name.startswith("template-")] == []
    assert product.command("template", "build", slow).returncode == 0


def test_the_commands_list_and_remove(product: Product, slow: str) -> None:
    assert product.command("template", "build", slow).returncode == 0
    listed = [row for row in json.loads(product.command("template", "ls", "--json").stdout) if row["profile"] == slow]
    assert [row["state"] for row in listed] == ["ready"]
    assert slow in product.command("template", "ls").stdout
    records = TemplateRecords(discover({"SANDBOX_GATEWAY_HOME": str(product.home)}))
    record = records.get(listed[0]["key"])
    assert record is not None
    records.failed(record, "no room at all")
    assert "ready, not rebuilt: no room at all" in product.command("template", "ls").stdout
    removed = product.command("template", "rm", listed[0]["key"][:12], "--json")
    assert json.loads(removed.stdout)[0]["profile"] == slow
    assert slow not in product.command("template", "ls").stdout
    assert product.command("template", "rm", "0" * 12).returncode == 1
    assert product.command("template", "rm").returncode == 2


async def test_a_build_that_failed_is_remembered_and_not_tried_at_each_start(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = driver.profile(KERNEL, preload=("getopt",))
    plan = await driver.plan(profile, tmp_path)
    templates = driver.lifecycle.templates
    templates._delay = 0.0
    tried = []

    async def fail(*_: object, **__: object) -> None:
        tried.append(1)
        raise SandboxGatewayError("disk_full", "no room at all")

    monkeypatch.setattr(templates.builder, "_make", fail)
    for _ in range(2):
        kernel = await driver.start(profile, tmp_path)
        assert not kernel.warm
        if templates._worker is not None:
            await asyncio.wait_for(templates._worker, 60)
    assert len(tried) == 1
    assert any("no room at all" in note for note in kernel.sandbox.record.notes)
    with pytest.raises(SandboxGatewayError, match="no room at all"):
        await templates.build(plan)
    assert len(tried) == 2
    templates.records.remove(plan.key.digest)


@pytest.mark.parametrize("which", ["survey", "prepare"])
async def test_a_kernel_that_can_take_no_identity_is_not_saved(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Neither of the two that are booted for a template."""

    async def survey(*_: object) -> tuple[Preparation, None]:
        return Preparation(which != "survey", {}), None

    async def prepare(*_: object) -> Preparation:
        return Preparation(which != "prepare", {})

    monkeypatch.setattr(Standby, "survey", survey)
    monkeypatch.setattr(Standby, "prepare", prepare)
    plan = await driver.plan(driver.profile(KERNEL, preload=("poplib",)), tmp_path)
    with pytest.raises(SandboxGatewayError, match="another identity"):
        await driver.lifecycle.templates.build(plan)
    assert driver.lifecycle.templates.builder.find(plan.key.digest) is None
    driver.lifecycle.templates.records.remove(plan.key.digest)


def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    records = TemplateRecords(discover({"SANDBOX_GATEWAY_HOME": str(tmp_path)}))
    record = TemplateRecord("a" * 64, "b" * 64, "p", "gvisor", ("numpy",), "c" * 32)
    records.put(record)
    assert records.get(record.key) == record
    for text in ("", "[]", "{}", "null", '{"key": 1}', "[" * 100000, json.dumps({**record.as_dict(), "built": "x"})):
        (records.directory / f"{record.key}.json").write_text(text)
        assert records.get(record.key) is None
        assert records.list() == ()
    records.put(record)
    other = records.directory / f"{'d' * 64}.json"
    other.write_text(json.dumps(record.as_dict()))
    assert records.get("d" * 64) is None, "a file under another name"


def test_failures_are_tried_again_ever_later(tmp_path: Path) -> None:
    records = TemplateRecords(discover({"SANDBOX_GATEWAY_HOME": str(tmp_path)}))
    record = TemplateRecord("a" * 64, "b" * 64, "p", "gvisor")
    waits = []
    for _ in range(12):
        record = records.failed(record, "why")
        waits.append(record.retry_at - record.failed)
    assert waits[:3] == [600, 1200, 2400] and waits[-1] == 24 * 3600
    assert replace(record, failures=0).retry_at == 0.0


PLAN = Plan(TemplateKey("a" * 64, "b" * 64), Profile("p", runtime="fake"), launch())


class Rehearsed(Builder):
    """Its sandboxes are imagined; one of the things that come after a template's commit fails as it is told."""

    def __init__(self, paths: Paths) -> None:
        maker: Any = SimpleNamespace(events=SimpleNamespace(note=lambda *_, **__: None))
        self.store, self.records = SnapshotStore(paths), TemplateRecords(paths)
        super().__init__(maker, self.store, self.records)
        self.fails = ""
        self.error: BaseException = SandboxGatewayError("disk_full", "no room at all")
        self.sealed, self.written = self.store.seal, self.records.put
        self.store.seal = self._seal  # type: ignore[method-assign]
        self.records.put = self._put  # type: ignore[method-assign]

    def _reach(self, what: str) -> None:
        if self.fails == what:
            self.fails = ""
            raise self.error

    @contextlib.asynccontextmanager
    async def _sandbox(self, plan: Plan) -> AsyncIterator[Any]:
        yield self
        if self.prepared:
            self._reach("removal")

    async def survey(self, preload: Any) -> tuple[Preparation, None]:
        self.prepared = False
        return Preparation(True, {}), None

    async def prepare(self, preload: Any, modules: Any) -> Preparation:
        self.prepared = True
        return Preparation(True, {})

    async def preserve(self, key: str) -> Snapshot:
        made = await make(self.store, Kind.TEMPLATE, template_key=key, sealed=False)
        self._reach("preserve")
        return made

    async def _seal(self, snapshot: Snapshot, report: Any = None) -> Snapshot:
        self._reach("seal")
        return await self.sealed(snapshot)

    def _put(self, record: TemplateRecord) -> None:
        self._reach("put")
        self.written(record)


@pytest.mark.parametrize("what", ["preserve", "removal", "seal", "put"])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_fails_behind_the_commit_of_a_template_leaves_no_snapshot(
    paths: Paths, what: str, cancelled: bool
) -> None:
    """No record would name it, and nothing else collects it."""
    builder = Rehearsed(paths)
    other = await make(builder.store, Kind.TEMPLATE, template_key="c" * 64)
    builder.fails = what
    if cancelled:
        builder.error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError if cancelled else SandboxGatewayError):
        await builder.build(PLAN)
    assert [snapshot.id for snapshot in builder.store.list()] == [other.id]
    assert builder.find(PLAN.key.digest) is None
    record = builder.records.get(PLAN.key.digest)
    assert record is None or record.snapshot is None
    made = await builder.build(PLAN)
    assert builder.find(PLAN.key.digest) == made


async def test_a_build_whose_caller_goes_as_it_is_written_down_leaves_one_template(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written all the same, on a thread: what it names stays, what it named before goes."""
    builder = Rehearsed(paths)
    before = await builder.build(PLAN)
    writing = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(record: TemplateRecord) -> None:
        loop.call_soon_threadsafe(writing.set)
        time.sleep(0.3)
        builder.written(record)

    monkeypatch.setattr(builder.records, "put", slowly)
    task = asyncio.create_task(builder.build(PLAN, again=True))
    await writing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    found = builder.find(PLAN.key.digest)
    assert found is not None and found.id != before.id
    assert [snapshot.id for snapshot in builder.store.list()] == [found.id]


async def test_a_template_outlives_a_failure_to_build_it_again(paths: Paths) -> None:
    """Kernels go on starting from it, and the reason can be read."""
    builder = Rehearsed(paths)
    good = await builder.build(PLAN)
    for what in ("preserve", "seal"):
        builder.fails = what
        with pytest.raises(SandboxGatewayError, match="no room at all"):
            await builder.build(PLAN, again=True)
        found = builder.find(PLAN.key.digest)
        assert found is not None and found.id == good.id
    assert [snapshot.id for snapshot in builder.store.list()] == [good.id]
    record = builder.records.get(PLAN.key.digest)
    assert record is not None and (record.failures, record.reason) == (2, "no room at all")


def test_a_template_that_is_given_up_is_tried_anew_whatever_failed_before(tmp_path: Path) -> None:
    """What it is known by then is why it was given up, not why an earlier build failed."""
    records = TemplateRecords(discover({"SANDBOX_GATEWAY_HOME": str(tmp_path)}))
    records.put(TemplateRecord("a" * 64, "b" * 64, "p", "gvisor", snapshot="c" * 32))
    assert records.failed(TemplateRecord("a" * 64, "b" * 64, "p", "gvisor"), "no room").snapshot == "c" * 32
    given_up = records.suspected("a" * 64, "c" * 32, "it is damaged", useless=True)
    assert given_up is not None and given_up.snapshot is None
    assert (given_up.reason, given_up.retry_at) == ("it is damaged", 0.0)


def test_a_snapshot_is_nobodys_when_the_record_of_its_template_surely_does_not_name_it(tmp_path: Path) -> None:
    records = TemplateRecords(discover({"SANDBOX_GATEWAY_HOME": str(tmp_path)}))
    assert records.orphaned("a" * 64, "c" * 32)
    records.put(TemplateRecord("a" * 64, "b" * 64, "p", "gvisor", snapshot="c" * 32))
    assert not records.orphaned("a" * 64, "c" * 32)
    assert records.orphaned("a" * 64, "d" * 32)
    assert not records.orphaned("no key", "c" * 32), "nobody knows what that is"
    file = records.directory / f"{'a' * 64}.json"
    file.write_text("no record")
    assert records.orphaned("a" * 64, "c" * 32), "its template is built again"
    file.unlink()
    file.mkdir()
    assert not records.orphaned("a" * 64, "c" * 32), "it cannot be read now"
