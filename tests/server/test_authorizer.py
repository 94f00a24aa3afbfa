"""Rights by kind of resource, and that a route without a check is found."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from jupyter_server.auth import User
from jupyter_server.auth.decorator import allow_unauthenticated, authorized, ws_authenticated
from jupyter_server.base.handlers import APIHandler
from small_server import Server, small_server
from tornado import web
from tornado.websocket import WebSocketHandler

from sandbox_gateway.server.authorizer import FOR_USERS, GatewayAuthorizer, public, routes, unprotected
from sandbox_gateway.server.event_handlers import event_handlers
from sandbox_gateway.server.identity import GatewayUser
from sandbox_gateway.server.metrics import MetricsHandler


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with small_server(tmp_path) as running:
        yield running


@pytest.mark.parametrize("resource", sorted(FOR_USERS))
@pytest.mark.parametrize("action", ["read", "write", "execute"])
def test_users_have_kernels_and_what_belongs_to_them(resource: str, action: str) -> None:
    assert GatewayAuthorizer().is_authorized(None, GatewayUser("ann"), action, resource)


@pytest.mark.parametrize("resource", ["server", "config", "contents", "terminals", "nbconvert", "metrics", "", "new"])
def test_all_else_is_for_administrators_and_for_who_has_the_one_shared_token(resource: str) -> None:
    authorizer = GatewayAuthorizer()
    assert not authorizer.is_authorized(None, GatewayUser("ann"), "read", resource)
    assert authorizer.is_authorized(None, GatewayUser("root", admin=True), "read", resource)
    assert authorizer.is_authorized(None, User("anonymous"), "read", resource)
    assert not authorizer.is_authorized(None, None, "read", resource)


async def test_a_user_does_not_end_the_server_nor_read_its_files_and_settings(server: Server) -> None:
    _, ann = server.user("ann")
    _, root = server.user("root", admin=True)
    for method, path in (
        ("POST", "/api/shutdown"),
        ("GET", "/api/config/x"),
        ("GET", "/api/contents"),
        ("GET", "/files/tokens.jsonl"),
    ):
        assert (await server.ask(path, ann, method=method, body=b"" if method == "POST" else None)).status == 403
    assert (await server.ask("/api/contents", root)).status == 200
    assert (await server.ask("/api/kernels", ann)).status == 200


class Forgotten(APIHandler):
    def get(self) -> None:
        """Neither."""

    @web.authenticated
    def post(self) -> None:
        """Not authorised."""

    @authorized
    def put(self) -> None:
        """Not authenticated: the order is wrong, but it refuses strangers all the same."""

    @web.authenticated
    @authorized
    def delete(self) -> None:
        """Both."""

    @allow_unauthenticated
    def head(self) -> None:
        """On purpose."""


class ForgottenSocket(WebSocketHandler):
    pass


class HalfSocket(WebSocketHandler):
    @ws_authenticated
    def get(self) -> None:
        """No pre_get."""


async def test_a_forgotten_check_is_found_by_its_method_and_place(tmp_path: Path) -> None:
    app = web.Application([("/inner", HalfSocket)])
    app.add_handlers(".*", [("/x", Forgotten), ("/s", ForgottenSocket)])
    found = unprotected(app)
    assert [(line.split(" (")[0], line.rsplit(": ")[-1]) for line in found if "OPTIONS" not in line] == [
        ("GET /inner$", "not authorised"),
        ("GET /s$", "not authenticated"),
        ("GET /x$", "not authenticated"),
        ("POST /x$", "not authorised"),
        ("PUT /x$", "not authenticated"),
    ]
    assert "HEAD /x$" in public(app)


async def test_our_routes_are_all_protected_and_known(tmp_path: Path) -> None:
    async with small_server(tmp_path, more=[("/metrics", MetricsHandler)]) as server:
        handlers = {handler for _, handler in event_handlers()} | {MetricsHandler}
        found = {handler for _, handler, _ in routes(server.app.web_app)}
        assert handlers <= found
        ours = [line for line in unprotected(server.app.web_app) if "sandbox_gateway" in line]
        assert ours == []
