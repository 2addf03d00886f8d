"""What lies in device, host and store pages, and hands that move it as a cache with tiers asks: the rank's loop and the store's
worker without memory, threads or time. Contents are written out (which tokens, of whom), so that a wrong page is seen at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.kvcache.page_keys import PageKeys
from baton.kvcache.radix_tree import PrefixHandle
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiered_cache import TieredCache
from baton.kvcache.tiers import Cancel, Found, PagesRead, Query, Read, StoreAction, Write, Written

Content = tuple[str | None, tuple[int, ...]]
"""Extra key, and all tokens up to the page's end."""
JUNK: Content = ("junk", ())


@dataclass
class Operation:
    action: Query | Read | Write
    done: int = 0
    """Pages of a read that were tried."""
    is_cancelled: bool = False


@dataclass
class Held:
    """A request with pages. The first `computed` of its tokens are in them."""

    tokens: list[int]
    extra_key: str | None
    handle: PrefixHandle
    pages: list[int]
    num_cached: int
    by_source: tuple[int, int, int]
    computed: int = 0


@dataclass
class World:
    cache: TieredCache
    keys: PageKeys
    device: dict[int, Content] = field(default_factory=dict)
    host: dict[int, Content] = field(default_factory=dict)
    store: dict[bytes, Content] = field(default_factory=dict)
    is_down: bool = False
    operations: dict[int, Operation] = field(default_factory=dict)
    log: list[StoreAction] = field(default_factory=list)
    """Every action so far."""
    saves: list[tuple[int, int]] = field(default_factory=list)
    """(device page, host page), every one so far."""
    last_loads: list[tuple[int, Content]] = field(default_factory=list)

    # -- the rank's loop ---------------------------------------------------------------------------------------------------

    def move(self) -> None:
        for page, content in self.last_loads:
            assert self.host[page] == content, "a load may still have been reading this page"
        copies = self.cache.take_copies()
        self.saves += copies.saves
        for device_page, host_page in copies.saves:
            self.host[host_page] = self.device[device_page]
        for host_page, device_page in copies.loads:
            self.device[device_page] = self.host[host_page]
        self.last_loads = [(page, self.host[page]) for page, _ in copies.loads]
        for action in self.cache.take_store_actions():
            self.log.append(action)
            if isinstance(action, Cancel):
                # A read or query may have ended while its cancellation was on the way.
                if action.op in self.operations:
                    self.operations[action.op].is_cancelled = True
                continue
            assert action.op not in self.operations
            self.operations[action.op] = Operation(action)
            if isinstance(action, Read):
                for page in action.host_pages:
                    self.host[page] = JUNK

    def admit(self, tokens: list[int], extra_key: str | None = None) -> Held | None:
        """What admission does: match, allocate, load; None (and nothing done) if it does not fit."""
        size = self.cache.page_size
        match = self.cache.match_prefix(tokens, extra_key, len(tokens) - 1)
        start = match.num_tokens + match.num_loadable * size
        assert start < len(tokens)
        fresh = self.cache.allocate(-(-len(tokens) // size) - len(match.pages))
        if fresh is None:
            self.cache.release(match.handle)
            return None
        cached = self.cache.load(match, fresh[: match.num_loadable])
        assert sum(cached) == start
        return Held(tokens, extra_key, match.handle, match.pages + fresh, start, tuple(cached))

    def step(self, *requests: Held) -> None:
        """Carry out the copies, check what they brought, compute the rest."""
        self.move()
        for held in requests:
            if held.computed == 0:
                held.computed = held.num_cached
                self.check(held)
            for i in range(held.computed // self.cache.page_size, len(held.pages)):
                self.device[held.pages[i]] = self._content(held, i)
            held.computed = len(held.tokens)

    def finish(self, held: Held, save_from: int = 0) -> None:
        self.cache.finish(held.handle, held.tokens[: held.computed], held.pages, save_from)

    def serve(self, tokens: list[int], extra_key: str | None = None, save_from: int = 0) -> Held:
        """One request from admission to end, alone."""
        held = self.admit(tokens, extra_key)
        assert held is not None, "it does not fit"
        self.step(held)
        self.finish(held, save_from)
        self.move()
        return held

    def check(self, held: Held) -> None:
        for i in range(held.computed // self.cache.page_size):
            assert self.device[held.pages[i]] == self._content(held, i), f"page {i} of the request is another's"

    def _content(self, held: Held, i: int) -> Content:
        return held.extra_key, tuple(held.tokens[: (i + 1) * self.cache.page_size])

    # -- the store's worker ------------------------------------------------------------------------------------------------

    def deliver(self, op: int, num_pages: int | None = None, is_ok: Callable[[bytes], bool] = lambda key: True) -> None:
        """One event of an operation; reads end with the one that brings the last page, or when they were cancelled.
        `num_pages`: how many are tried now (all that are left). `is_ok`: of pages that the store has."""
        operation = self.operations[op]
        action = operation.action
        match action:
            case Query():
                found = next((i for i, key in enumerate(action.keys) if key not in self.store), len(action.keys))
                del self.operations[op]
                self.cache.on_store_event(Found(op, 0 if self.is_down else found), 0.0)
            case Write():
                ok = []
                for key, page in zip(action.keys, action.host_pages, strict=True):
                    ok.append(not self.is_down and is_ok(key))
                    if ok[-1]:
                        assert self._key(self.host[page]) == key, "the page changed before it was written"
                        self.store[key] = self.host[page]
                del self.operations[op]
                self.cache.on_store_event(Written(op, ok), 0.0)
            case Read():
                left = 0 if operation.is_cancelled and num_pages == 0 else len(action.keys) - operation.done
                num = left if num_pages is None else min(num_pages, left)
                first, ok = operation.done, []
                for i in range(first, first + num):
                    key = action.keys[i]
                    ok.append(not self.is_down and key in self.store and is_ok(key))
                    self.host[action.host_pages[i]] = self.store[key] if ok[-1] else JUNK
                operation.done += num
                is_last = operation.is_cancelled or operation.done == len(action.keys)
                if is_last:
                    del self.operations[op]
                self.cache.on_store_event(PagesRead(op, first, ok, is_last), 0.0)

    def settle(self) -> None:
        """Until nothing is on its way."""
        self.move()
        while self.operations:
            for op in list(self.operations):
                self.deliver(op)
            self.move()
        self.move()

    def _key(self, content: Content) -> bytes:
        extra_key, tokens = content
        return self.keys.extend(self.keys.root(extra_key), tokens)[-1]


# -- small worlds ------------------------------------------------------------------------------------------------------

KEYS = PageKeys("model", "bfloat16", 2)
A, B, C = ([start + i for i in range(8)] for start in (100, 200, 300))
"""Prompts of four pages; one token is always left to compute, so that three of them can be found."""


def make(device_pages: int = 8, events: bool = False, **config: Any) -> World:
    defaults = {"host_pages": 40, "load_back_threshold": 2, "prefetch_threshold": 2}
    settings = TierConfig(**{**defaults, **config})
    return World(TieredCache(device_pages, 2, "lru", KEYS, settings, events), KEYS)


def keys_of(tokens: list[int], extra_key: str | None = None) -> list[bytes]:
    return KEYS.extend(KEYS.root(extra_key), tokens)


def prefetch(world: World, rid: str, tokens: list[int], extra_key: str | None = None, now: float = 0.0) -> None:
    world.cache.begin_prefetch(rid, tokens, extra_key, len(tokens) - 1, now)
    world.move()


def only(world: World, kind: type) -> Any:
    """The operation of this kind that is under way."""
    (op,) = [op for op, operation in world.operations.items() if isinstance(operation.action, kind)]
    return op


def filled(**config: Any) -> World:
    """The store has A and B; this worker has nothing."""
    world = make(**config, has_store=True)
    for tokens in (A, B):
        world.serve(tokens)
        world.settle()
    assert world.cache.flush()
    world.cache.take_kv_events()
    return world
