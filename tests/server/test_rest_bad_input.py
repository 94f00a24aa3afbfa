"""Whatever is sent: a clear 4xx that names what is wrong, never a 500 or silence, and the next request is served."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rest_service import OPERATIONS, Rest, check_problem, rest_service

from sandbox_gateway.errors import InvalidField, SandboxGatewayError
from sandbox_gateway.server import openapi
from sandbox_gateway.server.requests import MAX_BODY, MAX_CODE, MAX_DEPTH, parse, read_body, read_query


@pytest.fixture
async def rest(tmp_path: Path) -> AsyncIterator[Rest]:
    async with rest_service(tmp_path) as made:
        yield made


MALFORMED = {
    "not JSON": b"{",
    "a word": b"none",
    "text behind it": b"{} x",
    "NaN": b'{"count": NaN}',
    "infinity": b'{"count": -Infinity}',
    "a float too large": b'{"count": 1e999}',
    "a number of thousands of digits": b'{"count": ' + b"9" * 5000 + b"}",
    "a name twice": b'{"count": 1, "count": 1}',
    "a name twice inside": b'{"env": {"A": "1", "A": "2"}}',
    "not UTF-8": b'{"name": "\xff"}',
    "half a surrogate pair": b'{"name": "\\ud800"}',
    "half a surrogate pair as a name": b'{"\\udfff": 1}',
    "nested a little too deep": b'{"env": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "nested far too deep": b"[" * 100_000 + b"]" * 100_000,
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "UTF-16": "{}".encode("utf-16"),
    "a NUL": b"\x00",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_body_is_a_problem_on_each_route_that_takes_one(rest: Rest, body: bytes) -> None:
    one = rest.gateway.add("ann").id
    for path, method in OPERATIONS:
        if "requestBody" not in openapi.description()["paths"][path][method]:
            continue
        address = path.replace("{id}", one).replace("{snapshot}", "none")
        told = await rest.problem(method.upper(), address, body)
        assert told["status"] == 400 and told["code"] == "invalid_request" and told["field"], (path, told)
    assert (await rest.ok("GET", f"/api/sandboxes/{one}"))["state"] == "running"
    assert not rest.gateway.wanted


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"profile": 1}, "profile"),
        ({"profile": "x" * 65}, "profile"),
        ({"profil": "x"}, "profil"),
        ({"env": []}, "env"),
        ({"env": {"A": 1}}, "env.A"),
        ({"env": {"A-B": "1"}}, "env.A-B"),
        ({"env": {"A\n": "1"}}, "env.A\n"),
        ({"env": {"A": "x\x00y"}}, "env.A"),
        ({"env": {f"A{at}": "" for at in range(1001)}}, "env"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 401}, "name"),
        ({"name": None}, "name"),
        ({"id": "x"}, "id"),
        ({"id": "5B1F4C0E-1C2D-4A57-9A0E-0D6F3F0A9C11"}, "id"),
        ({"id": "../../../../etc/passwd"}, "id"),
        ({"resources": "2GiB"}, "resources"),
        ({"resources": {"cpu": []}}, "resources.cpu"),
        ({"resources": {"memory": 10**30}}, "resources.memory"),
        ({"resources": {"memory": "9" * 4000}}, "resources.memory"),
        ({"resources": {"cpu": True}}, "resources.cpu"),
        ({"resources": {"gpu": 1}}, "resources.gpu"),
        ({"resources": {"mounts": []}}, "resources.mounts"),
        ({"resources": {"idle": {"pause": {}}}}, "resources.idle.pause"),
        ({"resources": {"idle": {"paus": 1}}}, "resources.idle.paus"),
        ({"x" * 100_000: 1}, "x" * 60),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_made(rest: Rest, body: Any, field: str) -> None:
    told = await rest.problem("POST", "/api/sandboxes", body)
    assert told["status"] == 400 and told["field"] == field
    assert len(json.dumps(told)) < 2000, "what was sent is not sent back"
    assert not rest.gateway.lifecycle.store.list()


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/sandboxes?limit=0", "limit"),
        ("/api/sandboxes?limit=1001", "limit"),
        ("/api/sandboxes?limit=x", "limit"),
        ("/api/sandboxes?limit=1.0", "limit"),
        ("/api/sandboxes?limit=", "limit"),
        ("/api/sandboxes?limit=1&limit=2", "limit"),
        ("/api/sandboxes?limit=" + "9" * 5000, "limit"),
        ("/api/sandboxes?limit=%D9%A1", "limit"),
        ("/api/sandboxes?state=asleep", "state.0"),
        ("/api/sandboxes?state=", "state.0"),
        ("/api/sandboxes?state=" + "running," * 20, "state"),
        ("/api/sandboxes?stats=perhaps", "stats"),
        ("/api/sandboxes?stat=true", "stat"),
        ("/api/sandboxes?name=%FF", "name"),
        ("/api/sandboxes?profile=" + "x" * 65, "profile"),
        ("/api/sandboxes?cursor=" + "x" * 401, "cursor"),
        ("/api/sandboxes?cursor=%00", "cursor"),
        ("/api/sandboxes?cursor=bmFuIHg=", "cursor"),
    ],
)
async def test_a_wrong_query_is_named(rest: Rest, path: str, field: str) -> None:
    told = await rest.problem("GET", path)
    assert told["status"] == 400 and told["field"] == field


@pytest.mark.parametrize("wait", ["-1", "nan", "inf", "1e999", "3601", "1e", "", "0x10", "1_0"])
async def test_a_wrong_wait_begins_nothing(rest: Rest, wait: str) -> None:
    one = rest.gateway.add("ann").id
    told = await rest.problem("POST", f"/api/sandboxes/{one}/suspend?wait={wait}")
    assert told["status"] == 400 and told["field"] == "wait"
    assert not (await rest.ok("GET", "/api/operations"))["operations"]


@pytest.mark.parametrize("timeout", [0, -1, 1e9, "1", [], True, 10**400])
async def test_a_wrong_timeout_runs_nothing(rest: Rest, timeout: Any) -> None:
    live = rest.gateway.lifecycle.live[rest.gateway.add("ann").id]
    told = await rest.problem("POST", f"/api/sandboxes/{live.id}/execute", {"code": "1", "timeout": timeout})
    assert told["status"] == 400 and told["field"] == "timeout" and not live.requests


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "multipart/form-data", "application/xml", "json", "x" * 9999],
)
async def test_a_body_of_another_kind_is_told_as_that(rest: Rest, kind: str) -> None:
    told = await rest.problem("POST", "/api/sandboxes", b"{}", headers={"Content-Type": kind})
    assert told["status"] in (415, 400) and told["code"] in ("media_type", "invalid_request")
    assert not rest.gateway.wanted


async def test_what_curl_and_urllib_call_a_form_is_read_as_json_when_a_token_came_with_it(rest: Rest) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    told = await rest.problem("POST", "/api/sandboxes", b"{", headers=kind)
    assert told["status"] == 400 and told["code"] == "invalid_request"
    told = await rest.problem("POST", "/api/sandboxes", b'{"profile": "none-such"}', headers=kind)
    assert told["code"] == "unknown_profile"


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
async def test_json_by_any_name_is_taken(rest: Rest, kind: str) -> None:
    assert (await rest.ask("POST", "/api/sandboxes", b"{}", headers={"Content-Type": kind})).status == 201


async def test_a_body_that_is_too_large_is_a_problem_and_the_next_one_is_served(rest: Rest) -> None:
    live = rest.gateway.lifecycle.live[rest.gateway.add("ann").id]
    told = await rest.problem("POST", "/api/sandboxes", {"name": "x" * MAX_BODY})
    assert (told["status"], told["code"]) == (413, "too_large")
    told = await rest.problem("POST", f"/api/sandboxes/{live.id}/execute", {"code": "x" * MAX_CODE})
    assert told["status"] == 413 and not live.requests
    assert (await rest.ask("POST", f"/api/sandboxes/{live.id}/execute", {"code": "#" * MAX_BODY})).status == 200


@pytest.mark.parametrize(
    "wanted",
    ["x", "..", "%2e%2e%2fetc", "%00", "%FF", "a%2Fb", "x" * 5000, "'; DROP TABLE sandboxes", "%F0%9F%98%80", "*"],
)
async def test_dead_and_strange_ids_are_not_found(rest: Rest, wanted: str) -> None:
    address = wanted.replace(" ", "%20").replace("'", "%27")
    for path, method in OPERATIONS:
        if "{" not in path:
            continue
        name = path[path.index("{") : path.index("}") + 1]
        operation = openapi.description()["paths"][path][method]
        body = None
        if operation.get("requestBody", {}).get("required"):
            schema = operation["requestBody"]["content"]["application/json"]
            body = schema["example"]
        answer = await rest.ask(method.upper(), path.replace(name, address), body, checked=False)
        assert answer.status in (404, 400), (path, method, answer.status)
        check_problem(answer)


async def test_methods_that_a_route_has_not_are_405_with_those_that_it_has(rest: Rest) -> None:
    for path in openapi.description()["paths"]:
        has = {method.upper() for where, method in OPERATIONS if where == path}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "QUERY"} - has:
            answer = await rest.ask(method, path.replace("{", "").replace("}", ""), checked=False)
            assert answer.status == 405, (method, path)
            check_problem(answer)
            assert set(answer.headers["Allow"].split(", ")) == has | {"OPTIONS"}


async def _raw(rest: Rest, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.server.app.port)
    writer.write(request)
    try:
        async with asyncio.timeout(10):
            return await reader.read(65536)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_broken_http_hurts_nobody_else(rest: Rest) -> None:
    head = f"POST /api/sandboxes HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {rest.token}\r\n".encode()
    for request in (
        head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        head + b"X: y\r\n" * 20_000 + b"\r\n",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 99999999999999\r\n\r\n",
        head + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\x01\x02\r\n\r\n",
    ):
        answer = await _raw(rest, request)
        assert not answer or b" 4" in answer.split(b"\r\n", 1)[0], answer[:200]
    for name, value in (("Authorization", "token " + "x" * 5000), ("Accept", "\xff"), ("Cookie", "a" * 5000)):
        headers = {name: value}
        answer = await rest.ask("GET", "/api/sandboxes", headers=headers, checked=False)
        assert answer.status in (200, 401)
    assert (await rest.ok("GET", "/api/sandboxes"))["sandboxes"] == []


# Anything at all

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["python3-gvisor", "2GiB", "none", "never", "10m", "\x00", "\ud7ff", "host"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(
    {
        name
        for schema in openapi.description()["components"]["schemas"].values()
        for name in schema.get("properties", {})
        if schema.get("additionalProperties") is False
    }
)
BODIES = st.dictionaries(
    st.sampled_from([*NAMES, "other"]),
    JSON | st.dictionaries(st.sampled_from(["cpu", "memory", "idle", "image", "A", "pause"]), JSON, max_size=3),
    max_size=3,
)
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(["wait", "limit", "state", "cursor", "since", "stats", "x", "forget"]), st.text(max_size=8)
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.AbstractEventLoop, Rest]]:
    """A server on a thread of its own, for tests that are no coroutines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()
    place = tmp_path_factory.mktemp("rest")
    try:
        yield loop, asyncio.run_coroutine_threadsafe(stack.enter_async_context(rest_service(place)), loop).result(60)
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(OPERATIONS), BODIES | JSON, QUERIES)
def test_any_body_and_query_is_answered_as_described(
    running: tuple[asyncio.AbstractEventLoop, Rest], operation: tuple[str, str], body: Any, query: Any
) -> None:
    loop, rest = running
    path, method = operation

    async def ask() -> None:
        one = rest.gateway.add("ann").id
        address = path.replace("{id}", one).replace("{", "").replace("}", "")
        encoded = urlencode([(name, value.encode("utf-8", "surrogatepass")) for name, value in query])
        sent = None if method == "get" else json.dumps(body).encode()
        async with asyncio.timeout(20):
            answer = await rest.ask(method.upper(), f"{address}?{encoded}", sent)
        assert answer.status < 500, (operation, body, query, answer.body)
        rest.gateway.lifecycle.store.delete(one)
        rest.gateway.lifecycle.live.pop(one).die() if one in rest.gateway.lifecycle.live else None

    asyncio.run_coroutine_threadsafe(ask(), loop).result(30)


@given(st.binary(max_size=200) | BODIES.map(lambda body: json.dumps(body).encode()), st.text(max_size=30))
def test_reading_a_body_gives_an_object_or_an_error_of_ours(body: bytes, kind: str) -> None:
    for schema in ("CreateSandbox", "Execute", "Multiply", "Nothing"):
        try:
            found = read_body(body, kind, schema, 150)
        except SandboxGatewayError as error:
            assert error.code in ("invalid_request", "media_type", "too_large")
        else:
            assert isinstance(found, dict) and openapi.validator(schema).is_valid(found)


@given(
    st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["wait", "limit"]), st.lists(st.binary(max_size=6), max_size=2)
    )
)
def test_reading_a_query_gives_plain_values_or_an_error_of_ours(arguments: dict[str, list[bytes]]) -> None:
    known = {**openapi.parameters("/api/sandboxes", "get"), **openapi.parameters("/api/sandboxes", "post")}
    try:
        found = read_query(arguments, known)
    except InvalidField as error:
        assert error.field is not None
    else:
        assert 1 <= found["limit"] <= 1000 and 0 <= found["wait"] <= 3600


@given(JSON)
def test_what_is_json_is_read_as_it_was(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == value
