"""Two users of one gateway: nothing of the one is visible or changeable for the other, by whatever way he tries."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from acceptance import Product
from people import gateway_for_users, revoke, token
from served import Answer, Served, Socket
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from sandbox_gateway.server import openapi

pytestmark = pytest.mark.timeout(300)
SECRET = "what-ann-printed"
PATH = "shared.ipynb"
NAME = "anns-model"


@dataclass
class World:
    """What ann has."""

    served: Served
    ann: str
    bob: str
    running: str
    suspended: str
    ended: str
    session: str
    """Jupyter's session of the running one."""
    snapshot: str
    operation: str
    socket: Socket

    def ids(self) -> list[str]:
        """All of it by name."""
        return [self.running, self.suspended, self.ended, self.session, self.snapshot, self.operation]

    async def check(self) -> None:
        """Everything is as it was."""
        assert (await self.socket.run("print(x)")).stdout == "41\n"
        found = (await self.served.ok("GET", "/api/sandboxes?state=all", token=self.ann))["sandboxes"]
        states = {one["id"]: one["state"] for one in found}
        assert states == {self.running: "running", self.suspended: "suspended", self.ended: "terminated"}
        assert {one["name"] for one in found} == {"anns", ""}
        (session,) = await self.served.ok("GET", "/api/sessions", token=self.ann)
        assert (session["id"], session["path"], session["kernel"]["id"]) == (self.session, PATH, self.running)
        (snapshot,) = (await self.served.ok("GET", "/api/snapshots", token=self.ann))["snapshots"]
        assert (snapshot["id"], snapshot["published"]) == (self.snapshot, False)


