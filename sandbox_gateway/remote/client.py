"""A gateway's REST, for programs on another machine: typed, asynchronous, on tornado's client.

Whatever goes wrong is a :class:`~sandbox_gateway.errors.SandboxGatewayError`: what the gateway answers, with its code,
message and hint; :class:`Unreachable` where there is no answer of a gateway's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import responses
from typing import Any, Final

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse

from sandbox_gateway import __version__
from sandbox_gateway.errors import ERRORS, SandboxGatewayError
from sandbox_gateway.remote.address import Address, segment

log = logging.getLogger(__name__)

CONNECT_TIMEOUT: Final = 15.0
"""Seconds to reach the gateway."""
QUICK: Final = 30.0
"""Seconds for an answer that needs no work."""
LONG: Final = 600.0
"""Seconds for what may have to build, save or restore something."""
WAIT: Final = 60
"""Seconds that the gateway is asked to hold one answer back until a long operation is done."""
_TRIES = 4
_PATIENCE = 0.5
_ENDED = frozenset({"terminated", "failed", "expired"})
_ASLEEP = frozenset({"paused", "suspending", "suspended"})
_GOING_ON = frozenset({"pending", "queued", "running", "started"})
_TRANSIENT = frozenset({429, 502, 503, 504})
"""What something on the way answers for a while; statuses above 500 that no standard knows are its own as well."""


class Unreachable(SandboxGatewayError):
    """``gateway_unreachable``: nobody answers, or something on the way answers in the gateway's place."""

    def __init__(self, address: Address, why: str, hint: str | None = None) -> None:
        super().__init__("gateway_unreachable", f"the gateway at {address.url} cannot be reached: {why}", hint)


@dataclass(frozen=True, slots=True)
class RemoteProfile:
    """What a gateway offers."""

    name: str
    display_name: str
    description: str = ""
    language: str = "python"
    interrupt_mode: str = "signal"
    isolated: bool = True
    variables: tuple[str, ...] = ()
    """Variables that a client may hand in, by name or with a ``*`` at the end."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RemoteProfile:
        """Read an entry of ``GET /api/profiles``."""
        name = _text(data, "name")
        variables = data.get("client_environment")
        return cls(
            name,
            _text(data, "display_name") or name,
            _text(data, "description"),
            _text(data, "language") or "python",
            "message" if data.get("interrupt_mode") == "message" else "signal",
            data.get("isolated") is not False and data.get("runtime") != "fake",
            tuple(item for item in variables if isinstance(item, str)) if isinstance(variables, list | tuple) else (),
        )


@dataclass(frozen=True, slots=True)
class RemoteSandbox:
    """A sandbox of a gateway, as it was when it was asked for."""

    id: str
    state: str
    profile: str = ""
    name: str = ""
    owner: str = ""
    reason: str = ""
    """Why it ended; empty while it has not."""
    exit_code: int | None = None
    """The kernel's, or minus the signal that ended it; None where that is not known."""
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """All that the gateway said."""

    @property
    def ended(self) -> bool:
        """Whether the kernel is dead; one that is paused or suspended is not."""
        return self.state in _ENDED

    @property
    def asleep(self) -> bool:
        """Whether it is paused or suspended: a request would wake it."""
        return self.state in _ASLEEP

    @property
    def falling_asleep(self) -> bool:
        """Whether it is being saved: the last that the kernel says may still be on its way."""
        return self.state == "suspending"

    @property
    def busy(self) -> bool:
        """Whether the kernel works on a request, or did when it was put to sleep."""
        kernel = self.data.get("kernel")
        return isinstance(kernel, Mapping) and kernel.get("execution_state") == "busy"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RemoteSandbox:
        """Read what the gateway answers."""
        death = data.get("death")
        reason, code = "", None
        if isinstance(death, Mapping):
            reason = _text(death, "reason") or _text(death, "detail") or _text(death, "kind")
            code, number = death.get("exit_code"), death.get("signal")
            code = code if isinstance(code, int) else -number if isinstance(number, int) else None
        sandbox_id, state, profile = _text(data, "id"), _text(data, "state"), _text(data, "profile")
        return cls(sandbox_id, state, profile, _text(data, "name"), _text(data, "owner"), reason, code, data)


