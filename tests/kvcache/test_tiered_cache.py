"""The tiers case by case: what is saved, loaded, read, written, waited for, told, and what is not."""

import dataclasses
from typing import Any

import pytest
from tests.fakes.tier_world import KEYS, A, B, C, filled, keys_of, make, only, prefetch

from baton.kvcache.integrity import IntegrityError
from baton.kvcache.keyed_cache import MAX_EVENTS, Cleared, KeyedCache, Removed, Stored
from baton.kvcache.prefix_cache import CachedTokens
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiers import Query, Read, Write

# -- device and host ---------------------------------------------------------------------------------------------------


def test_what_the_device_evicted_comes_back_from_the_host() -> None:
    world = make()
    for tokens in (A, B, C):
        world.serve(tokens)
    assert world.serve(A).by_source == (0, 6, 0)
    assert world.serve(A).by_source == (6, 0, 0)
    counters = world.cache.counters
    assert (counters.saved, counters.loaded, counters.host_hit_tokens, counters.device_hit_tokens) == (12, 3, 6, 6)
    assert (counters.host_pages_used, counters.host_pages_total) == (12, 40)


def test_a_tenant_finds_only_its_own_pages_in_every_tier() -> None:
    world = make(has_store=True)
    world.serve(A, "tenant")
    world.settle()
    assert world.serve(A).num_cached == 0
    assert world.serve(A, "tenant").by_source == (6, 0, 0)
    world.settle()
    assert world.cache.flush()
    prefetch(world, "r", A, "other")
    world.settle()
    assert world.serve(A, "other").num_cached == 0


def test_the_match_never_goes_beyond_max_tokens() -> None:
    world = make()
    world.serve([*A, 1, 2])
    world.serve(B)
    match = world.cache.match_prefix(A, None, 5)
    assert match.num_tokens + match.num_loadable * 2 == 4
    world.cache.release(match.handle)


def test_fewer_tokens_than_the_threshold_are_not_loaded() -> None:
    world = make(load_back_threshold=7)
    for tokens in (A, B, C):
        world.serve(tokens)
    assert world.serve(A).by_source == (0, 0, 0)


def test_a_match_keeps_its_host_pages_until_it_is_released() -> None:
    world = make(device_pages=5, host_pages=4)
    world.serve(A)
    world.cache._pool.free(world.cache.allocate(5) or [])
    match = world.cache.match_prefix(A, None, 7)
    assert match.num_loadable == 3
    # Only one host page is left for the four of B, so three are not saved; nothing waits.
    world.serve(B)
    assert world.cache.counters.saves_skipped == 3
    world.cache.release(match.handle)
    world.cache.check_integrity({})
    assert world.serve(A).by_source == (0, 6, 0)


def test_the_host_tier_forgets_the_least_recent_prefix_from_its_end() -> None:
    world = make(device_pages=4, host_pages=10)
    for tokens in (A, B, A, C):
        world.serve(tokens)
    # A was used again, of B there is room for two pages: the first two.
    assert world.serve(B).by_source == (0, 4, 0)


def test_what_the_device_serves_stays_fresh_in_the_host_tier_too() -> None:
    world = make(device_pages=6, host_pages=8)
    world.serve([*A[:4], 1])
    world.serve([*B[:4], 1])
    for _ in range(3):
        world.serve([*A[:4], 1])
    world.serve(C)
    world.serve([*C, 1, 2, 3])
    # B made room in the host tier, not A, although B was saved later.
    assert world.serve([*A[:4], 1]).num_cached == 4


def test_lfu_counts_uses_and_not_when_pages_came() -> None:
    world = make(device_pages=4, host_pages=8, eviction_policy="lfu")
    for tokens in (A, A, A, B, C):
        world.serve(tokens)
    assert world.serve(A).num_cached == 6


