"""The token file: what is in it, who may read it, and that changes neither get lost nor show half done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.quotas import Quota
from sandbox_gateway.tokens import MAX_FILE, Token, TokenFile, TokenList, TokenWatch, hashed

NOW = 1_800_000_000.0


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.jsonl")


def test_a_token_is_256_random_bits_and_only_its_hash_is_kept(file: TokenFile) -> None:
    token, secret = file.add("ann", NOW, label="laptop")
    _, other = file.add("ann", NOW)
    assert secret != other and len(secret.removeprefix("sgt_")) == 43
    text = file.path.read_text()
    assert secret not in text and secret.removeprefix("sgt_") not in text
    assert hashed(secret) == token.hash and token.hash in text
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_everything_about_a_token_is_kept(file: TokenFile) -> None:
    token, secret = file.add(
        "ann@example.org",
        NOW,
        groups=["lab", "gpu", "lab"],
        admin=True,
        quota=Quota(live=3),
        expires=NOW + 5,
        label="x",
    )
    tokens, _ = file.read()
    assert tokens.tokens == (token,)
    assert token.groups == ("lab", "gpu") and tokens.quota("ann@example.org") == Quota(live=3)
    assert tokens.find(secret, NOW) == token and tokens.get(token.id, NOW) == token
    assert tokens.find(secret, NOW + 5) is None and tokens.get(token.id, NOW + 5) is None


def test_no_quota_and_an_unlimited_one_are_different_things(file: TokenFile) -> None:
    file.add("ann", NOW)
    file.add("bob", NOW, quota=Quota())
    tokens, _ = file.read()
    assert tokens.quota("ann") is None and tokens.quota("bob") == Quota()


def test_the_last_line_with_a_quota_decides(file: TokenFile) -> None:
    file.add("ann", NOW, quota=Quota(live=1))
    file.add("ann", NOW, quota=Quota(live=2))
    file.add("ann", NOW)
    assert file.read()[0].quota("ann") == Quota(live=2)


def test_an_id_removes_one_token_and_a_name_all_of_the_user(file: TokenFile) -> None:
    first, _ = file.add("ann", NOW)
    file.add("ann", NOW)
    bob, _ = file.add("bob", NOW)
    assert file.remove(first.id) == (first,)
    assert [it.name for it in file.remove("ann")] == ["ann"]
    assert file.remove("ann") == () and file.read()[0].tokens == (bob,)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "a\nb", "-x", "x" * 101, "é", "a,b", "\x00"])
def test_a_name_that_could_mean_something_else_is_refused(file: TokenFile, name: str) -> None:
    with pytest.raises(SandboxGatewayError, match="name"):
        file.add(name, NOW)
    with pytest.raises(SandboxGatewayError, match="group"):
        file.add("ann", NOW, groups=[name])
    assert not file.path.exists()


def test_no_file_is_no_user(file: TokenFile) -> None:
    assert file.read() == (TokenList(), None)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_file_that_is_open_to_others_is_refused(file: TokenFile, mode: int) -> None:
    file.add("ann", NOW)
    file.path.chmod(mode)
    for use in (file.read, lambda: file.add("bob", NOW), lambda: file.remove("ann")):
        with pytest.raises(SandboxGatewayError, match="open to other users"):
            use()


def test_what_is_no_file_is_refused_and_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(SandboxGatewayError):
            TokenFile(path).read()


GOOD = {"id": "ab", "name": "ann", "hash": "sha256:" + "0" * 64}


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "1", "null", '"x"', "[" * 100_000,
        json.dumps({**GOOD, "hash": "md5:00"}),
        json.dumps({**GOOD, "hash": "sha256:" + "G" * 64}),
        json.dumps({**GOOD, "admin": 1}),
        json.dumps({**GOOD, "admin": "false"}),
        json.dumps({**GOOD, "name": "../x"}),
        json.dumps({**GOOD, "groups": "lab"}),
        json.dumps({**GOOD, "groups": [1]}),
        json.dumps({**GOOD, "expires": "tomorrow"}),
        json.dumps({**GOOD, "expires": True}),
        json.dumps({**GOOD})[:-1] + ', "expires": NaN}',
        json.dumps({**GOOD})[:-1] + ', "expires": 1e999}',
        json.dumps({**GOOD, "expires": 1e18}),
        json.dumps({**GOOD, "quota": {"live": -1}}),
        json.dumps({**GOOD, "token": "sgt_secret"}),
        json.dumps({"name": "ann", "hash": GOOD["hash"]}),
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)  # fmt: skip
def test_a_wrong_line_spoils_the_whole_file_and_is_named_without_what_it_says(file: TokenFile, line: str) -> None:
    file.add("ann", NOW)
    with file.path.open("a", encoding="latin-1") as stream:
        stream.write("\n# a comment\n" + line + "\n")
    with pytest.raises(SandboxGatewayError) as caught:
        file.read()
    assert caught.value.code == "store_failed" and f"{file.path}:5: " in caught.value.message
    assert "sgt_secret" not in str(caught.value)


def test_two_tokens_of_one_id_are_refused(file: TokenFile) -> None:
    file.path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({**GOOD, 'hash': 'sha256:' + '1' * 64})}\n")
    file.path.chmod(0o600)
    with pytest.raises(SandboxGatewayError, match="second token"):
        file.read()


def test_a_file_without_end_is_refused(file: TokenFile) -> None:
    with file.path.open("wb") as stream:
        stream.truncate(MAX_FILE + 10)
    file.path.chmod(0o600)
    with pytest.raises(SandboxGatewayError, match="longer"):
        file.read()


@given(st.binary(max_size=400))
def test_any_content_is_read_or_refused_as_ours(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("t") / "tokens"
    path.write_bytes(content)
    path.chmod(0o600)
    try:
        tokens, _ = TokenFile(path).read()
    except SandboxGatewayError as error:
        assert error.code == "store_failed"
    else:
        assert tokens.tokens == ()


@given(st.text(max_size=50))
def test_no_text_is_a_token_by_chance(text: str) -> None:
    listed = TokenList.of([Token("a", "ann", hashed("sgt_right")), Token("b", "bob", hashed("sgt_other"))])
    assert listed.find(text, NOW) is None


def test_changes_of_many_processes_at_once_are_all_kept(file: TokenFile) -> None:
    script = (
        "import sys; from pathlib import Path; from sandbox_gateway.tokens import TokenFile\n"
        "for n in range(5): TokenFile(Path(sys.argv[1])).add(f'{sys.argv[2]}{n}', 0.0)"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(file.path), name]) for name in "abcd"]
    assert [process.wait(60) for process in running] == [0] * 4
    assert len(file.read()[0].tokens) == 20
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["tokens.jsonl", "tokens.jsonl.lock"]


def test_a_reader_never_sees_half_a_change(file: TokenFile) -> None:
    file.add("ann", NOW)
    ended = threading.Event()

    def change() -> None:
        try:
            for number in range(50):
                file.add(f"u{number}", NOW)
                file.remove(f"u{number}")
        finally:
            ended.set()

    thread = threading.Thread(target=change)
    thread.start()
    while not ended.is_set():
        assert file.read()[0].tokens[0].name == "ann"
    thread.join()


def test_a_failed_write_leaves_the_file_as_it_was(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.add("ann", NOW)
    before = file.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SandboxGatewayError) as caught:
        file.add("bob", NOW)
    assert caught.value.code == "disk_full" and file.path.read_bytes() == before
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["tokens.jsonl", "tokens.jsonl.lock"]


def test_a_link_to_the_file_is_followed_and_stays_a_link(file: TokenFile, tmp_path: Path) -> None:
    file.add("ann", NOW)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "users"
    link.symlink_to(file.path)
    TokenFile(link).add("bob", NOW)
    assert link.is_symlink() and len(file.read()[0].tokens) == 2


def test_the_watch_reads_only_what_has_changed(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = file.add("ann", NOW)
    watch, reads = TokenWatch(file), []
    real = TokenFile.read
    monkeypatch.setattr(TokenFile, "read", lambda self: reads.append(1) or real(self))
    for _ in range(5):
        assert watch.current().find(secret, NOW) is not None
    assert len(reads) == 1
    file.path.chmod(0o644)
    assert watch.current().tokens == ()
    file.path.chmod(0o600)
    assert watch.current().find(secret, NOW) is not None
