"""The index of the file store: which object lies in which slot, shared by all processes of a host; SQLite in WAL mode.

Every change is one short transaction, and none is open while bytes are copied. A slot is written under a token (a negative key
that nobody looks up) and becomes visible by one update, so a writer that dies leaves at most slots that age and are used again.
SQLite does not sync: whatever a process dies of is safe, and after a power failure the worst is an index that is damaged (made
anew at the next start) or ahead of its data (which the seals find). Not here: the bytes (`file`).

Least recently used first, by a counter instead of a clock. What was used in one call is ordered so that the end of a prefix goes
before its beginning.
"""

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096
BUSY_TIMEOUT_S = 1.0
"""For another process's transaction to end; they take milliseconds."""
_TOUCHES = 256
"""Reads are noted in memory and written this many at a time, or with the next reservation."""
_TRIM_STEP_BYTES = 256 << 20
"""Given back in one transaction when a store is opened with less capacity than it holds."""
_CHECKPOINT_PAGES = 256
"""SQLite's log is copied into the index when it has so many pages: about 1 MiB."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (key INTEGER PRIMARY KEY, size INTEGER NOT NULL, slot INTEGER NOT NULL, used INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS objects_by_use ON objects (used);
CREATE TABLE IF NOT EXISTS files (size INTEGER PRIMARY KEY, num_slots INTEGER NOT NULL, num_held INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS holes (size INTEGER NOT NULL, slot INTEGER NOT NULL, PRIMARY KEY (size, slot)) WITHOUT ROWID;
"""
# Invariant: the slots 0 .. num_slots - 1 of a size are its objects' (num_held of them, distinct) and its holes', disjoint.


@dataclass(frozen=True, slots=True)
class Slot:
    token: int
    number: int


@dataclass(slots=True)
class Totals:
    """As of the last transaction of this process; `evicted` counts what this process evicted."""

    held_bytes: int = 0
    num_objects: int = 0
    evicted: int = 0


