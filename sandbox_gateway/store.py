"""What exists: the index of all sandboxes of one installation, in SQLite (DESIGN 4.7).

Any thread of any process of this user may use the store at the same time. Each method is one transaction, and what
it wrote survives the death of the process at any later point (WAL with ``synchronous=NORMAL``: a power cut may lose the
last transactions, but then the sandboxes they spoke of are gone with the machine's memory, and the boot id tells so).

The store is the index; the truth about who owns a sandbox is the lock (:mod:`sandbox_gateway.owner`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from sandbox_gateway import forks
from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.events import Event, EventKind
from sandbox_gateway.model import Activity, Death, Idle, Launch, OnOwnerExit, SandboxRecord, State

BUSY_TIMEOUT: Final = 10.0
"""Seconds to wait for another process's transaction before ``store_failed``."""

MAX_EVENTS: Final = 10_000
"""Events that are kept, the newest ones (a few more between two trims)."""
MAX_EVENTS_EACH: Final = 1_000
"""Events that are kept of one sandbox."""
_TRIM_EVERY = 100

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        """CREATE TABLE sandboxes (
            id TEXT PRIMARY KEY,
            state TEXT NOT NULL,
            profile TEXT NOT NULL,
            runtime TEXT NOT NULL,
            created REAL NOT NULL,
            changed REAL NOT NULL,
            boot_id TEXT NOT NULL,
            step TEXT NOT NULL,
            handle TEXT NOT NULL,
            layers TEXT NOT NULL,
            on_owner_exit TEXT NOT NULL,
            grace REAL NOT NULL,
            owner_pid INTEGER,
            death TEXT,
            notes TEXT NOT NULL,
            name TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX sandboxes_by_state ON sandboxes (state)",
    ),
    (
        "ALTER TABLE sandboxes ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE sandboxes ADD COLUMN snapshot TEXT",
        "ALTER TABLE sandboxes ADD COLUMN parent TEXT",
        "CREATE TABLE launches (id TEXT PRIMARY KEY, launch TEXT NOT NULL) STRICT, WITHOUT ROWID",
    ),
    (
        # AUTOINCREMENT: a number is never given again, also when the newest events were deleted.
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            sandbox TEXT NOT NULL,
            time REAL NOT NULL,
            kind TEXT NOT NULL,
            text TEXT NOT NULL,
            data TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX events_by_sandbox ON events (sandbox, id)",
        "CREATE TABLE activity (id TEXT PRIMARY KEY, last REAL NOT NULL, expiry_announced REAL, end_announced REAL)"
        " STRICT, WITHOUT ROWID",
    ),
    (
        "ALTER TABLE sandboxes ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
        "CREATE TABLE snapshot_owners (id TEXT PRIMARY KEY, owner TEXT NOT NULL, published INTEGER NOT NULL)"
        " STRICT, WITHOUT ROWID",
    ),
    ("ALTER TABLE sandboxes ADD COLUMN idle TEXT",),
)
"""Statements that lead from version ``n`` (the index) to ``n + 1``. Append only: old ones are in users' files."""

_COLUMNS = (
    "id", "state", "profile", "runtime", "created", "changed", "boot_id", "step", "handle", "layers",
    "on_owner_exit", "grace", "owner_pid", "death", "notes", "name", "epoch", "snapshot", "parent", "owner", "idle",
)  # fmt: skip
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM sandboxes"
_UPSERT = f"INSERT OR REPLACE INTO sandboxes ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_LAUNCH = "INSERT OR REPLACE INTO launches (id, launch) VALUES (?, ?)"
_WITHOUT_LAYERS = frozenset({State.TERMINATED, State.EXPIRED})


