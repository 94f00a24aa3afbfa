"""Users by a token file, over real HTTP: who gets in, as whom, and that a revoked one is out at once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from jupyter_server.auth import User
from jupyter_server.base.call_context import CallContext
from small_server import Server, small_server

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.quotas import Quota
from sandbox_gateway.server.callers import EVERYBODY, Caller
from sandbox_gateway.server.identity import GatewayUser, TokenFileIdentityProvider, caller_of


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with small_server(tmp_path) as running:
        yield running


def provider(server: Server) -> TokenFileIdentityProvider:
    found = server.app.identity_provider
    assert isinstance(found, TokenFileIdentityProvider)
    return found


# Who gets in


@pytest.mark.parametrize("scheme", ["token", "Bearer", "bearer"])
async def test_a_token_lets_its_user_in_under_each_scheme(server: Server, scheme: str) -> None:
    _, secret = server.user("ann", groups=["lab"])
    me = await server.ask("/api/me", secret, scheme=scheme)
    identity = me.json["identity"]
    assert me.status == 200 and identity["username"] == "ann"
    assert identity["groups"] == ["lab"] and identity["admin"] is False
    assert "token" not in json.dumps(identity)


async def test_a_token_in_the_address_lets_its_user_in(server: Server) -> None:
    _, secret = server.user("ann")
    assert (await server.ask(f"/api/status?token={secret}")).status == 200


@pytest.mark.parametrize("secret", ["", "x", "sgt_x", "sgt_" + "a" * 43, "a" * 60_000, "\u00e9", "%F0", "sha256:00"])
async def test_anything_else_lets_nobody_in(server: Server, secret: str) -> None:
    token, _ = server.user("ann")
    for given in (secret, token.hash, token.id):
        assert (await server.ask("/api/status", given.encode("utf-8").decode("latin-1"))).status == 403


async def test_without_a_token_nobody_gets_in(server: Server) -> None:
    server.user("ann")
    assert (await server.ask("/api/status")).status == 403
    assert (await server.ask("/api/kernels", method="POST", body={})).status == 403


async def test_the_one_shared_token_is_refused_and_none_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_TOKEN", "shared-by-all")
    lines = Lines()
    async with small_server(tmp_path, log=lines) as server:
        assert (await server.ask("/api/status", "shared-by-all")).status == 403
        assert (await server.ask("/api/status?token=")).status == 403
        assert server.app.identity_provider.token == ""
    assert any("is not used" in line for line in lines.found)


async def test_a_new_user_needs_no_restart_and_an_expired_one_is_out(server: Server) -> None:
    now = time.time()
    assert (await server.ask("/api/status", "sgt_none")).status == 403
    _, ann = server.user("ann", now, expires=now + 100)
    assert (await server.ask("/api/status", ann)).status == 200
    provider(server)._clock = lambda: now + 101
    assert (await server.ask("/api/status", ann)).status == 403


async def test_a_revoked_token_is_out_at_once_and_another_of_the_same_user_stays(server: Server) -> None:
    one, first = server.user("ann")
    _, second = server.user("ann")
    server.users.remove(one.id)
    assert (await server.ask("/api/status", first)).status == 403
    assert (await server.ask("/api/status", second)).status == 200


# Browsers


async def test_a_browser_logs_in_with_a_token_and_is_known_by_its_cookie(server: Server) -> None:
    _, secret = server.user("ann")
    browser = await server.log_in(secret)
    assert secret not in browser["Cookie"]
    assert (await server.ask("/api/me", headers=browser)).json["identity"]["username"] == "ann"


async def test_a_login_with_a_wrong_token_fails(server: Server) -> None:
    server.user("ann")
    with pytest.raises(PermissionError):
        await server.log_in("sgt_wrong")


async def test_a_cookie_of_a_revoked_token_is_worth_nothing(server: Server) -> None:
    token, secret = server.user("ann")
    _, other = server.user("ann")
    browser = await server.log_in(secret)
    assert (await server.ask("/api/status", headers=browser)).status == 200
    server.users.remove(token.id)
    assert (await server.ask("/api/status", headers=browser)).status == 403
    assert (await server.ask("/api/status", other)).status == 200


async def test_a_cookie_follows_the_rights_that_the_file_says_now(server: Server) -> None:
    _, secret = server.user("ann", admin=True)
    browser = await server.log_in(secret)
    assert (await server.ask("/api/me", headers=browser)).json["identity"]["admin"] is True
    text = server.users.path.read_text().replace('"admin": true', '"admin": false')
    server.users.path.write_text(text)
    assert (await server.ask("/api/me", headers=browser)).json["identity"]["admin"] is False


async def test_a_cookie_that_was_changed_or_made_up_is_refused(server: Server) -> None:
    _, secret = server.user("ann")
    browser = await server.log_in(secret)
    for cookie in (browser["Cookie"].replace("=", "=x"), "username-127-0-0-1=ann", browser["Cookie"] + "A"):
        assert (await server.ask("/api/status", headers={"Cookie": cookie})).status == 403


async def test_a_change_by_cookie_needs_the_xsrf_token_and_one_by_token_does_not(server: Server) -> None:
    _, secret = server.user("ann", admin=True)
    browser = await server.log_in(secret)
    body = {"schema_id": "x"}
    assert (
        await server.ask("/api/events", method="POST", body=body, headers={"Cookie": browser["Cookie"]})
    ).status == 403
    assert (await server.ask("/api/events", method="POST", body=body, headers=browser)).status == 400
    assert (await server.ask("/api/events", secret, method="POST", body=body)).status == 400


# The file


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@pytest.fixture
def errors() -> Iterator[list[str]]:
    lines = Lines()
    log = logging.getLogger("sandbox_gateway.tokens")
    log.addHandler(lines)
    yield lines.found
    log.removeHandler(lines)


async def test_without_a_file_nobody_gets_in_and_the_log_says_how_to_make_a_user(
    errors: list[str], server: Server
) -> None:
    for _ in range(3):
        assert (await server.ask("/api/status", "sgt_x")).status == 403
    _, secret = server.user("ann")
    assert (await server.ask("/api/status", secret)).status == 200
    server.users.path.unlink()
    for _ in range(3):
        assert (await server.ask("/api/status", secret)).status == 403
    assert len(errors) == 2, errors  # at the start, and once more when it was gone again
    assert "jupyter sandbox token add NAME" in errors[1]


@pytest.mark.parametrize("damage", ["not json\n", '{"name": "eve"}\n', "[]\n", "\x00\n"])
async def test_a_damaged_line_lets_nobody_in_until_it_is_mended(server: Server, errors: list[str], damage: str) -> None:
    _, secret = server.user("ann")
    good = server.users.path.read_text()
    server.users.path.write_text(good + damage)
    for _ in range(2):
        assert (await server.ask("/api/status", secret)).status == 403
    assert sum(":3:" in line and "token ls" in line for line in errors) == 1
    server.users.path.write_text(good)
    assert (await server.ask("/api/status", secret)).status == 200


async def test_a_file_that_others_may_write_lets_nobody_in(server: Server, errors: list[str]) -> None:
    _, secret = server.user("ann")
    server.users.path.chmod(0o644)
    assert (await server.ask("/api/status", secret)).status == 403
    assert any("chmod 600" in line for line in errors)
    server.users.path.chmod(0o600)
    assert (await server.ask("/api/status", secret)).status == 200


async def test_a_quota_of_the_file_is_told_by_owner(server: Server) -> None:
    server.user("ann", quota=Quota(live=2))
    server.user("bob")
    assert provider(server).quota_of("ann") == Quota(live=2)
    assert provider(server).quota_of("bob") is None and provider(server).quota_of("eve") is None


async def test_who_was_let_in_before_can_be_asked_about_again(server: Server) -> None:
    token, _ = server.user("ann")
    user = GatewayUser("ann", initials="AN", token_id=token.id)
    assert provider(server).still_valid(user)
    assert not provider(server).still_valid(GatewayUser("ann", initials="AN", token_id=token.id, admin=True))
    server.users.remove("ann")
    assert not provider(server).still_valid(user) and not provider(server).still_valid(User("ann"))


# One shared token


async def test_with_one_shared_token_the_stock_provider_works_and_there_is_one_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_TOKEN", "one-for-all")
    async with small_server(tmp_path, users=False) as server:
        assert (await server.ask("/api/status", "one-for-all")).status == 200
        assert (await server.ask("/api/status", "another")).status == 403
        names = {(await server.ask("/api/me", "one-for-all")).json["identity"]["username"] for _ in range(2)}
        assert len(names) == 2  # which is why nothing is built on them


def test_a_user_of_the_stock_provider_is_everybody() -> None:
    assert caller_of(User("d0c1", "Anonymous Io")) == EVERYBODY


def test_a_user_of_ours_is_himself() -> None:
    assert caller_of(GatewayUser("ann", groups=("lab",))) == Caller("ann", False, ("lab",))
    assert caller_of(GatewayUser("root", admin=True)).admin


def test_a_user_of_any_other_provider_is_himself_and_no_administrator() -> None:
    class Handler:
        settings = {"identity_provider": object()}  # noqa: RUF012

    CallContext.set(CallContext.JUPYTER_HANDLER, Handler())
    try:
        assert caller_of(User("ann")) == Caller("ann")
    finally:
        CallContext.set(CallContext.JUPYTER_HANDLER, None)


@pytest.mark.parametrize("user", [None, "", "ann", {}, object()])
def test_no_user_is_nobody(user: object) -> None:
    with pytest.raises(SandboxGatewayError) as caught:
        caller_of(user)
    assert caught.value.code == "unauthenticated"
