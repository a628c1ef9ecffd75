"""The durable index: one SQLite file a namespace, one transaction a batch.

The slots of a segment are stored by leaf, 64 of them in one row, because a batch fills neighbouring
slots: it then touches two or three rows, and a million pages load as 16 thousand rows.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from symphony_sglang.store.settings import SyncPolicy
from symphony_sglang.store.slots import LEAF_ENTRY, LEAF_SLOTS

INDEX_FILE = "index.sqlite"
_SUM_BYTES = 8
_LEAF_BYTES = _SUM_BYTES + LEAF_SLOTS * LEAF_ENTRY.itemsize
_DAYS_KEPT = 400
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leaves (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS daily (
    day TEXT PRIMARY KEY, payload_bytes INTEGER NOT NULL, disk_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL, id TEXT NOT NULL, stamp INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_by_age ON records (kind, stamp);
"""


# A leaf's id and its (LEAF_SLOTS,) entries.
Leaf = tuple[int, npt.NDArray[np.void]]


class LoadedLeaves(NamedTuple):
    """(n,) ids ascending, (n, LEAF_SLOTS) entries, and how many rows were damaged."""

    ids: npt.NDArray[np.int64]
    entries: npt.NDArray[np.void]
    damaged: int


class RecordChange(NamedTuple):
    """A side record to store, or to delete where `body` is None."""

    kind: str
    id: str
    body: bytes | None


class Transaction(NamedTuple):
    """Everything that becomes durable together."""

    leaves: Sequence[Leaf]
    records: Sequence[RecordChange]
    meta: dict[str, int]
    day: str
    payload_bytes: int
    disk_bytes: int
    records_max: int


