"""The REST routes over a :class:`fakes.FakeGateway`, in a real jupyter_server, asked over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import FakeGateway
from small_server import Answer, Server, small_server

from sandbox_gateway.server import openapi
from sandbox_gateway.server.operations import Operations, operations_of
from sandbox_gateway.server.rest import HANDLERS, rest_handlers

OPERATIONS = [
    (path, method)
    for path, route in openapi.description()["paths"].items()
    for method in route
    if method != "parameters"
]


@dataclass
class Rest:
    """The server, its gateway, and a user."""

    server: Server
    gateway: FakeGateway
    token: str
    admin: str
    """The tokens of two users; both have the routes, one is an administrator."""

    @property
    def operations(self) -> Operations:
        return operations_of(self.server.app.web_app.settings)

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] = {},
        checked: bool = True,
    ) -> Answer:
        """One request; its answer is held against the description."""
        sent = {"Content-Type": "application/json", **headers} if body is not None else headers
        answer = await self.server.ask(
            path, self.token if token is None else token, method=method, body=body, headers=sent
        )
        if checked:
            against_description(method, path, answer)
        return answer

    async def ok(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON of a request that has to succeed."""
        answer = await self.ask(method, path, body, **options)
        assert answer.status < 300, (method, path, answer.status, answer.body)
        return answer.json if answer.body else None

    async def problem(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """The problem that a request is answered with."""
        answer = await self.ask(method, path, body, **options)
        assert 400 <= answer.status < 600, (method, path, answer.status, answer.body)
        return check_problem(answer)

    async def until_ended(self, operation_id: str) -> dict[str, Any]:
        """An operation at its end."""
        async with asyncio.timeout(10):
            found: dict[str, Any] = await self.ok("GET", f"/api/operations/{operation_id}?wait=10")
        assert found["state"] != "running"
        return found


def check_problem(answer: Answer) -> dict[str, Any]:
    """The body of an error, which has to be a whole one."""
    assert answer.headers["Content-Type"] == "application/problem+json", (answer.status, answer.body)
    found: dict[str, Any] = answer.json
    openapi.check(found, "Problem")
    assert found["status"] == answer.status and found["code"] in found["type"]
    assert found["message"] == found["detail"] and found["hint"], found
    return found


def route_of(path: str) -> str | None:
    """The path of the description that an address belongs to."""
    parts = path.partition("?")[0].strip("/").split("/")
    for handler in HANDLERS:
        names = handler.path.strip("/").split("/")
        if len(names) == len(parts) and all(
            name.startswith("{") or name == part for name, part in zip(names, parts, strict=True)
        ):
            return handler.path
    return None


def against_description(method: str, path: str, answer: Answer) -> None:
    """Whether the description has this answer of this route."""
    route = route_of(path)
    operation = openapi.description()["paths"].get(route, {}).get(method.lower())
    if operation is None:
        assert answer.status in (404, 405, 401, 403)
        check_problem(answer)
        return
    described = operation["responses"].get(str(answer.status)) or operation["responses"]["default"]
    if answer.status < 400:
        assert str(answer.status) in operation["responses"], (method, path, answer.status)
    if "$ref" in described:
        described = openapi.description()["components"]["responses"][described["$ref"].rsplit("/", 1)[1]]
    content = described.get("content")
    if content is None:
        assert not answer.body
        return
    kind = answer.headers["Content-Type"].partition(";")[0]
    assert kind in content, (method, path, answer.status, kind)
    if kind.endswith("json") and kind != "application/x-ndjson":
        openapi.raise_first(openapi.checker(content[kind]["schema"]), json.loads(answer.body), (method, path))
    for name in described.get("headers", ()):
        assert answer.headers[name].startswith("/api/")


@asynccontextmanager
async def rest_service(place: Path, **traits: Any) -> AsyncIterator[Rest]:
    """It runs in ``place``."""
    gateway = FakeGateway(place)
    async with small_server(place, more=rest_handlers(), **traits) as server:
        server.app.web_app.settings["sandbox_gateway"] = gateway
        server.app.web_app.settings["sandbox_events"] = None
        _, token = server.user("ann")
        _, admin = server.user("root", admin=True)
        rest = Rest(server, gateway, token, admin)
        try:
            yield rest
        finally:
            await rest.operations.close()
            for live in gateway.lifecycle.live.values():
                live.die()
            await asyncio.sleep(0)
            gateway.close()
