"""Which requests run in a step: chunks, mixing, policies, admission, retraction."""

import pytest
from tests.fakes.paged_runner import oracle
from tests.scheduler.machine import Worker, submit

from baton.engine.scheduler.admission import RETRY_STEPS
from baton.engine.scheduler.retraction import NewTokenRatio
from baton.engine.scheduler.waiting import LPM_MAX_QUEUE, MAX_BYPASSED
from baton.protocol.rank import Finish


def step_lens(worker: Worker) -> list[int]:
    """Run one step; its query lengths."""
    batch = worker.scheduler.schedule(worker.now)
    assert batch is not None
    worker.ledger.take(worker.scheduler.apply(worker.runner.run(batch), worker.now))
    worker.scheduler.check_integrity()
    return [int(n) for n in batch.query_lens]


def order_of_first_tokens(worker: Worker) -> list[str]:
    """Run to the end; rids in the order of their first token."""
    seen: list[str] = []
    while worker.step():
        seen += [rid for rid in worker.ledger.tokens if rid not in seen]
    return seen


def test_a_long_prompt_is_computed_in_chunks_of_whole_pages() -> None:
    worker = Worker(chunked_prefill_size=10, page_size=4)
    worker.add(submit("a", range(21), 2))
    assert [step_lens(worker) for _ in range(4)] == [[8], [8], [5], [1]]


def test_a_chunk_is_never_less_than_a_page() -> None:
    worker = Worker(chunked_prefill_size=3, page_size=4)
    worker.add(submit("a", range(9), 1))
    assert [step_lens(worker) for _ in range(3)] == [[4], [4], [1]]


def test_prompts_share_a_step_and_only_one_is_left_in_the_middle() -> None:
    worker = Worker(chunked_prefill_size=16)
    for rid, base in (("a", 0), ("b", 100), ("c", 200)):
        worker.add(submit(rid, range(base, base + 10), 2))
    assert step_lens(worker) == [10, 4]
    assert step_lens(worker) == [6, 8]
    assert step_lens(worker) == [2]
    assert step_lens(worker) == [1, 1, 1]


def test_max_prefill_tokens_bounds_a_step_but_not_a_single_prompt() -> None:
    worker = Worker(chunked_prefill_size=None, max_prefill_tokens=12)
    for rid, size in (("a", 8), ("b", 8), ("c", 20)):
        worker.add(submit(rid, range(ord(rid), ord(rid) + size), 1))
    assert [step_lens(worker) for _ in range(3)] == [[8], [8], [20]]


def test_prefill_goes_before_decode_unless_chunks_are_mixed() -> None:
    for mixed, expected in ((False, [[4], [4], [1, 1]]), (True, [[4, 1], [4, 1], [1, 1]])):
        worker = Worker(chunked_prefill_size=8 if mixed else 4, enable_mixed_chunk=mixed)
        worker.add(submit("a", [1, 2, 3], 9))
        worker.step()
        worker.add(submit("b", range(50, 58), 9))
        assert [step_lens(worker) for _ in range(3)] == expected
        worker.run()
        assert worker.ledger.tokens == {"a": oracle([1, 2, 3], 9), "b": oracle(list(range(50, 58)), 9)}


def test_no_more_run_than_may() -> None:
    worker = Worker(max_running_requests=2)
    for rid in "abc":
        worker.add(submit(rid, [1, 2, 3], 2))
    assert [len(step_lens(worker)) for _ in range(4)] == [2, 2, 1, 1]


def test_a_second_request_reuses_the_prompt_of_one_that_still_runs() -> None:
    worker = Worker()
    worker.add(submit("a", range(9), 20))
    worker.step()
    worker.add(submit("b", range(9), 20))
    worker.run()
    assert worker.ledger.last["b"].cached_tokens == 8
    assert worker.ledger.tokens["a"] == worker.ledger.tokens["b"]


def test_without_the_radix_cache_nothing_is_shared() -> None:
    worker = Worker(shared=False)
    for rid in "ab":
        worker.add(submit(rid, range(9), 2))
        worker.run()
    assert worker.ledger.last["b"].cached_tokens == 0
    assert worker.cache.num_free == worker.cache.num_pages


# -- policies ----------------------------------------------------------------------------------------------------------


def fill(worker: Worker, prompt: range) -> None:
    worker.add(submit("fill", prompt, 1))
    worker.run()
    worker.ledger.tokens.clear()


