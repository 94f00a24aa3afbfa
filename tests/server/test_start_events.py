"""A kernel that Jupyter's own routes start is told of as one that ours start."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.images.service import Progress
from sandbox_gateway.server.starts import said, telling


class Bridge:
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def operation(self, operation_id: str, kind: str, phase: str, owner: str, **more: Any) -> None:
        known = {"operation": operation_id, "kind": kind, "phase": phase, "owner": owner}
        self.told.append(known | {key: value for key, value in more.items() if value not in ("", None)})


async def test_a_start_is_told_with_its_phases_from_any_thread_and_each_phase_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sandbox_gateway.server.starts.TELL_INTERVAL", 3600.0)
    bridge = Bridge()
    restoring = Progress("sandbox", 0, 0, "restoring it")
    with telling(bridge, "ann", "id", "report.ipynb") as progress:  # type: ignore[arg-type]
        await asyncio.to_thread(progress, Progress("environment /home/ann/venv", 5, 10))
        await asyncio.to_thread(progress, Progress("environment /home/ann/venv", 6, 10))  # too soon to be news
        await asyncio.to_thread(progress, restoring)
        await asyncio.sleep(0)
    progress(restoring)
    await asyncio.sleep(0)
    assert [(one["phase"], one.get("text")) for one in bridge.told] == [
        ("started", None),
        ("progress", "building environment"),
        ("progress", "restoring it"),
        ("succeeded", None),
    ]
    assert {(one["kind"], one["owner"], one["sandbox"], one["name"]) for one in bridge.told} == {
        ("create", "ann", "id", "report.ipynb")
    }
    assert (bridge.told[1]["done"], bridge.told[1]["total"]) == (5, 10)


@pytest.mark.parametrize(
    ("error", "code"), [(SandboxGatewayError("over_quota", "too many"), "over_quota"), (OSError(), "internal")]
)
async def test_a_start_that_fails_is_told_with_the_reason(error: Exception, code: str) -> None:
    bridge = Bridge()
    with pytest.raises(type(error)), telling(bridge, "ann", "id", ""):  # type: ignore[arg-type]
        raise error
    assert [one["phase"] for one in bridge.told] == ["started", "failed"]
    assert bridge.told[1]["error"].code == code


async def test_without_anybody_to_tell_it_is_done_all_the_same() -> None:
    with telling(None, "ann", "id", "") as progress:
        progress(Progress("sandbox", 0, 0, "restoring it"))


def test_where_things_are_on_the_machine_is_not_told() -> None:
    assert said(Progress("environment /home/u/venv", 0, 0, "packing environment /home/u/venv")) == "packing environment"
