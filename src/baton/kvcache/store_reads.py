"""Prefixes on their way from the store to the host tier, for requests that wait.

A request's prefetch is a `Query`, then a `Read` of what the store has and nobody else brings already; requests with the same
prefix wait for the same read. Host pages of a read stay pinned until its last event, even if nobody wants them any more.
What was not in the upper tiers, and is worth asking for, is `tiered_cache`'s finding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from baton.kvcache.host_tier import HostPage, HostTier
from baton.kvcache.tier_config import TierConfig, TierCounters
from baton.kvcache.tiers import Cancel, Found, PagesRead, Query, Read


@dataclass(frozen=True, slots=True)
class Wanted:
    """The pages behind those that this worker has of a prompt."""

    keys: list[bytes]
    parent_key: bytes | None
    """The page before; None: there is none."""
    token_ids: list[int]
    extra_key: str | None


@dataclass(slots=True)
class _Prefetch:
    wanted: Wanted
    deadline: float
    op: int | None
    """Its query, until that was answered."""
    reads: set[int]
    """Reads in flight that may bring pages of it."""


@dataclass(slots=True)
class _Reading:
    wanted: Wanted
    indices: list[int]
    """Of the pages, in `wanted`."""
    pages: list[HostPage]
    rids: set[str]
    """Requests that wait for it. Nobody: it was cancelled."""
    is_forgotten: bool = False
    """A flush came between."""

    @property
    def keys(self) -> list[bytes]:
        return [self.wanted.keys[i] for i in self.indices]


class StoreReads:
    def __init__(
        self,
        host: HostTier,
        config: TierConfig,
        page_size: int,
        op_ids: Iterator[int],
        counters: TierCounters,
        has_on_device: Callable[[bytes], bool],
        on_arrived: Callable[[Wanted, list[int]], None],
    ) -> None:
        """`on_arrived`: told which pages (indices, ascending) are in the host tier now and were not before."""
        self._host = host
        self._config = config
        self._page_size = page_size
        self._op_ids = op_ids
        self._counters = counters
        self._has_on_device = has_on_device
        self._on_arrived = on_arrived
        self._max_pages = max(1, int(host.num_pages * config.max_read_share))
        self._num_pages = 0
        self._prefetches: dict[str, _Prefetch] = {}
        self._queries: dict[int, str] = {}
        """Request by operation, also after the request left."""
        self._readings: dict[int, _Reading] = {}
        self._coming: dict[bytes, int] = {}
        """Which read, not cancelled, brings the page with this key."""
        self._actions: list[Query | Read | Cancel] = []
        self._next_deadline: float | None = None

    def begin(self, rid: str, wanted: Wanted, now: float) -> None:
        self.end(rid)
        config = self._config
        wait_s = config.prefetch_timeout_base_s + config.prefetch_timeout_per_ki_token_s * len(wanted.token_ids) / 1024
        op = next(self._op_ids)
        self._prefetches[rid] = _Prefetch(wanted, now + wait_s, op, set())
        self._queries[op] = rid
        self._actions.append(Query(op, wanted.keys))

    def is_awaited(self, rid: str, now: float) -> bool:
        prefetch = self._prefetches.get(rid)
        if prefetch is None or (prefetch.op is None and not prefetch.reads):
            return False
        if self._config.prefetch_policy != "timeout":
            return self._config.prefetch_policy == "wait_complete"
        if now >= prefetch.deadline:
            return False
        held_back = self._next_deadline
        self._next_deadline = prefetch.deadline if held_back is None else min(prefetch.deadline, held_back)
        return True

    def end(self, rid: str) -> None:
        prefetch = self._prefetches.pop(rid, None)
        if prefetch is None:
            return
        if prefetch.op is not None:
            self._actions.append(Cancel(prefetch.op))
        for op in prefetch.reads:
            reading = self._readings[op]
            reading.rids.discard(rid)
            if not reading.rids and not reading.is_forgotten:
                self._cancel(op, reading)

    def take_deadline(self) -> float | None:
        deadline, self._next_deadline = self._next_deadline, None
        return deadline

    def take_actions(self) -> list[Query | Read | Cancel]:
        actions, self._actions = self._actions, []
        return actions

    def forget(self) -> None:
        """A flush: what is on its way does not count any more."""
        for op, reading in self._readings.items():
            if reading.rids and not reading.is_forgotten:
                self._cancel(op, reading)
            reading.is_forgotten = True

    def on_found(self, event: Found) -> None:
        rid = self._queries.pop(event.op)
        prefetch = self._prefetches.get(rid)
        if prefetch is None or prefetch.op != event.op:
            return
        prefetch.op = None
        keys = prefetch.wanted.keys[: event.num_pages]
        if len(keys) * self._page_size < self._config.prefetch_threshold:
            return
        # Nobody must evict, to make room for the rest, what is here already.
        self._host.touch([page for key in keys if (page := self._host.get(key)) is not None], is_use=False)
        missing = []
        for i, key in enumerate(keys):
            op = self._coming.get(key)
            if op is not None:
                self._readings[op].rids.add(rid)
                prefetch.reads.add(op)
            elif self._host.get(key) is None and not self._has_on_device(key):
                missing.append(i)
        self._read(rid, prefetch, missing)

    def on_pages_read(self, event: PagesRead) -> None:
        reading = self._readings[event.op]
        arrived = []
        for i, ok in enumerate(event.ok, event.first):
            index, page = reading.indices[i], reading.pages[i]
            key = reading.wanted.keys[index]
            self._counters.prefetched += ok
            self._counters.reads_failed += not ok
            if ok and not reading.is_forgotten and self._host.get(key) is None:
                self._host.add(page, key)
                page.is_stored = page.is_fresh = True
                arrived.append(index)
        self._on_arrived(reading.wanted, arrived)
        if event.is_last:
            self._end_read(event.op, reading)

    def on_late(self, op: int) -> None:
        """Nobody waits for this operation any more."""
        prefetch = self._prefetches.get(self._queries.get(op, ""))
        if prefetch is not None and prefetch.op == op:
            prefetch.op = None
        reading = self._readings.get(op)
        if reading is None or not reading.rids:
            return
        for rid in reading.rids:
            self._prefetches[rid].reads.discard(op)
        reading.rids.clear()
        if not reading.is_forgotten:
            self._cancel(op, reading)

    def pins(self) -> dict[str, list[HostPage]]:
        return {f"read {op}": reading.pages for op, reading in self._readings.items()}

    def _read(self, rid: str, prefetch: _Prefetch, missing: list[int]) -> None:
        """As many of these pages as there is room for."""
        pages: list[HostPage] = []
        while len(pages) < min(len(missing), self._max_pages - self._num_pages):
            page = self._host.allocate()
            if page is None:
                break
            pages.append(page)
        self._counters.reads_skipped += len(missing) - len(pages)
        if not pages:
            return
        op = next(self._op_ids)
        reading = _Reading(prefetch.wanted, missing[: len(pages)], pages, {rid})
        self._readings[op] = reading
        self._num_pages += len(pages)
        prefetch.reads.add(op)
        self._coming.update(dict.fromkeys(reading.keys, op))
        self._actions.append(Read(op, reading.keys, [page.page for page in pages]))

    def _cancel(self, op: int, reading: _Reading) -> None:
        self._actions.append(Cancel(op))
        for key in reading.keys:
            del self._coming[key]

    def _end_read(self, op: int, reading: _Reading) -> None:
        del self._readings[op]
        self._num_pages -= len(reading.pages)
        for key in reading.keys:
            if self._coming.get(key) == op:
                del self._coming[key]
        for rid in reading.rids:
            self._prefetches[rid].reads.discard(op)
        self._host.touch(reading.pages, is_use=False)
        self._host.unpin(reversed(reading.pages))
