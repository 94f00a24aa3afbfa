"""A real jupyter_server in this process, without kernels of ours: for users, events, metrics and logs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from jupyter_server.serverapp import ServerApp
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect
from traitlets.config import Config

from sandbox_gateway.server.authorizer import GatewayAuthorizer
from sandbox_gateway.server.event_handlers import event_handlers
from sandbox_gateway.server.identity import TokenFileIdentityProvider
from sandbox_gateway.tokens import Token, TokenFile


class Answer:
    """What a request was answered."""

    def __init__(self, status: int, body: bytes, headers: Any) -> None:
        self.status = status
        self.body = body
        self.headers = headers

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """The server and requests to it."""

    def __init__(self, app: ServerApp, users: TokenFile) -> None:
        self.app = app
        self.users = users
        self.connected: list[WebSocketClientConnection] = []
        self.url = f"http://127.0.0.1:{app.port}"

    def user(self, name: str, now: float = 1e9, **rights: Any) -> tuple[Token, str]:
        """A new token of a user, and its secret."""
        return self.users.add(name, now, **rights)

    async def ask(
        self,
        path: str,
        token: str = "",
        *,
        method: str = "GET",
        body: Any = None,
        scheme: str = "token",
        headers: Mapping[str, str] = {},
    ) -> Answer:
        sent = {"Authorization": f"{scheme} {token}"} if token else {}
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = HTTPRequest(
            self.url + path,
            method=method,
            headers={**sent, **headers},
            body=raw,
            allow_nonstandard_methods=True,
            follow_redirects=False,
        )
        found = await AsyncHTTPClient().fetch(request, raise_error=False)
        return Answer(found.code, found.body or b"", found.headers)

    async def subscribe(self, token: str) -> WebSocketClientConnection:
        request = HTTPRequest(
            self.url.replace("http", "ws") + "/api/events/subscribe", headers={"Authorization": f"token {token}"}
        )
        connected = await websocket_connect(request)
        self.connected.append(connected)
        return connected

    async def log_in(self, secret: str) -> dict[str, str]:
        """As a browser: the headers of its next requests."""
        page = await self.ask("/login")
        cookies = dict(re.findall(r"^([^=]+)=([^;]*)", line)[0] for line in page.headers.get_list("Set-Cookie"))
        xsrf = cookies["_xsrf"]
        done = await self.ask(
            "/login",
            method="POST",
            body=f"password={secret}&_xsrf={xsrf}".encode(),
            headers={"Cookie": f"_xsrf={xsrf}", "Content-Type": "application/x-www-form-urlencoded"},
        )
        if done.status != 302:
            raise PermissionError(done.status)
        cookies |= dict(re.findall(r"^([^=]+)=([^;]*)", line)[0] for line in done.headers.get_list("Set-Cookie"))
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items()), "X-XSRFToken": xsrf}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def small_server(
    place: Path,
    *,
    users: bool = True,
    log: logging.Handler | None = None,
    more: Sequence[tuple[str, type]] = (),
    **traits: Any,
) -> AsyncIterator[Server]:
    """A server in ``place``: if ``users``, by a token file, else as stock; ``more`` routes, ``traits`` of ServerApp."""
    file = TokenFile(place / "tokens.jsonl")
    config = Config()
    config.ServerApp.update(
        {
            "ip": "127.0.0.1",
            "port": _free_port(),
            "port_retries": 0,
            "open_browser": False,
            "allow_root": True,
            "root_dir": str(place),
            "authorizer_class": GatewayAuthorizer,
            "allow_unauthenticated_access": False,
            **traits,
        }
    )
    if users:
        config.ServerApp.identity_provider_class = TokenFileIdentityProvider
        config.TokenFileIdentityProvider.token_file = str(file.path)
    folders = {f"JUPYTER_{name}_DIR": str(place / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    with mock.patch.dict(os.environ, folders):
        app = ServerApp(config=config)
        app.init_signal = lambda: None
        if log is not None:
            app.log.addHandler(log)
        app.initialize([], find_extensions=False)
        app.web_app.add_handlers(".*$", [*event_handlers(), *more])
        try:
            while not app.http_server._sockets:  # it binds when its loop turns
                await asyncio.sleep(0.001)
            server = Server(app, file)
            yield server
            for connected in server.connected:
                stream = connected.protocol.stream if connected.protocol is not None else None
                connected.close()
                if stream is not None:
                    stream.close()  # a client that reads nothing does not hear the answer to its goodbye
        finally:
            await app._cleanup()
            if log is not None:
                app.log.removeHandler(log)