def stride_of(size: int) -> int:
    """Objects of `size` bytes lie this far apart."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class FileIndex:
    """Thread-safe: lookups and changes have a connection and a lock each. sqlite3.Error when the index is locked or damaged."""

    def __init__(self, directory: Path, capacity: int, release: Callable[[int, int], None]) -> None:
        """`release(size, slot)` gives the disk space of a slot back. Raises OSError and sqlite3.Error."""
        self._capacity, self._release = capacity, release
        self.totals = Totals()
        self._touched: dict[int, None] = {}
        with _locked(directory / "lock"):
            path = directory / "index.sqlite"
            self._changes = _open_or_remake(path, directory)
            self._lookups = _connect(path)
        self._changes_lock, self._lookups_lock = threading.Lock(), threading.Lock()
        with self._changing() as db:
            self._count(db)
        self._trim()

    def lookup(self, keys: Sequence[int], size: int, *, consecutive: bool = False) -> list[int | None]:
        """The slot of each object of this size, None where there is none; `consecutive`: only up to the first None."""
        slots: list[int | None] = []
        query = "SELECT slot FROM objects WHERE key=? AND size=?"
        with self._lookups_lock, _transaction(self._lookups, "DEFERRED") as db:
            for key in keys:
                row = db.execute(query, (key, size)).fetchone()
                slots.append(row and row[0])
                if consecutive and row is None:
                    break
        return slots

    def touch(self, keys: Sequence[int]) -> None:
        """These objects were used now, the first one being the beginning of a prefix."""
        with self._changes_lock:
            for key in reversed(keys):
                self._touched.pop(key, None)
                self._touched[key] = None
            flush = len(self._touched) >= _TOUCHES
        if flush:
            with self._changing() as db:
                self._write_touched(db)
                self._count(db)

    def reserve(self, size: int, count: int, *, grow: bool = True) -> list[Slot]:
        """Slots to write, at most `count`: new ones while the capacity (and `grow`) allows, then those of the least recently
        used objects. The caller writes them and then publishes or drops every one."""
        stride = stride_of(size)
        with self._changing() as db:
            self._write_touched(db)
            held = self._count(db)
            room = max(0, (self._capacity - held) // stride) if grow else 0
            numbers = self._take_new(db, size, min(count, room))
            numbers += self._evict(db, size, count - len(numbers), held + len(numbers) * stride)
            slots = [Slot(_token(), number) for number in numbers]
            self._insert(db, size, slots)
            self._count(db)
        return slots

    def publish(self, slots: Sequence[Slot], keys: Sequence[int]) -> list[bool]:
        """From now on slot i, which has been written, holds the object of key i. False where it was taken away meanwhile; True also
        where another process was first."""
        results = []
        with self._changing() as db:
            for slot, key in zip(slots, keys, strict=True):
                if db.execute("UPDATE OR IGNORE objects SET key=? WHERE key=?", (key, slot.token)).rowcount == 1:
                    results.append(True)
                    continue
                # Ours, if it is still there, is the first to be used again.
                db.execute("UPDATE objects SET used=0 WHERE key=?", (slot.token,))
                results.append(db.execute("SELECT 1 FROM objects WHERE key=?", (key,)).fetchone() is not None)
        return results

    def drop(self, size: int, slots: Sequence[Slot]) -> None:
        """These could not be written: give their space back."""
        with self._changing() as db:
            for slot in slots:
                if db.execute("DELETE FROM objects WHERE key=?", (slot.token,)).rowcount == 1:
                    self._free(db, size, slot.number)
            self._count(db)

    def make_room(self, num_bytes: int) -> None:
        """Give disk space back, at most an eighth of what is held. It comes free before SQLite wants some for the change."""
        with self._changing() as db:
            held = self._count(db)
            self._shrink(db, held - min(num_bytes, held // 8))

    def discard(self, keys: Sequence[int], size: int) -> None:
        """Forget these objects; their slots are the first to be used again."""
        with self._changing() as db:
            rows = [(_token(), key, size) for key in keys]
            db.executemany("UPDATE objects SET key=?, used=0 WHERE key=? AND size=?", rows)

    def clear(self, truncate: Callable[[int], None]) -> None:
        """Forget everything. `truncate(size)` empties the file of that size."""
        with self._changing() as db:
            for (size,) in db.execute("SELECT size FROM files").fetchall():
                truncate(size)
            for table in ("objects", "files", "holes"):
                db.execute(f"DELETE FROM {table}")
            self._count(db)

    def check_integrity(self) -> None:
        """AssertionError when the invariant does not hold. For tests; reads everything."""
        with self._changing() as db:
            for size, num_slots, num_held in db.execute("SELECT * FROM files").fetchall():
                held = [slot for (slot,) in db.execute("SELECT slot FROM objects WHERE size=?", (size,))]
                holes = [slot for (slot,) in db.execute("SELECT slot FROM holes WHERE size=?", (size,))]
                assert len(held) == num_held, f"{len(held)} objects of {size} bytes, {num_held} counted"
                assert sorted(held + holes) == list(range(num_slots)), (
                    f"size {size}: {sorted(held)} and {sorted(holes)} of {num_slots}"
                )
            assert self._count(db) <= self._capacity

    def close(self) -> None:
        """Notes the last reads; sqlite3.Error is swallowed, since nothing is lost but their order."""
        try:
            with self._changing() as db:
                self._write_touched(db)
        except sqlite3.Error:
            pass
        with self._changes_lock, self._lookups_lock:
            self._changes.close()
            self._lookups.close()

    def _trim(self) -> None:
        """Down to the capacity, which may be less than when this directory was last used; in steps, so that nobody waits long."""
        while self.totals.held_bytes > self._capacity:
            with self._changing() as db:
                self._shrink(db, max(self._capacity, self._count(db) - _TRIM_STEP_BYTES))

    # -- inside a transaction

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._changes_lock:
            evicted = self.totals.evicted
            try:
                with _transaction(self._changes, "IMMEDIATE") as db:
                    yield db
            except BaseException:
                self.totals.evicted = evicted
                raise

    def _count(self, db: sqlite3.Connection) -> int:
        """Bytes held, also noted in `totals`."""
        files = db.execute("SELECT size, num_held FROM files").fetchall()
        self.totals.held_bytes = sum(stride_of(size) * num_held for size, num_held in files)
        self.totals.num_objects = sum(num_held for _, num_held in files)
        return self.totals.held_bytes

    def _now(self, db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT coalesce(max(used), 0) + 1 FROM objects").fetchone()[0])

    def _write_touched(self, db: sqlite3.Connection) -> None:
        now = self._now(db)
        used = zip(range(now, now + len(self._touched)), self._touched, strict=True)
        db.executemany("UPDATE objects SET used=? WHERE key=?", list(used))
        self._touched.clear()

    def _take_new(self, db: sqlite3.Connection, size: int, count: int) -> list[int]:
        """Slots that held no object: holes first, then the end of the file."""
        if count <= 0:
            return []
        numbers = [n for (n,) in db.execute("SELECT slot FROM holes WHERE size=? LIMIT ?", (size, count)).fetchall()]
        db.executemany("DELETE FROM holes WHERE size=? AND slot=?", [(size, n) for n in numbers])
        row = db.execute("SELECT num_slots FROM files WHERE size=?", (size,)).fetchone()
        end = row[0] if row else 0
        new_end = end + count - len(numbers)
        db.execute(
            "INSERT INTO files VALUES (?, ?, ?) ON CONFLICT (size) DO UPDATE SET num_slots=?, num_held=num_held+?",
            (size, new_end, count, new_end, count),
        )
        return numbers + list(range(end, new_end))

    def _evict(self, db: sqlite3.Connection, size: int, count: int, held: int) -> list[int]:
        """Up to `count` slots of least recently used objects. Objects of another size (another model's) give their space back, and so
        do all while more is held than the capacity."""
        numbers: list[int] = []
        if count <= 0:
            return numbers
        stride = stride_of(size)
        for victim_size, number in self._oldest(db):
            if victim_size == size and held <= self._capacity:
                numbers.append(number)
            else:
                self._free(db, victim_size, number)
                held -= stride_of(victim_size)
                more = min(count - len(numbers), (self._capacity - held) // stride)
                numbers += self._take_new(db, size, more)
                held += max(0, more) * stride
            if len(numbers) == count:
                break
        return numbers

    def _oldest(self, db: sqlite3.Connection) -> Iterator[tuple[int, int]]:
        """(size, slot) of the least recently used objects, which are forgotten one by one; the slot is the caller's."""
        query = "SELECT key, size, slot FROM objects ORDER BY used LIMIT 64"
        while victims := db.execute(query).fetchall():
            for key, size, number in victims:
                db.execute("DELETE FROM objects WHERE key=?", (key,))
                self.totals.evicted += 1
                yield size, number

    def _shrink(self, db: sqlite3.Connection, num_bytes: int) -> None:
        """Evict until no more than `num_bytes` are held."""
        held = self._count(db)
        victims = self._oldest(db)
        while held > num_bytes:
            size, number = next(victims)
            self._free(db, size, number)
            held -= stride_of(size)
        self._count(db)

    def _free(self, db: sqlite3.Connection, size: int, number: int) -> None:
        self._release(size, number)
        db.execute("INSERT INTO holes VALUES (?, ?)", (size, number))
        db.execute("UPDATE files SET num_held=num_held-1 WHERE size=?", (size,))

    def _insert(self, db: sqlite3.Connection, size: int, slots: Sequence[Slot]) -> None:
        now = self._now(db)
        rows = [(slot.token, size, slot.number, now + len(slots) - i) for i, slot in enumerate(slots)]
        db.executemany("INSERT INTO objects VALUES (?, ?, ?, ?)", rows)


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[sqlite3.Connection]:
    db.execute(f"BEGIN {kind}")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        # SQLite itself has ended the transaction after some errors.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time opens (and, if need be, makes anew) the index."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _open_or_remake(path: Path, directory: Path) -> sqlite3.Connection:
    try:
        return _prepared(_connect(path))
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        # Only a power failure or a broken disk does this. What the index knew is lost, so the data are of no use either.
        for file in directory.glob("index.sqlite*"):
            file.unlink()
        for file in directory.glob("objects-*"):
            file.unlink()
        return _prepared(_connect(path))


def _prepared(db: sqlite3.Connection) -> sqlite3.Connection:
    try:
        if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the index is damaged")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        db.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _token() -> int:
    return -1 - secrets.randbits(62)