@pytest.fixture(scope="module")
def _users(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with gateway_for_users(product, tmp_path_factory.mktemp("users") / "gateway.log") as served:
        yield served


@pytest.fixture(scope="module")
def tokens(product: Product, _users: Served) -> tuple[str, str]:
    return token(product, "ann"), token(product, "bob")


@pytest.fixture
async def users(_users: Served) -> AsyncIterator[Served]:
    """The gateway; nothing of what a test makes there is left."""
    yield _users
    await _users.hang_up()
    for one in (await _users.ok("GET", "/api/sandboxes?state=all&limit=1000"))["sandboxes"]:
        await _users.ask("DELETE", f"/api/sandboxes/{one['id']}?forget=true")
    for one in (await _users.ok("GET", "/api/snapshots"))["snapshots"]:
        await _users.ask("DELETE", f"/api/snapshots/{one['id']}")


@pytest.fixture
async def world(users: Served, tokens: tuple[str, str]) -> World:
    ann, bob = tokens
    body = {"path": PATH, "type": "notebook", "name": PATH, "kernel": {"name": "python3"}}
    session = await users.ok("POST", "/api/sessions", body, token=ann)
    running = session["kernel"]["id"]
    await users.ok("PATCH", f"/api/sandboxes/{running}", {"name": "anns"}, token=ann)
    socket = await users.open(running, "same-session", token=ann)
    await socket.run(f"x = 41; print({SECRET!r})")
    saved = await users.ok("POST", f"/api/sandboxes/{running}/snapshots?wait=60", {"name": NAME}, token=ann)
    suspended, ended = await users.create(token=ann), await users.create(token=ann)
    await users.ok("DELETE", f"/api/sandboxes/{ended}", token=ann)
    operation = await users.ok("POST", f"/api/sandboxes/{suspended}/suspend?wait=0", token=ann)
    await users.ok("GET", f"/api/operations/{operation['id']}?wait=60", token=ann)
    found = World(users, ann, bob, running, suspended, ended, session["id"], saved["id"], operation["id"], socket)
    await found.check()
    return found


BODIES: dict[tuple[str, str], Any] = {
    ("patch", "/api/sandboxes/{id}"): {"name": "bobs"},
    ("post", "/api/sandboxes/{id}/execute"): {"code": f"x = 0; print({SECRET!r})"},
    ("post", "/api/sandboxes/{id}/fork"): {"count": 2},
    ("post", "/api/sandboxes/{id}/input"): {"value": "42"},
    ("post", "/api/sandboxes/{id}/snapshots"): {"name": "stolen"},
    ("post", "/api/snapshots/{snapshot}/start"): {"count": 1},
    ("patch", "/api/snapshots/{snapshot}"): {"published": True},
}
"""What is sent; an empty object to all other routes."""


def routes() -> list[tuple[str, str, Any]]:
    """Method, address and body of each route that names one thing: ours by the description, and Jupyter's."""
    found = [
        (method.upper(), path, BODIES.get((method, path), None if method in ("get", "delete") else {}))
        for path, methods in openapi.description()["paths"].items()
        for method in methods
        if method in ("get", "post", "put", "patch", "delete") and "{" in path and "{profile}" not in path
    ]
    found += [("DELETE", "/api/sandboxes/{id}?forget=true", None), ("GET", "/api/sandboxes/{id}?stats=true", None)]
    found += [("POST", f"/api/sandboxes/{{id}}/{what}?wait=5", {}) for what in ("suspend", "resume", "fork")]
    found += [("GET", "/api/operations/{operation}?wait=1", None)]
    found += [("GET", "/api/sandboxes/{id}/events?since=0", None)]
    found += [(method, "/api/kernels/{id}", None) for method in ("GET", "DELETE")]
    found += [("POST", f"/api/kernels/{{id}}/{action}", None) for action in ("interrupt", "restart")]
    found += [(method, "/api/sessions/{session}", None) for method in ("GET", "DELETE")]
    found += [("PATCH", "/api/sessions/{session}", {"path": "bobs.ipynb", "kernel": {"name": "python3"}})]
    found += [("GET", "/api/kernels/{id}/channels", None), ("GET", "/api/resolvePath?path=x&kernel={id}", None)]
    return found


def told(answer: Answer, address: str) -> tuple[int, str]:
    """What an answer says, but for the id that was asked for and for what differs each time."""
    text = answer.body.decode() if isinstance(answer.body, bytes) else json.dumps(answer.body, sort_keys=True)
    varying = ("Date", "Content-Length", "Etag", "X-Request-Id", "Set-Cookie")
    headers = sorted(f"{key}: {value}" for key, value in dict(answer.headers).items() if key not in varying)
    return answer.status, (text + "\n".join(headers)).replace(address, "ID")


async def test_no_route_tells_or_changes_anything_of_anothers(world: World) -> None:
    tried = 0
    for method, path, body in routes():
        things = {
            "{id}": [world.running, world.suspended, world.ended],
            "{session}": [world.session],
            "{snapshot}": [world.snapshot, NAME],
            "{operation}": [world.operation],
        }
        for name, ids in things.items():
            if name not in path:
                continue
            for wanted in ids:
                # As many characters as the id has, so that even the length of an answer is the same.
                stranger = str(uuid.uuid4()) if len(wanted) == 36 else uuid.uuid4().hex[: len(wanted)]
                real = await world.served.ask(method, path.replace(name, wanted), body, token=world.bob)
                none = await world.served.ask(method, path.replace(name, stranger), body, token=world.bob)
                assert told(real, wanted) == told(none, stranger), (method, path)
                expected = 200 if "resolvePath" in path else 404
                assert real.status == expected, (method, path, real.status, real.body)
                tried += 1
    print(f"\n{tried} requests for things of another")
    await world.check()


async def test_lists_and_counts_show_only_ones_own(world: World) -> None:
    served, bob = world.served, world.bob
    mine = await served.create(token=bob)
    for path in (
        "/api/sandboxes",
        "/api/sandboxes?state=all&stats=true",
        "/api/sandboxes?owner=ann",
        "/api/sandboxes?name=anns&state=all",
        "/api/kernels",
        "/api/sessions",
        "/api/snapshots",
        "/api/operations",
        "/api/status",
        "/api/profiles",
        "/api/quota",
        f"/api/sandboxes/{mine}/events",
        f"/api/sandboxes/{mine}/snapshots",
    ):
        answer = await served.ask("GET", path, token=bob)
        assert answer.status == 200, path
        text = json.dumps(answer.body)
        assert not [one for one in (*world.ids(), NAME, "anns", '"ann"', PATH) if one in text], (path, text)
    quota = await served.ok("GET", "/api/quota", token=bob)
    assert (quota["live"]["used"], quota["suspended"]["used"], quota["disk"]["used"]) == (1, 0, 0)
    status = await served.ok("GET", "/api/status", token=bob)
    assert (status["kernels"], status["connections"]) == (1, 0)
    assert [one["id"] for one in await served.ok("GET", "/api/kernels", token=bob)] == [mine]
    assert (await served.ask("GET", "/metrics", token=bob)).status == 403
    metrics = (await served.ask("GET", "/metrics")).body.decode()
    assert not [one for one in (*world.ids(), NAME, "ann", "bob") if f'"{one}"' in metrics]


@pytest.mark.parametrize("query", [{}, {"replay": "1"}, {"session_id": "same-session"}])
@pytest.mark.parametrize("protocol", ["v1.kernel.websocket.jupyter.org", None])
async def test_no_websocket_of_anothers_kernel_opens(world: World, query: dict[str, str], protocol: str | None) -> None:
    session = query.pop("session_id", "other")
    for kernel in (world.running, world.suspended, world.ended, str(uuid.uuid4())):
        with pytest.raises(HTTPClientError) as refused:
            await world.served.open(kernel, session, token=world.bob, protocol=protocol, **query)
        assert refused.value.code == 404
    await world.check()


async def test_a_chosen_id_that_is_anothers_is_refused_in_the_same_words_alive_or_ended(world: World) -> None:
    served, bob = world.served, world.bob

    async def answers(wanted: str) -> list[tuple[int, str]]:
        requests = (
            ("/api/sandboxes?wait=60", {"id": wanted}),
            ("/api/kernels", {"name": "python3", "kernel_id": wanted}),
            ("/api/sessions", {"path": "bobs.ipynb", "type": "notebook", "kernel": {"id": wanted}}),
        )
        return [told(await served.ask("POST", path, body, token=bob), wanted) for path, body in requests]

    alive, asleep, ended = [await answers(one) for one in (world.running, world.suspended, world.ended)]
    assert alive == asleep == ended
    assert [status for status, _ in alive] == [409, 409, 409]
    assert not [word for word in ("ann", "running", "suspended") if f'{word}"' in alive[0][1] + alive[1][1]]
    assert await served.ok("GET", "/api/sessions", token=bob) == []
    await world.check()


async def test_a_session_cannot_be_moved_to_anothers_kernel(world: World) -> None:
    served, bob = world.served, world.bob
    body = {"path": "bobs.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
    mine = await served.ok("POST", "/api/sessions", body, token=bob)
    answers = []
    for wanted in (world.running, world.suspended, world.ended, str(uuid.uuid4())):
        answer = await served.ask("PATCH", f"/api/sessions/{mine['id']}", {"kernel": {"id": wanted}}, token=bob)
        answers.append(told(answer, wanted))
    assert len(set(answers)) == 1
    assert answers[0][0] == 400
    (after,) = await served.ok("GET", "/api/sessions", token=bob)
    assert after["kernel"]["id"] == mine["kernel"]["id"]
    await world.check()


async def test_two_users_have_a_notebook_of_the_same_path_each_with_a_kernel_of_his_own(world: World) -> None:
    served, bob = world.served, world.bob
    body = {"path": PATH, "type": "notebook", "name": PATH, "kernel": {"name": "python3"}}
    mine = await served.ok("POST", "/api/sessions", body, token=bob)
    assert mine["kernel"]["id"] != world.running
    assert (await served.ok("POST", "/api/sessions", body, token=bob))["id"] == mine["id"]
    assert [one["id"] for one in await served.ok("GET", "/api/sessions", token=bob)] == [mine["id"]]
    socket = await served.open(mine["kernel"]["id"], "same-session", token=bob)
    cell = await socket.run("import os; print('x' in globals(), sorted(n for n in os.environ if 'TOKEN' in n))")
    assert cell.stdout == "False []\n"
    await served.ok("DELETE", f"/api/sessions/{mine['id']}", token=bob)
    await world.check()


async def subscribe(served: Served, secret: str) -> WebSocketClientConnection:
    url = f"ws://127.0.0.1:{served.port}/api/events/subscribe"
    return await websocket_connect(HTTPRequest(url, headers={"Authorization": f"token {secret}"}))


async def test_events_are_told_to_their_owner_and_to_administrators_only(world: World) -> None:
    served = world.served
    listeners = [await subscribe(served, secret) for secret in (world.bob, world.ann, served.token)]
    made = await served.create(token=world.ann)
    for what in ("pause", "resume", "suspend?wait=60", "resume?wait=60", "fork?wait=60"):
        await served.ok("POST", f"/api/sandboxes/{made}/{what}", token=world.ann)
    await served.ask("POST", f"/api/sandboxes/{made}/suspend", token=world.bob)
    await served.ok("DELETE", f"/api/kernels/{made}", token=world.ann)
    mine = await served.create(token=world.bob)
    heard: list[str] = []
    for listener in listeners:
        text = ""
        async with asyncio.timeout(30):
            # The last thing that happens; who does not hear of it waits for nothing else.
            while mine not in text and not (listener is listeners[1] and "terminated" in text and made in text):
                text += str(await listener.read_message())
        heard.append(text)
        listener.close()
        while await listener.read_message() is not None:
            pass
    bobs, anns, all_of_it = heard
    assert made not in bobs
    assert '"ann"' not in bobs
    assert made in anns
    assert '"bob"' not in anns
    assert made in all_of_it
    for event in ({"schema_id": "x", "version": "1", "data": {}}, {"schema_id": "x"}, []):
        assert (await served.ask("POST", "/api/events", event, token=world.bob)).status in (400, 403)


async def test_a_published_snapshot_can_be_started_by_everybody_and_changed_by_its_owner_only(world: World) -> None:
    served, bob = world.served, world.bob
    where = f"/api/snapshots/{world.snapshot}"
    assert (await served.ask("PATCH", where, {"published": True}, token=world.ann)).status == 403
    await served.ok("PATCH", where, {"published": True})
    seen = await served.ok("GET", where, token=bob)
    assert seen["sandbox"] is None
    assert world.running not in json.dumps(seen)
    for method, body in (("DELETE", None), ("PATCH", {"published": False})):
        assert (await served.ask(method, where, body, token=bob)).status in (403, 404)
    started = await served.ok("POST", f"{where}/start?wait=60", {}, token=bob)
    (child,) = [one["id"] for one in started["children"]]
    record = await served.ok("GET", f"/api/sandboxes/{child}", token=bob)
    assert record["owner"] == "bob"
    assert world.running not in json.dumps(record)
    assert (await served.ask("GET", f"/api/sandboxes/{child}", token=world.ann)).status == 404
    socket = await served.open(child, token=bob)
    assert (await socket.run("print(x)")).stdout == "41\n"
    await served.ok("PATCH", where, {"published": False})
    assert (await served.ask("GET", where, token=bob)).status == 404
    await world.check()


async def test_a_name_cannot_stand_in_for_anothers_snapshot(world: World) -> None:
    served, bob = world.served, world.bob
    mine = await served.create(token=bob)
    where = f"/api/sandboxes/{mine}/snapshots?wait=60"
    # A name that looks like an id: an administrator who removes one would hit another.
    assert (await served.ask("POST", where, {"name": world.snapshot}, token=bob)).status == 400
    # The same name as ann's is bob's to have, and means his own to him.
    made = await served.ok("POST", where, {"name": NAME}, token=bob)
    started = await served.ok("POST", f"/api/snapshots/{NAME}/start?wait=60", {}, token=bob)
    (child,) = [one["id"] for one in started["children"]]
    socket = await served.open(child, token=bob)
    assert (await socket.run("print('x' in globals())")).stdout == "False\n"
    await served.ok("DELETE", f"/api/snapshots/{NAME}", token=bob)
    left = {one["id"] for one in (await served.ok("GET", "/api/snapshots"))["snapshots"]}
    assert left == {world.snapshot}
    assert made["id"] != world.snapshot
    await world.check()


async def test_an_administrator_sees_all_and_does_not_take_a_users_place(world: World) -> None:
    served = world.served
    found = (await served.ok("GET", "/api/sandboxes?state=all&limit=1000"))["sandboxes"]
    assert {one["id"] for one in found} >= {world.running, world.suspended, world.ended}
    assert world.running in {one["id"] for one in await served.ok("GET", "/api/kernels")}
    assert world.session in {one["id"] for one in await served.ok("GET", "/api/sessions")}
    assert (await served.ok("GET", f"/api/operations/{world.operation}"))["id"] == world.operation
    # The same session id as ann's: her connection stays.
    socket = await served.open(world.running, "same-session")
    assert (await socket.run("print(x)")).stdout == "41\n"
    children = (await served.ok("POST", f"/api/sandboxes/{world.running}/fork?wait=60", {}))["children"]
    assert (await served.ok("GET", f"/api/sandboxes/{children[0]['id']}"))["owner"] == "ann"
    await served.ok("DELETE", f"/api/sandboxes/{children[0]['id']}?forget=true")
    await world.check()


async def test_a_revoked_token_is_refused_at_once_and_its_websockets_end(users: Served, product: Product) -> None:
    eve = token(product, "eve")
    mine = await users.create(token=eve)
    silent, busy = await users.open(mine, token=eve), await users.open(mine, token=eve)
    listener = await subscribe(users, eve)
    cell = busy.execute("import time\nfor n in range(1000): print(n, flush=True); time.sleep(0.1)")
    while "\n" not in cell.stdout:
        cell.messages.append(await busy.next())  # type: ignore[arg-type]
    body = {"code": "import time; time.sleep(100)", "timeout": 100}
    other = await users.create(token=eve)
    running = asyncio.create_task(users.ask("POST", f"/api/sandboxes/{other}/execute", body, token=eve))
    await asyncio.sleep(1)
    revoke(product, "eve")
    began = asyncio.get_running_loop().time()
    assert (await users.ask("GET", "/api/kernels", token=eve)).status == 403
    assert (await users.ask("GET", "/api/sandboxes", token=eve)).status == 401
    with pytest.raises(HTTPClientError) as refused:
        await users.open(mine, token=eve)
    assert refused.value.code == 403
    for socket in (silent, busy):
        async with asyncio.timeout(10):
            while await socket.next(10) is not None:
                pass
        assert socket.connected.close_code == 1008
    async with asyncio.timeout(10):
        while await listener.read_message() is not None:
            pass
    assert listener.close_code == 1008
    listener.close()
    print(f"\nclosed after {asyncio.get_running_loop().time() - began:.1f} s")
    *_, last = (await asyncio.wait_for(running, 20)).body.splitlines()
    assert json.loads(last)["code"] == "unauthenticated"


async def test_what_a_revoked_user_sends_is_not_passed_on(users: Served, product: Product) -> None:
    mal = token(product, "mal")
    mine = await users.create(token=mal)
    socket = await users.open(mine, token=mal)
    await socket.run("x = 1")
    revoke(product, "mal")
    socket.execute("x = 2")
    async with asyncio.timeout(10):
        while await socket.next(10) is not None:
            pass
    again = await users.open(mine)
    assert (await again.run("print(x)")).stdout == "1\n"


async def test_over_quota_is_refused_by_every_door_with_what_would_free_it(users: Served, product: Product) -> None:
    dan = token(product, "dan", "--quota", "live=2,suspended=1")
    first = await users.create(token=dan)

    async def over(path: str, body: Any) -> None:
        answer = await users.ask("POST", path, body, token=dan)
        assert answer.status == 403, (path, answer.status, answer.body)
        assert "2" in json.dumps(answer.body), answer.body

    # A batch counts at once: not one of them is made.
    await over(f"/api/sandboxes/{first}/fork?wait=60", {"count": 2})
    found = (await users.ok("GET", "/api/sandboxes?state=all", token=dan))["sandboxes"]
    assert [one["id"] for one in found] == [first]
    second = await users.create(token=dan)
    await over("/api/sandboxes", {})
    await over("/api/kernels", {"name": "python3"})
    await over("/api/sessions", {"path": "n.ipynb", "type": "notebook", "kernel": {"name": "python3"}})
    await over(f"/api/sandboxes/{first}/fork?wait=60", {"count": 1})
    await users.ok("POST", f"/api/sandboxes/{first}/suspend?wait=60", token=dan)
    third = await users.create(token=dan)
    answer = await users.ask("POST", f"/api/sandboxes/{second}/suspend?wait=60", token=dan)
    assert answer.status == 403, answer.body
    await over(f"/api/sandboxes/{first}/resume?wait=60", {})
    await users.ok("DELETE", f"/api/sandboxes/{third}", token=dan)
    await users.ok("POST", f"/api/sandboxes/{first}/resume?wait=60", token=dan)


async def test_a_client_that_wakes_a_kernel_does_not_get_past_the_quota(users: Served, product: Product) -> None:
    kim = token(product, "kim", "--quota", "live=1")
    first = await users.create(token=kim)
    socket = await users.open(first, token=kim)
    await socket.run("x = 1")
    await users.ok("POST", f"/api/sandboxes/{first}/suspend?wait=60", token=kim)
    second = await users.create(token=kim)
    answer = await users.ask("POST", f"/api/sandboxes/{first}/execute", {"code": "x"}, token=kim)
    assert answer.status == 403, answer.body
    cell = socket.execute("print(x)")
    await asyncio.sleep(3)
    live = [one["id"] for one in (await users.ok("GET", "/api/sandboxes?state=running", token=kim))["sandboxes"]]
    assert live == [second]
    await users.ok("DELETE", f"/api/sandboxes/{second}", token=kim)
    if not cell.done:
        cell = await socket.run("print(x)")
    assert cell.stdout == "1\n"


async def test_of_many_creates_at_once_no_more_than_the_quota_succeed(users: Served, product: Product) -> None:
    lee = token(product, "lee", "--quota", "live=3")
    doors = [("/api/sandboxes", {}), ("/api/kernels", {"name": "python3"})] * 5
    answers = await asyncio.gather(*(users.ask("POST", path, body, token=lee) for path, body in doors))
    assert sorted(answer.status for answer in answers) == [201] * 3 + [403] * 7
    assert len((await users.ok("GET", "/api/sandboxes", token=lee))["sandboxes"]) == 3
    pat = token(product, "pat", "--quota", "creates_per_minute=2")
    answers = await asyncio.gather(*(users.ask("POST", "/api/sandboxes", {}, token=pat) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [201] * 2 + [429] * 3
    hint = next(answer.body["hint"] for answer in answers if answer.status == 429)
    assert "Try again in" in hint


async def test_two_users_who_choose_the_same_id_at_once_do_not_get_in_each_others_way(
    users: Served, tokens: tuple[str, str]
) -> None:
    wanted = str(uuid.uuid4())
    answers = await asyncio.gather(
        *(users.ask("POST", "/api/sandboxes?wait=60", {"id": wanted}, token=tokens[n % 2]) for n in range(6))
    )
    assert sorted(answer.status for answer in answers) == [201] + [409] * 5, [one.body for one in answers]
    owner = next(n % 2 for n, answer in enumerate(answers) if answer.status == 201)
    socket = await users.open(wanted, token=tokens[owner])
    assert (await socket.run("print(6 * 7)")).stdout == "42\n"
    assert (await users.ask("GET", f"/api/sandboxes/{wanted}", token=tokens[1 - owner])).status == 404


async def test_who_asks_again_for_an_id_that_is_being_made_is_not_told_of_the_quota(
    users: Served, product: Product
) -> None:
    """A client whose connection broke tries again: there is room, and what it asked for is on its way."""
    ray = token(product, "ray", "--quota", "live=1")
    wanted = str(uuid.uuid4())
    doors = [("/api/sandboxes?wait=60", {"id": wanted}), ("/api/kernels", {"name": "python3", "kernel_id": wanted})] * 2
    answers = await asyncio.gather(*(users.ask("POST", path, body, token=ray) for path, body in doors))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 3, [one.body for one in answers]
    assert (await users.ask("POST", "/api/sandboxes", {}, token=ray)).status == 403
