"""What a JupyterLab with ``--gateway-url`` passes on: as it comes, without holding it, and its failures as problems."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.gateway.gateway_client import GatewayClient
from small_server import Answer, Server, small_server
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.testing import bind_unused_port

from sandbox_gateway.server.passing import PassedHandler
from sandbox_gateway.server.rest import ROOTS

pytestmark = pytest.mark.timeout(60)
PART = b"x" * 65536


class Far:
    """A gateway that answers as a test says."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        """Set when who asked is gone."""
        self.sent = 0
        self.asked: list[tuple[str, str, bytes]] = []


class _Answers(web.RequestHandler):
    def initialize(self, far: Far) -> None:
        self.far = far

    def check_xsrf_cookie(self) -> None:
        pass

    def on_connection_close(self) -> None:
        self.far.left.set()

    async def get(self, what: str) -> None:
        far = self.far
        far.asked.append((str(self.request.method), str(self.request.uri), self.request.body))
        if self.request.headers["Authorization"] != "token right":
            self.set_status(401)
            self.finish({"code": "unauthenticated"})
        elif what == "lines":
            self.set_header("Content-Type", "application/x-ndjson")
            self.write('{"type":"stdout"}\n')
            await self.flush()
            await far.go_on.wait()
            self.finish('{"type":"end"}\n')
        elif what == "flood":
            self.set_header("Content-Type", "application/x-ndjson")
            with contextlib.suppress(StreamClosedError):
                while far.sent < 256 << 20:
                    self.write(PART)
                    await self.flush()
                    far.sent += len(PART)
        elif what == "silent":
            await far.left.wait()
        elif what == "torn":
            self.write("half")
            await self.flush()
            await far.go_on.wait()
            self.request.connection.close()  # type: ignore[attr-defined]
        elif what == "page":
            self.set_header("Content-Type", "text/html")
            self.finish("<script>alert(1)</script>")
        elif what == "elsewhere":
            self.redirect("https://other.example/")
        elif what == "nothing":
            self.set_status(204)
            self.finish()
        else:
            self.finish({"what": what})

    post = delete = get


@pytest.fixture
async def far() -> AsyncIterator[Far]:
    socket, port = bind_unused_port()
    found = Far(port)
    server = HTTPServer(web.Application([(r"/api/(?:quota|sandboxes/?(.*))", _Answers, {"far": found})]))
    server.add_socket(socket)
    yield found
    found.go_on.set()
    found.left.set()
    server.stop()
    await server.close_all_connections()


@pytest.fixture
async def near(far: Far, tmp_path: Path) -> AsyncIterator[Server]:
    """A server whose gateway that is."""
    GatewayClient.clear_instance()
    routes = [(rf"/api/(?:{'|'.join(ROOTS)})((?:/.*)?)", PassedHandler)]
    async with small_server(tmp_path, more=routes) as server:
        client = GatewayClient.instance()
        client.url, client.auth_token = far.url, "right"
        yield server
    GatewayClient.clear_instance()


async def ask(near: Server, path: str, **options: Any) -> Answer:
    return await near.ask(path, near.user("ann")[1], **options)


def head(near: Server, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {near.user('ann')[1]}\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def opened(near: Server, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """The answer to a GET, behind its headers, as it comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", near.app.port, limit=len(PART))
    writer.write(head(near, path))
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    try:
        yield reader
    finally:
        writer.close()


async def test_each_line_is_passed_on_when_it_comes(far: Far, near: Server) -> None:
    async with asyncio.timeout(20), opened(near, "/api/sandboxes/lines") as reader:
        assert await reader.readline() == b"12\r\n"
        assert await reader.readline() == b'{"type":"stdout"}\n'
        far.go_on.set()
        assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b'{"type":"end"}\n\r\n0\r\n\r\n')


async def test_a_reader_that_stops_holds_the_gateway_back(far: Far, near: Server) -> None:
    async with asyncio.timeout(50), opened(near, "/api/sandboxes/flood") as reader:
        before = -1
        while far.sent != before or before == 0:
            before = far.sent
            await asyncio.sleep(0.5)
        held = far.sent
        assert held < 32 << 20, "what the sockets hold, and no more"
        while far.sent < held + (16 << 20):
            assert await reader.read(1 << 20)
    await far.left.wait()


async def test_who_goes_away_is_missed_although_nothing_comes(far: Far, near: Server) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", near.app.port)
    head = (
        f"GET /api/sandboxes/silent HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {near.user('ann')[1]}\r\n\r\n"
    )
    writer.write(head.encode())
    async with asyncio.timeout(20):
        while not far.asked:
            await asyncio.sleep(0.01)
        assert not far.left.is_set()
        writer.close()
        await far.left.wait()


async def test_half_an_answer_does_not_look_whole(far: Far, near: Server) -> None:
    async with asyncio.timeout(20), opened(near, "/api/sandboxes/torn") as reader:
        assert await reader.readuntil(b"half") == b"4\r\nhalf"
        far.go_on.set()
        assert not (await reader.read(-1)).endswith(b"0\r\n\r\n")


async def test_what_is_asked_and_answered_goes_through(far: Far, near: Server) -> None:
    assert (await ask(near, "/api/quota")).json == {"what": None}, "every root of ours"
    mine = near.user("ann")[1]
    told = await near.ask(f"/api/sandboxes/plain?limit=2&token={mine}", method="POST", body={"a": 1})
    assert (told.status, told.json) == (200, {"what": "plain"})
    assert far.asked[-1] == ("POST", "/api/sandboxes/plain?limit=2", b'{"a": 1}'), "a token of this server stays here"
    nothing = await ask(near, "/api/sandboxes/nothing", method="DELETE")
    assert (nothing.status, nothing.body) == (204, b"")
    page = await ask(near, "/api/sandboxes/page")
    assert page.headers["Content-Type"] == "text/plain; charset=UTF-8", "no page of a gateway's in this origin"
    first = await ask(near, "/api/sandboxes/plain")
    again = await ask(near, "/api/sandboxes/plain", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize("path", ["../kernels", "%2e%2e/kernels", "one/..%2fkernels", "one/..%5ckernels", "./one"])
async def test_a_way_out_of_our_routes_is_not_passed_on(far: Far, near: Server, path: str) -> None:
    """A proxy before the gateway might walk it."""
    before = len(far.asked)
    assert (await ask(near, f"/api/sandboxes/{path}")).status == 404
    assert len(far.asked) == before


async def test_a_gateway_that_cannot_be_asked_is_a_problem_with_what_to_do(far: Far, near: Server) -> None:
    def problem(answer: Answer) -> tuple[int, str, str]:
        assert answer.headers["Content-Type"] == "application/problem+json"
        found = json.loads(answer.body)
        return answer.status, found["code"], found["message"] + found["hint"]

    status, code, text = problem(await ask(near, "/api/sandboxes/elsewhere"))
    assert (status, code) == (502, "gateway_unreachable") and "https://other.example/" in text
    client = GatewayClient.instance()
    client.auth_token = "wrong"
    status, code, text = problem(await ask(near, "/api/sandboxes"))
    assert (status, code) == (502, "gateway_refused") and "JUPYTER_GATEWAY_AUTH_TOKEN" in text
    socket, port = bind_unused_port()
    socket.close()
    client.url = f"http://127.0.0.1:{port}"
    status, code, text = problem(await ask(near, "/api/sandboxes"))
    assert (status, code) == (502, "gateway_unreachable") and "does not answer" in text
    stranger = await near.ask("/api/sandboxes", "wrong")
    assert problem(stranger)[:2] == (401, "unauthenticated"), "of this server"
