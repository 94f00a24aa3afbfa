"""Who makes a request: the users of jupyter_server, and the :class:`~sandbox_gateway.server.callers.Caller` of each.

With a single shared token (or password) jupyter_server's own provider authenticates; it invents a new name for each
request without a cookie, so its users are no owners, and all of them are
:data:`~sandbox_gateway.server.callers.EVERYBODY`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jupyter_server.auth import IdentityProvider, User
from jupyter_server.auth.identity import LegacyIdentityProvider, PasswordIdentityProvider
from jupyter_server.base.call_context import CallContext
from tornado import web
from traitlets import Unicode

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import discover
from sandbox_gateway.quotas import Quota
from sandbox_gateway.server.callers import EVERYBODY, Caller
from sandbox_gateway.tokens import FILE_NAME, Token, TokenFile, TokenWatch

_SHARED: Final = (IdentityProvider, PasswordIdentityProvider, LegacyIdentityProvider)
"""The providers whose users have names that mean nothing."""
_SHARED_TOKEN: Final = ("JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE")
"""Where jupyter_server takes the one shared token from."""
LOOK: Final = 2.0
"""Seconds between two looks whether the user of something that stays open has been revoked."""
REVOKED: Final = 1008
"""Close code "policy violation" of a WebSocket whose user was revoked."""


@dataclass
class GatewayUser(User):
    """A user with a name of his own, whom an identity provider of ours authenticated."""

    admin: bool = False
    groups: tuple[str, ...] = ()
    token_id: str = ""
    """Which of his tokens he came with; not the secret."""


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


class TokenFileIdentityProvider(IdentityProvider):
    """Several users, each with tokens of his own, from a file of hashes (:mod:`sandbox_gateway.tokens`).

    ``--ServerApp.identity_provider_class=sandbox_gateway.server.identity.TokenFileIdentityProvider`` turns it on, and
    ``jupyter sandbox token add NAME`` makes users. A token comes as ``Authorization: Bearer`` (or ``token``), as
    ``?token=``, or in the login form of a browser, which then has a signed cookie that names the token. The file is
    looked at anew for each request, cookie or not: who was revoked is out at once.
    """

    token_file = Unicode(
        "",
        config=True,
        help="The file of users; default: tokens.jsonl in the data directory, where `jupyter sandbox token` writes it.",
    )

    _watch: TokenWatch
    _clock: Callable[[], float]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        configured = self.trait_has_value("token") or any(os.getenv(name) for name in _SHARED_TOKEN)
        self.token = ""  # else jupyter_server makes one, shows it in the log, and lets it in
        self.token_generated = False
        if configured:
            self.log.warning("users have tokens of their own here: the one shared token that is configured is not used")
        path = Path(self.token_file).expanduser().absolute() if self.token_file else discover().home / FILE_NAME
        self._watch = TokenWatch(TokenFile(path))
        self._clock = time.time
        self._watch.current()  # what is wrong with the file is in the log at the start, not only at the first login

    # Who it is

    async def get_user_token(self, handler: web.RequestHandler) -> User | None:
        """The user whose token came with the request."""
        secret = self.get_token(handler)
        return self._user(secret) if secret else None

    def user_to_cookie(self, user: User) -> str:
        """A cookie names the token that it was given for; jupyter_server signs it."""
        if not isinstance(user, GatewayUser):
            raise ValueError("a login cookie is for users of this provider")
        return json.dumps({"token": user.token_id})

    def user_from_cookie(self, cookie_value: str) -> User | None:
        """The user of a cookie whose signature holds; None when the token has been revoked, or has expired."""
        named = json.loads(cookie_value)
        token_id = named.get("token") if isinstance(named, dict) else None
        if not isinstance(token_id, str):
            return None
        found = self._watch.current().get(token_id, self._clock())
        return None if found is None else _user_of(found)

    def process_login_form(self, handler: web.RequestHandler) -> User | None:
        """The user whose token was typed in (the form calls it a password)."""
        return self._user(handler.get_body_argument("password", ""))

    def _user(self, secret: str) -> GatewayUser | None:
        found = self._watch.current().find(secret, self._clock())
        return None if found is None else _user_of(found)

    def still_valid(self, user: object) -> bool:
        """Whether a user who was let in before would be let in now: for what stays open after its request."""
        if not isinstance(user, GatewayUser):
            return False
        found = self._watch.current().get(user.token_id, self._clock())
        return found is not None and _user_of(found) == user

    def identity_model(self, user: User) -> dict[str, Any]:
        """As ``/api/me`` shows it."""
        model = super().identity_model(user)
        model.pop("token_id", None)
        return {**model, "groups": list(model.get("groups", ()))}

    def quota_of(self, owner: str) -> Quota | None:
        """What the file says of a user's quota; None: the gateway's default holds."""
        return self._watch.current().quota(owner)

    # jupyter_server's own switches

    @property
    def auth_enabled(self) -> bool:
        """Always: a file without users lets nobody in."""
        return True


def still_welcome(handler: Any) -> bool:
    """Whether the user of a request, or of a WebSocket, would be let in now."""
    provider = handler.settings.get("identity_provider")
    return not isinstance(provider, TokenFileIdentityProvider) or provider.still_valid(handler.current_user)


class Revocation:
    """Calls ``end`` when the user of ``handler`` is not welcome any more; looks every :data:`LOOK` seconds until
    :meth:`close`."""

    def __init__(self, handler: web.RequestHandler, end: Callable[[], object]) -> None:
        self._handler = handler
        self._end = end
        self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        if still_welcome(self._handler):
            self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)
        else:
            self._end()


def _user_of(token: Token) -> GatewayUser:
    return GatewayUser(
        username=token.name,
        initials=token.name[:2].upper(),
        admin=token.admin,
        groups=token.groups,
        token_id=token.id,
    )
