"""What the handlers of all REST routes have in common: the caller, checked requests, answers, problems."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar, cast

from jupyter_server.base.handlers import APIHandler
from tornado import web

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.runtimes.base import Stats
from sandbox_gateway.server import openapi, views
from sandbox_gateway.server.callers import Caller
from sandbox_gateway.server.gateway import Gateway
from sandbox_gateway.server.identity import caller_of
from sandbox_gateway.server.operations import Operation, Operations, OperationState, Work, operations_of
from sandbox_gateway.server.problems import MEDIA_TYPE, of_http, problem
from sandbox_gateway.server.requests import MAX_BODY, read_body, read_query

METHODS = ("get", "post", "patch", "delete")
"""What the routes may have."""


_FORM = "application/x-www-form-urlencoded"


class ProblemHandler(APIHandler):
    """Tells what went wrong as a problem (RFC 9457)."""

    auth_resource = "sandboxes"

    def check_xsrf_cookie(self) -> None:
        """Only of who is known: anybody else is told that he is not, and not of a cookie that he would need."""
        if getattr(self, "_jupyter_current_user", None) is not None:
            super().check_xsrf_cookie()

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Ours have a status of their own; who is not authenticated is told so."""
        error = _error(kwargs)
        if isinstance(error, SandboxGatewayError):
            status_code = error.status
        elif status_code == 403 and getattr(self, "_jupyter_current_user", None) is None and self.check_host():
            status_code = 401
        super().send_error(status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """A problem (RFC 9457)."""
        error = _error(kwargs)
        if not isinstance(error, SandboxGatewayError):
            # What goes wrong in the server itself is for its log, not for the caller.
            message = (error.log_message or "") if isinstance(error, web.HTTPError) and status_code < 500 else ""
            error = of_http(status_code, message)
        if status_code == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.allowed()))
        self.finish(json.dumps(problem(error, status_code)), set_content_type=MEDIA_TYPE)

    def allowed(self) -> list[str]:
        """The methods of this route."""
        own = [name.upper() for name in METHODS if getattr(type(self), name) is not getattr(web.RequestHandler, name)]
        return [*own, "OPTIONS"]

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """An error of ours is an answer; only what is our fault belongs in the log."""
        if isinstance(value, SandboxGatewayError):
            if value.status >= 500:
                self.log.warning("%s %s: %s", self.request.method, self.request.path, value.message)
            return
        super().log_exception(typ, value, tb)


class RestHandler(ProblemHandler):
    """One route of ``openapi.yaml``. All methods of subclasses are ``@web.authenticated`` and ``@authorized``."""

    path: ClassVar[str] = ""
    """As the description names it."""

    # Who and what

    @property
    def gateway(self) -> Gateway:
        """The gateway of this server."""
        return cast(Gateway, self.settings["sandbox_gateway"])

    @property
    def operations(self) -> Operations:
        """What takes long in this server."""
        return operations_of(self.settings)

    @property
    def caller(self) -> Caller:
        """Who asks."""
        return caller_of(self.current_user)

    def read(self, schema: str, limit: int = MAX_BODY) -> dict[str, Any]:
        """The body, checked against a schema of the description."""
        kind = self.request.headers.get("Content-Type")
        if kind == _FORM and self.token_authenticated:
            # What curl and urllib say of any body. From a page of another site, which has no token, it stays refused.
            kind = None
        return read_body(self.request.body, kind, schema, limit)

    def query(self) -> dict[str, Any]:
        """The query parameters, checked against the description."""
        known = openapi.parameters(self.path, str(self.request.method).lower())
        return read_query(self.request.query_arguments, known)

    # Answers

    def answer(self, value: Mapping[str, Any], status: int = 200, *, location: str = "") -> None:
        """Finish with JSON."""
        self.set_status(status)
        if location:
            self.set_header("Location", self.base_url.rstrip("/") + location)
        self.finish(json.dumps(value, allow_nan=False))

    def answer_nothing(self) -> None:
        """Finish without a body."""
        self.set_status(204)
        self.finish()

    async def long(
        self,
        kind: str,
        work: Work,
        wait: float,
        *,
        sandbox: str | None = None,
        name: str = "",
        status: int = 200,
        location: Callable[[Mapping[str, Any]], str] = lambda result: "",
    ) -> None:
        """Begin an operation, and answer with its outcome if it comes within ``wait`` seconds, else with itself."""
        operation = self.operations.start(self.caller, kind, work, sandbox=sandbox, name=name)
        operation = await self.operations.wait(operation, wait)
        if operation.error is not None and wait > 0:
            raise operation.error
        if operation.state is OperationState.SUCCEEDED and operation.result is not None and wait > 0:
            self.answer(operation.result, status, location=location(operation.result))
        else:
            self.accept(operation)

    def accept(self, operation: Operation) -> None:
        """Answer that it goes on."""
        self.answer(operation.as_dict(), 202, location=f"/api/operations/{operation.id}")

    async def shown(self, sandbox_id: str, *, stats: bool = False) -> dict[str, Any]:
        """A sandbox as JSON."""
        return await view_of(self.gateway, self.settings, self.caller, sandbox_id, stats=stats)


