"""The log: no secret ever in it, and JSON lines with the sandbox's id."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.base.call_context import CallContext
from small_server import small_server

from sandbox_gateway.server.logs import JsonLines, Redacting, install, redact, warn_of_arguments

SECRET = "sgt_Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MGFiY2RlZmdoaWo"
SHARED = "0123456789abcdef0123456789abcdef0123456789abcdef"
ID = "11111111-2222-3333-4444-555555555555"


# What is taken out


@pytest.mark.parametrize(
    "line",
    [
        "403 GET /api/kernels?token={} (@127.0.0.1) 0.5ms",
        "403 GET /api/kernels?session_id=x&token={}&x=1 referer=http://h/lab?token={}",
        "GET /login?access_token={} HTTP/1.1",
        "http://127.0.0.1:8888/?Token={}",
        '"/api?token={}"',
        "Authorization: token {}",
        "Authorization: Bearer {}",
        "authorization: bearer {}",
        "{{'Authorization': 'token {}', 'Accept': '*/*'}}",
        '{{"Authorization": "Bearer {}"}}',
        "('Authorization', 'token {}')",
        "Authorization: {}",
        "Proxy-Authorization: Basic {}",
        "Cookie: username-localhost-8888={}; _xsrf=2",
        "Set-Cookie: username={}; Path=/",
        "sent Bearer {} and failed",
        "_xsrf in /x?_xsrf={}",
        "password in /x?password={}",
        "a\n  b ?token={}\n  c",
    ],
)
@pytest.mark.parametrize("secret", [SECRET, SHARED, "YWRtaW46MTIzNDU2Nzg5MA=="])
def test_a_secret_in_any_usual_place_is_taken_out_and_the_rest_stays(line: str, secret: str) -> None:
    found = redact(line.format(secret, secret))
    assert secret not in found and "[secret]" in found
    assert found.startswith(line.split("{}")[0].format()[:8])


@pytest.mark.parametrize(
    "line",
    [
        "200 GET /api/kernels?session_id=5&replay=1 (ann@127.0.0.1) 0.5ms",
        "the token 1 of 2 is old",
        "token file /srv/tokens.jsonl cannot be read",
        "Bearer of bad news",
        "Clearing invalid/expired login cookie username-localhost-8888",
        "Writing Jupyter server cookie secret to /run/jupyter_cookie_secret",
        f"sandbox {ID} was suspended",
        "authorization failed for ann",
        "",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert redact(line) == line


@given(before=st.text(max_size=30), after=st.text(max_size=30))
def test_a_token_of_ours_is_taken_out_wherever_it_is(before: str, after: str) -> None:
    assert SECRET not in redact(before + SECRET + after)


@given(st.text(alphabet="&?token=;'\" :authorization\n", max_size=3000))
def test_any_line_is_done_in_good_time(line: str) -> None:
    redact(line)


def test_what_is_known_to_be_secret_is_taken_out_wherever_it_is() -> None:
    assert redact("it is hunter22, indeed", ["hunter22"]) == "it is [secret], indeed"
    assert redact("abc", ["", "b"]) == "abc"  # too short to be one: it would spoil every line


# How it is written


def record(message: str, *values: object, error: bool = False, **extra: Any) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise RuntimeError(f"GET /x?token={SECRET}")
        except RuntimeError:
            info = sys.exc_info()
    made = logging.LogRecord("sandbox_gateway.live", logging.WARNING, __file__, 1, message, values, info)
    made.__dict__.update(extra)
    return made


def test_arguments_and_tracebacks_are_cleaned_too() -> None:
    for formatter in (Redacting(logging.Formatter("%(message)s")), JsonLines()):
        text = formatter.format(
            record("asked %s with %r", "/x?token=abc123", {"Authorization": "token abc123"}, error=True)
        )
        assert "abc123" not in text and SECRET not in text and "RuntimeError" in text


@pytest.mark.parametrize(
    ("made", "sandbox"),
    [
        (record("sandbox %s was suspended", ID), ID),
        (record("creating it failed", sandbox=ID), ID),
        (record(f"404 GET /api/sandboxes/{ID.upper()}/logs (ann@::1)"), ID),
        (record(f"404 GET /api/kernels/{ID}/channels"), ID),
        (record(f"kernel '{ID}' restarted"), ID),
        (record(f"session {ID} opened"), None),
        (record("nothing of it"), None),
    ],
)
def test_a_json_line_has_the_id_of_its_sandbox(made: logging.LogRecord, sandbox: str | None) -> None:
    text = JsonLines().format(made)
    line = json.loads(text)
    assert "\n" not in text and line.get("sandbox") == sandbox
    assert line["level"] == "warning" and line["logger"] == "sandbox_gateway.live" and line["time"].endswith("+00:00")


def test_within_a_request_the_id_and_the_user_are_the_requests() -> None:
    class Handler:
        class request:
            path = f"/base/api/sandboxes/{ID}/suspend"

        class current_user:
            username = "ann"

    CallContext.set(CallContext.JUPYTER_HANDLER, Handler())
    try:
        line = json.loads(JsonLines().format(record("it failed")))
    finally:
        CallContext.set(CallContext.JUPYTER_HANDLER, None)
    assert (line["sandbox"], line["user"]) == (ID, "ann")


def test_control_characters_cannot_forge_a_line() -> None:
    text = JsonLines().format(record('x\n{"level": "info", "message": "forged"}\r\x1b[2J'))
    assert len(text.splitlines()) == 1 and "\x1b" not in text


def test_a_huge_message_is_cut() -> None:
    assert len(JsonLines().format(record("x" * 10_000_000))) < 100_000


# In a server


@pytest.fixture
def written() -> Iterator[tuple[logging.Handler, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    ours = logging.getLogger("sandbox_gateway")
    before = (ours.parent, ours.level)
    yield handler, stream
    ours.parent, ours.level = before  # type: ignore[misc]


@pytest.mark.parametrize("as_json", [False, True])
async def test_no_token_of_a_request_is_in_the_log_at_any_level(
    tmp_path: Path, written: tuple[logging.Handler, io.StringIO], as_json: bool
) -> None:
    handler, stream = written
    async with small_server(tmp_path, log=handler, log_level=logging.DEBUG) as server:
        install(server.app.log, server.app.identity_provider, as_json=as_json)
        _, secret = server.user("ann")
        for path in ("/api/status", f"/api/kernels/{ID}", "/nowhere", "/api/events/subscribe"):
            for token in (secret, SECRET, SHARED):
                await server.ask(f"{path}?token={token}", headers={"Referer": f"http://x/?token={token}"})
                await server.ask(path, token, scheme="Bearer")
                await server.ask(path, headers={"Cookie": f'username-127-0-0-1="{token}"'})
        await server.log_in(secret)
        logging.getLogger("sandbox_gateway.any").warning("sandbox %s: ?token=%s", ID, secret)
    text = stream.getvalue()
    assert "/nowhere" in text
    for token in (secret, SECRET, SHARED):
        assert token not in text
    if as_json:
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert {"sandbox": ID, "level": "warning"}.items() <= next(
            line for line in lines if line["logger"] == "sandbox_gateway.any"
        ).items()
        assert any(line.get("sandbox") == ID and "/api/kernels" in line["message"] for line in lines)


async def test_no_file_that_the_server_writes_has_a_token(tmp_path: Path) -> None:
    async with small_server(tmp_path) as server:
        _, secret = server.user("ann")
        server.app.write_server_info_file()
        await server.log_in(secret)
        for path in (path for path in tmp_path.rglob("*") if path.is_file()):
            assert secret.encode() not in path.read_bytes(), path


async def test_the_one_shared_token_is_not_in_the_log_but_one_that_was_made_up_shows_on_a_terminal(
    tmp_path: Path, written: tuple[logging.Handler, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, stream = written
    monkeypatch.setenv("JUPYTER_TOKEN", SHARED)
    async with small_server(tmp_path, users=False, log=handler) as server:
        install(server.app.log, server.app.identity_provider)
        server.app.log.critical("anything with %s in it", SHARED)
    assert SHARED not in stream.getvalue()

    monkeypatch.delenv("JUPYTER_TOKEN")
    for terminal in (False, True):
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal, raising=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        async with small_server(tmp_path, users=False, log=handler) as server:
            install(server.app.log, server.app.identity_provider)
            token = server.app.identity_provider.token
            server.app.log.critical("open %s", server.app.connect_url)
            server.app.log.warning("403 GET /x?token=%s", token)
        shown = [line for line in stream.getvalue().splitlines() if token in line]
        assert [line.startswith("open ") for line in shown] == [True] * terminal


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["--IdentityProvider.token=x"], True),
        (["--ServerApp.token", "x"], True),
        (["--PasswordIdentityProvider.hashed_password=argon2:x"], False),
        (["--ip=0.0.0.0", "--port", "8888"], False),
        (["--TokenFileIdentityProvider.token_file=/x"], False),
    ],
)
def test_a_token_on_the_command_line_is_warned_of(
    caplog: pytest.LogCaptureFixture, arguments: list[str], warned: bool
) -> None:
    warn_of_arguments(logging.getLogger("test"), arguments)
    assert bool(caplog.records) is warned
