"""The simulator against a slow model of the same rules, and against the prefix cache itself."""

from hypothesis import given
from hypothesis import strategies as st

from baton.bench.lru import PageNames, hit_rate, simulate
from baton.kvcache.prefix_cache import PrefixCache

PAGE = 2
# Two tokens only, so that prompts share prefixes, end inside one another and part in the middle.
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=25)
CAPACITY = st.integers(7, 20)


def slow_lru(prompts: list[list[int]], capacity: int) -> list[int]:
    """Cached tokens of each prompt; pages are prefixes, each with the time and depth that decide who goes first."""
    pool: dict[tuple[int, ...], tuple[int, int]] = {}
    results = []
    for clock, prompt in enumerate(prompts):
        prefixes = [tuple(prompt[:end]) for end in range(PAGE, len(prompt) + 1, PAGE)]
        found = 0
        for prefix in prefixes[: (len(prompt) - 1) // PAGE]:
            if prefix not in pool:
                break
            found += 1
        for prefix in prefixes[:found]:
            pool[prefix] = (clock, -len(prefix))
        num_new = -(-len(prompt) // PAGE) - found
        while len(pool) + num_new > capacity:
            del pool[min(pool, key=lambda page: pool[page])]
        for prefix in prefixes:
            pool[prefix] = (clock, -len(prefix))
        results.append(found * PAGE)
    return results


def uses_of(prompts: list[list[int]]) -> list:
    names = PageNames(PAGE)
    return [names.use(prompt, len(prompt)) for prompt in prompts]


@given(PROMPTS, CAPACITY)
def test_as_the_slow_model(prompts: list[list[int]], capacity: int) -> None:
    assert [one for (one,) in simulate(uses_of(prompts), [capacity], PAGE)] == slow_lru(prompts, capacity)


@given(PROMPTS, CAPACITY)
def test_as_the_prefix_cache(prompts: list[list[int]], capacity: int) -> None:
    cache = PrefixCache(capacity, PAGE)
    found = []
    for prompt in prompts:
        match = cache.match_prefix(prompt, None, len(prompt) - 1)
        fresh = cache.allocate(-(-len(prompt) // PAGE) - len(match.pages))
        assert fresh is not None
        cache.finish(match.handle, prompt, [*match.pages, *fresh])
        found.append(match.num_tokens)
    assert [one for (one,) in simulate(uses_of(prompts), [capacity], PAGE)] == found


@given(PROMPTS, CAPACITY, st.integers(0, 20))
def test_tiers_add_up_to_the_largest(prompts: list[list[int]], capacity: int, more: int) -> None:
    uses = uses_of(prompts)
    device = simulate(uses, [capacity], PAGE)
    both = simulate(uses, [capacity, capacity + more, None], PAGE)
    everything = simulate(uses, [None], PAGE)
    assert [one[0] for one in both] == [one for (one,) in device]
    assert [sum(one) for one in both] == [one for (one,) in everything]


def test_the_published_workload_has_the_published_ceiling() -> None:
    # 10 rounds of 2048 tokens, 1 out: at most 81.8 % of prompt tokens can be cached
    page, names = 64, PageNames(64)
    talk = list(range(10 * 2049))
    uses = [names.use(talk[: 2048 * (turn + 1) + turn + 1], 2048 * (turn + 1) + turn) for turn in range(10)]
    assert round(hit_rate(uses, simulate(uses, [None], page)), 3) == 0.818
