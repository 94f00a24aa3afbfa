"""How every command begins and ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_harness import Run

from sandbox_gateway.cli import kernelspec_commands
from sandbox_gateway.cli.main import parser
from sandbox_gateway.host.paths import Paths

COMMANDS = (
    "doctor", "setup", "install", "uninstall", "image", "ps", "logs", "stop", "rm",
    "suspend", "resume", "pause", "fork", "connect",
)  # fmt: skip


def test_help_lists_the_commands(program: Run) -> None:
    done = program("--help")
    assert done.status == 0 and done.stderr == ""
    for name in COMMANDS:
        assert name in done.stdout.split()


@pytest.mark.parametrize(
    "command", [(name,) for name in COMMANDS] + [("image", name) for name in ("ls", "build", "rm", "prune")]
)
def test_each_command_explains_itself(run: Run, command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*command, "--help")
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "command", [(name,) for name in COMMANDS if name != "image"] + [("image", "ls"), ("image", "build")]
)
def test_each_command_takes_json(command: tuple[str, ...]) -> None:
    ids = ("x",) if command[0] in {"logs", "stop", "rm", "suspend", "resume", "pause", "fork", "connect"} else ()
    assert parser().parse_args([*command, *ids, "--json"]).json is True


def test_the_version_is_told(program: Run) -> None:
    from sandbox_gateway import __version__

    assert program("--version").stdout == f"sandbox_gateway {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "banned"),
    [
        ([], "asyncio sqlite3 tomllib zmq jupyter_core jupyter_client traitlets tornado".split()),
        (["ps"], "zmq jupyter_core jupyter_client traitlets tornado jsonschema".split()),
    ],
)
def test_what_a_command_does_not_need_is_not_imported(paths: Paths, arguments: list[str], banned: list[str]) -> None:
    script = (
        f"import sys; from sandbox_gateway.cli.main import main, parser; parser(); {arguments} and main({arguments})"
    )
    show = "; sys.stderr.write(' '.join(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", script + show], capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stderr.split()).isdisjoint(banned)


@pytest.mark.parametrize(
    "arguments",
    [
        *((), ("fly",), ("ps", "--colour"), ("ps", "--js"), ("logs",), ("stop",), ("rm",)),
        *(("image",), ("image", "fly"), ("image", "rm"), ("image", "build", "--image", "host", "python3-gvisor")),
        *(("stop", "--all", "x"), ("rm", "--all", "--ended"), ("install", "--user", "--sys-prefix")),
    ],
)
def test_wrong_usage_ends_with_status_2_and_two_lines(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.status == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ") and second.startswith("hint: `jupyter sandbox") and "--help" in second


def test_wrong_usage_with_json_is_an_object(run: Run) -> None:
    done = run("stop", "--json")
    assert done.status == 2 and done.error["code"] == "usage" and "--help" in done.error["hint"]


def test_an_error_is_one_line_and_a_hint(program: Run) -> None:
    done = program("install", "python3-gvisr")
    assert (done.status, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert first == "error: there is no profile 'python3-gvisr'"
    assert second.startswith("hint: Did you mean 'python3-gvisor'?")


def test_an_error_with_json_is_an_object_on_stderr(program: Run) -> None:
    done = program("install", "nothing", "--json")
    assert (done.status, done.stdout) == (1, "")
    assert done.error["code"] == "unknown_profile" and "nothing" in done.error["message"] and done.error["hint"]


def test_each_problem_of_a_profile_file_is_a_line_of_its_own(run: Run, paths: Paths) -> None:
    paths.profiles.write_text("[profiles.x]\ncpu = 0\nmemroy = 3\n")
    done = run("install")
    lines = done.stderr.splitlines()
    assert done.status == 1 and len(lines) == 3
    assert lines[0].startswith(f"error: {paths.profiles}:2: profiles.x.cpu: ")
    assert lines[1].startswith(f"error: {paths.profiles}:3: profiles.x.memroy: unknown key; did you mean 'memory'?")
    assert [item["line"] for item in run("install", "--json").error["problems"]] == [2, 3]


def test_a_bug_is_one_line_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelspec_commands, "_place", lambda options: 1 / 0)
    done = run("uninstall")
    assert done.status == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ZeroDivisionError: division by zero\nhint: ")


def test_a_bug_shows_its_traceback_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_GATEWAY_DEBUG", "1")
    monkeypatch.setattr(kernelspec_commands, "_place", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("uninstall")


@pytest.mark.parametrize(
    ("number", "code"), [(28, "disk_full"), (13, "data_directory"), (30, "data_directory"), (5, "internal")]
)
def test_an_error_of_the_system_has_a_code(run: Run, monkeypatch: pytest.MonkeyPatch, number: int, code: str) -> None:
    def broken(options: object) -> Path:
        raise OSError(number, "it happened", "/some/file")

    monkeypatch.setattr(kernelspec_commands, "_place", broken)
    error = run("uninstall", "--json").error
    assert (error["code"], error["message"]) == (code, "/some/file: it happened")


def test_ctrl_c_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernelspec_commands, "_place", interrupted)
    done = run("uninstall")
    assert (done.status, done.stderr) == (130, "\ninterrupted\n")


def test_a_closed_pipe_ends_quietly(paths: Paths) -> None:
    text = "".join(f"[profiles.p{index}]\n" for index in range(3000))
    paths.profiles.write_text(text)  # more output than a pipe holds
    process = subprocess.Popen(
        [sys.executable, "-m", "sandbox_gateway.cli", "install", "--list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141
