"""Storage: every object of the cluster, in memory for reading and in SQLite for keeping.

Owns the one resourceVersion sequence, the change log that watches read, group commit and compaction.

The database is one multi-version table, `log(rv, resource, namespace, name, type, body)`: a row is what a key became
at `rv`. The newest row of each key is the present state, older ones are the history for watches, exact lists and
continue tokens. A write is
  1. `put`: checked by the caller against `latest` (which sees writes still on their way), given the next rv;
  2. committed by one thread, all writes that wait together in one transaction with fsync (synchronous=FULL);
  3. only then visible to `get`, `list` and watches, and its future resolved, so nobody is ever told of a write that
     a SIGKILL could lose.

Invariant: committed_revision <= revision; rows of `log` with rv > committed_revision do not exist.
Objects are shared and never changed in place. Not here: what an object means (see `operations`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

JSON = dict[str, Any]
ENCODED_KEPT = 512  # watchers read a change soon after it is made; older ones encode it again
ADDED, MODIFIED, DELETED = "ADDED", "MODIFIED", "DELETED"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
  rv INTEGER PRIMARY KEY, resource TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
  type TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS log_key ON log (resource, namespace, name, rv);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
# Rows at or below the floor whose key has a newer row at or below the floor, and deletions there, serve nobody.
_COMPACT = """
DELETE FROM log WHERE rv <= :floor AND (type = 'DELETED' OR EXISTS (
  SELECT 1 FROM log newer WHERE newer.resource = log.resource AND newer.namespace = log.namespace
  AND newer.name = log.name AND newer.rv > log.rv AND newer.rv <= :floor))