def test_a_prefix_saved_in_chunks_loses_its_end_first_too() -> None:
    world = make(device_pages=4, host_pages=6)
    held = world.admit(A)
    assert held is not None
    world.step(held)
    for num_computed in (2, 4, 6, 8):
        held.handle, held.pages, _ = world.cache.commit(held.handle, A[:num_computed], held.pages)
        world.move()
    world.finish(held)
    world.serve(B)
    assert world.serve(A).by_source == (0, 4, 0)


def test_lfu_keeps_in_the_host_tier_what_was_used_often() -> None:
    world = make(device_pages=4, host_pages=8, eviction_policy="lfu")
    for tokens in (A, B, A, B, A, C):
        world.serve(tokens)
    assert world.serve(A).by_source == (0, 6, 0)


def test_a_page_that_is_being_loaded_is_not_read_into_before_the_next_copies() -> None:
    world = filled(host_pages=4, max_read_share=1.0, max_write_share=1.0)
    prefetch(world, "r", A)
    world.settle()
    held = world.admit(A)
    assert held is not None
    prefetch(world, "s", B)  # carries out the loads of A, which a GPU would still be about
    world.deliver(only(world, Query))
    assert world.cache.counters.reads_skipped == 2
    world.move()
    world.cache.drop(held.handle, held.pages)


# -- write policies ----------------------------------------------------------------------------------------------------


def test_write_through_saves_what_was_computed_at_once() -> None:
    world = make()
    assert len(world.serve(A).pages) == len(world.saves) == 4


def test_write_through_saves_again_what_the_host_tier_lost() -> None:
    world = make(device_pages=8, host_pages=4)
    world.serve(A)
    world.serve(B)
    assert len(world.saves) == 8
    assert world.serve(A).by_source == (6, 0, 0)
    assert len(world.saves) == 11 + 1  # three that it used, and the one it computed


def test_selective_saves_at_the_second_use() -> None:
    world = make(write_policy="write_through_selective")
    world.serve(A)
    assert world.saves == []
    pages = world.serve(A).pages
    assert [page for page, _ in world.saves[:3]] == pages[:3]


def test_write_back_saves_when_the_device_evicts_and_before_the_page_is_reused() -> None:
    world = make(device_pages=4, write_policy="write_back")
    world.serve(A)
    assert world.saves == []
    held = world.admit(B)
    assert held is not None
    # B's pages are A's: the save stands in the very copies that come before B's step.
    world.step(held)
    assert sorted(page for page, _ in world.saves) == sorted(held.pages)
    world.finish(held)
    assert world.serve(A).by_source == (0, 6, 0)


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_pages_that_another_worker_keeps_are_not_saved(policy: Any) -> None:
    world = make(device_pages=5, write_policy=policy)
    world.serve(A, save_from=3)
    world.serve(A, save_from=3)
    world.serve(B, save_from=4)
    world.serve(C, save_from=4)
    assert len(world.saves) == 1
    held = world.admit(A)
    assert held is not None and held.num_cached == 0


# -- flush -------------------------------------------------------------------------------------------------------------


def test_flush_forgets_both_tiers_also_with_operations_in_flight() -> None:
    world = filled()
    world.serve(C)
    write = only(world, Write)
    prefetch(world, "r", A)
    world.deliver(only(world, Query))
    world.move()
    read = only(world, Read)
    world.deliver(read, 1)
    held = world.admit(B)
    assert held is not None and not world.cache.flush()
    world.cache.drop(held.handle, held.pages)
    assert world.cache.flush()
    assert world.cache.counters.host_pages_used == 4 + 3, "of the write and of the read, until their last event"
    world.cache.check_integrity({})
    world.deliver(read)
    world.deliver(write)
    world.settle()
    assert world.cache.counters.host_pages_used == 0
    assert world.serve(A).num_cached == 0


def test_flush_between_a_save_and_its_copy() -> None:
    world = make(has_store=True)
    held = world.admit(A)
    assert held is not None
    world.step(held)
    world.finish(held)
    assert world.cache.flush()
    assert not world.cache.take_copies() and world.cache.take_store_actions() == []
    assert world.cache.counters.host_pages_used == 0


# -- events ------------------------------------------------------------------------------------------------------------


