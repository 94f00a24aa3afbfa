"""Building templates from several processes, and what a crash in the middle leaves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from acceptance import KERNEL, Product, until
from templating import Driver

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.kernel_watch import Preparation
from sandbox_gateway.snapshots import Kind, SnapshotStore
from sandbox_gateway.standby import Standby
from sandbox_gateway.templates import TemplateRecord, TemplateRecords

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
