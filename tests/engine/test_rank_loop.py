"""The rank's loop over a runner without a model: steps in flight, and steps that fail."""

from collections.abc import Sequence
from random import Random

import pytest
from tests.fakes.paged_runner import PagedRunner, oracle

from baton.engine.assemble import Engine
from baton.engine.batch import ForwardBatch
from baton.engine.rank import RankLoop
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.scheduler import Scheduler
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.rank import Abort, FlushCache, FromRank, Reply, RequestOutput, StepOutput, Submit, ToRank
from baton.protocol.sampling import SamplingParams

PAGE_SIZE = 4


class _OverError(Exception):
    pass


class Script:
    """A channel that brings the next messages each time the loop asks, until none are left and it would sleep."""

    def __init__(self, *messages: Sequence[ToRank]) -> None:
        self._messages = list(messages)
        self.sent: list[FromRank] = []

    def receive(self, timeout_s: float | None) -> Sequence[ToRank]:
        if self._messages:
            return self._messages.pop(0)
        if timeout_s == 0.0:
            return []
        raise _OverError

    def send(self, message: FromRank) -> None:
        self.sent.append(message)

    def outputs(self, rid: str) -> list[RequestOutput]:
        steps = [message for message in self.sent if isinstance(message, StepOutput)]
        return [output for step in steps for output in step.outputs if output.rid == rid]


class FailingRunner(PagedRunner):
    """Has no memory for a step of more than 8 tokens."""

    def submit(self, batch: ForwardBatch) -> None:
        if len(batch.token_ids) > 8:
            raise RuntimeError("out of memory")
        super().submit(batch)


def run(script: Script, runner: PagedRunner, **config: int) -> None:
    """Until the loop would sleep."""
    settings = SchedulerConfig(context_len=200, **config)
    scheduler = Scheduler(settings, PrefixCache(64, PAGE_SIZE), Random(0))
    engine = Engine(scheduler, runner, None, None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(_OverError):
        RankLoop(engine, script).run()  # type: ignore[arg-type]


def request(rid: str, prompt: range, num_tokens: int) -> Submit:
    return Submit(rid=rid, input_ids=list(prompt), sampling=SamplingParams(max_new_tokens=num_tokens))


def test_the_runner_gets_as_many_steps_as_it_takes() -> None:
    depths = []

    class Runner(PagedRunner):
        def submit(self, batch: ForwardBatch) -> None:
            super().submit(batch)
            depths.append(len(self.in_flight))

    script = Script([request("a", range(40), 3)])
    run(script, Runner(PAGE_SIZE), pipeline_depth=3, chunked_prefill_size=8)
    assert max(depths) == 3
    assert [token for output in script.outputs("a") for token in output.token_ids] == oracle(list(range(40)), 3)


def test_a_cache_can_be_flushed_right_after_an_abort() -> None:
    """Although a step of the request is in flight."""
    script = Script([request("a", range(60), 3)], [Abort("a", "gone"), FlushCache(7)])
    run(script, PagedRunner(PAGE_SIZE), pipeline_depth=2, chunked_prefill_size=8)
    (reply,) = (message for message in script.sent if isinstance(message, Reply))
    assert (reply.call_id, reply.ok) == (7, True)
    finish = script.outputs("a")[-1].finish
    assert finish is not None and finish.type == "abort"


def test_a_step_that_fails_ends_its_requests_and_the_loop_goes_on_with_others() -> None:
    script = Script([request("long", range(60, 72), 3), request("short", range(8), 3)])
    run(script, FailingRunner(PAGE_SIZE), chunked_prefill_size=12)
    finish = script.outputs("long")[-1].finish
    assert finish is not None and finish.error is not None
    assert finish.error.message == "the model step failed: out of memory"
    assert [token for output in script.outputs("short") for token in output.token_ids] == oracle(list(range(8)), 3)
