"""A prefix cache that knows the key of every page it holds, and tells what enters and leaves it.

Owns the maps between device pages and keys, and the KV events that a router builds its view on. The tree below finds pages by
their tokens and knows no keys; `tiered_cache` goes on from here to the lower tiers. Sending the events is the engine's business.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from baton.kvcache.integrity import IntegrityError
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.prefix_cache import PrefixCache
from baton.kvcache.radix_tree import EvictionPolicy, Inserted, PrefixHandle

MAX_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class Stored:
    """Pages that need not be computed from now on, each following the one before it."""

    keys: list[bytes]
    parent_key: bytes | None
    """The page before the first; None: the first starts a sequence."""
    token_ids: list[int]
    """Of all these pages."""
    extra_key: str | None


@dataclass(frozen=True, slots=True)
class Removed:
    """Pages that this worker has in no tier of its own any more."""

    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Cleared:
    """Forget all pages."""


KvEvent = Stored | Removed | Cleared


class KvEventLog:
    """Events until they are taken. If nobody does, `Cleared` takes the place of all of them: who listens later knows too
    little, never too much."""

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._events: list[KvEvent] = []

    def add_stored(
        self, keys: Sequence[bytes], is_new: Sequence[bool], parent_key: bytes | None, token_ids: list[int],
        extra_key: str | None,
    ) -> None:  # fmt: skip
        """Of a run of pages, tell those that are new."""
        if not self._is_on:
            return
        size = len(token_ids) // max(1, len(keys))
        start = 0
        while start < len(keys):
            end = start
            while end < len(keys) and is_new[end]:
                end += 1
            if end > start:
                parent = keys[start - 1] if start else parent_key
                tokens = token_ids[start * size : end * size]
                self._add(Stored(list(keys[start:end]), parent, tokens, extra_key))
            start = end + 1

    def add_removed(self, keys: list[bytes]) -> None:
        if not self._is_on or not keys:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, Removed):
            last.keys.extend(keys)
        else:
            self._add(Removed(list(keys)))

    def add_cleared(self) -> None:
        if self._is_on:
            self._events = [Cleared()]

    def take(self) -> list[KvEvent]:
        events, self._events = self._events, []
        return events

    def _add(self, event: KvEvent) -> None:
        if len(self._events) >= MAX_EVENTS:
            self._events = [Cleared()]
        self._events.append(event)


class KeyedCache(PrefixCache):
    def __init__(
        self,
        num_pages: int,
        page_size: int,
        eviction_policy: EvictionPolicy,
        keys: PageKeys,
        with_kv_events: bool = False,
    ) -> None:
        super().__init__(num_pages, page_size, eviction_policy)
        if keys.page_size != page_size:
            raise ValueError(f"keys are of pages of {keys.page_size} tokens, the cache's have {page_size}")
        self._keys = keys
        # Invariant: both hold exactly the tree's pages.
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._events = KvEventLog(with_kv_events)

    def take_kv_events(self) -> list[KvEvent]:
        """What changed since the last call, in order; always empty unless switched on."""
        return self._events.take()

    def flush(self) -> bool:
        if not super().flush():
            return False
        self._key_of.clear()
        self._page_of.clear()
        self._events.add_cleared()
        return True

    def check_integrity(self, in_use: Mapping[str, Collection[int]]) -> None:
        super().check_integrity(in_use)
        in_tree = {page for node in self._tree.nodes() for page in node.pages}
        if in_tree != self._key_of.keys():
            raise IntegrityError(f"pages with a key, or in the tree, but not both: {in_tree ^ self._key_of.keys()}")
        if {key: page for page, key in self._key_of.items()} != self._page_of:
            raise IntegrityError("pages by key and keys by page disagree")

    # -- for the tiers below -----------------------------------------------------------------------------------------------

    def _is_below(self, key: bytes) -> bool:
        """Whether a lower tier of this worker has the page."""
        return False

    def _left_device(self, page: int, key: bytes) -> None:
        """The page was evicted; its contents stay until the next step."""

    def _end_key(self, pages: Sequence[int], extra_key: str | None) -> bytes:
        """The key that the page after `pages`, the tree's, is chained to."""
        return self._key_of[pages[-1]] if pages else self._keys.root(extra_key)

    def _share(self, handle: PrefixHandle, token_ids: list[int], pages: Sequence[int], save_from: int) -> Inserted:
        inserted = super()._share(handle, token_ids, pages, save_from)
        shared, first = inserted.pages, handle.num_pages
        while first < len(shared) and shared[first] in self._key_of:
            first += 1
        if first == len(shared):
            return inserted
        parent = self._end_key(shared[:first], handle.extra_key)
        tokens = token_ids[first * self.page_size : len(shared) * self.page_size]
        keys = self._keys.extend(parent, tokens)
        for page, key in zip(shared[first:], keys, strict=True):
            self._key_of[page] = key
            self._page_of[key] = page
        is_new = [not self._is_below(key) for key in keys]
        self._events.add_stored(keys, is_new, parent if first else None, tokens, handle.extra_key)
        return inserted

    def _evict(self, num_pages: int) -> list[int]:
        pages = super()._evict(num_pages)
        gone = []
        for page in pages:
            key = self._key_of.pop(page)
            del self._page_of[key]
            self._left_device(page, key)
            if not self._is_below(key):
                gone.append(key)
        self._events.add_removed(gone)
        return pages