class Database:
    """The connection. Any damage shows as sqlite3.DatabaseError; the store then rebuilds."""

    def __init__(self, folder: Path, sync: SyncPolicy | None) -> None:
        """Open or create; with no `sync`, open what is there to read it, beside a writer."""
        self._lock = threading.Lock()
        mode = "ro" if sync is None else "rwc"
        self._connection = sqlite3.connect(
            f"{(folder / INDEX_FILE).absolute().as_uri()}?mode={mode}",
            isolation_level=None,
            check_same_thread=False,
            timeout=1.0,
            uri=True,
        )
        if sync is None:
            return
        try:
            with self._access():
                self._configure(sync)
        except sqlite3.Error:
            self._connection.close()
            raise

    def _configure(self, sync: SyncPolicy) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode=WAL")
        # NORMAL may lose a committed transaction at a power cut, and with it an eviction whose
        # slot has been reused.
        run(f"PRAGMA synchronous={'OFF' if sync is SyncPolicy.OFF else 'FULL'}")
        run("PRAGMA journal_size_limit=16777216")
        run("PRAGMA locking_mode=NORMAL")
        self._connection.executescript(_SCHEMA)

    @contextlib.contextmanager
    def _access(self) -> Iterator[None]:
        """The connection for one thread. Damage may reach an error text, which then cannot be
        decoded: that is still the damage."""
        with self._lock:
            try:
                yield
            except UnicodeDecodeError as error:
                raise sqlite3.DatabaseError(f"unreadable content: {error}") from error

    def load_leaves(self) -> LoadedLeaves:
        with self._access():
            rows = self._connection.execute("SELECT id, body FROM leaves ORDER BY id").fetchall()
        good = [(leaf, body) for leaf, body in rows if leaf_is_sound(leaf, body)]
        ids = np.array([leaf for leaf, _ in good], np.int64)
        joined = b"".join([body[_SUM_BYTES:] for _, body in good])
        entries = np.frombuffer(joined, LEAF_ENTRY).reshape(len(good), LEAF_SLOTS)
        return LoadedLeaves(ids, entries, len(rows) - len(good))

    def meta(self, name: str, default: int) -> int:
        with self._access():
            row = self._connection.execute(
                "SELECT value FROM meta WHERE name = ?", (name,)
            ).fetchone()
        return int(row[0]) if row else default

    def commit(self, work: Transaction) -> int:
        """Make `work` durable; returns the bytes of index written. Raises sqlite3.Error."""
        bodies = [(leaf, leaf_body(leaf, entries)) for leaf, entries in work.leaves]
        with self._access():
            run, many = self._connection.execute, self._connection.executemany
            run("BEGIN IMMEDIATE")
            try:
                many("INSERT OR REPLACE INTO leaves VALUES (?, ?)", [b for b in bodies if b[1]])
                many("DELETE FROM leaves WHERE id = ?", [(b[0],) for b in bodies if not b[1]])
                many("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(work.meta.items()))
                self._write_records(work)
                if work.day:
                    self._count_day(work)
                run("COMMIT")
            except (sqlite3.Error, UnicodeDecodeError):
                if self._connection.in_transaction:
                    run("ROLLBACK")
                raise
        return sum(len(body) for _, body in bodies)

    def _count_day(self, work: Transaction) -> None:
        run = self._connection.execute
        run(
            "INSERT INTO daily VALUES (?, ?, ?) ON CONFLICT (day) DO UPDATE SET "
            "payload_bytes = payload_bytes + excluded.payload_bytes, "
            "disk_bytes = disk_bytes + excluded.disk_bytes",
            (work.day, work.payload_bytes, work.disk_bytes),
        )
        run(
            "DELETE FROM daily WHERE day NOT IN (SELECT day FROM daily ORDER BY day DESC LIMIT ?)",
            (_DAYS_KEPT,),
        )

    def _write_records(self, work: Transaction) -> None:
        run = self._connection.execute
        for change in work.records:
            if change.body is None:
                run("DELETE FROM records WHERE kind = ? AND id = ?", (change.kind, change.id))
                continue
            row = run(
                "SELECT COALESCE(MAX(stamp), 0) + 1 FROM records WHERE kind = ?", (change.kind,)
            )
            stamp = int(row.fetchone()[0])
            run(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)",
                (change.kind, change.id, stamp, change.body),
            )
        for kind in {change.kind for change in work.records}:
            run(
                "DELETE FROM records WHERE kind = ? AND stamp <= (SELECT stamp FROM records "
                "WHERE kind = ? ORDER BY stamp DESC LIMIT 1 OFFSET ?)",
                (kind, kind, work.records_max),
            )

    def records(self, kind: str) -> list[tuple[str, bytes]]:
        """(id, body) of a kind, oldest first."""
        with self._access():
            return self._connection.execute(
                "SELECT id, body FROM records WHERE kind = ? ORDER BY stamp", (kind,)
            ).fetchall()

    def daily(self) -> list[tuple[str, int, int]]:
        """(day, payload bytes, bytes written to disk), newest first."""
        with self._access():
            return self._connection.execute(
                "SELECT day, payload_bytes, disk_bytes FROM daily ORDER BY day DESC"
            ).fetchall()

    def vacuum(self) -> None:
        with self._access():
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite found the file's content wrong, rather than the disk unwilling."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def leaf_body(leaf: int, entries: npt.NDArray[np.void]) -> bytes:
    """The row of a leaf: a checksum over id and entries, the entries; b"" if none is used."""
    if not entries["used"].any():
        return b""
    content = entries.tobytes()
    return _leaf_sum(leaf, content) + content


def leaf_is_sound(leaf: object, body: object) -> bool:
    if not isinstance(leaf, int) or not isinstance(body, bytes) or len(body) != _LEAF_BYTES:
        return False
    return leaf >= 0 and body[:_SUM_BYTES] == _leaf_sum(leaf, body[_SUM_BYTES:])


def _leaf_sum(leaf: int, content: bytes) -> bytes:
    return xxhash.xxh3_64_digest(content, seed=leaf)


def set_aside(folder: Path) -> Path:
    """Move a damaged index out of the way, for a later look; an earlier one is replaced."""
    for suffix in ("-wal", "-shm"):
        (folder / (INDEX_FILE + suffix)).unlink(missing_ok=True)
    damaged = folder / (INDEX_FILE + ".damaged")
    if (folder / INDEX_FILE).exists():
        (folder / INDEX_FILE).replace(damaged)
    return damaged
