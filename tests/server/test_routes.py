"""What the headless server serves at all: its routes held against a list, each behind a login and a right."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.server import openapi
from sandbox_gateway.server.app import GatewayApp
from sandbox_gateway.server.authorizer import public, routes, unprotected

KERNEL = r"(?P<kernel_id>\w+-\w+-\w+-\w+-\w+)"
SESSION = r"(?P<session_id>\w+-\w+-\w+-\w+-\w+)"

JUPYTER = {
    r"/api$",
    r"/api/events$",
    r"/api/events/subscribe$",
    r"/api/kernels$",
    rf"/api/kernels/{KERNEL}$",
    rf"/api/kernels/{KERNEL}/(?P<action>restart|interrupt)$",
    rf"/api/kernels/{KERNEL}/channels$",
    r"/api/kernelspecs$",
    r"/api/kernelspecs/(?P<kernel_name>[\w\.\-%]+)$",
    r"/api/me$",
    r"/api/resolvePath$",
    r"/api/security/csp-report$",
    r"/api/sessions$",
    rf"/api/sessions/{SESSION}$",
    r"/api/spec.yaml$",
    r"/api/status$",
    r"/kernelspecs/(?P<kernel_name>[\w\.\-%]+)/(?P<path>.*)$",
    r"/login$",
    r"/logout$",
    r"/metrics$",
    # jupyter_server's own pictures and style sheets, which its login form needs.
    r"/static/(.*)$",
    r"/(robots\.txt|favicon\.ico)$",
    r"/(robots\.txt)$",
    r"/(favicon\.ico)$",
    # Redirections, and what there is not.
    r"/.*/$",
    r"/?$",
    r"(.*)$",
    r"/api/(?:sandboxes|snapshots|profiles|operations|quota)(?:/.*)?$",
}
"""Jupyter's own routes that a gateway needs; all others are in our description."""

PUBLIC = {
    "GET /api$",  # the version; clients ask it first
    "GET /login$",
    "POST /login$",
    "GET /logout$",
    "GET /metrics$",  # asks for itself: `authenticate_prometheus = False` opens it
    "GET /static/(.*)$",
    "HEAD /static/(.*)$",
    *(f"{method} {path}" for method in ("GET", "HEAD") for path in sorted(JUPYTER) if "robots" in path),
    *(f"{method} /(favicon\\.ico)$" for method in ("GET", "HEAD")),
    *(f"{method} /.*/$" for method in ("GET", "POST", "PUT")),
    "GET /?$",
}
"""What strangers may ask, besides OPTIONS."""

NOT_SERVED = (
    "/api/contents /api/contents/x.ipynb /files/x /view/x /edit/x /tree /lab /notebooks/x /nbconvert/html/x"
    " /api/nbconvert /api/terminals /terminals/websocket/1 /api/config/x /api/shutdown /lsp /lsp/status /api/settings"
    " /lab/api/settings /nbextensions/x /custom/custom.css /api/gateway /services/x /spec /api/build"
).split()


