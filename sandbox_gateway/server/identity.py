"""Who makes a request: the users of jupyter_server, and the :class:`~sandbox_gateway.server.callers.Caller` of each.

With a single shared token (or password) jupyter_server's own provider authenticates; it invents a new name for each
request without a cookie, so its users are no owners, and all of them are
:data:`~sandbox_gateway.server.callers.EVERYBODY`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from jupyter_server.auth import IdentityProvider, User
from jupyter_server.auth.identity import LegacyIdentityProvider, PasswordIdentityProvider
from jupyter_server.base.call_context import CallContext

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.server.callers import EVERYBODY, Caller

_SHARED: Final = (IdentityProvider, PasswordIdentityProvider, LegacyIdentityProvider)
"""The providers whose users have names that mean nothing."""


@dataclass
class GatewayUser(User):
    """A user with a name of his own, whom an identity provider of ours authenticated."""

    admin: bool = False
    groups: tuple[str, ...] = ()


def caller_of(user: object) -> Caller:
    """The caller that ``user`` (a handler's ``current_user``) is.

    Users of an identity provider that is neither ours nor jupyter_server's own are callers under their user name, and
    administrators only where the user itself says so (an attribute ``admin`` that is True).

    Raises ``unauthenticated`` where there is no user: a route that forgot to ask for one must not act for everybody.
    """
    if not isinstance(user, User):
        raise SandboxGatewayError("unauthenticated", "this request has no user")
    if type(user) is User and _shared_token():
        return EVERYBODY
    groups = getattr(user, "groups", ())
    names = tuple(str(group) for group in groups) if isinstance(groups, tuple | list | set | frozenset) else ()
    return Caller(user.username, getattr(user, "admin", False) is True, names)


def _shared_token() -> bool:
    """Whether the request at hand (if any) was authenticated by one secret that all users share."""
    handler = CallContext.get(CallContext.JUPYTER_HANDLER)
    settings = getattr(handler, "settings", None) or {}
    provider = settings.get("identity_provider")
    return provider is None or type(provider) in _SHARED
