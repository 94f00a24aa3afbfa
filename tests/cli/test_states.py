"""``suspend``, ``resume``, ``pause``, ``fork`` and ``connect``, and what ``ps`` shows of them."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Mapping
from typing import Any

import pytest
from cli_harness import Owner, Run, record

from sandbox_gateway import keeper
from sandbox_gateway.cli.each import Meter
from sandbox_gateway.cli.output import ProgressLine
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.keeper import driving
from sandbox_gateway.model import Death, DeathKind, OnOwnerExit, State
from sandbox_gateway.owner import NoOwner, OwnerLock
from sandbox_gateway.snapshots import SnapshotStore
from sandbox_gateway.store import Store

A = "11112222-3333-4444-5555-666677778888"
B = "22229999-3333-4444-5555-666677778888"
C = "33339999-3333-4444-5555-666677778888"


@pytest.fixture
def asked_of_the_keeper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """What a keeper is asked; it does nothing and says that all went well."""
    asked: list[tuple[str, str, Any]] = []

    async def ask_keeper(
        paths: Paths, op: str, sandbox_id: str = "", params: Mapping[str, Any] | None = None, **_: Any
    ) -> dict[str, Any]:
        asked.append((op, sandbox_id, params))
        return {"children": [{"id": C, "error": None}]}

    monkeypatch.setattr(driving, "ask_keeper", ask_keeper)
    return asked


@pytest.mark.parametrize(("command", "state"), [("suspend", "suspended"), ("resume", "running"), ("pause", "paused")])
def test_it_asks_the_owner_and_tells_the_state_that_is_reached(
    program: Run, owner: Owner, command: str, state: str
) -> None:
    owner.answers[command] = {}
    owner.own(record(A), record(B))
    done = program(command, A[:6])
    assert (done.status, done.stdout, done.stderr) == (0, f"{A} {state}\n", "")
    assert program(command, A, B, "--json").json == [{"id": A, "state": state}, {"id": B, "state": state}]
    assert owner.asked.count((command, A)) == 2 and owner.asked.count((command, B)) == 1


def test_several_are_worked_on_at_once_and_each_outcome_is_told(run: Run, owner: Owner) -> None:
    owner.answers["suspend"] = lambda sandbox_id: (
        (_ for _ in ()).throw(SandboxGatewayError("snapshot_failed", f"no room for {sandbox_id[:4]}"))
        if sandbox_id == B
        else {}
    )
    owner.own(record(A), record(B), record(C))
    done = run("suspend", A, "nothing", B, C)
    assert done.status == 1
    assert sorted(done.stdout.splitlines()) == [f"{A} suspended", f"{C} suspended"]
    assert "error: no room for 2222" in done.stderr and "there is no sandbox 'nothing'" in done.stderr
    assert "hint: The kernel runs on; try again." in done.stderr


@pytest.mark.parametrize(
    ("command", "taken"), [("suspend", {A, B}), ("resume", {B, C}), ("pause", {A})], ids=["suspend", "resume", "pause"]
)
def test_all_takes_those_that_can(run: Run, owner: Owner, store: Store, command: str, taken: set[str]) -> None:
    owner.answers[command] = {}
    owner.own(record(A), record(B, State.PAUSED), record(C, State.SUSPENDED))
    store.put(record("ended", State.TERMINATED))
    assert {row["id"] for row in run(command, "--all", "--json").json} == taken


@pytest.mark.parametrize("command", ["suspend", "resume", "pause"])
def test_wrong_usage(run: Run, paths: Paths, command: str) -> None:
    assert run(command).status == 2 and run(command, "--all", A).status == 2


def test_what_is_there_already_is_no_error(run: Run, owner: Owner) -> None:
    owner.answers["suspend"] = SandboxGatewayError("illegal_transition", "it is suspended")
    owner.own(record(A, State.SUSPENDED), record(B, State.RESTARTING))
    assert run("suspend", A).stdout == f"{A} suspended\n"
    assert run("suspend", B).status == 1


@pytest.mark.parametrize("command", ["suspend", "resume", "pause", "fork", "connect"])
def test_what_has_ended_is_told_with_its_reason_and_nobody_is_started(
    run: Run, store: Store, asked_of_the_keeper: list[tuple[str, str, Any]], command: str
) -> None:
    store.put(record(A, State.FAILED, death=Death(DeathKind.OUT_OF_MEMORY)))
    done = run(command, A)
    assert done.status == 1 and f"error: sandbox {A} is failed: out of memory" in done.stderr
    assert asked_of_the_keeper == []


def test_what_nobody_owns_is_given_to_the_keeper(
    run: Run, store: Store, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask_keeper(paths: Paths, op: str, sandbox_id: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        assert (op, sandbox_id) == ("adopt", A)
        owner.own(store.get(A))
        return {}

    monkeypatch.setattr(driving, "ask_keeper", ask_keeper)
    owner.answers["resume"] = {}
    store.put(record(A, State.SUSPENDED))
    assert run("resume", A).stdout == f"{A} running\n"
    assert owner.asked == [("resume", A)]


def test_an_owner_that_dies_over_it_is_replaced(
    run: Run, store: Store, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def ask(paths: Paths, sandbox_id: str, op: str, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(op)
        if len(asked) == 1:
            raise NoOwner(sandbox_id, died=True)
        return {}

    async def ask_keeper(*_: Any, **__: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(driving, "ask", ask)
    monkeypatch.setattr(driving, "ask_keeper", ask_keeper)
    store.put(record(A, State.SUSPENDED))
    assert run("resume", A).status == 0 and asked == ["resume", "resume"]
    asked.clear()
    done = run("fork", A)
    assert done.status == 1 and asked == ["save"], "what may have been done is not done twice"
    assert "ended over it" in done.stderr


def test_fork_has_the_owner_save_it_and_the_keeper_make_the_children(
    run: Run, owner: Owner, asked_of_the_keeper: list[tuple[str, str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(SnapshotStore, "remove", lambda store, snapshot: removed.append(snapshot))
    owner.answers["save"] = {"snapshot": "f0"}
    owner.own(record(A))
    assert run("fork", A[:5], "-n", "2", "--name", "tries", "--json").json == [C]
    assert owner.asked == [("save", A)]
    assert asked_of_the_keeper == [("spawn", "f0", {"count": 2, "name": "tries"})]
    assert removed == ["f0"], "what was saved for the fork goes with it"
    assert run("fork", A).stdout == f"{C}\n"


def test_fork_of_a_suspended_sandbox_needs_no_owner(
    run: Run, store: Store, asked_of_the_keeper: list[tuple[str, str, Any]]
) -> None:
    store.put(record(A, State.SUSPENDED, snapshot="f1"))
    assert run("fork", A, "--json").json == [C]
    assert asked_of_the_keeper == [("spawn", "f1", {"count": 1, "name": ""})]


def test_a_child_that_could_not_be_made_is_told_beside_those_that_were(
    run: Run, store: Store, asked_of_the_keeper: list[tuple[str, str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = SandboxGatewayError("restore_failed", "no memory for the second").as_dict()

    async def ask_keeper(*_: Any, **__: Any) -> dict[str, Any]:
        return {"children": [{"id": B, "error": None}, {"id": C, "error": error}]}

    monkeypatch.setattr(driving, "ask_keeper", ask_keeper)
    store.put(record(A, State.SUSPENDED, snapshot="f1"))
    done = run("fork", A, "-n", "2", "--json")
    assert done.status == 1 and done.json == [B] and done.error["message"] == "no memory for the second"


def test_fork_of_what_is_neither_a_sandbox_nor_a_snapshot(run: Run, paths: Paths) -> None:
    done = run("fork", "nothing")
    assert done.status == 1 and "neither a sandbox nor a snapshot 'nothing'" in done.stderr


@pytest.mark.parametrize("count", ["0", "-1", "1001", "x"])
def test_fork_of_no_sensible_number(run: Run, paths: Paths, count: str) -> None:
    assert run("fork", A, "-n", count).status == 2


def test_connect_prints_the_path_and_nothing_else(program: Run, owner: Owner) -> None:
    owner.answers["connect"] = {"connection_file": "/run/x/owner.connection.json"}
    owner.own(record(A))
    done = program("connect", A[:4])
    assert (done.status, done.stdout, done.stderr) == (0, "/run/x/owner.connection.json\n", "")
    assert program("connect", A, "--json").json == {"id": A, "connection_file": "/run/x/owner.connection.json"}


def test_ps_shows_the_suspended_with_their_disk_and_owner(run: Run, owner: Owner, paths: Paths, store: Store) -> None:
    image = paths.snapshots / "s1" / "image"
    image.mkdir(parents=True)
    (image / "pages").write_bytes(os.urandom(1 << 20))
    owner.own(record(A, State.SUSPENDED, snapshot="s1", epoch=3, parent="sandbox:x"))
    store.put(record(B, State.SUSPENDED, snapshot="gone", boot_id="another boot", on_owner_exit=OnOwnerExit.TERMINATE))
    first, second = run("ps", "--json").json
    assert first["owner_pid"] == os.getpid() and first["disk"] >= 1 << 20 and first["memory"] is None
    assert (first["snapshot"], first["parent"], first["epoch"]) == ("s1", "sandbox:x", 3)
    assert (second["state"], second["owner_pid"], second["disk"]) == ("suspended", None, None)
    assert ("stats", A) not in owner.asked, "what is suspended has no memory to ask about"
    heading, one, two = run("ps").stdout.splitlines()
    assert "DISK" in heading and "1.0 MiB" in one and "none" in two.split()


def test_ps_marks_what_the_keeper_owns(run: Run, owner: Owner, paths: Paths) -> None:
    owner.own(record(A))
    assert run("ps", "--json").json[0]["keeper"] is False
    with OwnerLock(keeper.keeper_directory(paths)):
        assert run("ps", "--json").json[0]["keeper"] is True
        assert f"{os.getpid()} (keeper)" in run("ps").stdout


def test_stop_all_takes_the_suspended_too(run: Run, owner: Owner, store: Store) -> None:
    owner.own(record(A), record(B, State.SUSPENDED), record(C, State.PAUSED))
    assert {row["id"] for row in run("stop", "--all", "--json").json} == {A, B, C}


def test_logs_of_a_suspended_sandbox_are_the_kept_ones(run: Run, owner: Owner, paths: Paths) -> None:
    owner.own(record(A, State.SUSPENDED))
    paths.logs.mkdir()
    (paths.logs / f"{A}.log").write_text("before the suspend\n")
    assert run("logs", A).stdout == "before the suspend\n"
    assert ("log", A) not in owner.asked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_much_and_how_fast() -> None:
    terminal, clock = Terminal(), [0.0]
    with ProgressLine(terminal) as line:
        meter = Meter(line, "suspending", lambda: clock[0])
        meter.begin(A)
        meter.update(A, {"message": "writing memory", "done": 0, "total": 400 << 20})
        clock[0] = 2.0
        meter.update(A, {"message": "writing memory", "done": 100 << 20, "total": 400 << 20})
        assert terminal.getvalue().endswith("suspending 11112222: writing memory 100 MiB of 400 MiB, 50 MiB/s")
        meter.begin(B)
        meter.update(B, {"message": "stopping\x1b[2J", "done": "x", "total": None})
        assert "suspending 22229999 and 1 more: stopping" in terminal.getvalue()
        assert "\x1b[2J" not in terminal.getvalue()
        meter.end(B)
        assert terminal.getvalue().endswith("suspending 11112222: writing memory 100 MiB of 400 MiB, 50 MiB/s")
        meter.end(A)


def test_eight_at_most_are_worked_on_at_once_and_no_less(run: Run, owner: Owner) -> None:
    under_way: set[str] = set()
    most = 0
    eight = asyncio.Event()

    async def suspend(sandbox_id: str) -> dict[str, Any]:
        nonlocal most
        under_way.add(sandbox_id)
        most = max(most, len(under_way))
        if most == 8:
            eight.set()
        async with asyncio.timeout(20):
            await eight.wait()
        under_way.discard(sandbox_id)
        return {}

    owner.answers["suspend"] = suspend
    owner.own(*(record(f"sandbox-{number}") for number in range(20)))
    assert len(run("suspend", "--all", "--json").json) == 20
    assert most == 8
