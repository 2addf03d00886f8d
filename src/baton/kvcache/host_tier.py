"""The host tier (L2): which host page holds the page with which key.

A flat map: keys are chained, so whoever looks up a prefix key by key finds no page of another one. Owns the pool of host page ids,
the pins on them and the order of eviction. What is worth keeping or loading is `tiered_cache`'s decision; the memory behind
an id is the engine's.
"""

import heapq
from collections.abc import Callable, Iterable

from baton.kvcache.integrity import IntegrityError
from baton.kvcache.page_pool import PagePool
from baton.kvcache.radix_tree import EvictionPolicy


class HostPage:
    """A host page that is not free: it has a key, or a pin, or both."""

    __slots__ = ("is_fresh", "is_offered", "is_stored", "key", "last_access", "num_pins", "num_uses", "page", "queued")

    def __init__(self, page: int) -> None:
        self.page = page
        self.key: bytes | None = None
        """None: not to be found (not filled yet, or forgotten)."""
        self.num_pins = 0
        self.last_access = 0
        self.num_uses = 0
        self.queued = False
        """An entry of the eviction heap points here."""
        self.is_stored = False
        """The store is known to have it."""
        self.is_offered = False
        """On its way to the store: waiting for its write, or in one."""
        self.is_fresh = False
        """Came from the store, and no request has used it yet."""


class HostTier:
    def __init__(self, num_pages: int, policy: EvictionPolicy, on_evicted: Callable[[HostPage, bytes], None]) -> None:
        """`on_evicted`: told the page and the key it had."""
        self._policy = policy
        self._on_evicted = on_evicted
        self._pool = PagePool(num_pages)
        self._cached: dict[bytes, HostPage] = {}
        self._clock = 0
        self._next_entry = 0
        # Invariant: every page with a key and without pins has exactly one entry, whose priority is at most its current one.
        self._heap: list[tuple[int, int, int, HostPage]] = []

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_used(self) -> int:
        return self._pool.num_pages - self._pool.num_free

    def get(self, key: bytes) -> HostPage | None:
        return self._cached.get(key)

    def allocate(self) -> HostPage | None:
        """A page without a key and with one pin, evicting another if need be. None: all are pinned."""
        if self._pool.num_free == 0:
            self._evict_one()
        taken = self._pool.alloc(1)
        if taken is None:
            return None
        page = HostPage(taken[0])
        page.num_pins = 1
        return page

    def add(self, page: HostPage, key: bytes) -> None:
        """From now on the (pinned) page is found under `key`, which no other has."""
        assert page.key is None and page.num_pins > 0 and key not in self._cached
        page.key = key
        self._cached[key] = page
        self.touch([page], is_use=False)

    def touch(self, pages: list[HostPage], is_use: bool) -> None:
        """Pages of one prefix, first to last. The last is the first to be evicted again: nothing lies behind it."""
        for page in reversed(pages):
            self._clock += 1
            page.last_access = self._clock
            page.num_uses += is_use

    def pin(self, page: HostPage) -> None:
        page.num_pins += 1

    def unpin(self, pages: Iterable[HostPage]) -> None:
        """Pages without a key are free after their last pin."""
        for page in pages:
            assert page.num_pins > 0, f"host page {page.page} unpinned too often"
            page.num_pins -= 1
            if page.num_pins:
                continue
            if page.key is None:
                self._pool.free((page.page,))
            else:
                self._queue(page)

    def clear(self) -> None:
        """Forget every page. Pinned ones are free after their last pin."""
        for page in self._cached.values():
            page.key = None
            if page.num_pins == 0:
                self._pool.free((page.page,))
        self._cached.clear()
        self._heap.clear()

    def forget_stored(self) -> None:
        """The store lost everything: what is used again is worth writing again."""
        for page in self._cached.values():
            page.is_stored = False

    def check(self, pins: dict[str, list[HostPage]]) -> None:
        """`pins`: who pins which pages, once for each pin. Raises `IntegrityError` unless every host page is exactly one of free,
        cached, pinned without a key."""
        owners: dict[int, list[str]] = {page: ["free"] for page in self._pool.free_pages}
        expected: dict[int, tuple[HostPage, int]] = {}
        for pages in pins.values():
            for page in pages:
                expected[id(page)] = (page, expected.get(id(page), (page, 0))[1] + 1)
        for key, page in self._cached.items():
            owners.setdefault(page.page, []).append("cached")
            expected.setdefault(id(page), (page, 0))
            if page.key != key:
                raise IntegrityError(f"host page {page.page} is found under a key that is not its own")
            if page.num_pins == 0 and not page.queued:
                raise IntegrityError(f"host page {page.page} could be evicted but is not queued")
        for page, count in expected.values():
            if page.num_pins != count:
                names = [name for name, pages in pins.items() if page in pages]
                raise IntegrityError(f"host page {page.page} has {page.num_pins} pins, its owners {names} make {count}")
            if page.key is None:
                owners.setdefault(page.page, []).append("pinned")
            elif self._cached.get(page.key) is not page:
                raise IntegrityError(f"host page {page.page} has a key under which it is not found")
        leaked = sorted(set(range(self.num_pages)) - owners.keys())
        shared = {page: names for page, names in sorted(owners.items()) if len(names) > 1}
        if leaked or shared:
            raise IntegrityError(f"host pages without owner: {leaked}; with several: {shared}")

    def _evict_one(self) -> None:
        while self._heap:
            used, accessed, _, page = heapq.heappop(self._heap)
            page.queued = False
            if page.key is None or page.num_pins:
                continue  # forgotten, or pinned: then `unpin` queues it again
            if (used, accessed) != self._priority(page):
                self._queue(page)
                continue
            key, page.key = page.key, None
            del self._cached[key]
            self._pool.free((page.page,))
            self._on_evicted(page, key)
            return

    def _priority(self, page: HostPage) -> tuple[int, int]:
        return (0 if self._policy == "lru" else page.num_uses, page.last_access)

    def _queue(self, page: HostPage) -> None:
        if not page.queued:
            page.queued = True
            self._next_entry += 1
            heapq.heappush(self._heap, (*self._priority(page), self._next_entry, page))
