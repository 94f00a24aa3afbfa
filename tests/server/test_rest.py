"""The REST routes: what they do and answer, over real HTTP; every answer is held against the description."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import PROFILE, FakeLive
from rest_service import Rest, rest_service

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import EventKind
from sandbox_gateway.model import Idle, State
from sandbox_gateway.server import operations as operations_module


@pytest.fixture
async def rest(tmp_path: Path) -> AsyncIterator[Rest]:
    async with rest_service(tmp_path) as made:
        yield made


# Making


async def test_create_answers_201_with_the_sandbox_and_its_address(rest: Rest) -> None:
    body = {"profile": PROFILE.name, "env": {"TZ": "UTC"}, "name": "a.ipynb"}
    answer = await rest.ask("POST", "/api/sandboxes", body)
    assert answer.status == 201
    made = answer.json
    assert made["state"] == "running" and made["owner"] == "ann" and made["profile"] == PROFILE.name
    assert made["name"] == "a.ipynb" and made["isolated"] is False and made["limits"]["memory"] == 1 << 30
    assert answer.headers["Location"] == f"/api/sandboxes/{made['id']}"
    assert (await rest.ok("GET", f"/api/sandboxes/{made['id']}")) == made
    [wanted] = rest.gateway.wanted
    assert wanted.environment == {"TZ": "UTC"} and wanted.id == made["id"]


@pytest.mark.parametrize("body", [None, b"", b"  \n", {}])
async def test_create_needs_no_body(rest: Rest, body: object) -> None:
    assert (await rest.ask("POST", "/api/sandboxes", body)).status == 201


async def test_an_id_can_be_chosen_and_resources_within_bounds(rest: Rest) -> None:
    wanted = str(uuid.uuid4())
    resources = {"memory": "512MiB", "idle": {"suspend": "10m"}}
    made = await rest.ok("POST", "/api/sandboxes", {"id": wanted, "resources": resources})
    assert made["id"] == wanted and made["idle"] == {"pause": None, "suspend": 600, "expire": None}
    assert rest.gateway.lifecycle.store.get(wanted).idle == Idle(suspend=600.0)
    told = await rest.problem("POST", "/api/sandboxes", {"resources": {"memory": "2GiB"}})
    assert told["status"] == 400 and told["field"] == "resources.memory" and "1073741824 bytes" in told["message"]


async def test_create_without_waiting_is_an_operation_with_progress_and_the_id(rest: Rest) -> None:
    rest.gateway.holds["create"] = asyncio.Event()
    answer = await rest.ask("POST", "/api/sandboxes?wait=0", {})
    assert answer.status == 202 and answer.json["kind"] == "create" and answer.json["state"] == "running"
    address = answer.headers["Location"]
    assert address == f"/api/operations/{answer.json['id']}"
    async with asyncio.timeout(10):
        while (found := await rest.ok("GET", address))["progress"]["done"] is None:
            await asyncio.sleep(0.01)
    assert found["progress"] == {"message": "building environment", "done": 5, "total": 10} and found["ended"] is None
    rest.gateway.holds["create"].set()
    ended = await rest.until_ended(answer.json["id"])
    assert ended["state"] == "succeeded" and ended["result"]["id"] == answer.json["sandbox"] and ended["ended"]


async def test_a_create_that_fails_is_a_problem_with_what_would_help(rest: Rest) -> None:
    rest.gateway.fails["create"] = SandboxGatewayError("over_quota", "4 of 4 sandboxes", "Suspend one: a, b.")
    told = await rest.problem("POST", "/api/sandboxes", {})
    assert (told["status"], told["code"], told["hint"]) == (403, "over_quota", "Suspend one: a, b.")
    assert (await rest.problem("POST", "/api/sandboxes", {"profile": "x"}))["code"] == "unknown_profile"


async def test_a_bug_is_told_as_one_and_shows_nothing(rest: Rest) -> None:
    rest.gateway.fails["create"] = RuntimeError("/secret/path")
    told = await rest.problem("POST", "/api/sandboxes", {})
    assert told["status"] == 500 and told["code"] == "internal" and "/secret" not in json.dumps(told)
    rest.gateway.fails["delete"] = RuntimeError("/secret/path")
    told = await rest.problem("DELETE", f"/api/sandboxes/{rest.gateway.add('ann').id}")
    assert told["code"] == "internal" and "/secret" not in json.dumps(told)


# Looking


async def test_the_list_has_pages_that_neither_lose_nor_double(rest: Rest) -> None:
    made = [rest.gateway.add("ann", created=1e9 + at // 2, id=f"s{at}") for at in range(7)]
    seen, cursor = [], ""
    while True:
        page = await rest.ok("GET", f"/api/sandboxes?limit=2{cursor}")
        seen += [one["id"] for one in page["sandboxes"]]
        if len(seen) == 2:
            rest.gateway.lifecycle.store.delete("s0")
            rest.gateway.add("ann", created=1.0, id="before")
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert seen == [record.id for record in made]
    for wrong in ("x", "!!!", "é", "bm9uZQ=="):
        told = await rest.problem("GET", f"/api/sandboxes?cursor={wrong}")
        assert told["status"] == 400 and told["field"] == "cursor"


async def test_the_list_is_filtered_by_state_profile_owner_and_name(rest: Rest) -> None:
    running = rest.gateway.add("ann", name="x").id
    asleep = rest.gateway.add("ann", State.SUSPENDED).id
    over = rest.gateway.add("ann", State.FAILED).id
    other = rest.gateway.add("bob").id

    async def ids(query: str, token: str | None = None) -> set[str]:
        return {one["id"] for one in (await rest.ok("GET", f"/api/sandboxes{query}", token=token))["sandboxes"]}

    assert await ids("") == {running, asleep}
    assert await ids("?state=all") == {running, asleep, over}
    assert await ids("?state=failed,suspended") == await ids("?state=failed&state=suspended") == {over, asleep}
    assert await ids("?name=x") == {running} and await ids("?profile=none") == set()
    assert await ids("", rest.admin) == {running, asleep, other}
    assert await ids("?owner=bob", rest.admin) == {other} and await ids("?owner=bob") == set()
    assert await ids("?1700000000000") == {running, asleep}, "JupyterLab adds a number that means nothing"


async def test_memory_is_told_when_asked_for(rest: Rest) -> None:
    running = rest.gateway.add("ann").id
    assert (await rest.ok("GET", f"/api/sandboxes/{running}"))["memory"] is None
    assert (await rest.ok("GET", f"/api/sandboxes/{running}?stats=true"))["memory"] == 1 << 20
    assert (await rest.ok("GET", "/api/sandboxes?stats=1"))["sandboxes"][0]["memory"] == 1 << 20
    assert (await rest.ok("GET", f"/api/sandboxes/{running}/stats"))["processes"] == 3


async def test_what_a_sandbox_uses_is_told_with_its_gpus_and_of_a_suspended_one_what_it_is_saved_in(rest: Rest) -> None:
    running, asleep = rest.gateway.add("ann").id, rest.gateway.add("ann", State.SUSPENDED, snapshot="saved").id
    assert (await rest.ok("GET", f"/api/sandboxes/{running}"))["usage"] is None
    rest.gateway.lifecycle.live.pop(asleep, None)
    listed = (await rest.ok("GET", "/api/sandboxes?stats=true"))["sandboxes"]
    used = {one["id"]: one["usage"] for one in listed}
    gpu = {"busy": 0.25, "memory": 1 << 30, "memory_limit": 1 << 33}
    assert used[running] == {"memory": 1 << 20, "cpu_seconds": 0.5, "disk": 4096, "saved": None, "gpu": gpu}
    assert used[asleep] == {"memory": None, "cpu_seconds": None, "disk": None, "saved": 5 << 20, "gpu": None}
    stats = await rest.ok("GET", f"/api/sandboxes/{running}/stats")
    assert (stats["disk"], stats["gpu"]) == (4096, gpu)


async def test_a_quota_is_told_with_what_is_used_of_it(rest: Rest) -> None:
    rest.gateway.add("ann")
    rest.gateway.add("bob")
    assert await rest.ok("GET", "/api/quota") == {
        "owner": "ann",
        "live": {"used": 1, "limit": 4},
        "suspended": {"used": 1, "limit": None},
        "memory": {"used": 1 << 30, "limit": None},
        "disk": {"used": 7, "limit": 1 << 34},
        "gpus": {"used": 0, "limit": None},
        "creates_per_minute": {"used": 2, "limit": None},
    }
    assert (await rest.problem("GET", "/api/quota?owner=bob"))["status"] == 400


async def test_logs_are_plain_text_and_events_have_numbers(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    for kind in (EventKind.CREATED, EventKind.STARTED, EventKind.SUSPENDED):
        rest.gateway.note(one, kind)
    answer = await rest.ask("GET", f"/api/sandboxes/{one}/logs")
    assert answer.body.decode() == "a log \N{REPLACEMENT CHARACTER}\n"
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    told = await rest.ok("GET", f"/api/sandboxes/{one}/events?since=1&limit=1")
    assert [event["kind"] for event in told["events"]] == ["started"]


async def test_profiles_say_what_may_be_chosen_and_nothing_of_the_administrators(rest: Rest) -> None:
    [one] = (await rest.ok("GET", "/api/profiles"))["profiles"]
    assert one["name"] == PROFILE.name and one["choices"]["properties"]["memory"]["maximum"] == 1 << 30
    assert one["start"] == {"template": True, "seconds": 0.2}
    assert one["active_output"] is False
    assert "environment" not in one and "mounts" not in one and "source" not in one
    assert await rest.ok("GET", f"/api/profiles/{PROFILE.name}") == one
    assert (await rest.problem("GET", "/api/profiles/x"))["code"] == "unknown_profile"


# Doing


async def test_suspend_and_resume_are_operations_or_wait_for_the_outcome(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    answer = await rest.ask("POST", f"/api/sandboxes/{one}/suspend", {"reason": "over night"})
    assert answer.status == 202 and answer.json["sandbox"] == one
    ended = await rest.until_ended(answer.json["id"])
    assert ended["result"]["state"] == "suspended" and ended["progress"]["message"] == "saving the memory"
    assert rest.gateway.reasons == ["over night"]
    again = await rest.ask("POST", f"/api/sandboxes/{one}/suspend?wait=5")
    assert again.status == 200 and again.json["state"] == "suspended", "harmless"
    woken = await rest.ask("POST", f"/api/sandboxes/{one}/resume?wait=5")
    assert woken.status == 200 and woken.json["state"] == "running"
    assert (await rest.ok("POST", f"/api/sandboxes/{one}/resume?wait=5"))["state"] == "running"


async def test_an_operation_that_fails_says_why(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    rest.gateway.fails["suspend"] = SandboxGatewayError("disk_full", "no space left")
    told = await rest.problem("POST", f"/api/sandboxes/{one}/suspend?wait=5")
    assert told["status"] == 507
    answer = await rest.ask("POST", f"/api/sandboxes/{one}/suspend")
    ended = await rest.until_ended(answer.json["id"])
    assert ended["state"] == "failed" and ended["error"]["code"] == "disk_full" and ended["result"] is None


async def test_pause_interrupt_restart_and_rename(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    address = f"/api/sandboxes/{one}"
    for _ in range(2):
        assert (await rest.ok("POST", f"{address}/pause"))["state"] == "paused"
    assert (await rest.ok("POST", f"{address}/interrupt"))["id"] == one
    assert rest.gateway.lifecycle.live[one].interrupts == 1
    assert (await rest.ok("POST", f"{address}/restart", {}))["id"] == one
    assert (await rest.ok("PATCH", address, {"name": "new"}))["name"] == "new"
    assert (await rest.problem("PATCH", address, {}))["field"] == "name"


async def test_fork_answers_with_children_and_what_failed(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    answer = await rest.ask("POST", f"/api/sandboxes/{one}/fork?wait=5", {"count": 3})
    assert answer.status == 201
    assert [child["error"] and child["error"]["code"] for child in answer.json["children"]] == [None, None, "disk_full"]
    for count in (0, 1001, 1.5, "2", None, True):
        told = await rest.problem("POST", f"/api/sandboxes/{one}/fork?wait=5", {"count": count})
        assert told["status"] == 400 and told["field"] == "count"


async def test_delete_ends_and_forget_removes_the_record(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    for _ in range(2):
        assert (await rest.ask("DELETE", f"/api/sandboxes/{one}")).status == 204
    found = await rest.ok("GET", f"/api/sandboxes/{one}")
    assert found["state"] == "terminated" and found["death"]["kind"] == "stopped" and found["death"]["reason"]
    for action in ("suspend?wait=5", "resume?wait=5", "pause", "interrupt", "restart", "execute"):
        body = {"code": "1"} if action == "execute" else None
        if action != "suspend?wait=5":
            assert (await rest.problem("POST", f"/api/sandboxes/{one}/{action}", body))["status"] == 409
    assert (await rest.ask("DELETE", f"/api/sandboxes/{one}?forget=true")).status == 204
    assert (await rest.problem("GET", f"/api/sandboxes/{one}"))["code"] == "unknown_sandbox"


# Snapshots


async def test_a_snapshot_is_made_listed_started_and_removed(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    answer = await rest.ask("POST", f"/api/sandboxes/{one}/snapshots?wait=5", {"name": "loaded"})
    assert answer.status == 201 and answer.json["name"] == "loaded" and answer.json["sandbox"] == one
    assert answer.headers["Location"] == f"/api/snapshots/{answer.json['id']}"
    assert (await rest.ok("GET", f"/api/sandboxes/{one}/snapshots"))["snapshots"] == [answer.json]
    assert (await rest.ok("GET", "/api/snapshots"))["snapshots"] == [answer.json]
    for key in ("id", "name"):
        assert await rest.ok("GET", f"/api/snapshots/{answer.json[key]}") == answer.json
    started = await rest.ask("POST", "/api/snapshots/loaded/start?wait=5", {"count": 2})
    assert started.status == 201 and len(started.json["children"]) == 2
    assert (await rest.ask("DELETE", "/api/snapshots/loaded")).status == 204
    assert (await rest.problem("DELETE", "/api/snapshots/loaded"))["code"] == "unknown_snapshot"


async def test_only_administrators_publish_and_what_is_published_hides_its_origin(rest: Rest) -> None:
    own, other = rest.gateway.add("ann").id, rest.gateway.add("bob").id
    await rest.ok("POST", f"/api/sandboxes/{own}/snapshots?wait=5", {"name": "mine"})
    await rest.ok("POST", f"/api/sandboxes/{other}/snapshots?wait=5", {"name": "his"}, token=rest.admin)
    assert (await rest.problem("PATCH", "/api/snapshots/mine", {"published": True}))["code"] == "forbidden"
    assert (await rest.problem("PATCH", "/api/snapshots/his", {"published": True}))["status"] == 404
    assert (await rest.ok("PATCH", "/api/snapshots/his", {"published": True}, token=rest.admin))["published"]
    seen = await rest.ok("GET", "/api/snapshots/his")
    assert seen["owner"] == "bob" and seen["sandbox"] is None and seen["parent"] is None
    assert (await rest.problem("DELETE", "/api/snapshots/his"))["status"] == 404


# Operations


async def test_a_caller_who_goes_away_does_not_cancel_an_operation(rest: Rest) -> None:
    one = rest.gateway.add("ann").id
    rest.gateway.holds["suspend"] = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", rest.server.app.port)
    request = f"POST /api/sandboxes/{one}/suspend?wait=60 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
    writer.write(f"{request}Authorization: token {rest.token}\r\n\r\n".encode())
    async with asyncio.timeout(10):
        while not (found := (await rest.ok("GET", "/api/operations"))["operations"]):
            await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()
    rest.gateway.holds["suspend"].set()
    assert (await rest.until_ended(found[0]["id"]))["state"] == "succeeded"
    assert rest.gateway.lifecycle.store.get(one).state is State.SUSPENDED


async def test_operations_are_their_callers_and_an_administrators(rest: Rest) -> None:
    mine = (await rest.ask("POST", "/api/sandboxes?wait=0", {})).json["id"]
    others = (await rest.ask("POST", "/api/sandboxes?wait=0", {}, token=rest.admin)).json["id"]
    assert [one["id"] for one in (await rest.ok("GET", "/api/operations"))["operations"]] == [mine]
    assert (await rest.problem("GET", f"/api/operations/{others}"))["code"] == "unknown_operation"
    seen = (await rest.ok("GET", "/api/operations", token=rest.admin))["operations"]
    assert [one["id"] for one in seen] == [mine, others]


async def test_waiting_ends_when_its_time_is_over_and_too_many_are_refused(
    rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations_module, "MAX_RUNNING", 2)
    one = rest.gateway.add("ann").id
    rest.gateway.holds["suspend"] = asyncio.Event()
    for _ in range(2):
        assert (await rest.ask("POST", f"/api/sandboxes/{one}/suspend?wait=0.05")).status == 202
    assert (await rest.problem("POST", f"/api/sandboxes/{one}/suspend"))["status"] == 429
    assert (await rest.ask("POST", f"/api/sandboxes/{one}/suspend", token=rest.admin)).status == 202
    rest.gateway.holds["suspend"].set()


# Who may


async def test_what_belongs_to_another_does_not_exist(rest: Rest) -> None:
    others: FakeLive = rest.gateway.lifecycle.live[rest.gateway.add("bob").id]
    address = f"/api/sandboxes/{others.id}"
    for method, path, body in (
        ("GET", "", None),
        ("PATCH", "", {"name": "x"}),
        ("DELETE", "", None),
        ("DELETE", "?forget=true", None),
        *(("POST", f"/{action}", None) for action in ("suspend", "resume", "pause", "interrupt", "restart", "fork")),
        *(("GET", f"/{what}", None) for what in ("snapshots", "logs", "stats", "events")),
        ("POST", "/snapshots", {"name": "x"}),
        ("POST", "/execute", {"code": "1"}),
        ("POST", "/input", {"value": "1"}),
    ):
        told = await rest.problem(method, address + path, body)
        assert (told["status"], told["code"]) == (404, "unknown_sandbox"), (method, path)
    assert rest.gateway.lifecycle.store.get(others.id).state is State.RUNNING and not others.requests
    assert not (await rest.ok("GET", "/api/operations", token=rest.admin))["operations"]


async def test_a_cookie_needs_the_xsrf_token_and_a_token_does_not(rest: Rest) -> None:
    _, secret = rest.server.user("cat")
    cookies = await rest.server.log_in(secret)
    made = await rest.server.ask("/api/sandboxes", method="POST", body=b"", headers=cookies)
    assert made.status == 201 and made.json["owner"] == "cat"
    without = {"Cookie": cookies["Cookie"]}
    told = await rest.problem("POST", "/api/sandboxes", {}, token="", headers=without)
    assert told["status"] == 403 and told["code"] == "forbidden"


async def test_who_is_not_known_is_told_that_and_not_of_a_cookie(rest: Rest) -> None:
    for token in ("", "wrong"):
        told = await rest.problem("POST", "/api/sandboxes", {}, token=token)
        assert (told["status"], told["code"]) == (401, "unauthenticated") and "_xsrf" not in told["message"]
