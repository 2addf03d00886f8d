"""Carries out the cache's `StoreAction`s on a store: a reader and a writer thread, so that the rank never waits for a store.

A store that is slow, broken or gone costs a bounded delay and never a request: each direction (lane) has a deadline per call
and a breaker, and every operation gets its last event whatever happens. What a store is trusted with is checked by `seal`.
Not here: which page goes where (`kvcache.tiered_cache`), and what pages are called (`objects`).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from baton.kvcache.page_memory import PageMemory
from baton.kvcache.stores.base import Store
from baton.kvcache.stores.breaker import Breaker
from baton.kvcache.stores.jobs import Bench, ClearJob, QueryJob, ReadJob, StoreNumbers, WriteJob
from baton.kvcache.stores.lane import Lane
from baton.kvcache.stores.objects import ObjectScheme
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.tiers import Cancel, Query, Read, StoreAction, StoreEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    call_timeout_s: float = 2.0
    """A call into the store that takes longer takes that direction down."""
    max_failures: int = 3
    """Failed calls in a row until a direction is down."""
    first_retry_s: float = 1.0
    max_retry_s: float = 30.0
    """Wait before the first probe of a store that is down; doubled after each that fails, up to the second figure."""
    batch_bytes: int = 8 << 20
    """Moved in one call: small enough that pages arrive while later ones are still read, large enough to hide what a call costs."""
    max_batch_pages: int = 64
    query_pages: int = 128
    """Asked in one call (SGLang's batch)."""
    max_queued_pages: int = 1 << 16
    """Per direction; an operation that does not fit is answered at once (reads: nothing found; writes: not stored)."""


class StoreWorker:
    """`memory` is the host tier: pages of payload and seal. `wake` is called from other threads whenever `poll` has news.
    All methods are for one thread, the rank's."""

    def __init__(
        self,
        store: Store,
        scheme: ObjectScheme,
        memory: PageMemory,
        wake: Callable[[], None],
        config: WorkerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError when the host pages have no room for exactly payload and seal."""
        expected = scheme.shape.page_bytes + SEAL_BYTES
        if memory.page_bytes != expected:
            raise ValueError(f"host pages have {memory.page_bytes} bytes, payload and seal need {expected}")
        self._store, self._wake = store, wake
        self._config = config = config or WorkerConfig()
        self._events: deque[StoreEvent] = deque()
        self._busy = threading.Event()
        self._closed = threading.Event()
        store.register(memory.array.reshape(-1))
        self._numbers = StoreNumbers(store)
        batch_pages = max(1, min(config.max_batch_pages, config.batch_bytes // expected))
        self._reads, self._writes = (
            self._lane(name, scheme, memory, batch_pages, clock) for name in ("reads", "writes")
        )
        self._watcher = threading.Thread(target=self._watch, name="store-watch", daemon=True)
        self._watcher.start()

    def do(self, action: StoreAction) -> None:
        """Never blocks; the answer comes from `poll`."""
        match action:
            case Query():
                self._reads.submit(QueryJob(action, self._reads.bench))
            case Read():
                self._reads.submit(ReadJob(action, self._reads.bench))
            case Cancel(op):
                self._reads.cancel(op)
                self._writes.cancel(op)
            case _:
                self._writes.submit(WriteJob(action, self._writes.bench))
        self._busy.set()

    def clear(self) -> Future[bool]:
        """Empty the store; the future's result says whether that was done."""
        done: Future[bool] = Future()
        done.add_done_callback(lambda _: self._wake())
        self._writes.submit(ClearJob(self._writes.bench, done))
        self._busy.set()
        return done

    def poll(self) -> list[StoreEvent]:
        """Everything that was answered since the last call."""
        self._check()
        events: list[StoreEvent] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def stats(self) -> Mapping[str, float]:
        """Counts since the start, `up` 0 or 1 (0: a direction is down), `*_seconds` spent in calls, and the store's own as `store_*`."""
        stats: dict[str, float] = {"up": float(self._reads.is_up and self._writes.is_up)}
        for lane in (self._reads, self._writes):
            for name, value in lane.bench.counters.as_stats().items():
                stats[name] = stats.get(name, 0) + value
        return stats | {f"store_{name}": value for name, value in self._numbers.values.items()}

    def close(self, drain_s: float = 0.0, timeout_s: float = 5.0) -> None:
        """Finish queued writes for up to `drain_s`, answer the rest, wait for the calls under way, close the store. A store that
        hangs in a call is left alone: it still has our pages."""
        self._closed.set()
        self._busy.set()
        self._watcher.join()
        ended = [self._reads.close(0.0, timeout_s), self._writes.close(drain_s, timeout_s)]
        if all(ended):
            self._store.close()
        else:
            logger.warning("store not closed: a call into it has not returned in %g s", timeout_s)

    def _lane(
        self, name: str, scheme: ObjectScheme, memory: PageMemory, batch_pages: int, clock: Callable[[], float]
    ) -> Lane:
        config = self._config
        objects = scheme.open(batch_pages)
        if objects.staging is not None:
            self._store.register(objects.staging.reshape(-1))
        bench = Bench(self._store, scheme, objects, memory, batch_pages, config.query_pages, self._numbers)
        breaker = Breaker(config.max_failures, config.first_retry_s, config.max_retry_s)
        return Lane(name, bench, breaker, self._emit, clock, config.call_timeout_s, config.max_queued_pages)

    def _emit(self, event: StoreEvent) -> None:
        self._events.append(event)
        self._wake()

    def _check(self) -> bool:
        """True while a call is under way or a direction is down."""
        watched = [lane.check() for lane in (self._reads, self._writes)]
        return any(watched)

    def _watch(self) -> None:
        """The rank may be asleep while a call hangs: look at the lanes for it, as long as there is something to see."""
        while not self._closed.is_set():
            self._busy.wait()
            self._busy.clear()
            while self._check() and not self._closed.wait(self._config.call_timeout_s / 4):
                pass
