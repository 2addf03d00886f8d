"""Random requests, aborts, time-outs, tiny pools and transfer failures: after every step each page has one owner, in the
end each request has one finish, and whoever finished has exactly the tokens that it would have had alone."""

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.fakes.paged_runner import oracle
from tests.scheduler.machine import Pair, Worker, submit

from baton.protocol.rank import Submit

# Prompts from few pieces, so that prefixes are shared.
PROMPTS = st.lists(st.sampled_from([[1], [2, 3], [1, 2, 3, 4], [5] * 7]), min_size=1, max_size=5).map(
    lambda pieces: [token for piece in pieces for token in piece]
)
EOS = 13


def requests(rid: str, room: int | None) -> st.SearchStrategy[Submit]:
    return st.builds(
        submit,
        st.just(rid),
        PROMPTS,
        st.sampled_from([0, 1, 2, 5, 9, 14, 20, None]),
        room=st.just(room),
        extra_key=st.sampled_from([None, None, "salt"]),
        output_ids=st.sampled_from([[], [], [], [20, 21]]),
        ignore_eos=st.booleans(),
        timeout_s=st.sampled_from([None] * 8 + [0.05, 1.0]),
        return_logprob=st.sampled_from([False, False, True]),
        logprob_start_len=st.sampled_from([-1, 0, 1, 5]),
        priority=st.integers(0, 2),
    )


TIERS = st.fixed_dictionaries(
    {
        "host_pages": st.sampled_from([3, 30, 200]),
        "has_store": st.booleans(),
        "write_policy": st.sampled_from(["write_through", "write_through_selective", "write_back"]),
        "prefetch_policy": st.sampled_from(["best_effort", "wait_complete", "timeout"]),
        "prefetch_threshold": st.sampled_from([1, 8]),
        "load_back_threshold": st.sampled_from([1, 10]),
        "prefetch_timeout_base_s": st.just(0.05),
    }
)
CONFIGS: dict[str, st.SearchStrategy[Any]] = {
    "policy": st.sampled_from(["fcfs", "lpm", "random", "lof"]),
    "chunked_prefill_size": st.sampled_from([None, 4, 8]),
    "max_prefill_tokens": st.sampled_from([6, 100]),
    "enable_mixed_chunk": st.booleans(),
    "enable_priority": st.booleans(),
    "max_running_requests": st.sampled_from([1, 6, 32, 32]),
    "max_queued_requests": st.sampled_from([None, None, 8]),
    # 0: no output is expected of running requests, so the pages run out all the time.
    "schedule_conservativeness": st.sampled_from([0.0, 0.0, 1.0]),
    "pool_tokens": st.sampled_from([40, 48, 64, 200]),
    "page_size": st.sampled_from([1, 2, 4]),
    "shared": st.sampled_from([True, True, False]),
    "tiers": st.none() | TIERS,
    "pipeline_depth": st.sampled_from([1, 2, 4]),
}


