"""The command line's doors to a gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remote_harness import TOKEN, Remote

from sandbox_gateway.cli.main import main
from sandbox_gateway.remote import credentials
from sandbox_gateway.remote.address import parse

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        return status, *capfd.readouterr()

    return run


def test_install_writes_kernelspecs_without_the_token_and_uninstall_forgets_both(
    remote: Remote, command: Command, tmp_path: Path
) -> None:
    credentials.forget(parse(remote.url).url)
    assert command("install", "--gateway", remote.url, "--prefix", tmp_path)[0] == 1
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    status, out, err = command("install", "--gateway", remote.url, "--prefix", tmp_path, "--token-file", secret)
    assert status == 0, err
    assert out.startswith(f"installed {remote.profile}-at-127.0.0.1-") and "TZ" in err
    directories = list((tmp_path / "share/jupyter/kernels").iterdir())
    (found,) = (path for path in directories if path.name.startswith(remote.profile + "-at-"))
    text = (found / "kernel.json").read_text()
    assert TOKEN not in text
    stanza = json.loads(text)["metadata"]["kernel_provisioner"]
    assert stanza["provisioner_name"] == "sandbox-remote"
    assert (stanza["config"]["gateway"], stanza["config"]["profile"]) == (remote.url, remote.profile)
    assert credentials.token(parse(remote.url), {}) == TOKEN
    again = command("install", "--gateway", remote.url, "--prefix", tmp_path, "--json", remote.profile)
    assert [change["action"] for change in json.loads(again[1])] == ["unchanged"]
    assert command("uninstall", "--gateway", "http://127.0.0.1:1", "--prefix", tmp_path)[1] == "nothing to do\n"
    status, out, _ = command("uninstall", "--gateway", remote.url, "--prefix", tmp_path)
    assert status == 0 and f"removed {found.name}" in out and not found.exists()
    assert credentials.token(parse(remote.url), {}) == ""


def test_a_profile_that_is_not_offered_and_a_gateway_that_is_none_are_clear_errors(
    remote: Remote, command: Command, tmp_path: Path
) -> None:
    status, _, err = command("install", "--gateway", remote.url, "--prefix", tmp_path, "no-such")
    assert status == 1 and "no profile 'no-such'" in err and remote.profile in err
    remote.proxy.refuse()
    status, _, err = command("ps", "--gateway", remote.url)
    assert status == 1 and "cannot be reached" in err and "hint:" in err
    assert TOKEN not in err


def test_sandboxes_are_listed_suspended_resumed_and_stopped_there(
    remote: Remote, command: Command, start: Callable[..., Any]
) -> None:
    _, client = start()
    client.execute_interactive("x = 1", timeout=60)
    status, out, err = command("ps", "--gateway", remote.url, "--json")
    assert status == 0, err
    (sandbox,) = json.loads(out)
    assert sandbox["state"] == "running"
    short = sandbox["id"][:8]
    assert short in command("ps", "--gateway", remote.url)[1]
    status, out, err = command("suspend", "--gateway", remote.url, short, "--json")
    assert (status, json.loads(out)) == (0, [{"id": sandbox["id"], "state": "suspended"}]), err
    status, out, err = command("resume", "--gateway", remote.url, "--all")
    assert (status, out) == (0, f"{sandbox['id']} running\n"), err
    if remote.kind == "real":
        status, out, err = command("fork", "--gateway", remote.url, short, "-n", "2", "--json")
        assert status == 0 and len(json.loads(out)) == 2, err
    status, out, err = command("stop", "--gateway", remote.url, "--all")
    assert status == 0 and f"{sandbox['id']} terminated" in out, err
    assert command("suspend", "--gateway", remote.url, short)[0] == 1


def test_a_client_that_starts_the_kernelspec_without_its_provisioner_is_told(remote: Remote, kernel_name: str) -> None:
    path = Path(os.environ["JUPYTER_PATH"]) / "kernels" / kernel_name / "kernel.json"
    argv = json.loads(path.read_text())["argv"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "sandbox only" in done.stderr