def test_fcfs_keeps_the_order_of_arrival() -> None:
    worker = Worker(max_running_requests=1)
    for rid in "cab":
        worker.add(submit(rid, [1, 2], 2))
    assert order_of_first_tokens(worker) == ["c", "a", "b"]


def test_lpm_takes_the_longest_cached_prefix_first() -> None:
    worker = Worker(policy="lpm", max_running_requests=1)
    fill(worker, range(40))
    for rid, prompt in (("none", range(60, 90)), ("short", [*range(8), 99]), ("long", range(40))):
        worker.add(submit(rid, prompt, 1))
    assert order_of_first_tokens(worker) == ["long", "short", "none"]


def test_lpm_holds_back_a_prompt_that_another_one_will_cache() -> None:
    worker = Worker(policy="lpm", max_running_requests=1, num_pages=200)
    for rid, prompt in (("a1", range(40)), ("a2", range(40)), ("b", range(100, 140))):
        worker.add(submit(rid, prompt, 1))
    assert order_of_first_tokens(worker) == ["a1", "a2", "b"] or worker.ledger.last["a2"].cached_tokens > 0
    # All three in one step: the twin goes last, so that a step with room for two computes no prefix twice.
    worker = Worker(policy="lpm", max_running_requests=2, num_pages=200)
    for rid, prompt in (("a1", range(40)), ("a2", range(40)), ("b", range(100, 140))):
        worker.add(submit(rid, prompt, 1))
    assert order_of_first_tokens(worker) == ["a1", "b", "a2"]
    assert worker.ledger.last["a2"].cached_tokens == 36


def test_lpm_falls_back_to_fcfs_when_the_queue_is_long() -> None:
    worker = Worker(policy="lpm", max_running_requests=1)
    fill(worker, range(8))
    for i in range(LPM_MAX_QUEUE):
        worker.add(submit(f"r{i}", [50 + i % 40, i], 1))
    worker.add(submit("cached", range(8), 1))
    assert order_of_first_tokens(worker)[0] == "r0"


def test_lof_takes_the_longest_output_first() -> None:
    worker = Worker(policy="lof", max_running_requests=1)
    for rid, size in (("a", 2), ("b", 9), ("c", 5)):
        worker.add(submit(rid, [1, 2], size))
    assert order_of_first_tokens(worker) == ["b", "c", "a"]


@pytest.mark.parametrize(("low_first", "expected"), [(False, ["b", "c", "a"]), (True, ["a", "c", "b"])])
def test_priorities_come_before_arrival(low_first: bool, expected: list[str]) -> None:
    worker = Worker(max_running_requests=1, enable_priority=True, low_priority_values_first=low_first)
    for rid, priority in (("a", 0), ("b", 7), ("c", 3)):
        worker.add(submit(rid, [1, 2], 2, priority=priority))
    assert order_of_first_tokens(worker) == expected


def test_no_policy_lets_a_request_starve() -> None:
    worker = Worker(policy="lpm", max_running_requests=1)
    fill(worker, range(8))
    worker.add(submit("uncached", range(60, 70), 1))
    for i in range(MAX_BYPASSED + 20):
        worker.add(submit(f"r{i}", range(8), 1))
    assert order_of_first_tokens(worker).index("uncached") == MAX_BYPASSED


def test_a_small_request_may_pass_one_that_does_not_fit_but_not_for_ever() -> None:
    worker = Worker(num_pages=16, page_size=4)
    worker.add(submit("running", range(30), 24))
    worker.step()
    worker.add(submit("large", range(100, 130), 10))
    small = [f"s{i}" for i in range(2 * MAX_BYPASSED)]
    for rid in small:
        worker.add(submit(rid, [1, 2], 1))
    order = order_of_first_tokens(worker)
    assert order[1] == "s0"
    assert order.index("large") <= 2 + MAX_BYPASSED