def in_pages(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Worker`."""
    rest = {name: value for name, value in config.items() if name != "pool_tokens"}
    return {**rest, "num_pages": config["pool_tokens"] // config["page_size"]}


def check_request(request: Submit, worker: Worker) -> None:
    """What the client saw of one request, against the oracle."""
    ledger, context_len = worker.ledger, worker.scheduler.config.context_len
    finish = ledger.finishes[request.rid]
    tokens = request.output_ids + ledger.tokens.get(request.rid, [])
    limit = context_len - len(request.input_ids)
    if request.sampling.max_new_tokens is not None:
        limit = min(limit, request.sampling.max_new_tokens)
    stop_ids = frozenset() if request.sampling.ignore_eos else frozenset({EOS})
    prompt = request.input_ids + request.output_ids
    expected = request.output_ids + oracle(prompt, max(0, limit - len(request.output_ids)), stop_ids)
    assert tokens == expected[: len(tokens)], "a wrong token"
    if finish.type == "abort":
        assert finish.error is not None and finish.error.request_id == request.rid
        if finish.error.type == "OutOfPagesError":
            assert len(request.input_ids + tokens) == worker.cache.num_pages * worker.cache.page_size + 1
        return
    assert tokens == expected
    assert finish.type == ("stop" if expected and expected[-1] in stop_ids else "length")
    if request.return_logprob and ledger.tokens.get(request.rid):
        assert [entry.token_id for entry in ledger.logprobs[request.rid]] == ledger.tokens[request.rid]
        wanted = request.input_ids[request.logprob_start_len :] if request.logprob_start_len >= 0 else []
        assert [entry.token_id for entry in ledger.input_logprobs.get(request.rid, [])] == wanted


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(config=st.fixed_dictionaries(CONFIGS), context_len=st.sampled_from([30, 200]))
    def start(self, config: dict[str, Any], context_len: int) -> None:
        self.worker = Worker(eos_token_ids=(EOS,), context_len=context_len, **in_pages(config))
        self.sent: list[Submit] = []

    @rule(data=st.data(), count=st.integers(1, 5))
    def add(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            request = data.draw(requests(f"r{len(self.sent)}", None))
            self.sent.append(request)
            self.worker.add(request)
            self.worker.scheduler.check_integrity()

    @rule(data=st.data(), stop=st.sampled_from([None, None, "END"]))
    def abort(self, data: st.DataObject, stop: str | None) -> None:
        if self.sent:
            rid = data.draw(st.sampled_from(self.sent)).rid
            self.worker.scheduler.abort(rid, "gone", self.worker.now, stop)
            self.worker.scheduler.check_integrity()
            self.worker.ledger.take(self.worker.scheduler.drain_outputs(self.worker.now))

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.worker.step()

    @rule(passed_s=st.sampled_from([0.0, 0.0, 0.06]))
    def begin_step(self, passed_s: float) -> None:
        self.worker.begin_step()
        self.worker.now += passed_s

    @rule(fails=st.sampled_from([False, False, True]))
    def end_step(self, fails: bool) -> None:
        self.worker.end_step(fails)

    @rule()
    def flush(self) -> None:
        idle = self.worker.scheduler.is_idle
        assert self.worker.scheduler.flush_cache() == idle

    def teardown(self) -> None:
        if not hasattr(self, "worker"):
            return
        self.worker.run(max_steps=100 + 250 * len(self.sent))  # alone, each takes at most context_len
        assert self.worker.scheduler.is_idle
        for request in self.sent:
            if self.worker.ledger.finishes[request.rid].matched != "END":
                check_request(request, self.worker)
        assert self.worker.scheduler.flush_cache()
        assert self.worker.cache.num_free == self.worker.cache.num_pages


class PairMachine(RuleBasedStateMachine):
    """The same through prefill and decode. Every token the decode side gives must follow from KV that crossed."""

    @initialize(prefill=st.fixed_dictionaries(CONFIGS), decode=st.fixed_dictionaries(CONFIGS))
    def start(self, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
        self.begin(prefill | {"mode": "prefill"}, decode | {"mode": "decode"})

    def begin(self, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
        same = {
            "page_size": prefill["page_size"], "store": {}, "eos_token_ids": (EOS,), "context_len": 60,
            "num_reserved_decode_tokens": 4,
        }  # fmt: skip
        self.pair = Pair(Worker(**in_pages(prefill | same)), Worker(**in_pages(decode | same)))
        self.sent: list[Submit] = []
        self.added: dict[Worker, set[str]] = {self.pair.prefill: set(), self.pair.decode: set()}

    @rule(data=st.data(), order=st.sampled_from(["pd", "dp"]), count=st.integers(1, 5))
    def add(self, data: st.DataObject, order: str, count: int) -> None:
        for _ in range(count):
            request = data.draw(requests(f"r{len(self.sent)}", 100 + len(self.sent)))
            self.sent.append(request)
            for side in order:
                self.send(self.pair.prefill if side == "p" else self.pair.decode, request)
            self.settle()

    def send(self, worker: Worker, request: Submit) -> None:
        self.added[worker].add(request.rid)
        worker.add(request)

    @rule(data=st.data(), side=st.sampled_from(["prefill", "decode"]))
    def abort(self, data: st.DataObject, side: str) -> None:
        if self.sent:
            worker: Worker = getattr(self.pair, side)
            worker.scheduler.abort(data.draw(st.sampled_from(self.sent)).rid, "gone", worker.now)
            self.settle()

    @rule(data=st.data())
    def transfer_fails(self, data: st.DataObject) -> None:
        if self.pair.rooms:
            self.pair.fail(data.draw(st.sampled_from(self.pair.rooms)), "broken")
            self.settle()

    @rule(side=st.sampled_from(["prefill", "decode"]), ends=st.booleans())
    def half_step(self, side: str, ends: bool) -> None:
        worker: Worker = getattr(self.pair, side)
        if ends:
            worker.end_step()
        else:
            worker.begin_step()
        self.settle()

    @rule(side=st.sampled_from(["prefill", "decode"]), count=st.integers(1, 4))
    def steps(self, side: str, count: int) -> None:
        for _ in range(count):
            getattr(self.pair, side).step()
            self.settle()

    @rule(count=st.integers(1, 8))
    def run_both(self, count: int) -> None:
        for _ in range(count):
            self.pair.step()
            self.settle()

    @rule()
    def deliver(self) -> None:
        self.pair.deliver()
        self.settle()

    def settle(self) -> None:
        for worker in (self.pair.prefill, self.pair.decode):
            worker.ledger.take(worker.scheduler.drain_outputs(worker.now))
            worker.check()
        self.pair.pump_actions()

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.pair.run()
        # Rooms that only one side knows (the other refused or gave up): their time-out.
        while self.pair.rooms:
            for room in self.pair.rooms:
                self.pair.fail(room, "timed out")
            self.pair.run()
        for worker in (self.pair.prefill, self.pair.decode):
            assert worker.scheduler.is_idle
            assert worker.ledger.finishes.keys() == self.added[worker]
            assert worker.scheduler.flush_cache()
            assert worker.cache.num_free == worker.cache.num_pages
        for request in self.sent:
            check_request(request, self.decoded_by(request))

    def decoded_by(self, request: Submit) -> Worker:
        return self.pair.decode


class BothMachine(PairMachine):
    """Two workers of mode "both": each is asked to prefill for the other, for itself, and to serve plain requests, with pools that
    a few prompts fill."""

    @initialize(prefill=st.fixed_dictionaries(CONFIGS), decode=st.fixed_dictionaries(CONFIGS))
    def start(self, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
        self.begin(*(config | {"mode": "both", "take_back_after_s": 0.0} for config in (prefill, decode)))
        self.places: dict[str, Worker] = {}

    @rule(data=st.data(), order=st.sampled_from(["pd", "pd", "dp"]), count=st.integers(1, 5))
    def add(self, data: st.DataObject, order: str, count: int) -> None:
        workers = self.pair.prefill, self.pair.decode
        for _ in range(count):
            room = 100 + len(self.sent)
            request = data.draw(requests(f"r{len(self.sent)}", room))
            prefill, decode = data.draw(st.sampled_from(workers)), data.draw(st.sampled_from(workers))
            is_plain = data.draw(st.sampled_from([False, False, True]))
            self.sent.append(request)
            self.places[request.rid] = decode
            if is_plain:
                self.send(decode, msgspec.structs.replace(request, bootstrap=None))
            for side in "" if is_plain else order:
                bootstrap = msgspec.structs.replace(request.bootstrap, side="prefill" if side == "p" else "decode")
                rid = f"prefill-{request.rid}" if side == "p" else request.rid
                self.send(
                    prefill if side == "p" else decode, msgspec.structs.replace(request, rid=rid, bootstrap=bootstrap)
                )
            self.settle()

    @rule(data=st.data(), side=st.sampled_from(["prefill", "decode"]))
    def abort(self, data: st.DataObject, side: str) -> None:
        worker: Worker = getattr(self.pair, side)
        if self.added[worker]:
            worker.scheduler.abort(data.draw(st.sampled_from(sorted(self.added[worker]))), "gone", worker.now)
            self.settle()

    def decoded_by(self, request: Submit) -> Worker:
        return self.places[request.rid]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestPair = PairMachine.TestCase
TestPair.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestBoth = BothMachine.TestCase
TestBoth.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("machine", [SchedulerMachine, PairMachine, BothMachine])
def test_long(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))
