"""What a lane does for one action: a job moves its pages in batches, and knows at any time the last event it still owes.

No threads, no time: `step` makes exactly one call into the store, through the lane, which watches it.
"""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from baton.kvcache.page_memory import PageMemory
from baton.kvcache.stores.base import DiscardingStore, Object, Store
from baton.kvcache.stores.objects import ObjectScheme, PageObjects
from baton.kvcache.tiers import Found, PagesRead, Query, Read, StoreEvent, Write, Written

logger = logging.getLogger(__name__)

Call = Callable[..., Any]
"""call(what, function, *arguments): the lane's watched call; `what` is query, read or write."""


@dataclass(slots=True)
class Counters:
    """One writer: the lane's thread (and `rejected` under the worker's lock)."""

    hits: int = 0
    """Pages that queries found."""
    misses: int = 0
    pages_read: int = 0
    bytes_read: int = 0
    pages_written: int = 0
    bytes_written: int = 0
    refused: int = 0
    """Pages that the store did not take."""
    damaged: int = 0
    """Objects that came back but were not what was put there under this name."""
    timeouts: int = 0
    errors: int = 0
    rejected: int = 0
    """Operations answered at once, without asking the store: it was down, or the queue full."""
    seconds: dict[str, float] = field(default_factory=lambda: {"query": 0.0, "read": 0.0, "write": 0.0})

    def as_stats(self) -> dict[str, float]:
        values = {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "seconds"}
        return values | {f"{what}_seconds": spent for what, spent in self.seconds.items()}


