"""``token add``, ``ls`` and ``rm``."""

from __future__ import annotations

import re

import pytest
from cli_harness import Run

from sandbox_gateway.host.paths import Paths
from sandbox_gateway.quotas import Quota
from sandbox_gateway.tokens import FILE_NAME, TokenFile


def test_add_writes_the_token_alone_and_once(run: Run, paths: Paths) -> None:
    done = run("token", "add", "ann")
    assert done.status == 0 and re.fullmatch(r"sgt_[A-Za-z0-9_-]{43}\n", done.stdout) and done.stderr == ""
    file = paths.home / FILE_NAME
    assert done.stdout.strip() not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert done.stdout.strip() not in run("token", "ls").stdout + run("token", "ls", "--json").stdout


def test_add_takes_everything_about_the_user(run: Run, paths: Paths) -> None:
    made = run(
        *("token", "add", "ann", "--admin", "--group", "lab", "--group", "gpu", "--expires", "1d12h"),
        *("--quota", "live=4,memory=8GiB", "--quota", "creates_per_minute=30", "--label", "laptop", "--json"),
    ).json
    assert made["token"].startswith("sgt_") and made["admin"] is True and made["groups"] == ["lab", "gpu"]
    (token,) = TokenFile(paths.home / FILE_NAME).read()[0].tokens
    assert token.quota == Quota(live=4, memory=8 << 30, creates_per_minute=30)
    assert token.expires is not None and token.expires - token.created == pytest.approx(129600, abs=1)
    assert made["expires"].endswith("Z")


def test_ls_shows_users_rights_and_ends_but_no_hash(run: Run) -> None:
    run("token", "add", "ann", "--admin", "--quota", "none")
    run("token", "add", "bob", "--expires", "0s")
    lines = run("token", "ls").stdout.splitlines()
    assert lines[0].split() == ["ID", "NAME", "RIGHTS", "QUOTA", "AGE", "EXPIRES"]
    assert "admin" in lines[1] and "none" in lines[1] and "expired" in lines[2]
    listed = run("token", "ls", "--json").json
    assert [it["name"] for it in listed] == ["ann", "bob"] and "hash" not in listed[0]


def test_ls_of_a_fresh_installation_is_empty_and_makes_nothing(run: Run, paths: Paths) -> None:
    assert run("token", "ls", "--json").json == []
    assert list(paths.home.iterdir()) == []


def test_rm_takes_an_id_or_a_name_and_says_what_there_is_not(run: Run) -> None:
    first = run("token", "add", "ann", "--json").json
    run("token", "add", "ann")
    run("token", "add", "bob")
    assert run("token", "rm", first["id"]).stdout == f"revoked {first['id']} of ann\n"
    done = run("token", "rm", "ann", "eve", "bob", "--json")
    assert done.status == 1 and [it["name"] for it in done.json] == ["ann", "bob"]
    assert "no token and no user eve" in done.stderr
    assert run("token", "ls", "--json").json == []


def test_rm_without_a_file_is_an_error_and_makes_nothing(run: Run, paths: Paths) -> None:
    assert run("token", "rm", "ann").status == 1
    assert list(paths.home.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("add",), 2),
        (("add", "ann", "--expires", "tomorrow"), 2),
        (("add", "ann", "--expires", "30"), 2),
        (("add", "ann", "--quota", "live"), 2),
        (("add", "ann", "--quota", "live=many"), 1),
        (("add", "ann", "--quota", "wings=2"), 1),
        (("add", "a/b"), 1),
        (("add", "ann", "--group", "../x"), 1),
    ],
)
def test_a_wrong_value_is_told_and_changes_nothing(
    run: Run, paths: Paths, arguments: tuple[str, ...], status: int
) -> None:
    done = run("token", *arguments)
    assert done.status == status and done.stderr.startswith("error: ") and "hint: " in done.stderr
    assert not (paths.home / FILE_NAME).exists()


def test_another_file_can_be_named(run: Run, paths: Paths) -> None:
    place = paths.home / "users"
    run("token", "add", "ann", "--file", place)
    assert run("token", "ls", "--json").json == []
    assert [it["name"] for it in run("token", "ls", "--json", "--file", place).json] == ["ann"]
