"""The KV cache as the scheduler sees it: pool and prefix tree joined, with the four moves of page ownership.

A request's page table is `pages`; the first `handle.num_pages` of it belong to the tree and are locked by the request's
handle, the rest belong to the request alone. `commit`, `finish` and `drop` are the only places where a page changes
hands between a request and the tree. Which request gets pages is the scheduler's decision; the memory behind a page is
the runner's.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from baton.kvcache.integrity import check_ownership
from baton.kvcache.page_pool import PagePool
from baton.kvcache.radix_tree import EvictionPolicy, Inserted, PrefixHandle, RadixTree
from baton.kvcache.tiers import Copies, StoreAction, StoreEvent


class PrefixMatch(NamedTuple):
    handle: PrefixHandle
    """Locked; give it back with `release`, `finish` or `drop`."""
    pages: list[int]
    """A fresh list: the caller may grow it into its page table."""
    num_tokens: int
    num_loadable: int = 0
    """Pages behind these that the host tier has; kept there for `load` until that or `release`."""


class Committed(NamedTuple):
    handle: PrefixHandle
    pages: list[int]
    duplicates: list[int]
    """Pages that the request has no more. The caller gives them to `free` when nothing reads or writes them."""


class CachedTokens(NamedTuple):
    """Where tokens that were not computed came from."""

    device: int = 0
    host: int = 0
    store: int = 0


class PrefixCache:
    """`num_pages` pages of `page_size` tokens, shared between requests with equal prefixes."""

    shares = True

    def __init__(self, num_pages: int, page_size: int, eviction_policy: EvictionPolicy = "lru") -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(page_size, eviction_policy)

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_evictable(self) -> int:
        return self._tree.num_evictable

    @property
    def num_protected(self) -> int:
        return self._tree.num_protected

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give now."""
        return self._pool.num_free + self._tree.num_evictable

    @property
    def num_handles(self) -> int:
        return len(self._tree.handles)

    def match_len(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> int:
        """Tokens that `match_prefix` would find; changes nothing."""
        return self._tree.match_len(token_ids, extra_key, max_tokens)

    def match_prefix(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> PrefixMatch:
        """Lock the longest cached prefix of at most `max_tokens` tokens (whole pages)."""
        node, pages = self._tree.match(token_ids, extra_key, max_tokens)
        return PrefixMatch(self._tree.lock(node, len(pages), extra_key), pages, len(pages) * self.page_size)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Pages for the caller alone, evicting unlocked prefixes as needed; None (and nothing evicted) if there are too
        few."""
        missing = num_pages - self._pool.num_free
        if missing > 0:
            if missing > self._tree.num_evictable:
                return None
            self._pool.free(self._evict(missing))
        return self._pool.alloc(num_pages)

    def release(self, handle: PrefixHandle) -> None:
        """Undo `match_prefix`."""
        self._tree.unlock(handle)

    def load(self, match: PrefixMatch, pages: Sequence[int]) -> CachedTokens:
        """Have the match's loadable pages copied into `pages` (one each, the caller's) by the next `Copies`. Says where all
        tokens of the match came from."""
        assert not pages, "there is no tier below to load from"
        return CachedTokens(device=match.num_tokens)

    # -- the tiers below: none here, `tiered_cache` has them ---------------------------------------------------------------

    def begin_prefetch(
        self, rid: str, token_ids: list[int], extra_key: str | None, max_tokens: int, now: float
    ) -> None:
        """A request waits: bring what the store has of its first `max_tokens` tokens into the host tier. `end_prefetch` follows."""

    def awaits_prefetch(self, rid: str, now: float) -> bool:
        """Whether the request should not be admitted yet, since its prefetch may still bring pages."""
        return False

    def end_prefetch(self, rid: str) -> None:
        """The request was admitted, or is gone. Without a prefetch nothing happens."""

    def next_deadline(self) -> float | None:
        """When the first of the requests that `awaits_prefetch` held back since the last call stops to wait, if nothing else
        happens. Those that nobody asked about are nobody's reason to wake up."""
        return None

    @property
    def num_unwritten(self) -> int:
        """Pages that are still to go to the store, or on their way."""
        return 0

    def take_copies(self) -> Copies:
        """Page copies to carry out now, before the next step and before any other action."""
        return Copies()

    def take_store_actions(self) -> list[StoreAction]:
        """To be given to the store's worker after the copies of the same pass were carried out."""
        return []

    def on_store_cleared(self) -> None:
        """The store has nothing any more."""

    def on_store_event(self, event: StoreEvent, now: float) -> None:
        raise AssertionError("there is no store")

    # -- ownership moves ---------------------------------------------------------------------------------------------------

    def commit(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int = 0) -> Committed:
        """Share what a request has computed so far; it goes on with the returned handle and page table.

        `token_ids` are the tokens whose KV is in `pages`. With `full` = whole pages of them, page indices are:
          [0, handle)         the tree's before and after
          [handle, existing)  the request's, but the tree has these tokens already: duplicates, the tree's pages replace them
          [existing, full)    the request's -> the tree's
          [full, end)         the request's before and after (a partial page, or pages not yet written)
        The new handle locks [0, full). Pages before `save_from` are some other worker's to keep in lower tiers.
        """
        full = len(token_ids) // self.page_size
        if full <= handle.num_pages:
            return Committed(handle, list(pages), [])
        node, shared, duplicates = self._share(handle, token_ids, pages[:full], save_from)
        new_handle = self._tree.lock(node, full, handle.extra_key)
        self._tree.unlock(handle)
        return Committed(new_handle, [*shared, *pages[full:]], duplicates)

    def finish(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int = 0) -> None:
        """A request ends: as `commit`, then the tree keeps [0, full) unlocked and [full, end) is freed."""
        full = len(token_ids) // self.page_size
        if full > handle.num_pages:
            self._pool.free(self._share(handle, token_ids, pages[:full], save_from).duplicates)
        self._pool.free(pages[max(full, handle.num_pages) :])
        self._tree.unlock(handle)

    def drop(self, handle: PrefixHandle, pages: Sequence[int]) -> None:
        """A request gives up its pages unshared (retraction, error): [handle, end) is freed, [0, handle) unlocked."""
        self._pool.free(pages[handle.num_pages :])
        self._tree.unlock(handle)

    def free(self, pages: Iterable[int]) -> None:
        """Duplicates of a `commit`."""
        self._pool.free(pages)

    def _share(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int) -> Inserted:
        """The one way of pages into the tree. `pages` are more than the handle's."""
        return self._tree.insert(token_ids, pages, handle.extra_key)

    def _evict(self, num_pages: int) -> list[int]:
        """The one way of pages out of it, beside `flush`."""
        return self._tree.evict(num_pages)

    def flush(self) -> bool:
        """Forget all prefixes; False (and nothing done) while a request holds one."""
        if self._tree.handles:
            return False
        self._pool.free(self._tree.reset())
        return True

    def check_integrity(self, in_use: Mapping[str, Collection[int]]) -> None:
        """`in_use`: pages held outside the tree, by owner. Raises `IntegrityError` unless every page is exactly one of
        free, evictable, protected, in use."""
        check_ownership(self._pool, self._tree, in_use)


class UnsharedCache(PrefixCache):
    """`--disable-radix-cache`: the same moves, but nothing is ever found or kept."""

    shares = False

    def match_len(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> int:
        return 0

    def match_prefix(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> PrefixMatch:
        return super().match_prefix([], extra_key, 0)

    def commit(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int = 0) -> Committed:
        return Committed(handle, list(pages), [])

    def finish(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int = 0) -> None:
        self.drop(handle, pages)
