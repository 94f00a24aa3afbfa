"""The index of sandboxes: what it keeps, what it refuses, and what several processes may do at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox_gateway import store as store_module
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.model import (
    Death,
    DeathKind,
    Image,
    KernelSpec,
    Launch,
    Layer,
    OnOwnerExit,
    SandboxRecord,
    SandboxSpec,
    State,
)
from sandbox_gateway.store import MIGRATIONS, Store

spawn = multiprocessing.get_context("spawn")


def record(sandbox_id: str = "a1", state: State = State.CREATING, **changes: object) -> SandboxRecord:
    values = {
        "id": sandbox_id,
        "state": state,
        "profile": "p",
        "runtime": "fake",
        "created": 1.0,
        "changed": 1.0,
        "boot_id": "boot",
    }
    return SandboxRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def listed(database: Path) -> list[SandboxRecord]:
    with Store(database) as opened:
        return list(opened.list())


def code_of(call, *arguments: object, **named: object) -> str:
    with pytest.raises(SandboxGatewayError) as caught:
        call(*arguments, **named)
    assert caught.value.hint
    return caught.value.code


def test_a_new_sandbox_is_written_with_how_it_was_launched_or_not_at_all(store: Store):
    class Unsayable(Launch):
        def as_dict(self) -> dict[str, object]:
            raise ValueError("no JSON")

    image = Image("host", (Layer("/layers/root.erofs", "/"),), "/usr/bin/python3")
    launch = Launch(SandboxSpec("a1", "p", "fake", image), KernelSpec(("python3",)), b"key", 1000, 1000)
    with pytest.raises(ValueError, match="no JSON"):
        store.enter(record(), Unsayable(launch.spec, launch.kernel, b"key", 1000, 1000))
    assert code_of(store.get, "a1") == "unknown_sandbox"
    store.enter(record(), launch)
    assert store.get("a1") == record()
    assert store.launch("a1") == launch


def test_every_field_of_a_record_comes_back(store: Store):
    death = Death(DeathKind.EXITED, "x", exit_code=3, signal=None, stderr_tail="é\n")
    full = record(
        step="start",
        handle={"id": "a1", "data": {"pid": 3, "list": [1]}},
        layers=("sha256:1", "sha256:2"),
        on_owner_exit=OnOwnerExit.KEEP,
        grace=2.5,
        owner_pid=7,
        death=death,
        notes=("memory: soft",),
        name="Ünïcode.ipynb",
    )
    store.put(full)
    assert store.get("a1") == full
    store.put(record())
    assert store.get("a1") == record()


def test_what_was_put_survives_closing(store: Store):
    store.put(record())
    store.close()
    assert store.get("a1") == record()
    assert listed(store.database) == [record()]


def test_find_takes_an_id_or_a_unique_prefix(store: Store):
    for name in ("abc", "abcd", "abd", "x%"):
        store.put(record(name))
    assert store.find("abcd").id == "abcd"
    assert store.find("abc").id == "abc", "an exact id wins over longer ones"
    assert store.find("x").id == "x%"
    assert code_of(store.find, "ab") == "ambiguous_id"
    for absent in ("", "%", "_bc", "zz", "ABC"):
        assert code_of(store.find, absent) == "unknown_sandbox"
    assert code_of(store.get, "ab") == "unknown_sandbox"


def test_list_is_oldest_first_and_filters_by_state(store: Store):
    store.put(record("new", created=2.0))
    store.put(record("old", State.RUNNING, created=1.0))
    assert [r.id for r in store.list()] == ["old", "new"]
    assert [r.id for r in store.list(frozenset({State.RUNNING, State.PAUSED}))] == ["old"]
    assert store.list(frozenset()) == ()


def test_delete_says_whether_there_was_one(store: Store):
    store.put(record())
    assert store.delete("a1")
    assert not store.delete("a1")
    assert store.list() == ()


def test_a_transition_is_checked_against_the_state_in_the_store(store: Store):
    store.put(record())
    moved = store.transition("a1", State.RUNNING, 5.0, owner_pid=9)
    assert (moved.state, moved.changed, moved.owner_pid) == (State.RUNNING, 5.0, 9)
    assert store.get("a1") == moved
    assert code_of(store.transition, "a1", State.CREATING, 6.0) == "illegal_transition"
    assert code_of(store.transition, "nope", State.RUNNING, 6.0) == "unknown_sandbox"
    assert store.get("a1") == moved


def test_update_changes_what_is_not_the_state(store: Store):
    store.put(record())
    assert store.update("a1", step="attach").step == "attach"
    assert store.get("a1").step == "attach"
    assert code_of(store.update, "nope", step="x") == "unknown_sandbox"
    for forbidden in ({"state": State.RUNNING}, {"id": "b"}):
        with pytest.raises(ValueError):
            store.update("a1", **forbidden)
    with pytest.raises(TypeError):
        store.update("a1", unheard_of=1)
    assert store.get("a1").step == "attach"


def test_layers_are_referenced_until_a_sandbox_is_over(store: Store):
    store.put(record("a", State.RUNNING, layers=("1", "2")))
    store.put(record("b", State.SUSPENDED, layers=("2", "3")))
    store.put(record("c", State.TERMINATED, layers=("4",)))
    store.put(record("d", State.EXPIRED, layers=("5",)))
    assert store.referenced_layers() == {"1", "2", "3"}


def test_the_file_is_private(store: Store):
    store.put(record())
    for path in store.database.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_closing_leaves_one_file(store: Store):
    store.put(record())
    store.close()
    assert [path.name for path in store.database.parent.iterdir()] == ["store.sqlite"]


# Concurrency


def _open_and_put(arguments: tuple[str, str]) -> None:
    database, name = arguments
    with Store(Path(database)) as opened:
        opened.put(record(name))


def test_first_openers_of_several_processes_and_threads_make_one_schema(tmp_path: Path):
    database = str(tmp_path / "store.sqlite")
    jobs = [(database, f"s{n}") for n in range(8)]
    with spawn.Pool(4) as pool:
        pool.map(_open_and_put, jobs, chunksize=1)
    other = str(tmp_path / "other.sqlite")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(_open_and_put, [(other, f"t{n}") for n in range(16)]))
    assert len(listed(Path(database))) == 8
    assert len(listed(Path(other))) == 16


def test_one_of_two_conflicting_moves_wins(store: Store):
    store.put(record(state=State.SUSPENDED))
    other = Store(store.database).open()
    barrier = threading.Barrier(2)

    def move(which: Store, state: State) -> str:
        barrier.wait()
        try:
            return str(which.transition("a1", state, 2.0).state)
        except SandboxGatewayError as error:
            return error.code

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(move, store, State.RESUMING)
        second = threads.submit(move, other, State.EXPIRED)
        results = {first.result(), second.result()}
    other.close()
    assert results in ({"resuming", "illegal_transition"}, {"expired", "illegal_transition"})


def test_updates_of_many_threads_are_not_lost(store: Store):
    store.put(record())
    other = Store(store.database).open()

    def bump(which: Store) -> None:
        for _ in range(20):
            with which._transaction() as connection:
                value = store_module._read(connection, "a1").grace
                connection.execute("UPDATE sandboxes SET grace = ? WHERE id = 'a1'", (value + 1,))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(bump, [store, other, store, other]))
    other.close()
    assert store.get("a1").grace == 30.0 + 80


def test_a_forked_child_opens_its_own_connection(store: Store):
    store.put(record())
    child = os.fork()
    if child == 0:
        ok = False
        try:
            store.put(record("child"))
            ok = store.get("a1") == record()
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.put(record("parent"))
    assert {r.id for r in store.list()} == {"a1", "child", "parent"}


def test_a_child_is_forked_between_what_threads_write_and_can_write_itself(store: Store):
    """SQLite's own mutexes and its list of locks go with a fork as they are: a child could wait for them for ever."""
    store.put(record())
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            store.put(record(threading.current_thread().name))

    writers = [threading.Thread(target=write, name=f"writer-{number}") for number in range(2)]
    for writer in writers:
        writer.start()
    codes = []
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                ok = False
                signal.alarm(20)
                try:
                    store.put(record("child"))
                    ok = store.get("a1") == record()
                    store.close()
                finally:
                    os._exit(0 if ok else 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            if codes[-1] != 0:
                break
    finally:
        over.set()
        for writer in writers:
            writer.join()
    assert codes == [0] * 30
    assert {r.id for r in listed(store.database)} == {"a1", "child", "writer-0", "writer-1"}


def test_what_was_written_survives_kill_9(tmp_path: Path):
    program = (
        "import os, signal, sys; from pathlib import Path; from sandbox_gateway.store import Store\n"
        "from sandbox_gateway.model import SandboxRecord, State\n"
        "store = Store(Path(sys.argv[1])).open()\n"
        "store.put(SandboxRecord('a1', State.CREATING, 'p', 'fake', 1.0, 1.0, 'boot'))\n"
        "store._connection.execute('BEGIN IMMEDIATE'); store._connection.execute('DELETE FROM sandboxes')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    database = tmp_path / "store.sqlite"
    done = subprocess.run([sys.executable, "-c", program, str(database)], check=False)
    assert done.returncode == -9
    assert listed(database) == [record()], "the open transaction is undone, the finished one is not"


# Schema versions


def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path):
    database = tmp_path / "store.sqlite"
    raw = sqlite3.connect(database)
    raw.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    raw.close()
    before = database.read_bytes()
    assert code_of(Store(database).open) == "store_too_new"
    assert database.read_bytes() == before


def test_an_older_schema_is_brought_up_to_date_keeping_what_is_there(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.put(record())
    store.close()
    added = (*MIGRATIONS, ("CREATE TABLE extra (x TEXT) STRICT",))
    monkeypatch.setattr(store_module, "MIGRATIONS", added)
    assert store.get("a1") == record()
    assert store._connection is not None
    assert store._connection.execute("PRAGMA user_version").fetchone() == (len(added),)


def test_a_migration_that_fails_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.put(record())
    store.close()
    broken = (*MIGRATIONS, ("CREATE TABLE extra (x TEXT)", "no SQL at all"))
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", broken)
        assert code_of(store.open) == "store_failed"
    assert store.get("a1") == record()
    assert store._connection is not None
    assert store._connection.execute("SELECT name FROM sqlite_master WHERE name = 'extra'").fetchall() == []


# Failures


def test_a_damaged_file_is_named(tmp_path: Path):
    database = tmp_path / "store.sqlite"
    database.write_bytes(b"this is no database, and long enough to be sure of that" * 100)
    assert code_of(Store(database).open) == "store_failed"


def test_a_damaged_record_is_named(store: Store):
    store.put(record())
    with store._transaction() as connection:
        connection.execute("UPDATE sandboxes SET state = 'unheard of'")
    with pytest.raises(SandboxGatewayError, match="a1") as caught:
        store.get("a1")
    assert caught.value.code == "store_failed"


def test_a_missing_directory_is_an_unusable_data_directory(tmp_path: Path):
    assert code_of(Store(tmp_path / "absent" / "store.sqlite").open) == "data_directory"


def test_a_directory_in_place_of_the_file_is_an_unusable_data_directory(tmp_path: Path):
    (tmp_path / "store.sqlite").mkdir()
    assert code_of(Store(tmp_path / "store.sqlite").open) == "data_directory"


def test_a_locked_store_is_reported_after_the_timeout(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.put(record())
    monkeypatch.setattr(store_module, "BUSY_TIMEOUT", 0.1)
    impatient = Store(store.database).open()
    with store._transaction():
        assert impatient.get("a1") == record(), "readers are not held up"
        assert code_of(impatient.put, record("b")) == "store_failed"
    impatient.put(record("b"))
    impatient.close()


def test_a_full_disk_is_reported_and_the_store_goes_on(store: Store):
    store.put(record())
    assert store._connection is not None
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    assert code_of(store.put, record("big", handle={"x": "y" * 100_000})) == "disk_full"
    store._connection.execute("PRAGMA max_page_count = 1000000")
    store.put(record("b"))
    assert [r.id for r in store.list()] == ["a1", "b"]


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/full").exists(), reason="mounting a small tmpfs needs root")
def test_a_really_full_disk_and_a_read_only_one(tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        print("skipped: no tmpfs can be mounted here:", mounted.stderr.decode())
        pytest.skip("no tmpfs can be mounted here")
    try:
        store = Store(small / "store.sqlite").open()
        store.put(record())
        with open(small / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        assert code_of(store.put, record("big", handle={"x": "y" * 100_000})) == "disk_full"
        assert store.get("a1") == record()
        (small / "filler").unlink()
        store.close()
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        store = Store(small / "store.sqlite")
        assert code_of(store.put, record("b")) == "data_directory"
        store.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_records_hold_plain_json(store: Store):
    store.put(record(handle={"pid": 1}, notes=("a",)))
    raw = sqlite3.connect(store.database)
    handle, notes = raw.execute("SELECT handle, notes FROM sandboxes").fetchone()
    raw.close()
    assert (json.loads(handle), json.loads(notes)) == ({"pid": 1}, ["a"])