def test_a_page_is_removed_when_it_has_left_both_tiers() -> None:
    world = make(device_pages=4, host_pages=6, events=True)
    world.serve(A)
    assert world.cache.take_kv_events() == [Stored(keys_of(A), None, A, None)]
    world.serve(B)
    events = world.cache.take_kv_events()
    assert Stored(keys_of(B), None, B, None) in events
    gone = [key for event in events if isinstance(event, Removed) for key in event.keys]
    assert sorted(gone) == sorted(keys_of(A)[2:]), "the host tier still has the first two"
    assert world.cache.flush()
    assert world.cache.take_kv_events() == [Cleared()]


def test_a_read_tells_what_it_brought_and_what_comes_before() -> None:
    world = filled(events=True)
    world.serve(A[:4], "t")
    world.serve(A[:4])
    world.cache.take_kv_events()
    prefetch(world, "r", [*A, 1])
    world.settle()
    assert world.cache.take_kv_events() == [Stored(keys_of(A)[2:], keys_of(A)[1], A[4:], None)]


def test_events_that_nobody_takes_are_bounded_and_never_tell_too_much() -> None:
    cache = KeyedCache(4, 2, "lru", KEYS, with_kv_events=True)
    for start in range(0, MAX_EVENTS):
        tokens = [start, start]
        match = cache.match_prefix(tokens, None, 2)
        fresh = cache.allocate(1)
        assert fresh is not None
        cache.finish(match.handle, tokens, fresh)
    events = cache.take_kv_events()
    assert len(events) <= MAX_EVENTS and events[0] == Cleared()
    known: set[bytes] = set()
    for event in events:
        if isinstance(event, Stored):
            known |= set(event.keys)
        elif isinstance(event, Removed):
            known -= set(event.keys)
    assert known <= cache._page_of.keys()


def test_without_a_wish_there_are_no_events() -> None:
    world = make()
    world.serve(A)
    assert world.cache.take_kv_events() == []


# -- self-check and settings -------------------------------------------------------------------------------------------


def test_the_self_check_names_a_host_page_that_leaked() -> None:
    world = make()
    world.serve(A)
    leaked = world.cache._host.allocate()
    assert leaked is not None
    with pytest.raises(IntegrityError, match=rf"host pages without owner: \[{leaked.page}\]"):
        world.cache.check_integrity({})


def test_the_self_check_names_the_owners_of_a_pin_too_many() -> None:
    world = make()
    world.serve(A)
    world.serve(B)
    world.serve(C)
    match = world.cache.match_prefix(A, None, 7)
    world.cache._host.pin(world.cache._matched[match.handle][0])
    with pytest.raises(IntegrityError, match=r"2 pins, its owners \['match 0'\] make 1"):
        world.cache.check_integrity({})


def test_the_self_check_sees_a_page_without_its_key() -> None:
    world = make()
    pages = world.serve(A).pages
    key = world.cache._key_of.pop(pages[0])
    with pytest.raises(IntegrityError, match="with a key, or in the tree, but not both"):
        world.cache.check_integrity({})
    world.cache._key_of[pages[0]] = key
    world.cache._page_of[key] = pages[1]
    with pytest.raises(IntegrityError, match="disagree"):
        world.cache.check_integrity({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host_pages", 0), ("write_policy", "never"), ("prefetch_policy", "maybe"), ("prefetch_threshold", -1),
        ("prefetch_timeout_base_s", -0.1), ("max_read_share", 0.0), ("max_write_share", 1.1), ("eviction_policy", "fifo"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TierConfig(host_pages=4), **{field: value})


def test_keys_must_be_of_the_caches_pages() -> None:
    with pytest.raises(ValueError, match="pages of 2 tokens, the cache's have 4"):
        KeyedCache(4, 4, "lru", KEYS)


def test_where_tokens_came_from_adds_up() -> None:
    world = make(device_pages=16)
    world.serve(A)
    match = world.cache.match_prefix(A, None, 7)
    assert world.cache.load(match, []) == CachedTokens(device=6)
    world.cache.release(match.handle)
