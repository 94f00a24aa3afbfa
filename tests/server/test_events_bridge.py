"""What happens to sandboxes reaches the event bus, and each subscriber hears of his own only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jupyter_events import EventLogger
from small_gateway import Live, SmallGateway
from small_server import Server, small_server
from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketClientConnection

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventKind
from sandbox_gateway.model import State
from sandbox_gateway.server import event_handlers
from sandbox_gateway.server.callers import EVERYBODY, Caller
from sandbox_gateway.server.events import KERNEL_ACTIONS, OPERATION, PHASES, SANDBOX, SCHEMAS, EventBridge, may_see
from sandbox_gateway.server.events import schema_id as id_of
from sandbox_gateway.server.identity import REVOKED

ANN, BOB = "a" * 8, "b" * 8
CONTENTS = "https://events.jupyter.org/jupyter_server/contents_service/v1"


class Bus:
    """An event logger, and what it was told."""

    def __init__(self) -> None:
        self.logger = EventLogger()
        self.told: list[tuple[str, dict[str, Any]]] = []

    def listen(self) -> None:
        self.logger.add_listener(listener=self._take)

    async def _take(self, logger: EventLogger, schema_id: str, data: dict[str, Any]) -> None:
        self.told.append((schema_id, data))

    async def settled(self, gateway: SmallGateway, bridge: EventBridge) -> list[dict[str, Any]]:
        await gateway.lifecycle.events.flush()
        await bridge.flush()
        await self.logger.gather_listeners()
        return [data for _, data in self.told]


@pytest.fixture
def gateway() -> SmallGateway:
    return SmallGateway()


# The bridge


def test_the_schema_knows_each_kind_and_each_phase_and_its_own_address() -> None:
    for path, place, values in (
        (SCHEMAS / "sandbox.yaml", "kind", [str(kind) for kind in EventKind]),
        (SCHEMAS / "operation.yaml", "phase", list(PHASES)),
    ):
        schema = yaml.safe_load(path.read_text())
        assert schema["$id"] == id_of(path) and schema["properties"][place]["enum"] == values


@pytest.mark.parametrize("kind", list(EventKind))
async def test_each_kind_of_event_reaches_the_bus_with_its_owner(gateway: SmallGateway, kind: EventKind) -> None:
    bus = Bus()
    bridge = EventBridge(gateway, bus.logger)
    bus.listen()
    gateway.add(ANN, "ann", State.PAUSED)
    gateway.lifecycle.events.note(ANN, kind, "it happened", seconds=1.5, children=["x"])
    (event,) = await bus.settled(gateway, bridge)
    bridge.close()
    assert event["kind"] == str(kind) and event["sandbox"] == ANN and event["owner"] == "ann"
    assert (event["profile"], event["state"], event["text"]) == ("python3-gvisor", "paused", "it happened")
    assert event["data"] == {"seconds": 1.5, "children": ["x"]} and event["id"] == 1


async def test_the_owner_is_known_before_the_kernel_is_the_gateways_and_after_its_record_is_gone(
    gateway: SmallGateway,
) -> None:
    bus = Bus()
    bridge = EventBridge(gateway, bus.logger)
    bus.listen()
    record = gateway.add(ANN, "ann", State.CREATING)
    del gateway.kernels[ANN]
    gateway.lifecycle.live[ANN] = Live(record)
    gateway.lifecycle.events.note(ANN, EventKind.CREATED)
    await bus.settled(gateway, bridge)
    assert bridge.owner_of(ANN) == "ann"
    del gateway.lifecycle.live[ANN], gateway.lifecycle.store.records[ANN]
    gateway.lifecycle.events.note(ANN, EventKind.DIED, "it died")
    events = await bus.settled(gateway, bridge)
    bridge.close()
    assert [event["owner"] for event in events] == ["ann", "ann"] and bridge.owner_of(ANN) == "ann"


async def test_what_is_nobodys_has_no_owner_and_order_is_kept(gateway: SmallGateway) -> None:
    bus = Bus()
    bridge = EventBridge(gateway, bus.logger)
    bus.listen()
    gateway.add(ANN, "ann")
    gateway.lifecycle.events.note("", EventKind.TEMPLATE_BUILT, "", profile="p", seconds=2.0)
    gateway.lifecycle.events.note("unknown", EventKind.STOPPED)
    for number in range(20):
        gateway.lifecycle.events.note(ANN if number % 2 else "", EventKind.WOKE, str(number))
    events = await bus.settled(gateway, bridge)
    bridge.close()
    assert [event["owner"] for event in events[:2]] == ["", ""] and events[0]["profile"] == "p"
    assert [event["id"] for event in events] == list(range(1, 23))


async def test_operations_reach_the_bus_and_whoever_counts(gateway: SmallGateway) -> None:
    bus = Bus()
    bridge = EventBridge(gateway, bus.logger)
    bus.listen()
    counted: list[object] = []
    bridge.on_operation += [lambda *values: 1 / 0, lambda *values: counted.append(values)]
    error = SandboxGatewayError("disk_full", "no space")
    bridge.operation("op1", "suspend", "started", "ann", sandbox=ANN)
    bridge.operation("op1", "suspend", "progress", "ann", sandbox=ANN, text="writing", done=5, total=10)
    bridge.operation("op1", "suspend", "failed", "ann", sandbox=ANN, error=error)
    bridge.operation("op2", "suspend", "no such phase", "ann")
    await bus.settled(gateway, bridge)
    bridge.close()
    assert [data["phase"] for _, data in bus.told] == ["started", "progress", "failed"]
    assert bus.told[1][1]["done"] == 5 and bus.told[2][1]["error"]["code"] == "disk_full"
    assert len(counted) == 4


async def test_after_close_nothing_is_told_and_a_second_bridge_may_follow(gateway: SmallGateway) -> None:
    bus = Bus()
    EventBridge(gateway, bus.logger).close()
    bridge = EventBridge(gateway, bus.logger)
    bus.listen()
    gateway.lifecycle.events.note(ANN, EventKind.WOKE)
    assert len(await bus.settled(gateway, bridge)) == 1
    bridge.close()


# Who may see what


@pytest.mark.parametrize(
    ("schema", "data", "seen"),
    [
        (SANDBOX, {"owner": "ann"}, True),
        (SANDBOX, {"owner": "bob"}, False),
        (SANDBOX, {"owner": ""}, False),
        (SANDBOX, {}, False),
        (OPERATION, {"owner": "ann"}, True),
        (OPERATION, {"owner": "bob"}, False),
        (KERNEL_ACTIONS, {"action": "start", "kernel_id": ANN}, True),
        (KERNEL_ACTIONS, {"action": "start", "kernel_id": BOB}, False),
        (KERNEL_ACTIONS, {"action": "start", "kernel_id": "unknown"}, False),
        (KERNEL_ACTIONS, {"action": "start", "status": "error"}, False),
        (CONTENTS, {"action": "get", "path": "x"}, False),
        ("https://example.org/other/v1", {"owner": "ann", "kernel_id": ANN}, False),
    ],
)
def test_a_user_sees_his_own_and_an_administrator_all(schema: str, data: dict[str, Any], seen: bool) -> None:
    owners = {ANN: "ann", BOB: "bob"}
    assert may_see(Caller("ann"), schema, data, owners.get) is seen
    assert may_see(Caller("root", admin=True), schema, data, owners.get)
    assert may_see(EVERYBODY, schema, data, owners.get)


# Over HTTP


class Subscriber:
    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection

    async def next(self) -> dict[str, Any]:
        raw = await asyncio.wait_for(self.connection.read_message(), 5)
        assert raw is not None, (self.connection.close_code, self.connection.close_reason)
        found: dict[str, Any] = json.loads(raw)
        return found


@pytest.fixture
async def server(tmp_path: Path, gateway: SmallGateway) -> AsyncIterator[Server]:
    async with small_server(tmp_path) as running:
        bridge = EventBridge(gateway, running.app.event_logger)
        running.app.web_app.settings["sandbox_events"] = bridge
        yield running
        bridge.close()


async def test_each_subscriber_gets_his_own_events(server: Server, gateway: SmallGateway) -> None:
    secrets = {name: server.user(name, admin=name == "root")[1] for name in ("ann", "bob", "root")}
    people = {name: Subscriber(await server.subscribe(secret)) for name, secret in secrets.items()}
    gateway.add(ANN, "ann")
    gateway.add(BOB, "bob")
    note = gateway.lifecycle.events.note
    note(ANN, EventKind.SUSPENDED, "one")
    note(BOB, EventKind.SUSPENDED, "two")
    note("", EventKind.TEMPLATE_BUILT, "three")
    logger = server.app.event_logger
    for kernel_id in (ANN, BOB):
        logger.emit(schema_id=KERNEL_ACTIONS, data={"action": "interrupt", "kernel_id": kernel_id, "msg": "four"})
    logger.emit(schema_id=CONTENTS, data={"action": "get", "path": "five"})
    await gateway.lifecycle.events.flush()
    await asyncio.sleep(0.05)
    note(ANN, EventKind.WOKE, "end")
    note(BOB, EventKind.WOKE, "end")

    async def heard(name: str, ends: int) -> list[str]:
        texts: list[str] = []
        while texts.count("end") < ends:
            event = await people[name].next()
            texts.append(event.get("text") or event.get("msg") or event.get("path"))
            if name != "root":
                assert event.get("owner", name) == name and event.get("kernel_id", ANN if name == "ann" else BOB) == (
                    ANN if name == "ann" else BOB
                )
        return sorted(texts)

    assert await heard("ann", 1) == ["end", "four", "one"]
    assert await heard("bob", 1) == ["end", "four", "two"]
    assert await heard("root", 2) == ["end", "end", "five", "four", "four", "one", "three", "two"]


async def test_nobody_subscribes_without_a_token(server: Server) -> None:
    for token in ("", "sgt_wrong"):
        with pytest.raises(HTTPClientError) as caught:
            await server.subscribe(token)
        assert caught.value.code == 403


async def test_a_revoked_user_is_cut_off_at_the_next_event(server: Server, gateway: SmallGateway) -> None:
    token, secret = server.user("ann")
    person = Subscriber(await server.subscribe(secret))
    gateway.add(ANN, "ann")
    gateway.lifecycle.events.note(ANN, EventKind.WOKE, "before")
    assert (await person.next())["text"] == "before"
    server.users.remove(token.id)
    gateway.lifecycle.events.note(ANN, EventKind.WOKE, "after")
    assert await asyncio.wait_for(person.connection.read_message(), 5) is None
    assert person.connection.close_code == REVOKED


async def test_a_subscriber_who_reads_nothing_is_cut_off_and_costs_a_bounded_amount(
    server: Server, gateway: SmallGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_handlers, "MAX_WAITING", 20)
    _, secret = server.user("ann")
    person = Subscriber(await server.subscribe(secret))
    gateway.add(ANN, "ann")
    person.connection.stream.socket.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
    logger = server.app.event_logger
    text = "x" * 100_000
    for _ in range(200):
        data = {"operation": "o", "kind": "k", "phase": "progress", "owner": "ann", "text": text}
        logger.emit(schema_id=OPERATION, data=data)
    await asyncio.sleep(0.2)
    assert not logger._modified_listeners[OPERATION]


async def test_users_put_nothing_on_the_bus_and_nobody_forges_the_servers_events(server: Server) -> None:
    _, ann = server.user("ann")
    _, root = server.user("root", admin=True)
    contents = {"schema_id": CONTENTS, "version": "1", "data": {"action": "get", "path": "x"}}
    forged = [
        {"schema_id": SANDBOX, "version": "1", "data": {"owner": "ann"}},
        {"schema_id": OPERATION, "version": "1", "data": {"owner": "ann"}},
        {"schema_id": KERNEL_ACTIONS, "version": "1", "data": {"action": "start", "kernel_id": ANN, "msg": ""}},
    ]
    for event in (contents, *forged):
        assert (await server.ask("/api/events", ann, method="POST", body=event)).status == 403
    for event in forged:
        assert (await server.ask("/api/events", root, method="POST", body=event)).status == 403
    assert (await server.ask("/api/events", root, method="POST", body=contents)).status == 204


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"1", b'"x"', b"{", b"{}", b'{"schema_id": []}',
     b'{"schema_id": {}, "data": {}}', b"\xff", b"[" * 100_000, b'{"schema_id": "x", "version": [], "data": {}}'],
)  # fmt: skip
async def test_a_malformed_event_is_a_bad_request(server: Server, body: bytes) -> None:
    _, root = server.user("root", admin=True)
    assert (await server.ask("/api/events", root, method="POST", body=body)).status == 400
