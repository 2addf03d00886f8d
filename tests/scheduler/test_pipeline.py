"""Several steps in flight, as a pipeline of stages needs them: who is in which, and what waits until a step was applied."""

from collections import deque

import pytest
from tests.fakes.paged_runner import oracle
from tests.scheduler.machine import STEP_ERROR, Pair, Worker, submit

from baton.engine.batch import ForwardBatch, ForwardOutput
from baton.engine.scheduler.config import SchedulerConfig, SchedulerConfigError


def begin(worker: Worker) -> list[int]:
    """Begin as many steps as may be in flight; how many tokens each has."""
    sizes = []
    while (batch := worker.begin_step()) is not None:
        sizes.append(len(batch.token_ids))
    return sizes


def decoding(worker: Worker, *rids: str, num_tokens: int = 30) -> None:
    """Bring requests to where each has its first token and no step is in flight."""
    for i, rid in enumerate(rids):
        worker.add(submit(rid, range(10 * i, 10 * i + 3), num_tokens))
        worker.begin_step()
        worker.end_step()
    assert [worker.state_of(rid) for rid in rids] == ["running"] * len(rids)


def test_the_chunks_of_a_prompt_follow_each_other_without_waiting() -> None:
    worker = Worker(pipeline_depth=3, chunked_prefill_size=8)
    worker.add(submit("a", range(36), 2))
    assert begin(worker) == [8, 8, 8]
    worker.end_step()
    assert begin(worker) == [8]
    worker.end_step()
    assert begin(worker) == [4]
    assert worker.ledger.tokens == {}
    worker.run()
    assert worker.ledger.tokens == {"a": oracle(list(range(36)), 2)}


def test_running_requests_are_spread_over_the_steps_in_flight() -> None:
    worker = Worker(200, pipeline_depth=3)
    decoding(worker, *"abcdefgh")
    assert begin(worker) == [3, 3, 2]
    for _ in range(6):
        worker.end_step()
        begin(worker)
    # Six steps ended, two rounds: everybody has the same number of tokens.
    assert {len(tokens) for tokens in worker.ledger.tokens.values()} == {3}


def test_those_that_waited_longest_go_first() -> None:
    worker = Worker(pipeline_depth=2)
    decoding(worker, *"abcd")
    for _ in range(6):
        worker.begin_step()
        worker.end_step()
    assert {len(tokens) for tokens in worker.ledger.tokens.values()} == {4}


def test_a_worker_is_not_idle_while_a_prompt_is_in_flight() -> None:
    """An idle one forgets how much output it expected."""
    worker = Worker(pipeline_depth=2)
    decoding(worker, "a", num_tokens=5)
    for _ in range(3):
        worker.begin_step()
        worker.end_step()
    ratio = worker.scheduler.state().new_token_ratio
    worker.begin_step()
    worker.add(submit("b", [50], 2))
    worker.begin_step()
    worker.end_step()
    assert worker.ledger.finishes["a"].type == "length"
    assert worker.begin_step() is None
    assert worker.scheduler.state().new_token_ratio < ratio


def test_a_new_request_does_not_wait_for_a_round_and_nobody_waits_for_two() -> None:
    worker = Worker(pipeline_depth=2)
    decoding(worker, *"abcd")
    assert begin(worker) == [2, 2]
    worker.add(submit("new", [70, 71], 30))
    worker.end_step()
    assert begin(worker) == [2]
    worker.end_step()
    worker.end_step()
    for _ in range(20):
        begin(worker)
        worker.end_step()
    counts = [len(worker.ledger.tokens[rid]) for rid in "abcd"]
    assert max(counts) - min(counts) <= 1


