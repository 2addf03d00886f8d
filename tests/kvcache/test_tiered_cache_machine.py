"""Random use of the cache with tiers, against a world that knows what lies in every page: whatever happens to copies and store
operations, in whatever order, a request reads its own tokens, every page has one owner, and nothing stays pinned."""

from dataclasses import dataclass, field
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.fakes.tier_world import Held, World

from baton.kvcache.keyed_cache import Cleared, KvEvent, Removed, Stored
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiered_cache import TieredCache
from baton.kvcache.tiers import Late

EXTRA_KEYS = st.sampled_from([None, "salt"])
# Conversations that go on, and part: long prefixes are shared all the time.
TOKENS = st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(0, 1), st.integers(1, 5)).map(
    lambda drawn: [drawn[0]] * drawn[1] + [drawn[2]] * drawn[3]
)
REQUESTS = st.lists(st.tuples(TOKENS, EXTRA_KEYS), min_size=1, max_size=5)


@dataclass
class View:
    """What a router knows from the events alone."""

    keys: PageKeys
    known: set[bytes] = field(default_factory=set)

    def apply(self, events: list[KvEvent]) -> None:
        for event in events:
            match event:
                case Stored():
                    parent = event.parent_key or self.keys.root(event.extra_key)
                    assert self.keys.extend(parent, event.token_ids) == event.keys
                    assert not self.known & set(event.keys), "told twice"
                    self.known |= set(event.keys)
                case Removed():
                    assert self.known >= set(event.keys), "never told, or removed twice"
                    self.known -= set(event.keys)
                case Cleared():
                    self.known.clear()


class TieredCacheMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2]),
        host_pages=st.sampled_from([2, 12, 30]),
        eviction=st.sampled_from(["lru", "lfu"]),
        write=st.sampled_from(["write_through", "write_back", "write_through_selective"]),
        prefetch=st.sampled_from(["best_effort", "wait_complete", "timeout"]),
        has_store=st.sampled_from([True, True, True, False]),
    )
    def start(self, page_size: int, host_pages: int, eviction: str, write: str, prefetch: str, has_store: bool) -> None:
        keys = PageKeys("model", "bfloat16", page_size)
        config = TierConfig(
            host_pages=host_pages,
            has_store=has_store,
            write_policy=write,  # type: ignore[arg-type]
            eviction_policy=eviction,  # type: ignore[arg-type]
            prefetch_policy=prefetch,  # type: ignore[arg-type]
            load_back_threshold=1,
            prefetch_threshold=1,
        )
        self.cache = TieredCache(14, page_size, eviction, keys, config, with_kv_events=True)  # type: ignore[arg-type]
        self.world = World(self.cache, keys)
        self.view = View(keys)
        self.admitted: list[Held] = []
        self.running: list[Held] = []
        self.waiting: dict[str, tuple[list[int], str | None]] = {}
        self.num_arrived = 0
        self.now = 0.0

    @rule(tokens=TOKENS, extra_key=EXTRA_KEYS)
    def arrive(self, tokens: list[int], extra_key: str | None) -> None:
        self.num_arrived += 1
        rid = str(self.num_arrived)
        self.waiting[rid] = (tokens, extra_key)
        self.cache.begin_prefetch(rid, tokens, extra_key, len(tokens) - 1, self.now)

    @rule(seconds=st.sampled_from([0.0, 0.0, 2.0]))
    def admit(self, seconds: float) -> None:
        """All that may be."""
        self.now += seconds
        for rid, request in list(self.waiting.items()):
            if self.cache.awaits_prefetch(rid, self.now):
                deadline = self.cache.next_deadline()
                assert (deadline is None) == (self.cache.config.prefetch_policy == "wait_complete")
                assert deadline is None or deadline > self.now
            elif (held := self.world.admit(*request)) is not None:
                self.cache.end_prefetch(rid)
                del self.waiting[rid]
                self.admitted.append(held)

    @rule(chunk=st.integers(1, 14), save_from=st.sampled_from([0, 0, 2]), num_finished=st.integers(0, 4))
    def step(self, chunk: int, save_from: int, num_finished: int) -> None:
        self.world.step(*self.admitted)
        for held in self.admitted:
            tokens = held.tokens[: max(held.num_cached, min(chunk, len(held.tokens)))]
            held.handle, held.pages, duplicates = self.cache.commit(held.handle, tokens, held.pages, save_from)
            self.cache.free(duplicates)
        self.running += self.admitted
        self.admitted = []
        for held in self.running[:num_finished]:
            self.world.finish(held, save_from)
        del self.running[:num_finished]

    @rule(requests=REQUESTS, num_events=st.integers(0, 3))
    def serve(self, requests: list[tuple[list[int], str | None]], num_events: int) -> None:
        """The usual way of a request, in one go."""
        for tokens, extra_key in requests:
            self.arrive(tokens, extra_key)
            for _ in range(num_events):
                self.world.move()
                for op in list(self.world.operations):
                    self.world.deliver(op)
            self.admit(0.0)
            self.step(14, 0, 4)

    @rule(who=st.integers(0, 20))
    def abort(self, who: int) -> None:
        """Waiting, running, or between its load and the step that it was for."""
        everyone = [*self.waiting, *self.admitted, *self.running]
        if not everyone:
            return
        one = everyone[who % len(everyone)]
        if isinstance(one, str):
            del self.waiting[one]
            self.cache.end_prefetch(one)
            return
        (self.admitted if one in self.admitted else self.running).remove(one)
        self.cache.drop(one.handle, one.pages)

    @rule(which=st.integers(0, 20), num_pages=st.integers(0, 5), damage=st.sampled_from([0, 0, 2, 3]))
    def deliver(self, which: int, num_pages: int, damage: int) -> None:
        self.world.move()
        operations = sorted(self.world.operations)
        if operations:
            op = operations[which % len(operations)]
            self.world.deliver(op, num_pages, lambda key: not damage or key[0] % damage != 0)

    @rule(which=st.integers(0, 20))
    def hang(self, which: int) -> None:
        self.world.move()
        operations = sorted(self.world.operations)
        if operations:
            self.cache.on_store_event(Late(operations[which % len(operations)]), 0.0)

    @rule(is_down=st.sampled_from([False, False, True]), num_lost=st.integers(0, 3))
    def store_trouble(self, is_down: bool, num_lost: int) -> None:
        self.world.is_down = is_down
        for key in sorted(self.world.store)[:num_lost]:
            del self.world.store[key]

    @rule()
    def pressure(self) -> None:
        """Make the device forget what nobody uses."""
        pages = self.cache.allocate(self.cache.num_available)
        assert pages is not None
        self.cache._pool.free(pages)

    @rule()
    def flush(self) -> None:
        idle = not self.admitted and not self.running
        self.view.apply(self.cache.take_kv_events())
        assert self.cache.flush() == idle
        if idle:
            assert self.cache.num_free == self.cache.num_pages
            self.view.apply(self.cache.take_kv_events())
            assert not self.view.known

    @invariant()
    def every_page_has_one_owner(self) -> None:
        if hasattr(self, "cache"):
            held = self.admitted + self.running
            self.cache.check_integrity({str(i): one.pages[one.handle.num_pages :] for i, one in enumerate(held)})
            for one in held:
                self.world.check(one)

    @invariant()
    def events_tell_what_is_here(self) -> None:
        if hasattr(self, "cache"):
            self.view.apply(self.cache.take_kv_events())
            assert self.view.known == self.cache._page_of.keys() | self.cache._host._cached.keys()

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for rid in self.waiting:
            self.cache.end_prefetch(rid)
        for held in self.admitted + self.running:
            self.cache.drop(held.handle, held.pages)
        self.world.settle()
        self.cache.check_integrity({})
        self.cache._host.check({})  # nobody has a pin


