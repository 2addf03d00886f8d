"""What the scheduler's tests drive it with: a worker (scheduler, cache, runner without a model), a pair of them joined by
a fake transfer, and the ledger of what each client was told."""

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Any

from tests.fakes.paged_runner import PagedRunner
from tests.scheduler.lower_tiers import LowerTiers, Page

from baton.engine.batch import ForwardBatch
from baton.engine.scheduler import pd
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.scheduler import Scheduler
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.prefix_cache import PrefixCache, UnsharedCache
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiered_cache import TieredCache
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import Bootstrap, Finish, RequestOutput, Submit, TokenLogprobs
from baton.protocol.sampling import SamplingParams
from baton.transfer.base import Bootstrapped, Event, Failed, Received, Sent


def submit(
    rid: str, prompt: Iterable[int], max_new_tokens: int | None = 4, room: int | None = None, **fields: Any
) -> Submit:
    """Fields of `Submit` by name; those of `SamplingParams` too."""
    names = set(SamplingParams.__struct_fields__) & fields.keys()
    sampling = SamplingParams(max_new_tokens=max_new_tokens, **{name: fields.pop(name) for name in names})
    bootstrap = None if room is None else Bootstrap("10.0.0.1", 8998, room)
    return Submit(
        rid=rid, input_ids=list(prompt), sampling=sampling, bootstrap=fields.pop("bootstrap", bootstrap), **fields
    )


STEP_ERROR = ErrorInfo("InternalServerError", 500, "the model step failed: out of memory", retryable=True)


