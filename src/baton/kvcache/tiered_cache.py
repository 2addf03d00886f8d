"""The prefix cache with tiers below the device: a host tier, and a store behind it (the policy alone: `tiers` says who acts on it).

A page is known by its key in every tier. On the device the tree finds it by its tokens; behind the last page found there, the
host tier is asked key by key. What the store has comes into the host tier while the request waits (`store_reads`), what was saved
there goes on to the store (`store_writes`).

A host page is used by a load from `match_prefix` on, by a save until its copy was carried out, by a read or write of the store
until its last event; meanwhile it is pinned. If all are pinned, a page is not saved or not read, and nothing waits.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from baton.kvcache.host_tier import HostPage, HostTier
from baton.kvcache.integrity import IntegrityError
from baton.kvcache.keyed_cache import KeyedCache
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.prefix_cache import CachedTokens, PrefixMatch
from baton.kvcache.radix_tree import EvictionPolicy, Inserted, PrefixHandle
from baton.kvcache.store_reads import StoreReads, Wanted
from baton.kvcache.store_writes import StoreWrites
from baton.kvcache.tier_config import TierConfig, TierCounters
from baton.kvcache.tiers import Copies, Found, Late, PagesRead, StoreAction, StoreEvent, Written


class TieredCache(KeyedCache):
    def __init__(
        self,
        num_pages: int,
        page_size: int,
        eviction_policy: EvictionPolicy,
        keys: PageKeys,
        config: TierConfig,
        with_kv_events: bool = False,
    ) -> None:
        super().__init__(num_pages, page_size, eviction_policy, keys, with_kv_events)
        self.config = config
        self._counters = TierCounters(host_pages_total=config.host_pages)
        self._host = HostTier(config.host_pages, config.eviction_policy, self._on_host_evicted)
        op_ids = itertools.count()
        self._reads = StoreReads(
            self._host, config, page_size, op_ids, self._counters, self._page_of.__contains__, self._on_arrived
        )
        max_writes = max(1, int(config.host_pages * config.max_write_share))
        self._writes = StoreWrites(self._host, max_writes, op_ids, self._counters)
        self._copies = Copies()
        # Host pages pinned by matches that wait for `load`, by copies in `_copies`, and by loads handed out last.
        self._matched: dict[PrefixHandle, list[HostPage]] = {}
        self._saving: list[HostPage] = []
        self._loading: list[HostPage] = []
        self._loads_out: list[HostPage] = []
        self._kept_elsewhere: set[int] = set()
        """The tree's pages that some other worker keeps in lower tiers."""

    @property
    def counters(self) -> TierCounters:
        """As of now."""
        return replace(self._counters, host_pages_used=self._host.num_used)

    @property
    def num_unwritten(self) -> int:
        return self._writes.num_pages

    # -- from the host tier to the device ----------------------------------------------------------------------------------

    def match_prefix(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> PrefixMatch:
        match = super().match_prefix(token_ids, extra_key, max_tokens)
        previous = self._end_key(match.pages, extra_key)
        loadable = list(self._walk(previous, token_ids, match.num_tokens, max_tokens))
        if not loadable or len(loadable) * self.page_size < self.config.load_back_threshold:
            return match
        for page in loadable:
            self._host.pin(page)
        self._matched[match.handle] = loadable
        return match._replace(num_loadable=len(loadable))

    def release(self, handle: PrefixHandle) -> None:
        super().release(handle)
        self._host.unpin(reversed(self._matched.pop(handle, ())))

    def load(self, match: PrefixMatch, pages: Sequence[int]) -> CachedTokens:
        loadable = self._matched.pop(match.handle, [])
        self._copies.loads += [(mine.page, page) for mine, page in zip(loadable, pages, strict=True)]
        self._loading += loadable
        num_fresh = sum(page.is_fresh for page in loadable)
        for page in loadable:
            page.is_fresh = False
        self._on_used(match.pages, loadable)
        size, counters = self.page_size, self._counters
        cached = CachedTokens(match.num_tokens, (len(loadable) - num_fresh) * size, num_fresh * size)
        counters.loaded += len(loadable)
        counters.device_hit_tokens += cached.device
        counters.host_hit_tokens += cached.host
        counters.store_hit_tokens += cached.store
        return cached

    def _walk(self, previous: bytes, token_ids: list[int], start: int, max_tokens: int) -> Iterator[HostPage]:
        """The host tier's pages behind `start`. Hashes no further than the first it does not have."""
        size = self.page_size
        for first in range(start, min(max_tokens, len(token_ids)) - size + 1, size):
            previous = self._keys.extend(previous, token_ids[first : first + size])[0]
            page = self._host.get(previous)
            if page is None:
                return
            yield page

    # -- from the device to the host tier, and on to the store -------------------------------------------------------------

    def _share(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int) -> Inserted:
        inserted = super()._share(handle, token_ids, pages, save_from)
        policy = self.config.write_policy
        for i in range(handle.num_pages, len(pages)):
            page = inserted.pages[i]
            is_new = page == pages[i]
            if i < save_from:
                if is_new:
                    self._kept_elsewhere.add(page)
            elif policy == "write_through" or (policy == "write_through_selective" and not is_new):
                self._save(page)
        # The pages that came with an earlier chunk must not look older than these, or they are evicted first.
        self._host.touch(self._host_copies(inserted.pages), is_use=False)
        return inserted

    def _on_used(self, pages: list[int], loaded: list[HostPage]) -> None:
        """A request uses these pages of the device, and behind them those of the host tier."""
        copies = self._host_copies(pages)
        self._host.touch([*copies, *loaded], is_use=True)
        if self.config.write_policy != "write_back" and len(copies) < len(pages):
            for page in pages:
                self._save(page)
        if self.config.has_store:
            for copy in (*copies, *loaded):
                if not copy.is_stored and not copy.is_offered and copy.key is not None:
                    self._writes.offer(copy)

    def _left_device(self, page: int, key: bytes) -> None:
        self._counters.device_evicted += 1
        if self.config.write_policy == "write_back":
            self._page_to_host(page, key)
        self._kept_elsewhere.discard(page)

    def _save(self, page: int) -> None:
        self._page_to_host(page, self._key_of[page])

    def _page_to_host(self, page: int, key: bytes) -> None:
        if page in self._kept_elsewhere or self._host.get(key) is not None:
            return
        copy = self._host.allocate()
        if copy is None:
            self._counters.saves_skipped += 1
            return
        self._host.add(copy, key)
        copy.is_offered = self.config.has_store
        self._copies.saves.append((page, copy.page))
        self._saving.append(copy)

    def _host_copies(self, pages: Sequence[int]) -> list[HostPage]:
        copies = (self._host.get(self._key_of[page]) for page in pages)
        return [copy for copy in copies if copy is not None]

    def take_copies(self) -> Copies:
        # A GPU may still have been reading what it was told to load; by now those copies are done (`tiers.Copies`).
        self._host.unpin(reversed(self._loads_out))
        self._loads_out, self._loading = self._loading, []
        copies, self._copies = self._copies, Copies()
        self._counters.saved += len(copies.saves)
        if self.config.has_store:
            for page in self._saving:
                self._writes.offer(page)
        self._host.unpin(reversed(self._saving))
        self._saving = []
        return copies

    # -- the store ---------------------------------------------------------------------------------------------------------

    def begin_prefetch(
        self, rid: str, token_ids: list[int], extra_key: str | None, max_tokens: int, now: float
    ) -> None:
        if not self.config.has_store:
            return
        size = self.page_size
        on_device, last_page = self._tree.find(token_ids, extra_key, max_tokens)
        parent = None if last_page is None else self._key_of[last_page]
        root = self._keys.root(extra_key)
        in_host = list(self._walk(parent or root, token_ids, on_device, max_tokens))
        self._host.touch(in_host, is_use=False)
        parent = in_host[-1].key if in_host else parent
        start = on_device + len(in_host) * size
        end = min(max_tokens, len(token_ids)) // size * size
        if end - start < max(self.config.prefetch_threshold, size):
            return
        tokens = token_ids[start:end]
        self._reads.begin(rid, Wanted(self._keys.extend(parent or root, tokens), parent, tokens, extra_key), now)

    def awaits_prefetch(self, rid: str, now: float) -> bool:
        return self._reads.is_awaited(rid, now)

    def end_prefetch(self, rid: str) -> None:
        self._reads.end(rid)

    def next_deadline(self) -> float | None:
        return self._reads.take_deadline()

    def take_store_actions(self) -> list[StoreAction]:
        return [*self._reads.take_actions(), *self._writes.take_actions()]

    def on_store_cleared(self) -> None:
        self._host.forget_stored()

    def on_store_event(self, event: StoreEvent, now: float) -> None:
        match event:
            case Found():
                self._reads.on_found(event)
            case PagesRead():
                self._reads.on_pages_read(event)
            case Written():
                self._writes.on_written(event)
            case Late(op):
                self._reads.on_late(op)

    def _on_arrived(self, wanted: Wanted, indices: list[int]) -> None:
        if not indices:
            return
        first, end = indices[0], indices[-1] + 1
        here = set(indices)
        is_new = [i in here and wanted.keys[i] not in self._page_of for i in range(first, end)]
        parent = wanted.keys[first - 1] if first else wanted.parent_key
        tokens = wanted.token_ids[first * self.page_size : end * self.page_size]
        self._events.add_stored(wanted.keys[first:end], is_new, parent, tokens, wanted.extra_key)

    # -- all tiers ---------------------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Forgets the host tier too. What the store has stays there."""
        if not super().flush():
            return False
        self._copies = Copies()
        self._host.clear()
        self._host.unpin((*self._saving, *self._loading))
        self._saving, self._loading = [], []
        self._kept_elsewhere.clear()
        self._reads.forget()
        self._writes.clear()
        return True

    def check_integrity(self, in_use: Mapping[str, Collection[int]]) -> None:
        super().check_integrity(in_use)
        if not self._matched.keys() <= self._tree.handles:
            raise IntegrityError("host pages are pinned for a match that is over")
        if not self._kept_elsewhere <= self._key_of.keys():
            raise IntegrityError("pages that the tree does not have are marked as kept elsewhere")
        matched = {f"match {i}": pages for i, pages in enumerate(self._matched.values())}
        copies = {"save": self._saving, "load": self._loading, "last load": self._loads_out}
        self._host.check({**matched, **copies, **self._reads.pins(), **self._writes.pins()})

    def _is_below(self, key: bytes) -> bool:
        return self._host.get(key) is not None

    def _on_host_evicted(self, page: HostPage, key: bytes) -> None:
        self._counters.host_evicted += 1
        self._counters.writes_skipped += self._writes.forget(key)
        if key not in self._page_of:
            self._events.add_removed([key])