TestTieredCacheMachine = TieredCacheMachine.TestCase
TestTieredCacheMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("seed", range(12))
def test_a_long_walk(seed: int) -> None:
    """The same rules, many times over: states that a search from empty caches does not come to."""
    rng = Random(seed)
    machine = TieredCacheMachine()
    policies = ["write_through", "write_back", "write_through_selective"]
    prefetch = ["best_effort", "wait_complete", "timeout"][seed // 3 % 3]
    machine.start(
        rng.choice([1, 2]), rng.choice([8, 16, 30]), rng.choice(["lru", "lfu"]), policies[seed % 3], prefetch, seed < 10
    )

    def tokens() -> list[int]:
        return [rng.randrange(2)] * rng.randrange(10) + [rng.randrange(2)] * rng.randrange(1, 6)

    def extra_key() -> str | None:
        return rng.choice([None, None, "salt"])

    rules = {
        lambda: machine.arrive(tokens(), extra_key()): 20,
        lambda: machine.admit(rng.choice([0.0, 2.0])): 20,
        lambda: machine.step(rng.randrange(1, 15), rng.choice([0, 2]), rng.randrange(4)): 20,
        lambda: machine.serve([(tokens(), extra_key()) for _ in range(3)], rng.randrange(4)): 8,
        lambda: machine.abort(rng.randrange(20)): 8,
        lambda: machine.deliver(rng.randrange(20), rng.randrange(6), rng.choice([0, 0, 2, 3])): 20,
        lambda: machine.store_trouble(rng.random() < 0.2, rng.randrange(3)): 3,
        lambda: machine.hang(rng.randrange(20)): 2,
        lambda: machine.pressure(): 3,
        lambda: machine.flush(): 2,
    }
    for rule_of_step in rng.choices(list(rules), weights=list(rules.values()), k=250):
        rule_of_step()
        machine.every_page_has_one_owner()
        machine.events_tell_what_is_here()
    machine.teardown()