def test_an_abort_waits_for_the_last_step_of_its_request_and_for_no_other() -> None:
    worker = Worker(pipeline_depth=3, chunked_prefill_size=8)
    worker.add(submit("a", range(60), 2))
    assert begin(worker) == [8, 8, 8]
    worker.scheduler.abort("a", "gone", worker.now)
    worker.add(submit("b", range(70, 75), 2))
    for _ in range(2):
        worker.end_step()
        assert "a" not in worker.ledger.finishes
        assert begin(worker) == []  # no further chunk of it
    worker.end_step()
    finish = worker.ledger.finishes["a"]
    assert finish.type == "abort" and finish.error is not None and finish.error.message == "gone"
    worker.run()
    assert worker.ledger.tokens["b"] == oracle(list(range(70, 75)), 2)
    assert worker.scheduler.flush_cache() and worker.cache.num_free == worker.cache.num_pages


def test_an_abort_of_a_request_that_is_in_no_step_waits_for_nothing() -> None:
    worker = Worker(pipeline_depth=2, max_running_requests=1)
    decoding(worker, "a")
    worker.add(submit("b", [50], 2))
    assert begin(worker) == [1]
    worker.scheduler.abort("b", "gone", worker.now)
    worker.ledger.take(worker.scheduler.drain_outputs(worker.now))
    assert worker.ledger.finishes["b"].type == "abort"


def test_a_deadline_that_comes_while_a_step_is_in_flight() -> None:
    worker = Worker(pipeline_depth=2)
    worker.add(submit("a", [1, 2, 3], 30, timeout_s=1.0))
    begin(worker)
    worker.now = 2.0
    worker.ledger.take(worker.scheduler.drain_outputs(worker.now))
    assert worker.ledger.finishes == {}
    worker.end_step()
    error = worker.ledger.finishes["a"].error
    assert error is not None and (error.type, error.code) == ("TimeoutError", 504)
    assert worker.scheduler.is_idle


def test_pages_that_another_request_shared_first_are_kept_for_the_steps_that_use_them() -> None:
    """Both compute the same prompt; the second one's pages are given up while its next chunk reads them."""
    worker = Worker(pipeline_depth=4, chunked_prefill_size=12, page_size=4, max_prefill_tokens=12)
    prompt = list(range(20))
    worker.add(submit("a", prompt[:12], 2))
    worker.add(submit("b", prompt, 2))
    assert begin(worker) == [12, 12, 8]
    free = worker.cache.num_free
    worker.end_step()
    worker.end_step()
    assert worker.cache.num_free == free
    worker.end_step()
    assert worker.cache.num_free == free + 3
    worker.run()
    assert worker.ledger.tokens == {"a": oracle(prompt[:12], 2), "b": oracle(prompt, 2)}


def test_when_pages_run_out_nobody_leaves_before_the_steps_in_flight_were_applied() -> None:
    worker = Worker(num_pages=8, page_size=1, pipeline_depth=2, schedule_conservativeness=0.0)
    decoding(worker, "a", "b", num_tokens=3)
    assert begin(worker) == [1, 1]
    worker.end_step()
    assert begin(worker) == []  # no page is left for a's next token
    assert worker.scheduler.state().num_retracted_total == 0
    worker.end_step()
    assert begin(worker) == [1]
    assert worker.scheduler.state().num_retracted_total == 1
    worker.run()
    assert worker.ledger.tokens == {"a": oracle([0, 1, 2], 3), "b": oracle([10, 11, 12], 3)}


def test_a_worker_of_a_pair_hands_over_the_chunks_that_were_applied() -> None:
    pair = Pair(
        Worker(mode="prefill", pipeline_depth=3, chunked_prefill_size=8), Worker(mode="decode", pipeline_depth=2)
    )
    prompt = list(range(30))
    for worker in (pair.prefill, pair.decode):
        worker.add(submit("a", prompt, 5, room=7))
    pair.decode.step()
    pair.prefill.step()
    pair.pump_actions()
    pair.deliver()
    assert begin(pair.prefill) == [8, 8, 8]
    for num_pages in (2, 4):
        pair.prefill.end_step()
        pair.pump_actions()
        assert sum(len(sent.page_ids) for sent in pair.sends[7]) == num_pages
    pair.run()
    assert pair.decode.ledger.tokens == {"a": oracle(prompt, 5)}


