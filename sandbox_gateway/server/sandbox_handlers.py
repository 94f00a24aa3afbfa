"""``/api/sandboxes`` and what is done with one sandbox."""

from __future__ import annotations

import base64
import binascii
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jupyter_server.auth.decorator import authorized
from tornado import web

from sandbox_gateway.errors import InvalidField
from sandbox_gateway.images.service import Progress
from sandbox_gateway.model import SandboxRecord, State
from sandbox_gateway.server import views
from sandbox_gateway.server.api_handler import RestHandler, unless_reached, view_of, views_of
from sandbox_gateway.server.gateway import Wanted
from sandbox_gateway.server.operations import Report
from sandbox_gateway.server.starts import said

_ENDED = frozenset({State.TERMINATED, State.FAILED, State.EXPIRED})


class SandboxesHandler(RestHandler):
    """The list, and new ones."""

    path = "/api/sandboxes"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """A page of the list."""
        query = self.query()
        found = await self.gateway.records(self.caller, states=_states(query.get("state")))
        page, following = _page(_filtered(found, query), query["limit"], query.get("cursor"))
        shown = await views_of(self.gateway, self.settings, self.caller, page, stats=query.get("stats", False))
        self.answer({"sandboxes": shown, "next": following})

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Start one."""
        query, body = self.query(), self.read("CreateSandbox")
        wanted = Wanted(
            profile=body.get("profile", ""),
            environment=body.get("env", {}),
            resources=body.get("resources", {}),
            name=body.get("name", ""),
            id=body.get("id") or str(uuid.uuid4()),
            directory=self._folder(body.get("path")),
        )
        gateway, caller, settings = self.gateway, self.caller, self.settings

        async def work(report: Report) -> Mapping[str, Any]:
            def progress(how_far: Progress) -> None:
                report({"message": said(how_far), "done": how_far.done_bytes, "total": how_far.total_bytes or None})

            record = await gateway.create(caller, wanted, progress)
            return await view_of(gateway, settings, caller, record.id)

        await self.long(
            "create",
            work,
            query["wait"],
            sandbox=wanted.id,
            name=wanted.name,
            status=201,
            location=lambda made: _address(made["id"]),
        )

    def _folder(self, path: str | None) -> Path | None:
        """Where a notebook of this path is; nowhere on a gateway, which has no notebooks."""
        manager = self.settings.get("kernel_manager")
        return None if path is None or manager is None else manager.folder(path)


class SandboxHandler(RestHandler):
    """One of them."""

    path = "/api/sandboxes/{id}"

    @web.authenticated
    @authorized
    async def get(self, sandbox_id: str) -> None:
        """Look at it."""
        self.answer(await self.shown(sandbox_id, stats=self.query()["stats"]))

    @web.authenticated
    @authorized
    async def patch(self, sandbox_id: str) -> None:
        """Rename it."""
        self.query()
        await self.gateway.rename(self.caller, sandbox_id, self.read("RenameSandbox")["name"])
        self.answer(await self.shown(sandbox_id))

    @web.authenticated
    @authorized
    async def delete(self, sandbox_id: str) -> None:
        """End it."""
        if self.query()["forget"]:
            await self.gateway.forget(self.caller, sandbox_id)
        else:
            await self.gateway.delete(self.caller, sandbox_id)
        self.answer_nothing()


class SuspendHandler(RestHandler):
    """Saving to disk."""

    path = "/api/sandboxes/{id}/suspend"

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Suspend it."""
        query, body = self.query(), self.read("Suspend")
        gateway, caller, settings = self.gateway, self.caller, self.settings
        await gateway.record(caller, sandbox_id)

        async def work(report: Report) -> Mapping[str, Any]:
            doing = gateway.suspend(caller, sandbox_id, body.get("reason", ""))
            await unless_reached(doing, gateway, caller, sandbox_id, State.SUSPENDED)
            return await view_of(gateway, settings, caller, sandbox_id)

        await self.long("suspend", work, query["wait"], sandbox=sandbox_id)


class ResumeHandler(RestHandler):
    """Waking."""

    path = "/api/sandboxes/{id}/resume"

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Let it go on."""
        query, _ = self.query(), self.read("Nothing")
        gateway, caller, settings = self.gateway, self.caller, self.settings
        await gateway.record(caller, sandbox_id)

        async def work(report: Report) -> Mapping[str, Any]:
            doing = gateway.resume(caller, sandbox_id)
            await unless_reached(doing, gateway, caller, sandbox_id, State.RUNNING)
            return await view_of(gateway, settings, caller, sandbox_id)

        await self.long("resume", work, query["wait"], sandbox=sandbox_id)


class PauseHandler(RestHandler):
    """Freezing."""

    path = "/api/sandboxes/{id}/pause"

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Pause it."""
        self.query(), self.read("Nothing")
        doing = self.gateway.pause(self.caller, sandbox_id)
        await unless_reached(doing, self.gateway, self.caller, sandbox_id, State.PAUSED)
        self.answer(await self.shown(sandbox_id))


