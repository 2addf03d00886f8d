"""What one client is told: refusals, ends, limits, time-outs, log-probabilities, seeds."""

import itertools
from typing import Any

import pytest
from tests.fakes.paged_runner import SEED_STATE, advance, logprobs_of, next_token, oracle
from tests.scheduler.machine import Worker, submit

from baton.engine.scheduler.config import SchedulerConfig, SchedulerConfigError
from baton.engine.scheduler.intake import build_request
from baton.engine.scheduler.request import LEGAL_TRANSITIONS, Status
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import Finish, TokenLogprobs

PROMPT = [1, 2, 3, 4, 5, 6]


def error_of(worker: Worker, rid: str) -> ErrorInfo:
    error = worker.ledger.finishes[rid].error
    assert error is not None
    return error


def test_a_request_gets_the_tokens_of_its_oracle_and_one_finish() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT, 5))
    worker.run()
    assert worker.ledger.tokens["a"] == oracle(PROMPT, 5)
    assert worker.ledger.finishes["a"] == Finish("length")
    assert worker.scheduler.is_idle


@pytest.mark.parametrize(
    ("request_fields", "config", "code", "message", "param"),
    [
        ({"prompt": []}, {}, 400, "The input has no tokens.", "input_ids"),
        (
            {"prompt": range(20)},
            {"context_len": 20},
            400,
            "The input (20 tokens) is longer than the model's context length (20 tokens).",
            "input_ids",
        ),
        (
            {"prompt": range(17)},
            {"num_pages": 4},
            400,
            "The input (17 tokens) is larger than this worker's KV cache (16 tokens).",
            "input_ids",
        ),
        (
            {"prompt": range(4), "return_logprob": True, "logprob_start_len": 4},
            {},
            400,
            "logprob_start_len (4) is not below the number of input tokens (4).",
            "logprob_start_len",
        ),
        (
            {"prompt": range(4)},
            {"mode": "prefill"},
            400,
            "Invalid request: Disaggregated request received without boostrap room id. req.rid='a'",
            "bootstrap_room",
        ),
        (
            {"prompt": range(4)},
            {"mode": "decode"},
            400,
            "Invalid request: Disaggregated request received without boostrap room id. req.rid='a'",
            "bootstrap_room",
        ),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(
    request_fields: dict[str, Any], config: dict[str, Any], code: int, message: str, param: str
) -> None:
    worker = Worker(**config)
    worker.add(submit("a", **request_fields))
    error = error_of(worker, "a")
    assert (error.code, error.message, error.param, error.retryable) == (code, message, param, False)
    assert worker.scheduler.is_idle


def test_a_full_queue_answers_503_that_may_be_retried_elsewhere() -> None:
    worker = Worker(max_queued_requests=2)
    for rid in "abc":
        worker.add(submit(rid, PROMPT))
    error = error_of(worker, "c")
    assert (error.code, error.type, error.retryable) == (503, "ServiceUnavailableError", True)
    worker.run()
    assert worker.ledger.finishes.keys() == {"a", "b", "c"}


def test_a_rid_that_is_live_is_not_taken_twice() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT))
    with pytest.raises(ValueError, match="'a' is in use"):
        worker.add(submit("a", PROMPT))
    worker.run()
    worker.ledger.finishes.clear()
    worker.add(submit("a", PROMPT))


def test_no_new_tokens_still_computes_the_prompt() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT, 0, return_logprob=True, logprob_start_len=0))
    worker.run()
    assert worker.ledger.tokens["a"] == []
    assert worker.ledger.finishes["a"] == Finish("length")
    assert [entry.token_id for entry in worker.ledger.input_logprobs["a"]] == PROMPT
    assert worker.runner.num_tokens == len(PROMPT)


def test_without_a_limit_the_context_is_one() -> None:
    worker = Worker(context_len=20)
    worker.add(submit("a", PROMPT, None))
    worker.add(submit("b", PROMPT, 1000))
    worker.run()
    for rid in "ab":
        assert worker.ledger.tokens[rid] == oracle(PROMPT, 14)
        assert worker.ledger.finishes[rid] == Finish("length")


@pytest.mark.parametrize("index", [0, 3])
def test_end_of_sequence_and_stop_ids(index: int) -> None:
    stop = oracle(PROMPT, 4)[index]
    first = oracle(PROMPT, 4).index(stop)
    worker = Worker(eos_token_ids=(stop,))
    worker.add(submit("eos", PROMPT, 10))
    worker.add(submit("ignored", PROMPT, 10, ignore_eos=True))
    worker.add(submit("id", PROMPT, 10, ignore_eos=True, stop_token_ids=[stop]))
    worker.run()
    for rid in ("eos", "id"):
        assert worker.ledger.finishes[rid] == Finish("stop", matched=stop)
        assert worker.ledger.tokens[rid] == oracle(PROMPT, first + 1)
    assert worker.ledger.finishes["ignored"] == Finish("length")
    assert len(worker.ledger.tokens["ignored"]) == 10