def _error(kwargs: Mapping[str, Any]) -> BaseException | None:
    found = kwargs.get("exc_info")
    error: BaseException | None = found[1] if found else None
    return error


# Looking at sandboxes

STATS_TIMEOUT = 1.0
"""Seconds in which it has to be found what a sandbox uses; without an answer it is not shown."""


async def view_of(
    gateway: Gateway, settings: Mapping[str, Any], caller: Caller, sandbox_id: str, *, stats: bool = False
) -> dict[str, Any]:
    """One sandbox as JSON; raises ``unknown_sandbox``."""
    record = await gateway.record(caller, sandbox_id)
    return (await views_of(gateway, settings, caller, [record], stats=stats))[0]


async def views_of(
    gateway: Gateway, settings: Mapping[str, Any], caller: Caller, records: Any, *, stats: bool = False
) -> list[dict[str, Any]]:
    """Sandboxes as JSON, with their limits and what Jupyter knows of their kernels."""
    limits = await asyncio.to_thread(_limits, gateway, [record.id for record in records])
    used = await _usages(gateway, caller, records) if stats else {}
    kernels = settings.get("kernel_manager")
    return [
        views.sandbox(record, limits[record.id], _model(kernels, record.id), used.get(record.id)) for record in records
    ]


def _limits(gateway: Gateway, ids: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sandbox_id in ids:
        live = gateway.lifecycle.live.get(sandbox_id)
        try:
            launch = live.launch if live is not None else gateway.lifecycle.store.launch(sandbox_id)
        except SandboxGatewayError:
            found[sandbox_id] = None  # it is so new, or so damaged, that nobody knows
        else:
            found[sandbox_id] = launch.spec.limits
    return found


async def _usages(gateway: Gateway, caller: Caller, records: Any) -> dict[str, dict[str, Any]]:
    sizes = await gateway.sizes([record.snapshot for record in records if record.snapshot is not None])
    found = await asyncio.gather(*(_stats(gateway, caller, record) for record in records))
    return {
        record.id: views.usage(stats, sizes.get(record.snapshot)) for record, stats in zip(records, found, strict=True)
    }


async def _stats(gateway: Gateway, caller: Caller, record: Any) -> Stats:
    if record.id not in gateway.kernels or record.snapshot is not None:  # those that are being made are none yet
        return Stats()
    try:
        async with asyncio.timeout(STATS_TIMEOUT):
            return await gateway.stats(caller, record.id)
    except (SandboxGatewayError, TimeoutError):
        return Stats()


def _model(kernels: Any, sandbox_id: str) -> Mapping[str, Any] | None:
    if kernels is None or sandbox_id not in kernels:
        return None
    try:
        model: Mapping[str, Any] = kernels.kernel_model(sandbox_id)
    except (KeyError, web.HTTPError):  # it is on its way out
        return None
    return model


async def unless_reached(doing: Awaitable[Any], gateway: Gateway, caller: Caller, sandbox_id: str, state: str) -> None:
    """Do it; that the sandbox is in ``state`` already is no error."""
    try:
        await doing
    except SandboxGatewayError as error:
        if error.code != "illegal_transition" or (await gateway.record(caller, sandbox_id)).state != state:
            raise
