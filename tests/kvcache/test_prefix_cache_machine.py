"""Random use of the cache against a model that knows only sequences of tokens: what the cache says it holds, was
committed; what is locked, stays; every page has one owner after every step."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.kvcache.prefix_cache import PrefixCache, UnsharedCache
from baton.kvcache.radix_tree import PrefixHandle

KEYS = (None, "salt")
# Two tokens only, so that prefixes are shared and split all the time.
TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=14)


class Held:
    """A request of the model: its page table, and what it wrote into it."""

    def __init__(self, tokens: list[int], key: str | None, handle: PrefixHandle, pages: list[int]) -> None:
        self.tokens, self.key, self.handle, self.pages = tokens, key, handle, pages


class CacheMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 2, 3]), policy=st.sampled_from(["lru", "lfu"]), shared=st.booleans())
    def start(self, page_size: int, policy: str, shared: bool) -> None:
        make = PrefixCache if shared else UnsharedCache
        self.cache = make(12, page_size, policy)  # type: ignore[arg-type]
        self.held: list[Held] = []
        # What the page's memory would hold: key, and all tokens up to the page's end.
        self.content: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    def _check_content(self, tokens: list[int], key: str | None, pages: list[int]) -> None:
        size = self.cache.page_size
        for i, page in enumerate(pages):
            if len(tokens) >= (i + 1) * size:
                assert self.content[page] == (key, tuple(tokens[: (i + 1) * size])), "a page of another prefix"

    @rule(tokens=TOKENS, key=st.sampled_from(KEYS))
    def arrive(self, tokens: list[int], key: str | None) -> None:
        predicted = self.cache.match_len(tokens, key, len(tokens))
        match = self.cache.match_prefix(tokens, key, len(tokens))
        assert match.num_tokens == predicted == len(match.pages) * self.cache.page_size <= len(tokens)
        self._check_content(tokens[: match.num_tokens], key, match.pages)
        missing = -(-len(tokens) // self.cache.page_size) - len(match.pages)
        available = self.cache.num_available
        fresh = self.cache.allocate(missing)
        assert (fresh is None) == (missing > available)
        if fresh is None:
            self.cache.release(match.handle)
            return
        held = Held(tokens, key, match.handle, match.pages + fresh)
        for i in range(len(match.pages), len(held.pages)):
            self.content[held.pages[i]] = (key, tuple(tokens[: (i + 1) * self.cache.page_size]))
        self.held.append(held)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if self.held:
            held = data.draw(st.sampled_from(self.held))
            computed = data.draw(st.integers(0, len(held.tokens)))
            held.handle, held.pages, duplicates = self.cache.commit(held.handle, held.tokens[:computed], held.pages)
            self.cache.free(duplicates)

    @rule(data=st.data(), how=st.sampled_from(["finish", "drop"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        if self.held:
            held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            if how == "drop":
                self.cache.drop(held.handle, held.pages)
            else:
                self.cache.finish(held.handle, held.tokens, held.pages)
                if self.cache.shares:
                    size = self.cache.page_size
                    assert self.cache.match_len(held.tokens, held.key, len(held.tokens)) == (
                        len(held.tokens) // size * size
                    )

    @rule()
    def flush(self) -> None:
        assert self.cache.flush() == (not self.held)
        if not self.held:
            assert self.cache.num_free == self.cache.num_pages

    @rule(num_pages=st.integers(0, 12))
    def pressure(self, num_pages: int) -> None:
        pages = self.cache.allocate(num_pages)
        if pages is not None:
            self.cache.check_integrity({"pressure": pages, **self._in_use()})
            self.cache._pool.free(pages)

    def _in_use(self) -> dict[str, list[int]]:
        return {str(i): held.pages[held.handle.num_pages :] for i, held in enumerate(self.held)}

    @invariant()
    def every_page_has_one_owner(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity(self._in_use())
            for held in self.held:
                self._check_content(held.tokens, held.key, held.pages)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
