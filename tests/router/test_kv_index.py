"""The block index against a model that remembers whole token prefixes."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from baton.router.config import CacheAwareConfig
from baton.router.kv_index import KvIndex, Prompt
from baton.router.policies import CacheAware

PAGE = 2
TOKENS = st.lists(st.integers(0, 1), min_size=PAGE, max_size=4 * PAGE)
STEP = st.one_of(
    st.tuples(st.just("store"), st.sampled_from("ab"), TOKENS),
    st.tuples(st.just("remove"), st.sampled_from("ab"), TOKENS),
    st.tuples(st.just("clear"), st.sampled_from("ab")),
    st.tuples(st.just("forget"), st.sampled_from("ab")),
    st.tuples(st.just("hold"), st.sampled_from("ab"), TOKENS),
    st.tuples(st.just("release")),
)


def prefixes(token_ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(token_ids[:end]) for end in range(PAGE, len(token_ids) + 1, PAGE)]


def hash_of(prefix: tuple[int, ...], worker: str) -> int:
    return hash((worker, prefix))  # every worker has names of its own


def whole(token_ids: list[int], worker: str) -> BlockStored:
    found = prefixes(token_ids)
    return BlockStored([hash_of(one, worker) for one in found], None, token_ids[: len(found) * PAGE], PAGE)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=25), TOKENS)
def test_the_index_knows_what_a_set_of_prefixes_knows(steps, asked):
    index = KvIndex(1000)
    model: dict[str, set[tuple[int, ...]]] = {"a": set(), "b": set()}
    holds = []
    for worker in model:
        index.add(worker)
    index.apply("a", whole([7, 7], "a"))  # so that the block size is known to holds
    model["a"].add((7, 7))
    for step in steps:
        match step:
            case ("store", worker, token_ids):
                index.apply(worker, whole(token_ids, worker))
                model[worker] |= set(prefixes(token_ids))
            case ("remove", worker, token_ids):
                index.apply(worker, BlockRemoved([hash_of(prefixes(token_ids)[-1], worker)]))
                model[worker].discard(prefixes(token_ids)[-1])
            case ("clear", worker):
                index.apply(worker, AllBlocksCleared())
                model[worker] = set()
                holds = [one for one in holds if one[0] != worker]
            case ("forget", worker):
                index.add(worker)
                model[worker] = set()
                holds = [one for one in holds if one[0] != worker]
            case ("hold", worker, token_ids):
                holds.append((worker, token_ids, index.hold(worker, Prompt(token_ids))))
            case ("release",) if holds:
                index.release(holds.pop()[2])
        index.check_integrity()
    expected = {}
    for worker, known in model.items():
        known = known | {one for held, token_ids, _ in holds if held == worker for one in prefixes(token_ids)}
        count = 0
        while count < len(prefixes(asked)) and prefixes(asked)[count] in known:
            count += 1
        if count:
            expected[worker] = count * PAGE
    assert index.match(Prompt(asked)) == expected


def test_over_the_bound_blocks_are_refused_and_what_is_known_stays_whole():
    index = KvIndex(max_blocks=3)
    index.add("a")
    index.apply("a", whole([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "a"))
    assert index.num_blocks("a") == 3
    assert index.num_refused == 1
    assert index.match(Prompt([1, 1, 2, 2, 3, 3, 4, 4, 5, 5])) == {"a": 6}
    index.apply("a", BlockRemoved([hash_of((1, 1, 2, 2, 3, 3), "a")]))
    index.apply("a", whole([9, 9], "a"))
    assert index.match(Prompt([9, 9])) == {"a": 2}


def test_workers_with_different_block_sizes_are_compared_in_tokens():
    index = KvIndex(100)
    index.add("small")
    index.add("large")
    index.apply("small", BlockStored([1, 2, 3], None, [1, 2, 3, 4, 5, 6], 2))
    index.apply("large", BlockStored([1, 2], None, [1, 2, 3, 4, 5, 6, 7, 8], 4))
    assert index.match(Prompt(range(1, 10))) == {"small": 6, "large": 8}


def test_a_worker_that_was_not_added_is_not_known():
    index = KvIndex(100)
    index.apply("stranger", whole([1, 1], "stranger"))
    assert "stranger" not in index
    assert not index


@pytest.mark.parametrize("token_ids", [[-1], [2**32]])
def test_a_prompt_of_ids_that_no_vocabulary_has_is_refused(token_ids):
    with pytest.raises(OverflowError):
        Prompt(token_ids)


class W:
    def __init__(self, url: str, active: int = 0) -> None:
        self.url = url
        self.active = active


def test_loads_that_are_too_far_apart_beat_the_cache():
    policy = CacheAware(CacheAwareConfig(balance_abs=4))
    for url in "ab":
        policy.index.add(url)
    policy.index.apply("a", whole([1, 1, 2, 2], "a"))
    assert policy.choose(b"k", [W("a", 3), W("b")], Prompt([1, 1, 2, 2])).url == "a"
    assert policy.choose(b"k", [W("a", 9), W("b")], Prompt([1, 1, 2, 2])).url == "b"


def test_a_worker_heard_only_from_the_middle_is_also_judged_by_the_text_sent_to_it():
    policy = CacheAware(CacheAwareConfig())
    text = b"a text that was sent to one of them"
    policy.tree.insert(text, "a")
    policy.index.add("a")
    policy.index.add("b")
    policy.index.apply("a", whole([5, 5, 6, 6], "a"))
    view = [W("a"), W("b")]
    assert policy.choose(text, view, Prompt([1, 1])).url == "b", "its events say that a has it no more"
    policy.partly_known.add("a")
    assert policy.choose(text, view, Prompt([2, 2])).url == "a"


def test_hits_below_the_threshold_do_not_decide():
    policy = CacheAware(CacheAwareConfig(threshold=0.5))
    policy.index.add("a")
    policy.index.add("b")
    policy.index.apply("a", whole([1, 1], "a"))
    rng = Random(1)
    prompt = [1, 1, *(rng.randrange(2, 9) for _ in range(6))]
    assert policy.choose(b"k", [W("a"), W("b")], Prompt(prompt)).url == "b"
