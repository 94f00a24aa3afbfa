"""One HTTP exchange with another server, whose answer is handed on while it comes.

tornado's own client is not enough: it keeps an answer in memory, has a few connections only, which long answers would
take from Jupyter's own requests, and cannot be told that nobody wants the answer any more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters
from tornado.httpclient import HTTPRequest
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
    encode_username_password,
)
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpclient import TCPClient

CHUNK: Final = 1 << 16
"""Bytes that are read before they are handed on, at most."""
_UNBOUNDED: Final = 1 << 60
"""tornado wants a bound of an answer; there is none, since nothing of it is kept."""
_PORTS: Final = {"http": 80, "https": 443}


class Broken(OSError):
    """There is no whole answer: the server cannot be reached, is too slow, or went away."""


class Exchange(HTTPMessageDelegate):
    """A request and its answer: :meth:`begin` it, then :meth:`take` the body; :meth:`close` ends it at any time.

    Redirections are answers as others.
    """

    def __init__(self, request: HTTPRequest) -> None:
        self._request = request
        self._stream: IOStream | None = None
        self._head: asyncio.Future[tuple[int, HTTPHeaders]] = asyncio.get_running_loop().create_future()
        self._taker: asyncio.Future[Callable[[bytes], Awaitable[None]]] = asyncio.get_running_loop().create_future()
        self._reading: asyncio.Future[bool] | None = None
        self._whole = False
        self._closed = False

    async def begin(self) -> tuple[int, HTTPHeaders]:
        """Ask; gives the status and the headers of the answer, for which ``request_timeout`` counts.

        Raises :class:`Broken`.
        """
        try:
            async with asyncio.timeout(self._request.request_timeout):
                connection = await self._send()
                self._reading = asyncio.ensure_future(connection.read_response(self))
                either: set[asyncio.Future[Any]] = {self._reading, self._head}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise Broken("it takes too long") from None
        except (OSError, ValueError) as error:
            raise error if isinstance(error, Broken) else Broken(str(error)) from error
        if not self._head.done():
            raise Broken("the connection ended before the answer began")
        return self._head.result()

    async def take(self, taker: Callable[[bytes], Awaitable[None]]) -> None:
        """Give each part of the body to ``taker``, and read the next when that is done; raises :class:`Broken` where
        not all of it comes."""
        assert self._reading is not None, "begin() comes first"
        self._taker.set_result(taker)
        with contextlib.suppress(StreamClosedError):
            await self._reading
        if not self._whole:
            raise Broken("the connection ended before the answer did")

    def close(self) -> None:
        """End it: nobody wants the answer, or more of it. Harmless at any time."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        if self._reading is not None and not self._taker.done():
            self._reading.cancel()

    async def _send(self) -> HTTP1Connection:
        request = self._request
        url = urlsplit(request.url)
        if url.scheme not in _PORTS or url.hostname is None:
            raise Broken(f"{url.scheme}://{url.hostname or ''} is no address of a server")
        self._stream = await TCPClient().connect(
            url.hostname,
            url.port or _PORTS[url.scheme],
            ssl_options=context(request) if url.scheme == "https" else None,
            timeout=request.connect_timeout,
        )
        if self._closed:
            self._stream.close()
            raise Broken("nobody waits any more")
        self._stream.set_nodelay(True)
        connection = HTTP1Connection(
            self._stream,
            True,
            HTTP1ConnectionParameters(no_keep_alive=True, chunk_size=CHUNK, max_body_size=_UNBOUNDED),
        )
        headers = HTTPHeaders(request.headers)
        headers["Host"] = url.netloc.rpartition("@")[2]
        headers["Connection"] = "close"
        if request.auth_username is not None:
            pair = encode_username_password(request.auth_username, request.auth_password or "")
            headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        body = request.body or b""
        if body or request.method not in ("GET", "DELETE"):
            headers["Content-Length"] = str(len(body))
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.write_headers(RequestStartLine(str(request.method), target, ""), headers, body or None)
        connection.finish()
        return connection

    # Called by the connection

    def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        """The answer begins."""
        assert isinstance(start_line, ResponseStartLine)
        if start_line.code < 200:
            return  # there is another to come
        self._head.set_result((start_line.code, headers))

    async def data_received(self, chunk: bytes) -> None:
        """Some of the body; the next is not read before this was taken."""
        taker = await self._taker
        await taker(chunk)

    def finish(self) -> None:
        """That was all of it."""
        self._whole = True


def context(request: HTTPRequest) -> ssl.SSLContext:
    """How the other server proves who it is, and this one to it."""
    found = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=request.ca_certs)
    if not request.validate_cert:
        found.check_hostname = False
        found.verify_mode = ssl.CERT_NONE
    if request.client_cert is not None:
        found.load_cert_chain(request.client_cert, request.client_key)
    return found