def test_a_request_that_did_not_fit_is_admitted_once_another_has_ended() -> None:
    worker = Worker(num_pages=8, page_size=4)
    worker.add(submit("a", range(16), 8))
    worker.step()
    worker.add(submit("b", range(100, 116), 8))
    for _ in range(RETRY_STEPS // 4):
        worker.step()
    assert worker.state_of("b") == "waiting"
    worker.run()
    assert worker.ledger.tokens["b"] == oracle(list(range(100, 116)), 8)


# -- retraction --------------------------------------------------------------------------------------------------------


def test_when_pages_run_out_the_request_with_fewest_tokens_goes_back_and_loses_none() -> None:
    worker = Worker(num_pages=12, page_size=2, schedule_conservativeness=0.0)
    worker.add(submit("old", range(4), 16))
    for _ in range(3):
        worker.step()
    worker.add(submit("young", range(50, 54), 10))
    seen: set[str] = set()
    while worker.step():
        seen |= {req.rid for req in worker.scheduler._at.waiting if req.num_retractions}
    assert seen == {"young"}
    assert worker.ledger.tokens == {"old": oracle(list(range(4)), 16), "young": oracle(list(range(50, 54)), 10)}
    assert worker.ledger.last["young"].num_retractions >= 1
    assert worker.ledger.last["old"].num_retractions == 0
    assert worker.scheduler.state().num_retracted_total >= 1


def test_among_equals_the_longest_prompt_goes_back_first() -> None:
    worker = Worker(num_pages=16, page_size=1, schedule_conservativeness=0.0)
    worker.add(submit("short", [1], 12))
    worker.add(submit("long", range(20, 24), 12))
    while worker.scheduler.state().num_retracted_total == 0:
        worker.step()
    assert worker.state_of("long") == "waiting"
    worker.run()
    assert worker.ledger.finishes == {"short": Finish("length"), "long": Finish("length")}


def test_a_request_that_the_whole_pool_cannot_hold_ends_with_an_error() -> None:
    worker = Worker(num_pages=4, page_size=4)
    worker.add(submit("a", range(10), 100))
    worker.add(submit("b", [1, 2], 3))
    worker.run()
    error = worker.ledger.finishes["a"].error
    assert error is not None and error.code == 500 and error.type == "OutOfPagesError"
    assert "fills this worker's cache of 16 tokens alone" in error.message
    assert worker.ledger.tokens["a"] == oracle(list(range(10)), 7)
    assert worker.ledger.tokens["b"] == oracle([1, 2], 3)


def test_the_expected_output_falls_with_steps_and_jumps_with_a_retraction() -> None:
    ratio = NewTokenRatio(1.0)
    assert ratio.value == pytest.approx(0.7)
    for _ in range(1000):
        ratio.on_decode_step()
    assert ratio.value == pytest.approx(0.7 * 0.14)
    worker = Worker()
    for rid in "ab":
        worker.add(submit(rid, [1, 2], 50))
    for _ in range(11):
        worker.step()
    ratio.on_retraction(worker.scheduler._at.decode.requests)
    assert ratio.value == pytest.approx((22 + 20 * 2) / 101)
    ratio.on_idle()
    assert ratio.value == pytest.approx(0.7)


def test_a_retraction_leaves_room_for_more_than_the_next_step() -> None:
    worker = Worker(num_pages=32, page_size=1, schedule_conservativeness=0.0)
    for rid, prompt in (("a", [1]), ("b", [2, 3]), ("c", [4, 5, 6])):
        worker.add(submit(rid, prompt, 25))
    retractions = []
    while worker.step():
        retractions.append(worker.scheduler.state().num_retracted_total)
    # The longest prompt goes; what it held is too little for 20 steps of the other two, so the second goes as well.
    assert retractions[retractions.index(2) - 1] == 0
    assert {rid: len(tokens) for rid, tokens in worker.ledger.tokens.items()} == {"a": 25, "b": 25, "c": 25}


def test_requests_of_one_step_reserve_room_for_each_other() -> None:
    worker = Worker(num_pages=8, page_size=4)
    for rid in "ab":
        worker.add(submit(rid, [ord(rid)], 20))
    assert len(step_lens(worker)) == 1


def test_steps_lower_the_expected_output_and_idling_restores_it() -> None:
    worker = Worker()
    worker.add(submit("a", [1], 12))
    worker.step()
    before = worker.scheduler.state().new_token_ratio
    for _ in range(10):
        worker.step()
    assert worker.scheduler.state().new_token_ratio == pytest.approx(before - 10 * 0.7 * 0.86 / 600)
    worker.run()
    assert worker.scheduler.state().new_token_ratio == before == pytest.approx(0.7)


def test_max_prefill_tokens_bounds_chunks_too() -> None:
    worker = Worker(chunked_prefill_size=16, max_prefill_tokens=8)
    worker.add(submit("a", range(20), 1))
    assert [step_lens(worker) for _ in range(3)] == [[8], [8], [4]]
