"""Pages on their way from the host tier to the store.

Pages wait here, unpinned, until fewer than `max_pages` are in flight: a store that is slow costs no room in the host tier, only
pages that are evicted before their turn. Which pages are offered is `tiered_cache`'s decision.
"""

from collections.abc import Iterator

from baton.kvcache.host_tier import HostPage, HostTier
from baton.kvcache.tier_config import TierCounters
from baton.kvcache.tiers import Write, Written

MAX_BATCH = 128
"""Pages of one write: they are pinned until the last of them is in the store."""


class StoreWrites:
    def __init__(self, host: HostTier, max_pages: int, op_ids: Iterator[int], counters: TierCounters) -> None:
        self._host = host
        self._max_pages = max_pages
        self._op_ids = op_ids
        self._counters = counters
        # In order of arrival. Invariant: all are cached and not in flight.
        self._waiting: dict[bytes, HostPage] = {}
        self._in_flight: dict[int, list[HostPage]] = {}
        self._num_in_flight = 0

    def offer(self, page: HostPage) -> None:
        """The page's contents are valid by the time the next actions are carried out."""
        assert page.key is not None
        page.is_offered = True
        self._waiting[page.key] = page

    @property
    def num_pages(self) -> int:
        """Waiting and in flight."""
        return len(self._waiting) + self._num_in_flight

    def forget(self, key: bytes) -> bool:
        """The page was evicted; whether it was waiting."""
        return self._waiting.pop(key, None) is not None

    def clear(self) -> None:
        """Forget what waits; what is in flight ends with its event."""
        self._waiting.clear()

    def take_actions(self) -> list[Write]:
        actions = []
        while self._waiting and self._num_in_flight < self._max_pages:
            size = min(MAX_BATCH, self._max_pages - self._num_in_flight, len(self._waiting))
            keys = [key for key, _ in zip(self._waiting, range(size), strict=False)]
            pages = [self._waiting.pop(key) for key in keys]
            for page in pages:
                self._host.pin(page)
            op = next(self._op_ids)
            self._in_flight[op] = pages
            self._num_in_flight += size
            actions.append(Write(op, keys, [page.page for page in pages]))
        return actions

    def on_written(self, event: Written) -> None:
        pages = self._in_flight.pop(event.op)
        self._num_in_flight -= len(pages)
        for page, ok in zip(pages, event.ok, strict=True):
            page.is_offered = False
            page.is_stored = ok
        self._counters.backed_up += sum(event.ok)
        self._counters.writes_failed += len(pages) - sum(event.ok)
        self._host.unpin(reversed(pages))

    def pins(self) -> dict[str, list[HostPage]]:
        return {f"write {op}": pages for op, pages in self._in_flight.items()}
