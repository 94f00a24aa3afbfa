"""Snapshots: of one sandbox, and as things of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.server import views
from sandbox_gateway.server.api_handler import RestHandler
from sandbox_gateway.server.callers import Caller
from sandbox_gateway.server.gateway import Gateway
from sandbox_gateway.server.operations import Report


class SandboxSnapshotsHandler(RestHandler):
    """Those of one sandbox."""

    path = "/api/sandboxes/{id}/snapshots"

    @web.authenticated
    @authorized
    async def get(self, sandbox_id: str) -> None:
        """The list."""
        self.query()
        await self.gateway.record(self.caller, sandbox_id)
        found = await _views(self.gateway, self.caller)
        self.answer({"snapshots": [one for one in found if one["sandbox"] == sandbox_id]})

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Save it."""
        query, body = self.query(), self.read("MakeSnapshot")
        gateway, caller = self.gateway, self.caller
        await gateway.record(caller, sandbox_id)

        async def work(report: Report) -> Mapping[str, Any]:
            made = await gateway.snapshot(caller, sandbox_id, body.get("name", ""))
            return await _view(gateway, caller, made.id)

        await self.long(
            "snapshot",
            work,
            query["wait"],
            sandbox=sandbox_id,
            status=201,
            location=lambda made: f"/api/snapshots/{made['id']}",
        )


class SnapshotsHandler(RestHandler):
    """All that a caller may start from."""

    path = "/api/snapshots"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The list."""
        self.query()
        self.answer({"snapshots": await _views(self.gateway, self.caller)})


class SnapshotHandler(RestHandler):
    """One of them."""

    path = "/api/snapshots/{snapshot}"

    @web.authenticated
    @authorized
    async def get(self, snapshot: str) -> None:
        """Look at it."""
        self.query()
        self.answer(await _view(self.gateway, self.caller, snapshot))

    @web.authenticated
    @authorized
    async def patch(self, snapshot: str) -> None:
        """Publish it, or no longer."""
        self.query()
        published = self.read("Publish")["published"]
        # First whether it is there: who may not see it learns nothing else.
        await _view(self.gateway, self.caller, snapshot)
        if not self.caller.admin:
            raise SandboxGatewayError("forbidden", "only administrators publish snapshots")
        await self.gateway.publish(self.caller, snapshot, published)
        self.answer(await _view(self.gateway, self.caller, snapshot))

    @web.authenticated
    @authorized
    async def delete(self, snapshot: str) -> None:
        """Remove it."""
        self.query()
        await self.gateway.remove_snapshot(self.caller, snapshot)
        self.answer_nothing()


class StartHandler(RestHandler):
    """New sandboxes from one."""

    path = "/api/snapshots/{snapshot}/start"

    @web.authenticated
    @authorized
    async def post(self, snapshot: str) -> None:
        """Start them."""
        query, count = self.query(), int(self.read("Multiply").get("count", 1))
        gateway, caller = self.gateway, self.caller
        found = await _view(gateway, caller, snapshot)

        async def work(report: Report) -> Mapping[str, Any]:
            return views.children(await gateway.start_from(caller, found["id"], count))

        await self.long("start", work, query["wait"], status=201)


async def _views(gateway: Gateway, caller: Caller) -> list[dict[str, Any]]:
    found = [views.snapshot(*each, caller) for each in await gateway.snapshots(caller)]
    return sorted(found, key=lambda one: (one["created"], one["id"]))


async def _view(gateway: Gateway, caller: Caller, wanted: str) -> dict[str, Any]:
    """One by its id or name, the id first; raises ``unknown_snapshot``."""
    found = sorted(await _views(gateway, caller), key=lambda one: bool(one["owner"] != caller.name))
    for key in ("id", "name"):
        for one in found:
            if one[key] == wanted:
                return one
    raise SandboxGatewayError(
        "unknown_snapshot", f"there is no snapshot {wanted[:80]!r}", "`GET /api/snapshots` lists them."
    )
