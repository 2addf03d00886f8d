"""The published multi-turn workload (150 clients, 10 rounds of 2048 tokens and 1 token of answer, all clients of a round before
the next), with 40 clients and its lengths divided by 64: how many prompt tokens each tier saves. A device pool of a quarter of the
working set, and a host tier of twice that (SGLang's default ratio), find what was published for them, 12 and 41 %.

Two oracles: what could be found at all if nothing were ever evicted, and a least-recently-used list of one tier's size."""

from collections import OrderedDict
from random import Random

import pytest
from tests.fakes.tier_world import World

from baton.kvcache.page_keys import PageKeys
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiered_cache import TieredCache

CLIENTS, ROUNDS, REQUEST, PAGE = 40, 10, 32, 4
WORKING_SET = CLIENTS * ROUNDS * (REQUEST + 1) // PAGE
DEVICE, HOST = WORKING_SET // 4, WORKING_SET // 2


def workload() -> list[tuple[int, int]]:
    """(client, prompt length), in order."""
    rng = Random(0)
    return [
        (client, round_ * (REQUEST + 1) + REQUEST)
        for round_ in range(ROUNDS)
        for client in rng.sample(range(CLIENTS), CLIENTS)
    ]


def ceiling() -> float:
    """The whole pages of a client's last prompt, for every prompt but its first."""
    lengths = [length for client, length in workload() if client == 0]
    return sum(length // PAGE * PAGE for length in lengths[:-1]) / sum(lengths)


def ideal_lru(num_pages: int) -> float:
    cached: OrderedDict[tuple[int, int], None] = OrderedDict()
    found = total = 0
    for client, length in workload():
        pages = [(client, i) for i in range(length // PAGE)]
        hit = next((i for i, page in enumerate(pages) if page not in cached), len(pages))
        found += hit * PAGE
        total += length
        for page in reversed(pages):
            cached[page] = None
            cached.move_to_end(page)
        while len(cached) > num_pages:
            cached.popitem(last=False)
    return found / total


def hit_rate(host_pages: int, has_store: bool, write_policy: str = "write_through") -> float:
    keys = PageKeys("model", "bfloat16", PAGE)
    config = TierConfig(
        host_pages=host_pages,
        has_store=has_store,
        write_policy=write_policy,  # type: ignore[arg-type]
        prefetch_policy="wait_complete",
        prefetch_threshold=PAGE,
        load_back_threshold=PAGE,
    )
    world = World(TieredCache(DEVICE, PAGE, "lru", keys, config), keys)
    found = total = 0
    for num, (client, length) in enumerate(workload()):
        tokens = [client * 1000 + i for i in range(length)]
        world.cache.begin_prefetch(str(num), tokens, None, length - 1, 0.0)
        while world.cache.awaits_prefetch(str(num), 0.0):
            world.settle()
        found += world.serve(tokens).num_cached
        world.cache.end_prefetch(str(num))
        world.settle()
        total += length
    world.cache.check_integrity({})
    return found / total


def test_the_oracles_are_the_published_figures() -> None:
    assert ceiling() == pytest.approx(0.818, abs=0.01)
    assert ideal_lru(DEVICE) == pytest.approx(0.123, abs=0.02)
    assert ideal_lru(HOST) == pytest.approx(0.406, abs=0.02)


def test_a_small_host_tier_adds_nothing_and_costs_nothing() -> None:
    assert hit_rate(1, has_store=False) == pytest.approx(ideal_lru(DEVICE), abs=0.01)


def test_a_host_tier_holds_a_copy_of_the_device_and_more() -> None:
    assert hit_rate(HOST, has_store=False) == pytest.approx(ideal_lru(HOST), abs=0.01)


def test_with_write_back_the_device_adds_to_the_host_tier() -> None:
    rate = hit_rate(HOST, False, "write_back")
    assert ideal_lru(HOST) + 0.05 < rate <= ideal_lru(HOST + DEVICE) + 0.01


def test_with_a_store_everything_is_found_that_was_ever_computed() -> None:
    assert hit_rate(HOST, has_store=True) == ceiling()