def test_before_min_new_tokens_stops_are_not_drawn() -> None:
    stop = next_token(PROMPT)
    worker = Worker(eos_token_ids=(stop,))
    worker.add(submit("a", PROMPT, 8, min_new_tokens=5))
    worker.run()
    assert worker.ledger.tokens["a"] == oracle(PROMPT, 8, frozenset({stop}), min_new=5)
    assert stop not in worker.ledger.tokens["a"][:5]


def test_a_resumed_request_goes_on_behind_its_tokens() -> None:
    whole = oracle(PROMPT, 10)
    worker = Worker()
    worker.add(submit("a", PROMPT, 10, output_ids=whole[:4]))
    worker.run()
    assert worker.ledger.tokens["a"] == whole[4:]


def test_a_resumed_request_that_was_done_ends_at_once() -> None:
    worker = Worker(eos_token_ids=(9,))
    worker.add(submit("limit", PROMPT, 2, output_ids=[7, 8]))
    worker.add(submit("stop", PROMPT, 5, output_ids=[7, 9]))
    assert worker.ledger.finishes == {"limit": Finish("length"), "stop": Finish("stop", matched=9)}
    assert not worker.step()


def test_abort_at_each_stage_ends_with_the_reason() -> None:
    for steps in range(4):
        worker = Worker(chunked_prefill_size=4)
        worker.add(submit("a", PROMPT, 9))
        for _ in range(steps):
            worker.step()
        worker.scheduler.abort("a", "client went away", worker.now)
        worker.scheduler.check_integrity()
        worker.run()
        error = error_of(worker, "a")
        assert (error.code, error.message, error.request_id) == (499, "client went away", "a")
        assert error.stage == ("server", "prefill", "decode", "decode")[steps]
        assert worker.ledger.tokens["a"] == oracle(PROMPT, max(0, steps - 1))
        assert worker.scheduler.flush_cache() and worker.cache.num_free == worker.cache.num_pages


def test_an_abort_for_a_stop_string_is_a_finish_and_keeps_the_prefix() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT, 50))
    for _ in range(7):
        worker.step()
    worker.scheduler.abort("a", "", worker.now, matched_stop="END")
    worker.run()
    assert worker.ledger.finishes["a"] == Finish("stop", matched="END")
    worker.add(submit("b", PROMPT + worker.ledger.tokens["a"], 1))
    worker.run()
    assert worker.ledger.last["b"].cached_tokens == 12  # 13 tokens, of which the last was never computed; whole pages


def test_an_unknown_rid_is_ignored() -> None:
    worker = Worker()
    worker.scheduler.abort("nobody", "x", 0.0)
    assert worker.scheduler.drain_outputs(0.0) == []


def test_a_deadline_ends_a_request_where_it_is() -> None:
    worker = Worker(max_running_requests=1)
    worker.add(submit("runs", PROMPT, 100, timeout_s=0.5))
    worker.add(submit("waits", PROMPT, 100, timeout_s=0.25))
    assert worker.scheduler.next_deadline() == 0.25
    worker.step()
    worker.now = 0.3
    worker.step()
    error = error_of(worker, "waits")
    assert (error.code, error.type, error.stage) == (504, "TimeoutError", "server")
    assert error.message == "The request did not finish within its 0.25 s; it was waiting."
    assert worker.scheduler.next_deadline() == 0.5
    outputs = worker.scheduler.drain_outputs(0.5)
    assert [(o.rid, o.finish and o.finish.error and o.finish.error.stage) for o in outputs] == [("runs", "decode")]
    assert worker.scheduler.next_deadline() is None
    assert worker.scheduler.is_idle


def test_log_probabilities_come_from_the_right_context() -> None:
    worker = Worker(chunked_prefill_size=4)
    worker.add(submit("first", PROMPT, 1))
    worker.run()
    worker.add(submit("a", PROMPT, 3, return_logprob=True, logprob_start_len=2))
    worker.run()
    states = list(itertools.accumulate(PROMPT + oracle(PROMPT, 3), advance, initial=SEED_STATE))
    tokens = PROMPT + worker.ledger.tokens["a"]
    expected = [logprobs_of(states[p], tokens[p]) for p in range(len(tokens))]
    assert worker.ledger.input_logprobs["a"] == expected[2:6]
    assert worker.ledger.logprobs["a"] == expected[6:]