class Ledger:
    """What clients saw. Fails at the second finish of a rid, and at anything after the first."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finishes: dict[str, Finish] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.input_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.last: dict[str, RequestOutput] = {}

    def take(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            assert output.rid not in self.finishes, f"{output.rid} got output after its finish"
            self.tokens.setdefault(output.rid, []).extend(output.token_ids)
            self.logprobs.setdefault(output.rid, []).extend(output.logprobs)
            self.last[output.rid] = output
            if output.input_logprobs:
                assert output.rid not in self.input_logprobs, "input logprobs come once"
                self.input_logprobs[output.rid] = output.input_logprobs
            if output.finish is not None:
                self.finishes[output.rid] = output.finish


class Worker:
    """`tiers`: fields of `TierConfig` for a worker with a host tier; `store`: what a store of several workers holds."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        shared: bool = True,
        tiers: dict[str, Any] | None = None,
        store: dict[bytes, Page] | None = None,
        **config: Any,
    ) -> None:
        self.runner = PagedRunner(page_size)
        self.lower = LowerTiers(self.runner, {} if store is None else store, seed=num_pages)
        self.cache = (PrefixCache if shared else UnsharedCache)(num_pages, page_size)
        if tiers is not None and shared:
            keys = PageKeys("model", "bfloat16", page_size)
            self.cache = TieredCache(num_pages, page_size, "lru", keys, TierConfig(**tiers))
        config.setdefault("context_len", 200)
        self.scheduler = Scheduler(SchedulerConfig(**config), self.cache, Random(0))
        self.ledger = Ledger()
        self.now = 0.0

    def add(self, request: Submit) -> None:
        self.ledger.take(self.scheduler.add(request, self.now))

    def step(self) -> bool:
        """One turn of the rank's loop; False if there was nothing to run."""
        self.now += 0.01
        events = self.lower.answer()
        for event in events:
            self.scheduler.on_store_event(event, self.now)
        while self.begin_step() is not None:
            pass
        ran = self.end_step()
        self.ledger.take(self.scheduler.drain_outputs(self.now))
        self.move()
        self.check()
        return ran or not self.lower.is_settled or self._waits()

    def begin_step(self) -> ForwardBatch | None:
        """Schedule, and bring the pages where the step needs them."""
        batch = self.scheduler.schedule(self.now)
        self.move()
        if batch is not None:
            self.runner.submit(batch)
        self.check()
        return batch

    def end_step(self, fails: bool = False) -> bool:
        """The oldest step in flight; False if there is none."""
        if not self.scheduler.num_in_flight:
            return False
        if fails:
            self.runner.fail()
            self.ledger.take(self.scheduler.fail_step(STEP_ERROR, self.now))
        else:
            self.ledger.take(self.scheduler.apply(self.runner.collect(), self.now))
        self.check()
        return True

    def check(self) -> None:
        """Every page has one owner, and what steps in flight use is neither free nor could be."""
        self.scheduler.check_integrity()
        nodes = self.cache._tree.nodes()
        evictable = (page for node in nodes if not node.lock_count for page in node.pages)
        lost = {*self.cache._pool.free_pages, *evictable} & self.runner.pages_in_flight()
        assert not lost, f"pages {lost} may be given to others under a step in flight"

    def move(self) -> None:
        self.lower.move(self.scheduler.drain_copies(), self.scheduler.drain_store_actions())

    def _waits(self) -> bool:
        """A request waits for its prefetch; time will end that."""
        deadline = self.cache.next_deadline()
        return deadline is not None and deadline > self.now - 0.02

    def run(self, max_steps: int = 2000) -> None:
        """Until nothing can run."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError(f"still running after {max_steps} steps")

    def state_of(self, rid: str) -> str:
        return self.scheduler._life.live[rid].status.value


class Pair:
    """Two workers and a transfer that keeps the contract of `transfer.base`, one message at a time. Which of them is a room's
    prefill and which its decode is what they do; one worker may be both.

    While it owns pages of a decode side it scribbles into those it has not written yet, so that a page given back too
    early is found by whoever reads it next.
    """

    def __init__(self, prefill: Worker, decode: Worker) -> None:
        self.prefill, self.decode = prefill, decode
        self.expected: dict[int, Worker] = {}
        self.receives: dict[int, tuple[Worker, pd.Receive]] = {}
        self.sends: dict[int, list[pd.SendPages]] = {}
        self.matched: set[int] = set()
        self.ended: set[int] = set()
        self._events: dict[Worker, deque[Event]] = {prefill: deque(), decode: deque()}

    @property
    def rooms(self) -> list[int]:
        """That have not ended."""
        return sorted(self.expected.keys() | self.receives.keys())

    def pump_actions(self) -> None:
        for worker in self._events:
            for action in worker.scheduler.drain_actions():
                self._perform(worker, action)
        for room in sorted(self.expected.keys() & self.receives.keys() - self.matched):
            self.matched.add(room)
            self._events[self.expected[room]].append(Bootstrapped(room, self.receives[room][1].first_page_idx))

    def _perform(self, worker: Worker, action: pd.Action) -> None:
        match action:
            case pd.Expect(room, timeout_s):
                assert room not in self.expected and timeout_s >= 0
                self.expected[room] = worker
                self._fail_if_over(room)
            case pd.SendPages(room):
                if room not in self.ended:  # else its end event is on the way
                    assert room in self.matched, "sent before Bootstrapped"
                    self.sends.setdefault(room, []).append(action)
                    self._write(worker, action)
            case pd.Receive(room):
                assert room not in self.receives
                self.receives[room] = worker, action
                for page in action.page_ids:
                    worker.runner.scribble(page)
                self._fail_if_over(room)
            case pd.AbortTransfer(room, _, side):
                held = self.expected.get(room) if side == "prefill" else self.receives.get(room, (None, None))[0]
                assert held in (worker, None), "aborted a room of another"
                self.fail(room, f"aborted by {side}")

    def _write(self, worker: Worker, sent: pd.SendPages) -> None:
        """Copy at once; the end events come when a test delivers them."""
        if sent.room not in self.receives:
            return
        receiver, target = self.receives[sent.room]
        for i, page in enumerate(sent.page_ids):
            idx = sent.first_page_idx + i - target.first_page_idx
            assert 0 <= idx < len(target.page_ids), "a page that the decode side did not ask for"
            receiver.runner.write_page(target.page_ids[idx], worker.runner.read_page(page))
        if sent.first_token is not None:
            self._check_complete(sent.room, target)
            self._close(sent.room)
            self._events[receiver].append(Received(sent.room, sent.first_token, 1000, 0.001, 0.001))
            self._events[worker].append(Sent(sent.room, 1000, 0.001))

    def _check_complete(self, room: int, target: pd.Receive) -> None:
        sent = [i for s in self.sends[room] for i in range(s.first_page_idx, s.first_page_idx + len(s.page_ids))]
        first = target.first_page_idx
        assert sent == list(range(first, first + len(target.page_ids))), "every page exactly once, in order"

    def _fail_if_over(self, room: int) -> None:
        """The peer has ended this room already."""
        if room in self.ended:
            self.fail(room, "the peer is gone")

    def _close(self, room: int) -> None:
        self.ended.add(room)
        self.expected.pop(room, None)
        self.receives.pop(room, None)
        self.matched.discard(room)

    def fail(self, room: int, message: str) -> None:
        """Both sides that know the room hear of its end; nothing touches its pages afterwards."""
        error = ErrorInfo("TransferError", 500, message, "transfer", retryable=True)
        if room in self.expected:
            self._events[self.expected[room]].append(Failed(room, error))
        if room in self.receives:
            receiver, action = self.receives[room]
            for page in action.page_ids:
                receiver.runner.scribble(page)
            self._events[receiver].append(Failed(room, error))
        self._close(room)

    def deliver(self) -> bool:
        """Hand over one event a worker."""
        delivered = False
        for worker, events in self._events.items():
            if events:
                worker.scheduler.on_transfer_event(events.popleft(), worker.now)
                delivered = True
        return delivered

    def step(self) -> bool:
        progress = False
        for worker in (self.prefill, self.decode):
            progress |= worker.step()
            self.pump_actions()
        return self.deliver() or progress

    def run(self, max_steps: int = 3000) -> None:
        """Until nothing can run. No room that both sides know is left then: each can always go on."""
        for _ in range(max_steps):
            if not self.step() and not self.step():
                assert not self.matched, f"prefill and decode wait for each other in rooms {self.matched}"
                return
        raise AssertionError(f"still running after {max_steps} steps")
