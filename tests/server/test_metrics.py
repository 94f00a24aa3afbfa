"""``/metrics``: figures that are right, name nobody, and are administrators' to read."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from jupyter_events import EventLogger
from prometheus_client.parser import text_string_to_metric_families
from small_gateway import SmallGateway, Stats
from small_server import Server, small_server

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.model import BLANK, Death, DeathKind, State
from sandbox_gateway.server.events import EventBridge
from sandbox_gateway.server.metrics import Metrics, MetricsHandler

ID, OTHER = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"


class Watched:
    """A small gateway with its figures."""

    def __init__(self) -> None:
        self.gateway = SmallGateway()
        self.bridge = EventBridge(self.gateway, EventLogger())
        self.metrics = Metrics(self.gateway, self.bridge)

    async def note(self, sandbox: str, kind: EventKind, text: str = "", /, **data: object) -> None:
        self.gateway.lifecycle.events.add(Event(sandbox, kind, text, data, 1.0))
        await self.settled()

    async def settled(self) -> None:
        await self.gateway.lifecycle.events.flush()
        await self.bridge.flush()

    async def figures(self) -> dict[str, float]:
        """``name{labels}`` -> value, ours only."""
        text = (await self.metrics.render()).decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                if sample.name.startswith("sandbox_gateway_"):
                    found[f"{sample.name.removeprefix('sandbox_gateway_')}{{{labels}}}".replace("{}", "")] = (
                        sample.value
                    )
        return found


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    found = Watched()
    yield found
    found.bridge.close()


@pytest.mark.parametrize(
    ("data", "way"),
    [
        ({}, "cold"),
        ({"parent": "template:abc"}, "template"),
        ({"parent": "template:abc", "pool": True}, "pool"),
        ({"parent": "snapshot:abc"}, "snapshot"),
        ({"parent": f"sandbox:{OTHER}"}, "fork"),
    ],
)
async def test_a_start_counts_by_profile_and_way_with_its_duration(
    watched: Watched, data: dict[str, object], way: str
) -> None:
    watched.gateway.add(ID, "ann")
    await watched.note(ID, EventKind.CREATED, **data)
    await watched.note(ID, EventKind.STARTED, seconds=0.12)
    found = await watched.figures()
    assert found[f"starts_total{{profile=python3-gvisor,way={way}}}"] == 1
    assert found["phase_seconds_sum{phase=start}"] == pytest.approx(0.12)
    assert found["phase_seconds_bucket{le=0.1,phase=start}"] == 0
    assert found["phase_seconds_bucket{le=0.15,phase=start}"] == 1


async def test_suspends_resumes_wakes_ends_and_failures_count(watched: Watched) -> None:
    watched.gateway.add(ID, "ann")
    await watched.note(ID, EventKind.SUSPENDED, seconds=2.0)
    await watched.note(ID, EventKind.WOKE)
    await watched.note(ID, EventKind.RESUMED, seconds=0.2)
    await watched.note(ID, EventKind.PAUSED)
    await watched.note(ID, EventKind.FAILED, code="disk_full")
    await watched.note(ID, EventKind.FAILED, code=f"made up {ID}")
    await watched.note(ID, EventKind.DIED, kind=str(DeathKind.OUT_OF_MEMORY))
    watched.metrics.failed("over_quota")
    found = await watched.figures()
    assert found["phase_seconds_count{phase=suspend}"] == found["phase_seconds_count{phase=resume}"] == 1
    assert found["wakes_total"] == 1 and found["ends_total{kind=out_of_memory}"] == 1
    assert found["failures_total{code=disk_full}"] == found["failures_total{code=other}"] == 1
    assert found["failures_total{code=over_quota}"] == 1


async def test_operations_count_with_their_duration_and_error(watched: Watched) -> None:
    for number, error in enumerate([None, SandboxGatewayError("disk_full", "no")]):
        watched.bridge.operation(str(number), "fork", "started", "ann")
        watched.bridge.operation(str(number), "fork", "progress", "ann")
        watched.bridge.operation(str(number), "fork", "failed" if error else "succeeded", "ann", error=error)
    found = await watched.figures()
    assert found["operation_seconds_count{operation=fork}"] == 2 and found["failures_total{code=disk_full}"] == 1


async def test_sandboxes_count_by_state_now(watched: Watched) -> None:
    watched.gateway.add(ID, "ann", State.SUSPENDED)
    watched.gateway.add(OTHER, "bob", State.RUNNING)
    watched.gateway.add("gone", "bob", State.TERMINATED, death=Death(DeathKind.STOPPED))
    watched.gateway.add("application", "", State.RUNNING)
    watched.gateway.add(f"{BLANK}x", "", State.CREATING)
    found = await watched.figures()
    assert found["sandboxes{state=suspended}"] == found["sandboxes{state=running}"] == 1
    assert found["sandboxes{state=creating}"] == 0 and "sandboxes{state=terminated}" not in found
    watched.gateway.remove(ID)
    assert (await watched.figures())["sandboxes{state=suspended}"] == 0


async def test_what_is_relayed_counts_once_and_is_kept_when_its_kernel_goes(watched: Watched) -> None:
    watched.gateway.add(ID, "ann")
    watched.gateway.add(OTHER, "bob")
    one, two = watched.gateway.kernels[ID].hub, watched.gateway.kernels[OTHER].hub
    one.stats = Stats(messages=10, size=100, sent=300, left_out=2, malformed=1, rejected=4, sessions=3, connected=2)
    two.stats = Stats(messages=1, size=7, sent=7, sessions=1, connected=1, pending=50)
    found = await watched.figures()
    assert (found["messages_total"], found["message_bytes_total"], found["sent_bytes_total"]) == (11, 107, 307)
    assert found["left_out_messages_total"] == 2 and found["malformed_messages_total"] == 1
    assert found["rejected_messages_total"] == 4 and found["pending_bytes"] == 50
    assert found["websocket_sessions{connected=yes}"] == 3 and found["websocket_sessions{connected=no}"] == 1
    one.stats = Stats(messages=15, size=150, sent=300, left_out=2, sessions=1)
    watched.gateway.remove(ID)
    found = await watched.figures()
    assert (found["messages_total"], found["message_bytes_total"]) == (16, 157)
    assert found["websocket_sessions{connected=yes}"] == 1 and found["websocket_sessions{connected=no}"] == 0
    assert (await watched.figures())["messages_total"] == 16


async def test_no_id_and_no_name_of_a_user_is_anywhere(watched: Watched) -> None:
    watched.gateway.add(ID, "ann-the-owner")
    for kind in EventKind:
        await watched.note(ID, kind, "ann-the-owner", seconds=1.0, parent=f"sandbox:{ID}", profile="ann-the-owner")
    watched.bridge.operation(ID, "suspend", "started", "ann-the-owner", sandbox=ID)
    text = (await watched.metrics.render()).decode()
    assert ID not in text and "ann-the-owner" not in text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", text)


async def test_two_gateways_of_one_process_have_their_own_figures(watched: Watched) -> None:
    other = Watched()
    await watched.note(ID, EventKind.WOKE)
    assert (await other.figures())["wakes_total"] == 0 and (await watched.figures())["wakes_total"] == 1
    other.bridge.close()


# Over HTTP


@pytest.fixture
async def server(tmp_path: Path, watched: Watched) -> AsyncIterator[Server]:
    async with small_server(tmp_path, more=[("/metrics", MetricsHandler)]) as running:
        running.app.web_app.settings["sandbox_metrics"] = watched.metrics
        yield running


async def test_the_figures_are_for_administrators_only(server: Server) -> None:
    _, ann = server.user("ann")
    _, root = server.user("root", admin=True)
    assert (await server.ask("/metrics")).status == 403
    assert (await server.ask("/metrics", ann)).status == 403
    found = await server.ask("/metrics", root, scheme="Bearer")
    assert found.status == 200 and found.headers["Content-Type"].startswith("text/plain")
    assert b"sandbox_gateway_sandboxes" in found.body and b"http_request_duration_seconds" in found.body


async def test_with_one_shared_token_whoever_has_it_reads_them(
    tmp_path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_TOKEN", "one-for-all")
    async with small_server(tmp_path, users=False, more=[("/metrics", MetricsHandler)]) as server:
        server.app.web_app.settings["sandbox_metrics"] = watched.metrics
        assert (await server.ask("/metrics")).status == 403
        assert (await server.ask("/metrics", "one-for-all")).status == 200


async def test_an_administrator_may_open_them_to_all(tmp_path: Path, watched: Watched) -> None:
    async with small_server(tmp_path, more=[("/metrics", MetricsHandler)], authenticate_prometheus=False) as server:
        server.app.web_app.settings["sandbox_metrics"] = watched.metrics
        assert (await server.ask("/metrics")).status == 200
        await asyncio.sleep(0)