class GatewayClient:
    """Asks one gateway. Make and use it on one event loop; :meth:`close` it there."""

    def __init__(self, address: Address, token: str = "") -> None:
        self.address = address
        self.token = token
        self._http: AsyncHTTPClient | None = None
        self._tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> GatewayClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let its connections go."""
        if self._http is not None:
            self._http.close()
            self._http = None

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries; the token is in it."""
        made = {"User-Agent": f"sandbox_gateway/{__version__}"}
        if self.token:
            made["Authorization"] = f"token {self.token}"
        return made

    @property
    def tls(self) -> ssl.SSLContext:
        """Certificates are checked, always. Raises ``invalid_request`` when the file of certificates is none."""
        if self._tls is None:
            path = self.address.ca_file
            try:
                self._tls = ssl.create_default_context(cafile=path or None)
            except OSError as error:
                text = f"{path} is no file of certificates: {error.strerror or error}"
                raise SandboxGatewayError("invalid_request", text, "It holds certificates in PEM form.") from error
        return self._tls

    def request(self, url: str, **options: Any) -> HTTPRequest:
        """A request to this gateway, for tornado."""
        if self.address.url.startswith("https"):
            options["ssl_options"] = self.tls
        return HTTPRequest(
            url, headers=self.headers, connect_timeout=CONNECT_TIMEOUT, follow_redirects=False, **options
        )

    # What there is

    async def profiles(self) -> tuple[RemoteProfile, ...]:
        """What the gateway offers."""
        try:
            answer = await self._call("GET", "/api/profiles")
        except SandboxGatewayError as error:
            if error.code not in {"not_found", "unknown_profile"} and error.status != HTTPStatus.NOT_FOUND:
                raise
            text = f"{self.address.url} serves no sandboxes"
            raise SandboxGatewayError("unsupported", text, "Is it the address of a `jupyter sandbox serve`?") from error
        return tuple(RemoteProfile.from_dict(item) for item in _items(answer, "profiles"))

    async def sandboxes(self, *, everything: bool = False) -> tuple[RemoteSandbox, ...]:
        """The caller's sandboxes, the oldest first; with ``everything`` those that have ended too."""
        found: list[RemoteSandbox] = []
        wanted = {"state": "all"} if everything else {}
        query: dict[str, str] = dict(wanted)
        while True:
            answer = await self._call("GET", "/api/sandboxes", query=query)
            found += [RemoteSandbox.from_dict(item) for item in _items(answer, "sandboxes")]
            following = answer.get("next") if isinstance(answer, Mapping) else None
            if not isinstance(following, str) or not following or following == query.get("cursor"):
                return tuple(found)
            query = {**wanted, "cursor": following}

    async def find(self, prefix: str) -> RemoteSandbox:
        """The sandbox with this id or unambiguous beginning of it. Raises ``unknown_sandbox`` or ``ambiguous_id``."""
        if len(prefix) == 36:
            return await self.get(prefix)
        found = [sandbox for sandbox in await self.sandboxes() if sandbox.id.startswith(prefix)]
        if not found:
            raise SandboxGatewayError("unknown_sandbox", f"there is no sandbox {prefix!r} on {self.address.place}")
        if len(found) > 1:
            raise SandboxGatewayError("ambiguous_id", f"{len(found)} sandboxes begin with {prefix!r}")
        return found[0]

    async def get(self, sandbox_id: str) -> RemoteSandbox:
        """One sandbox. Raises ``unknown_sandbox``."""
        return self._sandbox(await self._call("GET", _path(sandbox_id)))

    # What is done to it

    async def create(
        self, profile: str, *, environment: Mapping[str, str] | None = None, name: str = "", sandbox_id: str = ""
    ) -> RemoteSandbox:
        """Start a kernel; returns when it runs.

        The id is chosen here, so that one whose answer is lost on the way is found again instead of left behind.
        """
        chosen = sandbox_id or str(uuid.uuid4())
        body: dict[str, Any] = {"profile": profile, "id": chosen}
        if environment:
            body["env"] = dict(environment)
        if name:
            body["name"] = name
        for attempt in range(_TRIES):
            try:
                return await self._long("POST", "/api/sandboxes", body)
            except Unreachable:
                if attempt == _TRIES - 1:
                    raise
                await _pause(attempt)
            except SandboxGatewayError as error:
                if attempt == 0 or error.code not in {"id_taken", "ambiguous_id", "illegal_transition"}:
                    raise
                return await self._made(chosen)
        raise AssertionError("unreachable")

    async def _made(self, sandbox_id: str) -> RemoteSandbox:
        """The one that an earlier try has made, or is making."""
        async with asyncio.timeout(LONG):
            while (found := await self.get(sandbox_id)).state == "creating":
                await asyncio.sleep(_PATIENCE)
        return found

    async def suspend(self, sandbox_id: str) -> RemoteSandbox:
        """Save it to disk; its memory is free."""
        return await self._do(sandbox_id, "suspend")

    async def resume(self, sandbox_id: str) -> RemoteSandbox:
        """Let it go on."""
        return await self._do(sandbox_id, "resume")

    async def pause(self, sandbox_id: str) -> RemoteSandbox:
        """Freeze it, memory kept."""
        return self._sandbox(await self._outcome("POST", _path(sandbox_id, "pause"), {}, wait=None))

    async def restart(self, sandbox_id: str) -> RemoteSandbox:
        """Start its kernel anew; of one that has ended, a new one under its id."""
        return self._sandbox(await self._outcome("POST", _path(sandbox_id, "restart"), {}, wait=None))

    async def interrupt(self, sandbox_id: str) -> None:
        """Interrupt what runs."""
        await self._call("POST", _path(sandbox_id, "interrupt"), {})

    async def fork(self, sandbox_id: str, count: int) -> Sequence[RemoteSandbox | SandboxGatewayError]:
        """``count`` children that go on from where it is, each of them, or why it could not be made."""
        answer = await self._outcome("POST", _path(sandbox_id, "fork"), {"count": count})
        children: list[RemoteSandbox | SandboxGatewayError] = []
        for item in _items(answer, "children"):
            error = item.get("error")
            children.append(
                SandboxGatewayError.from_dict(error) if isinstance(error, Mapping) else RemoteSandbox.from_dict(item)
            )
        return children

    async def delete(self, sandbox_id: str, timeout: float = LONG) -> None:
        """End it, files and snapshot included; one that has ended is no error."""
        try:
            await self._outcome("DELETE", _path(sandbox_id), None, timeout, wait=None)
        except SandboxGatewayError as error:
            if error.status not in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
                raise

    async def _do(self, sandbox_id: str, operation: str) -> RemoteSandbox:
        return await self._long("POST", _path(sandbox_id, operation), {})

    async def _long(self, method: str, path: str, body: Mapping[str, Any]) -> RemoteSandbox:
        return self._sandbox(await self._outcome(method, path, body))

    async def _outcome(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float = LONG,
        *,
        wait: int | None = WAIT,
    ) -> Any:
        """What something that takes long ends with; ``wait``: seconds after which its address is to be answered, None
        where it has none. Raises its error, or ``timeout``."""
        try:
            async with asyncio.timeout(timeout):
                query, patience = (None, timeout) if wait is None else ({"wait": str(wait)}, wait + QUICK)
                response = await self._send(method, path, body, query, patience)
                answer = _read(response)
                if response.code != HTTPStatus.ACCEPTED:
                    return answer
                while isinstance(answer, Mapping) and answer.get("state") in _GOING_ON:
                    answer = await self._operation(_text(answer, "id"))
        except TimeoutError as error:
            text = f"{self.address.place} has not done it within {timeout:.0f} s"
            raise SandboxGatewayError("timeout", text) from error
        found = answer if isinstance(answer, Mapping) else {}
        failed = found.get("error")
        if isinstance(failed, Mapping):
            raise SandboxGatewayError.from_dict(failed)
        return found.get("result")

    async def _operation(self, operation: str) -> Mapping[str, Any]:
        await asyncio.sleep(_PATIENCE)
        answer = await self._call("GET", f"/api/operations/{segment(operation)}", query={"wait": str(WAIT)})
        return answer if isinstance(answer, Mapping) else {}

    # The way there

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> Any:
        """Ask once, or a few times where that does no harm."""
        tries = _TRIES if method == "GET" else 1
        timeout = WAIT + QUICK if query and "wait" in query else QUICK
        for attempt in range(tries):
            try:
                return _read(await self._send(method, path, body, query, timeout))
            except Unreachable:
                if attempt == tries - 1:
                    raise
            await _pause(attempt)
        raise AssertionError("unreachable")

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str] | None,
        timeout: float,
    ) -> HTTPResponse:
        if self._http is None:
            self._http = AsyncHTTPClient(force_instance=True, defaults={"decompress_response": True})
        request = self.request(
            self.address.http(path, query),
            method=method,
            body=None if body is None else json.dumps(body),
            request_timeout=timeout,
            allow_nonstandard_methods=True,
        )
        if body is not None:
            request.headers["Content-Type"] = "application/json"
        try:
            return await self._http.fetch(request)
        except HTTPClientError as error:
            raise self.explained(error) from error
        except (OSError, ValueError) as error:
            raise self.explained(error) from error

    def explained(self, error: Exception) -> SandboxGatewayError:
        """What a failed request means."""
        if not isinstance(error, HTTPClientError) or error.code == 599:
            return Unreachable(self.address, _why(error), _hint(error))
        problem = _problem(error.response)
        code = problem.get("code")
        if isinstance(code, str) and code in ERRORS:
            return SandboxGatewayError.from_dict(problem)
        said = _text(problem, "message") or _text(problem, "detail") or responses.get(error.code, "a status of its own")
        if error.code in {401, 403}:
            text = (
                f"{self.address.place} does not take the token" if self.token else f"{self.address.place} wants a token"
            )
            hint = f"`jupyter sandbox install --gateway {self.address.url} --token-file FILE` keeps another one."
            return SandboxGatewayError("unauthenticated", f"{text} ({error.code} {said})", hint)
        if 300 <= error.code < 400:
            to = error.response.headers.get("Location", "") if error.response is not None else ""
            return Unreachable(self.address, f"it sends us to {to[:200]}", "Give the address that it names.")
        if error.code in _TRANSIENT or (error.code > 500 and error.code not in responses):
            return Unreachable(self.address, f"{error.code} {said}")
        fallback = {404: "not_found", 410: "expired", 409: "illegal_transition"}.get(error.code, "internal")
        return SandboxGatewayError(fallback, f"{self.address.place} answers {error.code}: {said}")

    def _sandbox(self, answer: Any) -> RemoteSandbox:
        if not isinstance(answer, Mapping) or not isinstance(answer.get("id"), str):
            raise Unreachable(self.address, "what answers there is no gateway")
        return RemoteSandbox.from_dict(answer)


def _path(sandbox_id: str, *more: str) -> str:
    return "/".join(("/api/sandboxes", segment(sandbox_id), *more))


def _read(response: HTTPResponse) -> Any:
    if not response.body:
        return None
    try:
        return json.loads(response.body)
    except ValueError:
        return None


def _items(answer: Any, name: str) -> list[Mapping[str, Any]]:
    """A list, or the object around it."""
    found = answer.get(name) if isinstance(answer, Mapping) else answer
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _problem(response: HTTPResponse | None) -> Mapping[str, Any]:
    answer = _read(response) if response is not None else None
    return answer if isinstance(answer, Mapping) else {}


def _text(data: Mapping[str, Any], name: str) -> str:
    found = data.get(name)
    return found if isinstance(found, str) else ""


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, HTTPClientError):
        return error.message or "no answer"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _hint(error: Exception) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "For a certificate of your own: `jupyter sandbox install --gateway URL --ca-file FILE`."
    return None


async def _pause(attempt: int) -> None:
    await asyncio.sleep(_PATIENCE * 2**attempt * (0.5 + random.random()))