"""


class Key(NamedTuple):
    """Where an object lives: resource is `pods` or `statefulsets.apps`; namespace is "" for cluster scope."""

    resource: str
    namespace: str
    name: str


class StoreClosedError(Exception):
    """The store was closed while a write waited; the write did not happen."""


@dataclass(slots=True)
class Change:
    """One committed write. `previous` is the object before it (None for ADDED)."""

    revision: int
    type: str
    key: Key
    object: JSON
    previous: JSON | None
    encoded: dict[Any, bytes] = field(default_factory=dict)  # wire forms, shared by all watchers of this change


class ResourceLog:
    """Objects and history of one resource. Read by everybody, written by Store only.

    Invariant: `changes` is sorted by revision; `names` is the sorted list of keys of `objects`.
    """

    def __init__(self, floor: int) -> None:
        self.objects: dict[tuple[str, str], JSON] = {}
        self.names: list[tuple[str, str]] = []
        self.changes: list[Change] = []
        self.floor = floor  # no change of this resource after `floor` was forgotten
        self._waiters: set[asyncio.Future[None]] = set()

    def apply(self, change: Change) -> None:
        place = (change.key.namespace, change.key.name)
        if change.type == DELETED:
            if self.objects.pop(place, None) is not None:
                del self.names[bisect_right(self.names, place) - 1]
        else:
            if place not in self.objects:
                insort(self.names, place)
            self.objects[place] = change.object
        self.changes.append(change)

    def since(self, revision: int) -> list[Change]:
        """Changes after `revision`, oldest first."""
        return self.changes[bisect_right(self.changes, revision, key=lambda c: c.revision) :]

    def select(self, namespace: str | None) -> Iterator[JSON]:
        """Objects in order of namespace and name; all namespaces for None."""
        if namespace is None:
            return (self.objects[place] for place in self.names)
        first = bisect_right(self.names, (namespace, ""))
        last = bisect_right(self.names, (namespace, "\U0010ffff"))
        return (self.objects[place] for place in self.names[first:last])

    def at(self, revision: int) -> dict[tuple[str, str], JSON]:
        """The objects as they were at `revision` (which must not be below the floor)."""
        state = dict(self.objects)
        for change in reversed(self.since(revision)):
            place = (change.key.namespace, change.key.name)
            if change.previous is None:
                state.pop(place, None)
            else:
                state[place] = change.previous
        return state

    async def wait(self) -> None:
        """Returns after the next commit that touches this resource (or on close)."""
        future = asyncio.get_running_loop().create_future()
        self._waiters.add(future)
        try:
            await future
        finally:
            self._waiters.discard(future)

    def wake(self) -> None:
        for future in self._waiters:
            if not future.done():
                future.set_result(None)

    def forget(self, floor: int) -> None:
        cut = bisect_right(self.changes, floor, key=lambda c: c.revision)
        if cut:
            self.floor = max(self.floor, self.changes[cut - 1].revision)
            del self.changes[:cut]


@dataclass(slots=True)
class _Write:
    change: Change
    done: asyncio.Future[int]


class Store:
    """The database. Construct it, then use it from one event loop; `close` when done.

    `history_limit` is how many changes are kept for watches before the oldest half is compacted away.
    """

    def __init__(self, path: Path | str, *, history_limit: int = 6_000) -> None:
        self.history_limit = history_limit
        self._resources: dict[str, ResourceLog] = {}
        self._pending: dict[Key, tuple[int, JSON | None]] = {}  # newest write of each key that is not committed yet
        self._queue: list[_Write] = []
        self._encoded: deque[Change] = deque()  # changes whose wire forms are still worth keeping
        self._newest: asyncio.Future[int] | None = None  # of the write queued last
        self._committing = False
        self._listeners: list[Callable[[list[Change]], None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="baton-store")
        self.closed = False
        self._db = sqlite3.connect(str(path), timeout=0.5, check_same_thread=False, isolation_level=None)
        self._open_database()
        self.floor = self._fact("floor")
        self.revision = self.committed_revision = self._load()

    # Reading

    def resource(self, name: str) -> ResourceLog:
        log = self._resources.get(name)
        if log is None:
            log = self._resources[name] = ResourceLog(self.floor)
        return log

    def resources(self) -> list[str]:
        """Names of the resources that were ever touched."""
        return list(self._resources)

    def get(self, key: Key) -> JSON | None:
        """The committed object."""
        log = self._resources.get(key.resource)
        return log.objects.get((key.namespace, key.name)) if log else None

    def latest(self, key: Key) -> JSON | None:
        """The object as the next write will find it, committed or not."""
        if key in self._pending:
            return self._pending[key][1]
        return self.get(key)

    def subscribe(self, listener: Callable[[list[Change]], None]) -> None:
        """Calls `listener` in the loop with each committed batch; it must not block or raise."""
        self._listeners.append(listener)

    # Writing

    def put(self, kind: str, key: Key, obj: JSON) -> tuple[JSON, asyncio.Future[int]]:
        """Queues a write (ADDED, MODIFIED or DELETED) that the caller has checked against `latest`.

        Returns the object with its resourceVersion and a future that resolves when the write is on disk. The object
        is taken over: its metadata is replaced, the rest is shared.
        """
        if self.closed:
            raise StoreClosedError
        previous = self.latest(key)
        self.revision += 1
        stored = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.revision)}}
        change = Change(self.revision, kind, key, stored, previous)
        self._pending[key] = (self.revision, None if kind == DELETED else stored)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()
        # A caller whose client went away no longer awaits the future; its failure is reported to the next one.
        done.add_done_callback(lambda f: None if f.cancelled() else f.exception())
        self._queue.append(_Write(change, done))
        self._newest = done
        if not self._committing:
            self._committing = True
            loop.call_soon(self._start_commit, loop)
        return stored, done

    async def flush(self) -> None:
        """Returns when every write queued so far is committed."""
        if self._newest is not None and not self._newest.done():
            await asyncio.wait([self._newest])

    async def close(self) -> None:
        """Commits what is queued, wakes every watch, closes the file."""
        if self.closed:
            return
        await self.flush()
        self.closed = True
        for log in self._resources.values():
            log.wake()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown(wait=False)

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant of this room is broken."""
        assert self.committed_revision <= self.revision
        for name, log in self._resources.items():
            assert log.names == sorted(log.objects), name
            revisions = [c.revision for c in log.changes]
            assert revisions == sorted(set(revisions)), name
            assert all(r > log.floor for r in revisions), name
            for place, obj in log.objects.items():
                assert int(obj["metadata"]["resourceVersion"]) <= self.committed_revision, place

    # Commit

    def _start_commit(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._queue = self._queue, []
        floor = self._new_floor()
        future = loop.run_in_executor(self._thread, self._commit, [w.change for w in batch], floor)
        future.add_done_callback(lambda f: self._finish_commit(loop, batch, floor, f.exception()))

    def _commit(self, changes: list[Change], floor: int | None) -> None:
        rows = [(c.revision, *c.key, c.type, msgspec.json.encode(c.object)) for c in changes]
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)", rows)
            if floor is not None:
                self._db.execute("INSERT OR REPLACE INTO facts VALUES ('floor', ?)", (floor,))
                self._db.execute(_COMPACT, {"floor": floor})
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _finish_commit(
        self, loop: asyncio.AbstractEventLoop, batch: list[_Write], floor: int | None, error: BaseException | None
    ) -> None:
        if error is not None:
            self._fail(batch, error)
            return
        changes = [w.change for w in batch]
        touched: dict[str, ResourceLog] = {}
        for change in changes:
            log = touched[change.key.resource] = self.resource(change.key.resource)
            log.apply(change)
            if self._pending.get(change.key, (0, None))[0] == change.revision:
                del self._pending[change.key]
            self._encoded.append(change)
        while len(self._encoded) > ENCODED_KEPT:
            self._encoded.popleft().encoded.clear()
        self.committed_revision = changes[-1].revision
        if floor is not None:
            self.floor = floor
            for log in self._resources.values():
                log.forget(floor)
        for write in batch:
            if not write.done.done():
                write.done.set_result(write.change.revision)
        for log in touched.values():
            log.wake()
        for listener in self._listeners:
            listener(changes)
        self._next_commit(loop)

    def _fail(self, batch: list[_Write], error: BaseException) -> None:
        """A failed transaction fails all writes that were queued: later ones were checked against it."""
        lost, self._queue = batch + self._queue, []
        self._pending.clear()
        self._committing = False
        for write in lost:
            if not write.done.done():
                write.done.set_exception(error)

    def _next_commit(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._queue:
            self._start_commit(loop)
        else:
            self._committing = False

    # History

    def _new_floor(self) -> int | None:
        total = sum(len(log.changes) for log in self._resources.values())
        if total <= self.history_limit:
            return None
        revisions = sorted(c.revision for log in self._resources.values() for c in log.changes)
        return revisions[total - self.history_limit // 2]

    async def compact(self, floor: int) -> None:
        """Forgets the history up to `floor` now (at most the committed revision); watches from before it get 410."""
        await self.flush()
        floor = min(floor, self.committed_revision)
        if floor <= self.floor:
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, [], floor)
        self.floor = floor
        for log in self._resources.values():
            log.forget(floor)

    # Database

    def _open_database(self) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # one daemon per state directory; a second one fails here
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    def _fact(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def _load(self) -> int:
        """Rebuilds state and history from the log; returns the newest revision."""
        newest: dict[Key, JSON] = {}
        revision = self.floor
        rows = self._db.execute("SELECT rv, resource, namespace, name, type, body FROM log ORDER BY rv")
        for rv, resource, namespace, name, kind, body in rows:
            key = Key(resource, namespace, name)
            obj = msgspec.json.decode(body)
            self.resource(resource).apply(Change(rv, kind, key, obj, newest.get(key)))
            if kind == DELETED:
                newest.pop(key, None)
            else:
                newest[key] = obj
            revision = max(revision, rv)
        for log in self._resources.values():
            log.forget(self.floor)
        return revision