def test_the_first_prompt_token_has_no_log_probability() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT, 1, return_logprob=True, logprob_start_len=0))
    worker.run()
    assert worker.ledger.input_logprobs["a"][0] == TokenLogprobs(1, None)
    assert len(worker.ledger.input_logprobs["a"]) == len(PROMPT)


def test_a_cached_prefix_is_computed_again_where_its_log_probabilities_are_wanted() -> None:
    worker = Worker()
    for rid, start in (("fill", -1), ("late", 5), ("early", 3)):
        worker.add(submit(rid, PROMPT, 1, return_logprob=True, logprob_start_len=start))
        worker.run()
    assert worker.ledger.last["late"].cached_tokens == 4
    assert worker.ledger.last["early"].cached_tokens == 0


def test_a_full_prefix_hit_computes_one_token_at_least() -> None:
    worker = Worker(page_size=1)
    for rid in "ab":
        worker.add(submit(rid, PROMPT, 3))
        worker.run()
    assert worker.ledger.last["b"].cached_tokens == len(PROMPT) - 1
    assert worker.ledger.tokens["b"] == worker.ledger.tokens["a"]


def test_the_extra_key_isolates() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT, 1, extra_key="tenant"))
    worker.run()
    for rid, key, cached in (("b", None, 0), ("c", "other", 0), ("d", "tenant", 4)):
        worker.add(submit(rid, PROMPT, 1, extra_key=key))
        worker.run()
        assert worker.ledger.last[rid].cached_tokens == cached


def test_seeds_are_the_requests_own_or_drawn_once() -> None:
    worker = Worker()
    worker.add(submit("own", PROMPT, 3, seed=-5))
    worker.add(submit("drawn", PROMPT, 3))
    seeds: dict[int, set[int]] = {0: set(), 1: set()}
    while (batch := worker.scheduler.schedule(0.0)) is not None:
        for row in batch.samples:
            seeds[row.seq_idx].add(row.seed)
        worker.scheduler.apply(worker.runner.run(batch), 0.0)
    assert seeds[0] == {-5}
    assert len(seeds[1]) == 1


def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    worker = Worker(max_running_requests=1)
    worker.add(submit("bad", PROMPT))
    worker.add(submit("good", PROMPT))
    assert worker.scheduler.schedule(0.0) is not None
    worker.ledger.take(worker.scheduler.fail_step(ErrorInfo("InternalError", 500, "device lost", "prefill"), 0.0))
    assert error_of(worker, "bad").message == "device lost"
    worker.run()
    assert worker.ledger.tokens["good"] == oracle(PROMPT, 4)


def test_flush_is_refused_while_busy() -> None:
    worker = Worker()
    worker.add(submit("a", PROMPT))
    assert not worker.scheduler.flush_cache()
    worker.run()
    assert worker.cache.num_evictable > 0
    assert worker.scheduler.flush_cache()
    assert worker.cache.num_free == worker.cache.num_pages


def test_state_counts_requests_and_pages() -> None:
    worker = Worker(max_running_requests=1, num_pages=8)
    worker.add(submit("a", PROMPT, 30))
    worker.add(submit("b", PROMPT))
    worker.step()
    state = worker.scheduler.state()
    assert (state.num_running, state.num_waiting, state.max_total_num_tokens) == (1, 1, 32)
    assert (state.free_pages, state.protected_pages, state.in_use_pages, state.num_used_tokens) == (6, 1, 1, 8)
    for _ in range(5):
        worker.now += 0.5
        worker.step()
    assert worker.scheduler.state().gen_throughput == pytest.approx(1 / 0.51, rel=0.01)


def test_statuses_move_only_along_the_table() -> None:
    assert LEGAL_TRANSITIONS.keys() == set(Status)
    worker = Worker()
    for start, end in itertools.product(Status, Status):
        req = build_request(submit("a", PROMPT), worker.scheduler.config, 100, worker.scheduler._rng, 0, 0.0)
        req.status = start
        if end in LEGAL_TRANSITIONS[start]:
            req.move_to(end)
            assert req.status is end
        else:
            with pytest.raises(AssertionError, match=f"illegal move {start.name} -> {end.name}"):
                req.move_to(end)


def test_bad_settings_are_all_named_at_once() -> None:
    with pytest.raises(SchedulerConfigError) as caught:
        SchedulerConfig(context_len=0, policy="dfs-weight", chunked_prefill_size=0)  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    assert lines[0] == "context_len must be positive, got 0"
    assert lines[1] == "schedule_policy 'dfs-weight' is not supported; use one of fcfs, lpm, random, lof"
    assert lines[2] == "chunked_prefill_size must be positive, got 0"
