"""Pool, tree and self-check, case by case."""

import pytest

from baton.kvcache.integrity import IntegrityError
from baton.kvcache.page_pool import PagePool
from baton.kvcache.prefix_cache import PrefixCache, UnsharedCache
from baton.kvcache.radix_tree import RadixTree


def put(cache: PrefixCache, tokens: list[int], key: str | None = None) -> list[int]:
    """Run one request through the cache; its pages."""
    match = cache.match_prefix(tokens, key, len(tokens))
    fresh = cache.allocate(-(-len(tokens) // cache.page_size) - len(match.pages))
    assert fresh is not None
    cache.finish(match.handle, tokens, match.pages + fresh)
    return match.pages + fresh


def test_pool_gives_all_pages_or_none_and_refuses_a_double_free() -> None:
    pool = PagePool(4)
    assert pool.alloc(5) is None
    pages = pool.alloc(4)
    assert pages is not None and sorted(pages) == [0, 1, 2, 3]
    assert pool.alloc(1) is None and pool.alloc(0) == []
    pool.free([2])
    with pytest.raises(AssertionError, match="page 2 freed twice"):
        pool.free([2])
    with pytest.raises(AssertionError, match="page 4 is not of this pool"):
        pool.free([4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, "lru"), "page_size must be positive"), ((1, "fifo"), "must be one of lru, lfu, got 'fifo'")],
)
def test_tree_refuses_bad_settings(arguments: tuple[int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadixTree(*arguments)  # type: ignore[arg-type]


def test_a_partial_match_shares_only_whole_pages() -> None:
    cache = PrefixCache(8, 4)
    put(cache, list(range(12)))
    tokens = [*range(7), 99, 8, 9, 10, 11]
    assert cache.match_len(tokens, None, len(tokens)) == 4
    match = cache.match_prefix(tokens, None, len(tokens))
    assert match.num_tokens == 4 and len(match.pages) == 1
    assert (cache.num_protected, cache.num_evictable) == (1, 2)
    cache.check_integrity({})


def test_max_tokens_bounds_the_match_so_that_a_token_is_left_to_compute() -> None:
    cache = PrefixCache(8, 4)
    put(cache, list(range(8)))
    assert cache.match_len(list(range(8)), None, 7) == 4


def test_the_extra_key_keeps_tenants_apart() -> None:
    cache = PrefixCache(8, 1)
    put(cache, [1, 2, 3], "a")
    assert cache.match_len([1, 2, 3], "a", 3) == 3
    assert cache.match_len([1, 2, 3], "b", 3) == cache.match_len([1, 2, 3], None, 3) == 0


def test_lru_evicts_the_prefix_used_longest_ago_from_its_end() -> None:
    cache = PrefixCache(6, 1)
    put(cache, [1, 1, 1])
    put(cache, [2, 2, 2])
    cache.release(cache.match_prefix([1, 1, 1], None, 3).handle)
    assert cache.allocate(2) is not None
    assert cache.match_len([2, 2, 2], None, 3) == 1
    assert cache.match_len([1, 1, 1], None, 3) == 3


def test_lfu_keeps_the_prefix_used_often() -> None:
    cache = PrefixCache(4, 1, "lfu")
    put(cache, [1, 1])
    for _ in range(3):
        cache.release(cache.match_prefix([1, 1], None, 2).handle)
    put(cache, [2, 2])
    assert cache.allocate(2) is not None
    assert cache.match_len([1, 1], None, 2) == 2
    assert cache.match_len([2, 2], None, 2) == 0


def test_what_is_locked_is_not_evicted_but_what_lies_behind_it_is() -> None:
    cache = PrefixCache(4, 1)
    put(cache, [1, 2, 3, 4])
    handle = cache.match_prefix([1, 2, 9], None, 3).handle
    assert cache.allocate(3) is None
    assert cache.allocate(2) is not None
    assert cache.match_len([1, 2, 3, 4], None, 4) == 2
    cache.release(handle)
    assert cache.num_evictable == 2


def test_commit_swaps_pages_that_another_request_shared_first() -> None:
    cache = PrefixCache(8, 2)
    first, second = (cache.match_prefix([1, 2, 3, 4, 5], None, 4) for _ in range(2))
    mine, theirs = cache.allocate(3), cache.allocate(3)
    assert mine is not None and theirs is not None
    first_handle, first_pages, _ = cache.commit(first.handle, [1, 2, 3, 4, 5], mine)
    second_handle, second_pages, duplicates = cache.commit(second.handle, [1, 2, 3, 4, 5], theirs)
    assert first_pages == mine
    assert second_pages == [*mine[:2], theirs[2]]
    assert duplicates == theirs[:2]
    assert cache.num_free == 2  # whoever still reads them may
    cache.free(duplicates)
    cache.check_integrity({"a": [mine[2]], "b": [theirs[2]]})
    cache.drop(first_handle, first_pages)
    cache.finish(second_handle, [1, 2, 3, 4, 5], second_pages)
    assert (cache.num_free, cache.num_evictable) == (6, 2)


def test_without_sharing_nothing_is_kept() -> None:
    cache = UnsharedCache(4, 1)
    put(cache, [1, 2, 3])
    assert cache.match_len([1, 2, 3], None, 3) == 0
    assert cache.num_free == 4


def test_flush_waits_for_requests() -> None:
    cache = PrefixCache(4, 1)
    put(cache, [1, 2])
    handle = cache.match_prefix([1], None, 1).handle
    assert not cache.flush()
    cache.release(handle)
    assert cache.flush()
    assert cache.num_free == 4 and cache.match_len([1, 2], None, 2) == 0


def test_integrity_names_the_pages() -> None:
    cache = PrefixCache(6, 1)
    put(cache, [1, 2])
    taken = cache.allocate(3)
    assert taken is not None
    cache.check_integrity({"r": taken})
    with pytest.raises(IntegrityError, match=rf"leaked pages \(no owner\): \[{taken[2]}\]"):
        cache.check_integrity({"r": taken[:2]})
    # One leak and one double owner: the counts agree, the sets do not.
    with pytest.raises(IntegrityError, match=r"several owners: .*in use by r.*in use by s"):
        cache.check_integrity({"r": taken[:2], "s": taken[:1]})
    with pytest.raises(IntegrityError, match=r"outside the pool"):
        cache.check_integrity({"r": [*taken, 6]})


def test_integrity_recomputes_lock_counts() -> None:
    cache = PrefixCache(6, 1)
    put(cache, [1, 2])
    handle = cache.match_prefix([1, 2], None, 2).handle
    handle.node.lock_count += 1
    with pytest.raises(IntegrityError, match="lock count 2, live handles make 1"):
        cache.check_integrity({})


def test_a_handle_is_released_once() -> None:
    cache = PrefixCache(6, 1)
    handle = cache.match_prefix([1], None, 1).handle
    cache.release(handle)
    with pytest.raises(AssertionError, match="unlocked twice"):
        cache.release(handle)