@pytest.fixture
def app(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[web.Application]:
    """The application of a gateway that serves nobody yet."""
    monkeypatch.setenv("SANDBOX_GATEWAY_HOME", str(paths.home))
    for name, place in (("JUPYTER_CONFIG_DIR", "config"), ("JUPYTER_RUNTIME_DIR", "r")):
        monkeypatch.setenv(name, str(tmp_path / place))
    ours = logging.getLogger("sandbox_gateway")
    before = (ours.parent, ours.propagate, ours.level)
    made = GatewayApp()
    made.initialize(["--allow-root", "--users", "--ip", "127.0.0.1"], new_httpserver=False)
    yield made.web_app
    ours.parent, ours.propagate = before[:2]
    ours.setLevel(before[2])


def ours() -> set[str]:
    """The patterns of the paths in the description."""
    return {re.sub(r"\\\{[a-z]+\\\}", "([^/]+)", re.escape(path)) + "$" for path in openapi.description()["paths"]}


def test_the_route_table_is_the_list_and_nothing_else(app: web.Application) -> None:
    found = {pattern for pattern, _, _ in routes(app)}
    assert found == JUPYTER | ours()


def test_no_handler_comes_from_an_extension_or_hands_out_the_machine(app: web.Application) -> None:
    modules = {handler.__module__ for _, handler, _ in routes(app)}
    assert {module.partition(".")[0] for module in modules} == {"jupyter_server", "sandbox_gateway"}
    forbidden = ("contents", "terminals", "nbconvert", "files", "config", "shutdown", "view", "gateway.handlers")
    assert [module for module in modules if any(f".{name}" in module for name in forbidden)] == []


def test_every_route_asks_for_a_login_and_a_right(app: web.Application) -> None:
    # /api/me tells who is logged in, and changes nothing but that user's own name: a login is the right.
    assert {line.split(" (")[0] for line in unprotected(app)} == {"GET /api/me$", "PATCH /api/me$"}
    assert {line for line in public(app) if not line.startswith("OPTIONS ")} == PUBLIC


def test_only_our_extension_is_loaded(app: web.Application) -> None:
    extensions = app.settings["serverapp"].extension_manager.extensions if "serverapp" in app.settings else {}
    assert set(extensions) <= {"sandbox_gateway.server"}


def addresses() -> list[tuple[str, str]]:
    """Each method of each route, as an address."""
    some = "00000000-0000-4000-8000-000000000000"
    found = [
        (method.upper(), re.sub(r"\{[a-z]+\}", some, path))
        for path, methods in openapi.description()["paths"].items()
        for method in methods
        if method in ("get", "post", "put", "patch", "delete")
    ]
    found += [(method, "/api/sandboxes/x/y/z") for method in ("GET", "POST", "PUT", "PATCH", "DELETE")]
    found += [("GET", "/api/kernels"), ("POST", "/api/kernels")]
    found += [(method, f"/api/kernels/{some}") for method in ("GET", "DELETE")]
    found += [("POST", f"/api/kernels/{some}/{action}") for action in ("restart", "interrupt")]
    found += [("GET", f"/api/kernels/{some}/channels"), ("GET", f"/api/kernels/{some}/channels?session_id=x&replay=1")]
    found += [("GET", "/api/kernelspecs"), ("GET", "/api/kernelspecs/python3-gvisor")]
    found += [("GET", "/kernelspecs/python3-gvisor/logo-svg.svg"), ("GET", "/metrics"), ("GET", "/api/status")]
    found += [("GET", "/api/sessions"), ("POST", "/api/sessions")]
    found += [(method, f"/api/sessions/{some}") for method in ("GET", "PATCH", "DELETE")]
    found += [("GET", "/api/me"), ("PATCH", "/api/me"), ("GET", "/api/spec.yaml"), ("GET", "/api/resolvePath?path=x")]
    found += [("POST", "/api/events"), ("GET", "/api/events/subscribe"), ("POST", "/api/security/csp-report")]
    found += [("GET", path) for path in NOT_SERVED] + [("POST", "/api/terminals"), ("POST", "/api/shutdown")]
    return found


async def ask(served: Served, method: str, path: str, **headers: str) -> Any:
    """A request without a token, nor a body that would be looked at first."""
    request = HTTPRequest(
        served.url + path,
        method=method,
        headers=headers,
        body=b"{}" if method not in ("GET", "DELETE") else None,
        allow_nonstandard_methods=True,
        follow_redirects=False,
    )
    return await AsyncHTTPClient().fetch(request, raise_error=False)


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Version": "13",
}


@pytest.mark.parametrize("credentials", [{}, {"Authorization": "Bearer wrong"}, {"Cookie": "username-x=wrong"}])
async def test_a_stranger_gets_nothing_from_any_route(gateway: Served, credentials: dict[str, str]) -> None:
    for method, path in addresses():
        socket = path.partition("?")[0].endswith(("/channels", "/subscribe"))
        answer = await ask(gateway, method, path, **credentials, **(UPGRADE if socket else {}))
        nothing = {404} if path in NOT_SERVED or path in ("/api/terminals", "/api/shutdown") else set()
        assert answer.code in {302, 401, 403} | nothing, (method, path, answer.code, answer.body[:300])
        if answer.code == 302:
            assert answer.headers["Location"].startswith("/login?"), (method, path)


async def test_what_a_gateway_has_no_use_for_is_not_served_to_an_administrator_either(gateway: Served) -> None:
    for path in NOT_SERVED:
        for method in ("GET", "POST"):
            answer = await gateway.ask(method, path, {} if method == "POST" else None)
            assert answer.status in (404, 405), (method, path, answer.status)
    tried = ("../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd")
    for path in ("/static/", "/kernelspecs/python3-gvisor/", "/kernelspecs/..%2f../"):
        for behind in tried:
            answer = await gateway.ask("GET", path + behind)
            assert answer.status in (403, 404), (path, behind, answer.status)


async def test_whether_a_file_exists_on_the_machine_is_not_told(gateway: Served) -> None:
    kernel = await gateway.create()
    for path in ("/etc/passwd", "../../../etc/passwd", str(gateway.log)):
        for more in ("", f"&kernel={kernel}"):
            answer = await gateway.ask("GET", f"/api/resolvePath?path={path}{more}")
            assert answer.status == 404 or answer.body == {"resolved": []}, answer.body
