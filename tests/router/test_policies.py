"""Policies as plain functions of (key, view); the prefix tree against a model that remembers whole texts."""

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.config import CacheAwareConfig
from baton.router.policies import CacheAware, make_policy
from baton.router.radix import PrefixTree

CONFIG = CacheAwareConfig(threshold=0.3, balance_abs=4, balance_rel=1.5, max_tree_size=10_000)


@dataclass
class W:
    url: str
    active: int = 0


def test_round_robin_takes_turns():
    view = [W("a"), W("b"), W("c")]
    policy = make_policy("round_robin", CONFIG, Random(1))
    assert [policy.choose(b"", view).url for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_random_reaches_every_worker_about_equally():
    view = [W("a"), W("b"), W("c")]
    policy = make_policy("random", CONFIG, Random(1))
    counts = Counter(policy.choose(b"", view).url for _ in range(3000))
    assert min(counts.values()) > 850  # 1000 each expected, standard deviation 26


def test_power_of_two_never_takes_the_most_loaded_of_many():
    view = [W("busy", 10), W("a", 1), W("b", 1)]
    policy = make_policy("power_of_two", CONFIG, Random(1))
    counts = Counter(policy.choose(b"", view).url for _ in range(300))
    assert set(counts) == {"a", "b"}


@pytest.mark.parametrize("name", ["random", "round_robin", "power_of_two", "cache_aware"])
def test_one_worker_is_always_taken(name):
    policy = make_policy(name, CONFIG, Random(1))
    assert {policy.choose(key, [W("only", 99)]).url for key in (b"", b"x", b"y" * 50)} == {"only"}


def test_cache_aware_returns_to_the_worker_that_has_the_prefix():
    view = [W("a"), W("b")]
    policy = CacheAware(CONFIG)
    first = policy.choose(b"system prompt one. question", view)
    other = policy.choose(b"another prompt altogether", view)
    assert other.url != first.url, "the one with the least text"
    assert policy.choose(b"system prompt one. question two", view).url == first.url
    assert policy.choose(b"another prompt altogether!", view).url == other.url


def test_cache_aware_needs_a_match_above_the_threshold():
    view = [W("a"), W("b")]
    policy = CacheAware(CONFIG)
    first = policy.choose(b"abc" + b"x" * 97, view)
    assert policy.choose(b"abc" + b"y" * 97, view).url != first.url


def test_cache_aware_balances_when_loads_are_far_apart():
    a, b = W("a"), W("b")
    policy = CacheAware(CONFIG)
    owner = policy.choose(b"shared prefix", [a, b])
    rest = b if owner is a else a
    owner.active, rest.active = 4, 0
    assert policy.choose(b"shared prefix", [a, b]) is owner, "not over balance_abs"
    owner.active = 5
    assert policy.choose(b"shared prefix", [a, b]) is rest


def test_cache_aware_does_not_balance_loads_of_the_same_order():
    a, b = W("a"), W("b")
    policy = CacheAware(CONFIG)
    owner = policy.choose(b"shared prefix", [a, b])
    a.active = b.active = 100
    owner.active = 105  # over balance_abs, but not over balance_rel
    assert policy.choose(b"shared prefix", [a, b]) is owner


def test_cache_aware_forgets_a_worker():
    view = [W("a"), W("b")]
    policy = CacheAware(CONFIG)
    owner = policy.choose(b"shared prefix", view)
    policy.forget(owner.url)
    policy.tree.check_integrity()
    assert policy.tree.match(b"shared prefix") == {}


texts = st.text(alphabet="ab", max_size=12).map(str.encode)
steps = st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), texts), max_size=30)


def _common(one: bytes, other: bytes) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


@given(steps, texts)
def test_tree_matches_the_longest_common_prefix_of_each_worker(inserted, wanted):
    tree = PrefixTree(1 << 20)
    for worker, text in inserted:
        tree.insert(text, worker)
        tree.check_integrity()
    expected: dict[str, int] = {}
    for worker, text in inserted:
        expected[worker] = max(expected.get(worker, 0), _common(text, wanted))
    assert tree.match(wanted) == {worker: length for worker, length in expected.items() if length}


@given(steps, st.integers(1, 20), st.sampled_from(["x", "y", "z"]))
def test_tree_stays_within_its_bound_and_forgets_on_removal(inserted, bound, gone):
    tree = PrefixTree(bound)
    for worker, text in inserted:
        tree.insert(text, worker)
        tree.check_integrity()
    tree.remove(gone)
    tree.check_integrity()
    assert gone not in tree.size
    tree.evict_all(0)
    tree.check_integrity()
    assert not any(tree.size.values())


def test_tree_evicts_the_least_recently_used_text_first():
    tree = PrefixTree(20)
    tree.insert(b"a" * 10, "w")
    tree.insert(b"b" * 10, "w")
    tree.insert(b"a" * 10, "w")
    tree.insert(b"c" * 5, "w")
    assert tree.match(b"b" * 10) == {}
    assert tree.match(b"a" * 10) == {"w": 10}


def test_a_broken_tree_is_noticed():
    tree = PrefixTree(100)
    tree.insert(b"abc", "w")
    tree.size["w"] = 2
    with pytest.raises(AssertionError, match="sizes do not add up"):
        tree.check_integrity()
