"""What kinds of things a user of the gateway may touch at all, and a look at every route for a forgotten check.

This is the coarse half of authorisation: by kind of resource. The fine half, by owner, is the gateway's own
(:meth:`sandbox_gateway.server.callers.Caller.may_use`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from jupyter_server.auth import Authorizer
from tornado import web
from tornado.routing import ReversibleRuleRouter

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.server.identity import caller_of

FOR_USERS: Final = frozenset(
    "api csp events kernels kernelspecs operations profiles sandboxes sessions snapshots".split()
)
"""Resources of users. All others are administrators' (the server's end, its configuration, files and terminals of the
machine it runs on, whatever an extension brings): a new kind of resource is closed until it is named here."""


class GatewayAuthorizer(Authorizer):
    """Users get kernels, administrators everything; with one shared token everybody is an administrator."""

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        """Called by jupyter_server's ``@authorized``, for a user who is authenticated."""
        try:
            caller = caller_of(user)
        except SandboxGatewayError:
            return False
        return caller.admin or resource in FOR_USERS


def routes(app: web.Application) -> Iterator[tuple[str, type[web.RequestHandler], dict[str, Any]]]:
    """Every route of a built application: its pattern, its handler, and the handler's arguments."""
    yield from _rules(app.default_router)
    # Those of add_handlers, which come first when a request is routed.
    yield from _rules(app.wildcard_router)


def _rules(router: ReversibleRuleRouter) -> Iterator[tuple[str, type[web.RequestHandler], dict[str, Any]]]:
    for rule in router.rules:
        if isinstance(rule.target, ReversibleRuleRouter):
            yield from _rules(rule.target)
        elif isinstance(rule.target, type) and issubclass(rule.target, web.RequestHandler):
            pattern = getattr(rule.matcher, "regex", None)
            yield (pattern.pattern if pattern is not None else "*", rule.target, rule.target_kwargs or {})


def unprotected(app: web.Application) -> list[str]:
    """``METHOD pattern (handler): what is missing`` for each method of each route that a stranger, or a user without
    the right to its resource, could call; empty when all is well.

    A method passes when it is marked as public on purpose (``@allow_unauthenticated``), or is both authenticated
    (``@web.authenticated``, ``@ws_authenticated``) and authorised (``@authorized``, or ``pre_get`` of a WebSocket).
    """
    found = []
    for pattern, handler, _ in routes(app):
        for method in handler.SUPPORTED_METHODS:
            function = getattr(handler, method.lower())
            if function is web.RequestHandler._unimplemented_method:
                continue
            missing = _missing(handler, function)
            if missing:
                found.append(f"{method} {pattern} ({handler.__module__}.{handler.__qualname__}): {missing}")
    return sorted(set(found))


def public(app: web.Application) -> list[str]:
    """``METHOD pattern`` for each method that is marked as public; a test holds them against a list."""
    found = set()
    for pattern, handler, _ in routes(app):
        for method in handler.SUPPORTED_METHODS:
            if getattr(getattr(handler, method.lower()), "__allow_unauthenticated", None) is True:
                found.add(f"{method} {pattern}")
    return sorted(found)


def _missing(handler: type[web.RequestHandler], function: Any) -> str:
    layers = list(_layers(function))
    if any(getattr(layer, "__allow_unauthenticated", None) is True for layer in layers):
        return ""
    authenticated = any(
        getattr(layer, "__allow_unauthenticated", None) is False or _made_by(layer, "authenticated") for layer in layers
    )
    if not authenticated:
        return "not authenticated"
    # A WebSocket is authorised before its upgrade, by a method of its own.
    if any(_made_by(layer, "authorized") for layer in layers) or hasattr(handler, "pre_get"):
        return ""
    return "not authorised"


def _layers(function: Any) -> Iterator[Any]:
    """A method and what its decorators wrap, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _made_by(layer: Any, decorator: str) -> bool:
    code = getattr(layer, "__code__", None)
    return code is not None and code.co_qualname.startswith(f"{decorator}.<locals>")