def test_a_step_that_failed_ends_its_requests_and_no_others() -> None:
    worker = Worker(pipeline_depth=3, chunked_prefill_size=8)
    worker.add(submit("a", range(20), 2))
    worker.add(submit("b", range(50, 53), 2))
    assert begin(worker) == [8, 8, 7]
    worker.end_step(fails=True)
    assert worker.ledger.finishes == {}  # two more of its chunks are in flight
    worker.run()
    error = worker.ledger.finishes["a"].error
    assert error is not None and error.message == STEP_ERROR.message
    assert worker.ledger.tokens["b"] == oracle([50, 51, 52], 2)
    # Nothing that was computed behind the failed chunk can be found.
    worker.add(submit("again", range(20), 2))
    worker.run()
    assert worker.ledger.last["again"].cached_tokens == 0
    assert worker.ledger.tokens["again"] == oracle(list(range(20)), 2)


def test_a_pipeline_without_a_step_is_refused() -> None:
    with pytest.raises(SchedulerConfigError, match="pipeline_depth"):
        SchedulerConfig(context_len=10, pipeline_depth=0)


# -- a pipeline on a virtual clock -------------------------------------------------------------------------------------


class Stages:
    """Stages that take as long as they have tokens to compute, and a constant; the first one is where steps begin."""

    def __init__(self, num_stages: int, step_s: float, token_s: float) -> None:
        self._step_s, self._token_s = step_s, token_s
        self._free_at = [0.0] * num_stages
        self._in_flight: deque[tuple[ForwardBatch, float]] = deque()
        self.busy_s = 0.0

    def submit(self, batch: ForwardBatch, now: float) -> float:
        """When the first stage is done with it."""
        took = self._step_s + self._token_s * len(batch.token_ids)
        arrived = now
        for stage, free_at in enumerate(self._free_at):
            arrived = self._free_at[stage] = max(arrived, free_at) + took
        self._in_flight.append((batch, arrived))
        self.busy_s += took * len(self._free_at)
        return now + took

    def collect(self, now: float) -> tuple[ForwardOutput, float]:
        """The oldest step's tokens, and when they are here."""
        batch, arrived = self._in_flight.popleft()
        count = len(batch.samples)
        return ForwardOutput([7] * count, [None] * count, []), max(now, arrived)


def busy_share(worker: Worker, num_stages: int, step_s: float, token_s: float) -> float:
    """Run everything as the rank's loop does; how much of the time the stages computed."""
    stages, scheduler, now = Stages(num_stages, step_s, token_s), worker.scheduler, 0.0
    while not scheduler.is_idle:
        while (batch := scheduler.schedule(now)) is not None:
            now = stages.submit(batch, now)
        output, now = stages.collect(now)
        scheduler.apply(output, now)
    return stages.busy_s / (num_stages * now)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_long_prompt_keeps_all_stages_busy(num_stages: int) -> None:
    def prefill(depth: int) -> float:
        worker = Worker(400, pipeline_depth=depth, chunked_prefill_size=16, context_len=2000)
        worker.add(submit("a", range(1024), 1))
        return busy_share(worker, num_stages, 1.0, 0.1)

    assert prefill(1) == pytest.approx(1 / num_stages)
    assert prefill(num_stages) > 0.95


@pytest.mark.parametrize("num_stages", [2, 4])
def test_requests_that_decode_keep_all_stages_busy(num_stages: int) -> None:
    """Also where they came all at once, in one prefill, and end at different times."""

    def decode(depth: int) -> float:
        worker = Worker(800, pipeline_depth=depth)
        for i in range(24):
            worker.add(submit(str(i), [i, i + 1], 60 + i))
        return busy_share(worker, num_stages, 1.0, 0.1)

    assert decode(1) == pytest.approx(1 / num_stages)
    assert decode(num_stages) > 0.9


def test_prompts_and_decoding_in_turns_keep_all_stages_busy() -> None:
    worker = Worker(1600, pipeline_depth=4, chunked_prefill_size=16, context_len=2000, enable_mixed_chunk=True)
    for i in range(16):
        worker.add(submit(str(i), range(50 * i, 50 * i + 100), 40))
    assert busy_share(worker, 4, 1.0, 0.1) > 0.9