class StoreNumbers:
    """What the store says of itself, as of the last call into it: whoever wants to know must not wait for the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._told = False
        self.values: Mapping[str, float] = {}
        """Replaced as a whole; any thread may read."""
        self.refresh()

    def refresh(self) -> None:
        """A store that cannot say is not for that reason unwell."""
        try:
            found = self._store.stats().items()
            self.values = {name: float(value) for name, value in found if name.isascii() and name.isidentifier()}
        except BaseException as error:  # A third party's code, on a thread that must live.
            self.values = {}
            if not self._told:
                self._told = True
                logger.warning("the store's stats() is of no use (said once): %s: %s", type(error).__name__, error)


@dataclass(slots=True)
class Bench:
    """What the jobs of one lane work with."""

    store: Store
    scheme: ObjectScheme
    objects: PageObjects
    memory: PageMemory
    batch_pages: int
    query_pages: int
    numbers: StoreNumbers
    counters: Counters = field(default_factory=Counters)

    def pages(self, host_pages: Sequence[int]) -> list[Object]:
        return [self.memory.array[page] for page in host_pages]

    def names(self, keys: Sequence[bytes]) -> list[str]:
        return [name for key in keys for name in self.scheme.names(key)]

    def whole_pages(self, objects_ok: Sequence[bool]) -> list[bool]:
        """A page is there when each of its objects is."""
        n = self.scheme.per_page
        return [all(objects_ok[i : i + n]) for i in range(0, len(objects_ok), n)]


class Job(Protocol):
    op: int
    num_pages: int
    cancelled: bool

    def step(self, call: Call) -> tuple[StoreEvent | None, bool]:
        """One call into the store: what to report, and whether the job has ended by that."""

    def give_up(self) -> StoreEvent | None:
        """The last event, if the job ends here."""


class QueryJob:
    def __init__(self, action: Query, bench: Bench) -> None:
        self.op, self.num_pages, self.cancelled = action.op, len(action.keys), False
        self._keys, self._bench = action.keys, bench
        self._found = 0

    def step(self, call: Call) -> tuple[StoreEvent | None, bool]:
        keys = self._keys[self._found : self._found + self._bench.query_pages]
        names = self._bench.names(keys)
        num_objects = call("query", exists, self._bench.store, names)
        found = num_objects // self._bench.scheme.per_page
        self._found += found
        counters = self._bench.counters
        counters.hits += found
        if found == len(keys) and self._found < len(self._keys):
            return None, False
        counters.misses += len(self._keys) - self._found
        return Found(self.op, self._found), True

    def give_up(self) -> StoreEvent | None:
        return Found(self.op, 0)


class ReadJob:
    """Ends at the first page that is not ok: behind a hole in a prefix nothing is of use."""

    def __init__(self, action: Read, bench: Bench) -> None:
        self.op, self.num_pages, self.cancelled = action.op, len(action.keys), False
        self._action, self._bench = action, bench
        self._next = 0

    def step(self, call: Call) -> tuple[StoreEvent | None, bool]:
        bench, first = self._bench, self._next
        last = min(first + bench.batch_pages, self.num_pages)
        pages = bench.pages(self._action.host_pages[first:last])
        names = bench.names(self._action.keys[first:last])
        got = call("read", _one_each, bench.store.batch_get, names, bench.objects.buffers(pages))
        verified = bench.objects.after_get(pages, names, got)
        ok = bench.whole_pages(verified)
        counters = bench.counters
        self._discard([name for name, came, fits in zip(names, got, verified, strict=True) if came and not fits], call)
        counters.pages_read += sum(ok)
        counters.bytes_read += sum(verified) * bench.scheme.object_bytes
        is_last = last == self.num_pages or not all(ok)
        if is_last:
            ok += [False] * (self.num_pages - last)
        self._next = last
        return PagesRead(self.op, first, ok, is_last), is_last

    def _discard(self, damaged: list[str], call: Call) -> None:
        bench = self._bench
        bench.counters.damaged += len(damaged)
        if damaged and isinstance(bench.store, DiscardingStore):
            call("read", bench.store.discard, damaged)

    def give_up(self) -> StoreEvent | None:
        return PagesRead(self.op, self._next, [False] * (self.num_pages - self._next), is_last=True)


class WriteJob:
    def __init__(self, action: Write, bench: Bench) -> None:
        self.op, self.num_pages, self.cancelled = action.op, len(action.keys), False
        self._action, self._bench = action, bench
        self._ok: list[bool] = []

    def step(self, call: Call) -> tuple[StoreEvent | None, bool]:
        bench, first = self._bench, len(self._ok)
        last = min(first + bench.batch_pages, self.num_pages)
        pages = bench.pages(self._action.host_pages[first:last])
        names = bench.names(self._action.keys[first:last])
        bench.objects.before_put(pages, names)
        put = call("write", _one_each, bench.store.batch_put, names, bench.objects.buffers(pages))
        ok = bench.whole_pages(put)
        self._ok += ok
        counters = bench.counters
        counters.pages_written += sum(ok)
        counters.bytes_written += sum(put) * bench.scheme.object_bytes
        counters.refused += len(ok) - sum(ok)
        if last < self.num_pages:
            return None, False
        return Written(self.op, self._ok), True

    def give_up(self) -> StoreEvent | None:
        return Written(self.op, self._ok + [False] * (self.num_pages - len(self._ok)))


class ClearJob:
    """/clear_hicache_storage_backend: answered by the future, not by an event."""

    op, num_pages, cancelled = -1, 0, False

    def __init__(self, bench: Bench, done: Future[bool]) -> None:
        self._bench, self._done = bench, done

    def step(self, call: Call) -> tuple[StoreEvent | None, bool]:
        call("write", self._bench.store.clear)
        self._done.set_result(True)
        return None, True

    def give_up(self) -> StoreEvent | None:
        self._done.set_result(False)
        return None


def exists(store: Store, names: Sequence[str]) -> int:
    """Raises what the store does, and where its answer does not fit the question; both count as failures of the call."""
    found = operator.index(store.batch_exists(names))
    if not 0 <= found <= len(names):
        raise ValueError(f"batch_exists says {found} of {len(names)}")
    return found


def _one_each(
    move: Callable[[Sequence[str], Sequence[Object]], Sequence[bool]], names: Sequence[str], objects: Sequence[Object]
) -> list[bool]:
    answer = move(names, objects)
    if len(answer) != len(names):
        raise ValueError(f"{len(answer)} answers for {len(names)} objects")
    return [bool(ok) for ok in answer]
