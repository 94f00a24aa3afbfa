"""``ps``, ``logs``, ``stop`` and ``rm`` against sandboxes that another process owns, or nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli_harness import Owner, Run, record

from sandbox_gateway.cli import actions
from sandbox_gateway.cli.actions import news
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Death, DeathKind, OnOwnerExit, State
from sandbox_gateway.store import Store

A = "11112222-3333-4444-5555-666677778888"
B = "11119999-3333-4444-5555-666677778888"


def test_ps_of_a_fresh_installation_is_empty_and_makes_nothing(program: Run, paths: Paths) -> None:
    before = sorted(paths.home.iterdir())
    assert program("ps", "--json").json == []
    assert program("ps").status == 0
    assert sorted(paths.home.iterdir()) == before


def test_ps_shows_what_another_process_started(program: Run, owner: Owner) -> None:
    owner.own(record(A, name="analysis.ipynb", notes=("cpu: soft",)))
    for _ in range(5):  # the owner has one second to tell the memory
        (found,) = program("ps", "--json").json
        if found["memory"] is not None:
            break
    assert {
        key: found[key] for key in ("id", "state", "profile", "runtime", "name", "owner_pid", "memory", "death")
    } == {
        "id": A,
        "state": "running",
        "profile": "python3-gvisor",
        "runtime": "fake",
        "name": "analysis.ipynb",
        "owner_pid": os.getpid(),
        "memory": 3 * 1024**2,
        "death": None,
    }
    assert found["since"].endswith("Z") and found["isolated"] is False and found["notes"] == ["cpu: soft"]


def test_ps_as_a_table_tells_the_shortest_ids_and_what_isolates_nothing(
    run: Run, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "STATS_TIMEOUT", 60.0)
    owner.own(record(A), record("11112222-3333-4444-5555-666677779999"))
    text = run("ps").stdout
    heading, first, second = text.splitlines()
    assert heading.split() == ["ID", "STATE", "PROFILE", "RUNTIME", "SINCE", "MEMORY", "OWNER"]
    assert first.split()[0] != second.split()[0] and first.startswith("11112222-3333")
    assert "fake (not isolated)" in first and "3.0 MiB" in first and str(os.getpid()) in first


def test_an_owner_that_does_not_tell_the_memory_does_not_hold_ps_up(run: Run, owner: Owner) -> None:
    owner.answers["stats"] = SandboxGatewayError("internal", "broken")
    owner.own(record(A))
    (found,) = run("ps", "--json").json
    assert found["memory"] is None and found["owner_pid"] == os.getpid()


def test_ps_hides_what_has_ended_unless_all_is_asked_for(run: Run, store: Store) -> None:
    store.put(record(A, State.FAILED, death=Death(DeathKind.OUT_OF_MEMORY, "out of memory at 640 MiB")))
    store.put(record(B, State.SUSPENDED))
    assert [item["id"] for item in run("ps", "--json").json] == [B]
    ended = next(item for item in run("ps", "--all", "--json").json if item["id"] == A)
    assert ended["state"] == "failed" and ended["death"]["kind"] == "out_of_memory"
    assert ended["death"]["reason"] == "out of memory at 640 MiB"
    assert "out of memory at 640 MiB" in run("ps", "-a").stdout


def test_ps_cleans_up_what_a_killed_application_left(run: Run, store: Store) -> None:
    store.put(record(A, owner_pid=4194303))
    assert run("ps", "--json").json == []
    (found,) = run("ps", "-a", "--json").json
    assert found["state"] == "terminated" and found["death"]["kind"] == "owner_gone"


def test_what_lives_on_without_an_owner_is_shown_as_such(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing_is_due(paths: Paths) -> list[str]:
        return []

    monkeypatch.setattr(actions, "sweep", nothing_is_due)
    store.put(record(A, owner_pid=4194303, on_owner_exit=OnOwnerExit.KEEP))
    (found,) = run("ps", "--json").json
    assert found["owner_pid"] is None and found["state"] == "running"
    assert "none (keep)" in run("ps").stdout


def test_ps_shows_what_it_cannot_clean_up(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(paths: Paths) -> list[str]:
        raise SandboxGatewayError("runtime_missing", "no runsc")

    monkeypatch.setattr(actions, "sweep", broken)
    store.put(record(A))
    assert [item["id"] for item in run("ps", "--json").json] == [A]


def test_after_a_restart_of_the_machine_nothing_is_shown_as_running(run: Run, store: Store) -> None:
    store.put(record(A, boot_id="another boot"))
    assert run("ps", "--json").json == []
    (found,) = run("ps", "-a", "--json").json
    assert found["state"] == "failed" and found["death"]["reason"] == "machine restarted"


def test_a_hostile_name_cannot_drive_the_terminal(run: Run, store: Store) -> None:
    store.put(record(A, name="x\x1b[2J\nfake row"))
    text = run("ps", "-a").stdout
    assert "\x1b" not in text and len(text.splitlines()) == 2


def test_stop_asks_the_owner_by_a_unique_beginning_of_the_id(program: Run, owner: Owner, store: Store) -> None:
    owner.own(record(A), record(B))
    done = program("stop", "11112")
    assert (done.status, done.stdout, done.stderr) == (0, f"{A} terminated\n", "")
    assert ("stop", A) in owner.asked and ("stop", B) not in owner.asked
    assert store.get(A).state is State.TERMINATED and store.get(B).state is State.RUNNING


def test_an_ambiguous_beginning_names_the_candidates(run: Run, owner: Owner) -> None:
    owner.own(record(A), record(B))
    done = run("stop", "1111")
    assert done.status == 1 and A in done.stderr and B in done.stderr and "hint: Give more characters" in done.stderr


def test_stop_does_what_it_can_and_tells_what_it_cannot(run: Run, owner: Owner) -> None:
    owner.own(record(A), record(B))
    done = run("stop", A, "nothing", B)
    assert done.status == 1
    assert sorted(done.stdout.splitlines()) == sorted([f"{A} terminated", f"{B} terminated"])
    assert "there is no sandbox 'nothing'" in done.stderr


def test_stop_all_takes_every_live_one(run: Run, owner: Owner, store: Store) -> None:
    owner.own(record(A), record(B))
    store.put(record("ended", State.TERMINATED))
    done = run("stop", "--all", "--json")
    assert sorted(item["id"] for item in done.json) == [A, B] and {item["state"] for item in done.json} == {
        "terminated"
    }


def test_stop_all_of_nothing_is_no_error(run: Run, paths: Paths) -> None:
    assert run("stop", "--all", "--json").json == []
    assert run("rm", "--all").status == 0


def test_what_the_owner_answers_is_shown(run: Run, owner: Owner) -> None:
    owner.answers["stop"] = SandboxGatewayError("runtime_failed", "it does not end", "Wait.")
    owner.own(record(A))
    done = run("stop", A)
    assert done.status == 1 and done.stderr == "error: it does not end\nhint: Wait.\n"


def test_stopping_what_has_ended_is_no_error(run: Run, store: Store) -> None:
    store.put(record(A, State.TERMINATED))
    assert run("stop", A).stdout == f"{A} terminated\n"


def test_rm_forgets_what_has_ended_and_its_log(run: Run, paths: Paths, store: Store) -> None:
    store.put(record(A, State.FAILED))
    paths.logs.mkdir()
    (paths.logs / f"{A}.log").write_text("last words\n")
    assert run("rm", A[:6]).stdout == f"{A} removed\n"
    assert store.list() == () and list(paths.logs.iterdir()) == []


def test_rm_of_a_running_one_ends_it_first(run: Run, owner: Owner, store: Store) -> None:
    owner.own(record(A))
    assert run("rm", A, "--json").json == [{"id": A, "state": "removed"}]
    assert ("stop", A) in owner.asked and store.list() == ()


def test_rm_ended_leaves_the_living(run: Run, owner: Owner, store: Store) -> None:
    owner.own(record(A))
    store.put(record(B, State.FAILED))
    run("rm", "--ended")
    assert [item.id for item in store.list()] == [A]


def test_rm_all_takes_everything(run: Run, owner: Owner, store: Store) -> None:
    owner.own(record(A))
    store.put(record(B, State.FAILED))
    assert run("rm", "--all").status == 0 and store.list() == ()


def test_logs_come_from_the_owner(program: Run, owner: Owner) -> None:
    owner.own(record(A))
    assert program("logs", A[:5]).stdout == "hello\n"
    assert program("logs", A, "--json").json == {"id": A, "log": "hello\n"}


def test_a_log_is_shown_whatever_the_locale_can_write(program: Run, owner: Owner) -> None:
    owner.answers["log"] = {"log": "\u00e4 \udc80\n"}
    owner.own(record(A))
    done = program("logs", A, PYTHONIOENCODING="ascii")
    assert (done.status, done.stdout) == (0, "\\xe4 \\udc80\n")


def test_logs_of_an_ended_sandbox_are_the_kept_ones_or_its_last_words(run: Run, paths: Paths, store: Store) -> None:
    store.put(record(A, State.FAILED, death=Death(DeathKind.EXITED, "x", stderr_tail="Segmentation fault")))
    assert run("logs", A).stdout == "Segmentation fault\n"
    paths.logs.mkdir()
    (paths.logs / f"{A}.log").write_bytes(b"all of it \xff\n")
    assert run("logs", A).stdout == "all of it \ufffd\n"


def test_logs_of_a_sandbox_without_owner_say_why_there_are_none(run: Run, store: Store) -> None:
    store.put(record(A))
    done = run("logs", A)
    assert done.status == 1 and "has no owner" in done.stderr and "hint: `jupyter sandbox connect" in done.stderr


def test_a_followed_log_grows_until_the_sandbox_ends(owner: Owner) -> None:
    text = ["one\n"]
    owner.answers["log"] = lambda sandbox_id: {"log": "".join(text)}
    owner.own(record(A))
    process = subprocess.Popen(
        [sys.executable, "-m", "sandbox_gateway.cli", "logs", "-f", A], stdout=subprocess.PIPE, text=True
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        text.append("two\n")
        assert process.stdout.readline() == "two\n"
        owner.end(A)
        assert process.stdout.read() == "" and process.wait() == 0
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    ("before", "now", "fresh"),
    [
        ("", "ab", "ab"),
        ("ab", "abc", "c"),
        ("ab", "ab", ""),
        ("abcd", "cde", "cde"),
        ("xabcdabc", "abcdabcz", "abcdabcz"),
    ],
)
def test_a_short_log_that_was_cut_in_front_is_shown_anew(before: str, now: str, fresh: str) -> None:
    assert news(before, now) == fresh


def test_a_long_log_that_was_cut_in_front_goes_on_where_it_was() -> None:
    lines = [f"line {number}\n" for number in range(5000)]
    before, now = "".join(lines[:4000]), "".join(lines[2000:])
    assert news(before, now) == "".join(lines[4000:])


def test_a_store_that_cannot_be_read_is_one_line(run: Run, paths: Paths) -> None:
    paths.ensure()
    paths.database.write_bytes(b"no database at all " * 100)
    done = run("ps")
    assert done.status == 1 and done.stderr.startswith("error: ") and "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_ps_answers_at_once(program: Run, owner: Owner) -> None:
    owner.own(record(A))
    best = 9.0
    for _ in range(3):
        begun = time.perf_counter()
        program("ps")
        best = min(best, time.perf_counter() - begun)
    assert best < 1.0


def test_the_program_is_installed_as_a_subcommand_of_jupyter() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    module, _, function = scripts["jupyter-sandbox"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