class InterruptHandler(RestHandler):
    """Ctrl-C."""

    path = "/api/sandboxes/{id}/interrupt"

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Interrupt what runs."""
        self.query(), self.read("Nothing")
        await self.gateway.interrupt(self.caller, sandbox_id)
        self.answer(await self.shown(sandbox_id))


class RestartHandler(RestHandler):
    """A new kernel."""

    path = "/api/sandboxes/{id}/restart"

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Start the kernel anew."""
        self.query()
        await self.gateway.restart(self.caller, sandbox_id, clean=self.read("Restart").get("clean", False))
        self.answer(await self.shown(sandbox_id))


class ForkHandler(RestHandler):
    """Children."""

    path = "/api/sandboxes/{id}/fork"

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        """Fork it."""
        query, count = self.query(), int(self.read("Multiply").get("count", 1))
        gateway, caller = self.gateway, self.caller
        await gateway.record(caller, sandbox_id)

        async def work(report: Report) -> Mapping[str, Any]:
            return views.children(await gateway.fork(caller, sandbox_id, count))

        await self.long("fork", work, query["wait"], sandbox=sandbox_id, status=201)


class LogsHandler(RestHandler):
    """What the kernel wrote past Jupyter."""

    path = "/api/sandboxes/{id}/logs"

    @web.authenticated
    @authorized
    async def get(self, sandbox_id: str) -> None:
        """The log as it is."""
        self.query()
        found = await self.gateway.logs(self.caller, sandbox_id)
        self.finish(found.decode(errors="replace").encode(), set_content_type="text/plain; charset=utf-8")


class StatsHandler(RestHandler):
    """Use of resources."""

    path = "/api/sandboxes/{id}/stats"

    @web.authenticated
    @authorized
    async def get(self, sandbox_id: str) -> None:
        """What it uses now."""
        self.query()
        stats = await self.gateway.stats(self.caller, sandbox_id)
        self.answer(asdict(stats))


class EventsHandler(RestHandler):
    """What happened."""

    path = "/api/sandboxes/{id}/events"

    @web.authenticated
    @authorized
    async def get(self, sandbox_id: str) -> None:
        """Its events, oldest first."""
        query = self.query()
        found = await self.gateway.events(self.caller, since=query["since"], sandbox=sandbox_id)
        self.answer({"events": [views.event(event) for event in found[: query["limit"]]]})


# Pages


def _address(sandbox_id: str) -> str:
    return f"/api/sandboxes/{sandbox_id}"


def _states(asked: list[str] | None) -> frozenset[State]:
    if asked is None:
        return frozenset(State) - _ENDED
    return frozenset(State) if "all" in asked else frozenset(State(name) for name in asked)


def _filtered(records: tuple[SandboxRecord, ...], query: Mapping[str, Any]) -> list[SandboxRecord]:
    wanted = {key: query[key] for key in ("profile", "owner", "name") if key in query}
    return [record for record in records if all(getattr(record, key) == value for key, value in wanted.items())]


def _page(records: list[SandboxRecord], limit: int, cursor: str | None) -> tuple[list[SandboxRecord], str | None]:
    """The records behind the cursor, and the cursor of those behind them. What is made or removed between two pages
    neither hides nor doubles another."""
    behind = _position(cursor) if cursor else (-1.0, "")
    left = sorted(
        (record for record in records if (record.created, record.id) > behind),
        key=lambda record: (record.created, record.id),
    )
    page = left[:limit]
    if len(left) <= limit:
        return page, None
    last = page[-1]
    return page, base64.urlsafe_b64encode(f"{last.created!r} {last.id}".encode()).decode()


def _position(cursor: str) -> tuple[float, str]:
    try:
        created, _, sandbox_id = base64.urlsafe_b64decode(cursor.encode("ascii")).decode().partition(" ")
        if not math.isfinite(float(created)):
            raise ValueError(created)
        return float(created), sandbox_id
    except (ValueError, binascii.Error):
        raise InvalidField("cursor", "is none that a page gave", "Begin without one.") from None