class Store:
    """The sandboxes of one installation.

    Opened by :meth:`open`, or by the first use. All methods raise ``store_failed``, ``disk_full``, ``data_directory``
    or ``store_too_new``; besides those only what their own text names. Fork-safe: ``os.fork`` waits until no thread
    uses a store, and closes them; parent and child open anew.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()
        forks.quiet(self)

    @property
    def database(self) -> Path:
        """The file; SQLite keeps ``-wal`` and ``-shm`` files beside it while it is open."""
        return self._database

    def open(self) -> Store:
        """Open the file, make it if it is missing, and bring its schema up to date. Returns the store itself."""
        with self._open_connection():
            return self

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock, self._mapped():
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def __enter__(self) -> Store:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def put(self, record: SandboxRecord) -> None:
        """Write ``record``, whatever was there under its id before."""
        with self._transaction() as connection:
            connection.execute(_UPSERT, _to_row(record))

    def get(self, sandbox_id: str) -> SandboxRecord:
        """The record of exactly this id; raises ``unknown_sandbox``."""
        with self._open_connection() as connection:
            return _read(connection, sandbox_id)

    def has(self, sandbox_id: str) -> bool:
        """Whether there is a record of exactly this id."""
        try:
            self.get(sandbox_id)
        except SandboxGatewayError as error:
            if error.code != "unknown_sandbox":
                raise
            return False
        return True

    def find(self, prefix: str) -> SandboxRecord:
        """The record whose id is ``prefix``, or the only one whose id begins so.

        Raises ``unknown_sandbox``, or ``ambiguous_id`` with some of the candidates.
        """
        with self._open_connection() as connection:
            rows = connection.execute(
                f"{_SELECT} WHERE substr(id, 1, ?) = ? ORDER BY id <> ?, id LIMIT 6", (len(prefix), prefix, prefix)
            ).fetchall()
        if not rows or not prefix:
            raise _unknown(prefix)
        if len(rows) > 1 and rows[0][0] != prefix:
            shown = ", ".join(row[0] for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
            raise SandboxGatewayError("ambiguous_id", f"{prefix!r} could be any of {shown}")
        return _from_row(rows[0])

    def list(self, states: frozenset[State] | None = None) -> tuple[SandboxRecord, ...]:
        """All records, or those in ``states``, oldest first."""
        names = tuple(str(state) for state in (State if states is None else states))
        with self._open_connection() as connection:
            rows = connection.execute(
                f"{_SELECT} WHERE state IN ({', '.join('?' * len(names))}) ORDER BY created, id", names
            ).fetchall()
        return tuple(_from_row(row) for row in rows)

    def delete(self, sandbox_id: str) -> bool:
        """Forget a sandbox and its events; False when there was none."""
        with self._transaction() as connection:
            for table, key in (("launches", "id"), ("activity", "id"), ("events", "sandbox")):
                connection.execute(f"DELETE FROM {table} WHERE {key} = ?", (sandbox_id,))
            return connection.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,)).rowcount > 0

    def update(self, sandbox_id: str, **changes: Any) -> SandboxRecord:
        """Change fields other than the state, atomically against other processes; returns the new record.

        Raises ``unknown_sandbox``.
        """
        if not changes.keys().isdisjoint({"id", "state"}):
            raise ValueError("an id never changes, and a state changes by transition()")
        with self._transaction() as connection:
            record = replace(_read(connection, sandbox_id), **changes)
            connection.execute(_UPSERT, _to_row(record))
        return record

    def transition(self, sandbox_id: str, state: State, now: float, **changes: Any) -> SandboxRecord:
        """Move to ``state`` at ``now`` (seconds since the epoch), checked against the state that the store has now.

        Of two processes that make conflicting moves, one gets ``illegal_transition``. Raises ``unknown_sandbox``.
        """
        with self._transaction() as connection:
            record = _read(connection, sandbox_id).moved(state, now, **changes)
            connection.execute(_UPSERT, _to_row(record))
        return record

    def enter(self, record: SandboxRecord, launch: Launch) -> None:
        """Write ``record`` and what another process needs to drive the sandbox: both, or neither."""
        with self._transaction() as connection:
            connection.execute(_UPSERT, _to_row(record))
            connection.execute(_LAUNCH, (record.id, json.dumps(launch.as_dict())))

    def put_launch(self, sandbox_id: str, launch: Launch) -> None:
        """Write what another process needs to drive the sandbox; it goes with :meth:`delete`."""
        with self._transaction() as connection:
            connection.execute(_LAUNCH, (sandbox_id, json.dumps(launch.as_dict())))

    def launch(self, sandbox_id: str) -> Launch:
        """What :meth:`put_launch` wrote; raises ``unknown_sandbox``, or ``store_failed`` when it is damaged."""
        with self._open_connection() as connection:
            row = connection.execute("SELECT launch FROM launches WHERE id = ?", (sandbox_id,)).fetchone()
        if row is None:
            raise _unknown(sandbox_id)
        try:
            return Launch.from_dict(json.loads(row[0]))
        except (ValueError, TypeError, KeyError) as error:
            raise SandboxGatewayError("store_failed", f"the launch of sandbox {sandbox_id} is damaged") from error

    def add_events(self, events: Sequence[Event]) -> tuple[Event, ...]:
        """Write events in their order; returns them with their numbers. Old ones go at the bounds."""
        written = []
        with self._transaction() as connection:
            for event in events:
                row = (event.sandbox, event.time, str(event.kind), event.text, json.dumps(dict(event.data)))
                added = connection.execute(
                    "INSERT INTO events (sandbox, time, kind, text, data) VALUES (?, ?, ?, ?, ?)", row
                )
                written.append(replace(event, id=added.lastrowid or 0))
            for sandbox_id in {event.sandbox for event in events}:
                connection.execute(
                    "DELETE FROM events WHERE sandbox = ? AND id <="
                    " (SELECT id FROM events WHERE sandbox = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    (sandbox_id, sandbox_id, MAX_EVENTS_EACH),
                )
            if any(event.id % _TRIM_EVERY == 0 for event in written):
                connection.execute(
                    "DELETE FROM events WHERE id <= (SELECT id FROM events ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    (MAX_EVENTS,),
                )
        return tuple(written)

    def events(self, sandbox_id: str | None = None, *, since: int = 0, limit: int = MAX_EVENTS) -> tuple[Event, ...]:
        """The newest ``limit`` events after number ``since``, of one sandbox or of all, oldest first.

        Kinds that this program does not know (a newer one wrote them) are left out.
        """
        condition, values = ("AND sandbox = ?", (sandbox_id,)) if sandbox_id is not None else ("", ())
        with self._open_connection() as connection:
            rows = connection.execute(
                f"SELECT sandbox, kind, text, data, time, id FROM events WHERE id > ? {condition}"
                " ORDER BY id DESC LIMIT ?",
                (since, *values, limit),
            ).fetchall()
        known = {str(kind) for kind in EventKind}
        return tuple(
            Event(sandbox, EventKind(kind), text, json.loads(data), time, number)
            for sandbox, kind, text, data, time, number in reversed(rows)
            if kind in known
        )

    def put_activity(self, sandbox_id: str, activity: Activity) -> None:
        """Write when a sandbox was used last; it goes with :meth:`delete`."""
        row = (sandbox_id, activity.last, activity.expiry_announced, activity.end_announced)
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO activity VALUES (?, ?, ?, ?)", row)

    def activity(self, sandbox_id: str) -> Activity | None:
        """What :meth:`put_activity` wrote; None when nothing was."""
        with self._open_connection() as connection:
            row = connection.execute(
                "SELECT last, expiry_announced, end_announced FROM activity WHERE id = ?", (sandbox_id,)
            ).fetchone()
        return None if row is None else Activity(*row)

    def put_snapshot_owner(self, snapshot_id: str, owner: str, *, published: bool = False) -> None:
        """Write which user of a gateway a saved snapshot belongs to, and whether everybody may start from it."""
        with self._transaction() as connection:
            row = (snapshot_id, owner, int(published))
            connection.execute("INSERT OR REPLACE INTO snapshot_owners VALUES (?, ?, ?)", row)

    def snapshot_owners(self) -> dict[str, tuple[str, bool]]:
        """The owner of each snapshot that has one, and whether it is published."""
        with self._open_connection() as connection:
            rows = connection.execute("SELECT id, owner, published FROM snapshot_owners").fetchall()
        return {snapshot_id: (owner, bool(published)) for snapshot_id, owner, published in rows}

    def forget_snapshot_owner(self, snapshot_id: str) -> None:
        """The snapshot is gone."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM snapshot_owners WHERE id = ?", (snapshot_id,))

    def referenced_layers(self) -> frozenset[str]:
        """Digests of layers that garbage collection must keep: those of all but terminated and expired sandboxes."""
        return frozenset(
            digest for record in self.list() if record.state not in _WITHOUT_LAYERS for digest in record.layers
        )

    # Connections and transactions

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open_connection() as connection, _immediate(connection):
            yield connection

    @contextlib.contextmanager
    def _open_connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._mapped():
            if self._connection is None:
                self._connection = self._connect()
            yield self._connection

    def before_fork(self) -> None:
        """Neither a connection, nor the locks that SQLite has noted for this process, nor a mutex that a thread holds
        inside it may cross a fork: see :class:`~sandbox_gateway.forks.Quieted`.
        """
        self._lock.acquire()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def after_fork(self) -> None:
        """The next use opens the file again."""
        self._lock.release()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._database, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            _check_version(connection)
            # Mode by path, never by a descriptor: closing one would drop this process's POSIX locks on the file.
            if stat.S_IMODE(os.stat(self._database).st_mode) & 0o077:
                os.chmod(self._database, 0o600)
            _persistently(connection, "PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explained(error) from error
        except OSError as error:
            raise SandboxGatewayError("data_directory", f"cannot use {self._database}: {error.strerror}") from error

    def _explained(self, error: sqlite3.Error) -> SandboxGatewayError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        name = self._database
        if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(name.parent)):
            return SandboxGatewayError("disk_full", f"no space left to write {name}")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return SandboxGatewayError("data_directory", f"cannot write {name}: {error}")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return SandboxGatewayError(
                "store_failed", f"{name} was locked by another process for {BUSY_TIMEOUT:.0f} s", "Try again."
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return SandboxGatewayError(
                "store_failed",
                f"{name} is damaged: {error}",
                "Stop all kernels and move the file away; the next start makes a new one.",
            )
        return SandboxGatewayError("store_failed", f"{name}: {error}")


@contextlib.contextmanager
def _immediate(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite may have rolled back by itself already (a full disk).
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _persistently(connection: sqlite3.Connection, statement: str) -> None:
    # Turning WAL on needs the file alone and does not call the busy handler: concurrent first openers retry here.
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute(statement).fetchall()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _check_version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise SandboxGatewayError(
            "store_too_new", f"the store has schema {version}, and this program knows {len(MIGRATIONS)} at most"
        )
    return version


def _migrate(connection: sqlite3.Connection) -> None:
    if _check_version(connection) == len(MIGRATIONS):
        return
    with _immediate(connection):
        # Read again under the write lock: another process may have migrated meanwhile.
        version = _check_version(connection)
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _is_full(directory: Path) -> bool:
    try:
        return shutil.disk_usage(directory).free < 1 << 20
    except OSError:
        return False


def _unknown(sandbox_id: str) -> SandboxGatewayError:
    return SandboxGatewayError("unknown_sandbox", f"there is no sandbox {sandbox_id!r}")


def _read(connection: sqlite3.Connection, sandbox_id: str) -> SandboxRecord:
    row = connection.execute(f"{_SELECT} WHERE id = ?", (sandbox_id,)).fetchone()
    if row is None:
        raise _unknown(sandbox_id)
    return _from_row(row)


def _to_row(record: SandboxRecord) -> tuple[Any, ...]:
    return (
        record.id,
        str(record.state),
        record.profile,
        record.runtime,
        record.created,
        record.changed,
        record.boot_id,
        record.step,
        json.dumps(dict(record.handle)),
        json.dumps(record.layers),
        str(record.on_owner_exit),
        record.grace,
        record.owner_pid,
        None if record.death is None else json.dumps(record.death.as_dict()),
        json.dumps(record.notes),
        record.name,
        record.epoch,
        record.snapshot,
        record.parent,
        record.owner,
        None if record.idle is None else json.dumps(asdict(record.idle)),
    )


def _from_row(row: Sequence[Any]) -> SandboxRecord:
    data = dict(zip(_COLUMNS, row, strict=True))
    try:
        return SandboxRecord(
            **{
                **data,
                "state": State(data["state"]),
                "handle": json.loads(data["handle"]),
                "layers": tuple(json.loads(data["layers"])),
                "on_owner_exit": OnOwnerExit(data["on_owner_exit"]),
                "death": None if data["death"] is None else Death.from_dict(json.loads(data["death"])),
                "notes": tuple(json.loads(data["notes"])),
                "idle": None if data["idle"] is None else Idle(**json.loads(data["idle"])),
            }
        )
    except (ValueError, TypeError, KeyError) as error:
        raise SandboxGatewayError(
            "store_failed", f"the record of sandbox {data['id']} is damaged: {error}", "`jupyter sandbox rm` it."
        ) from error
