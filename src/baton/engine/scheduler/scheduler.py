"""The scheduler: which requests run in the next step, and what a step's tokens mean for each of them.

Front door: `add`, `abort`, `on_transfer_event`, `schedule` -> `apply`, `drain_outputs`, `drain_actions`. It computes
nothing and waits for nothing: the rank's loop runs the batch, carries out the actions and passes time in as `now`
(seconds, any origin, never backwards). Places and ends of requests are in `places` and `lifecycle`, the budget of a
prefill step in `admission`, the KV hand-over in `pd`.

Between `schedule` and `apply` a step is in flight and its pages are being written; there may be several, and `inflight` says
what waits for them.
"""

from collections.abc import Callable
from random import Random

import msgspec

from baton.engine.batch import ForwardBatch, ForwardOutput
from baton.engine.scheduler import pd
from baton.engine.scheduler.admission import Admission, Chunk, future_tokens, max_cached_tokens
from baton.engine.scheduler.assemble import StepPlan, assemble
from baton.engine.scheduler.audit import audit
from baton.engine.scheduler.config import CLIP_MAX_NEW_TOKENS, SchedulerConfig
from baton.engine.scheduler.decode_batch import NO_ROWS
from baton.engine.scheduler.intake import build_request, finish_of, refusal, stage_of, with_request_id
from baton.engine.scheduler.places import Places
from baton.engine.scheduler.request import Request, Status
from baton.engine.scheduler.snapshot import snapshot
from baton.engine.scheduler.take_back import TakeBack
from baton.kvcache.prefix_cache import PrefixCache
from baton.kvcache.tiers import Copies, StoreAction, StoreEvent
from baton.protocol.errors import ABORTED_CODE, ErrorInfo, RequestError
from baton.protocol.rank import STAGE_OF_MODE, Finish, RequestOutput, SchedulerState, Submit, TokenLogprobs
from baton.transfer.base import Bootstrapped, Event, Failed, Received, Sent


class Scheduler:
    def __init__(self, config: SchedulerConfig, cache: PrefixCache, rng: Random) -> None:
        """`rng`: draws the seeds of requests that bring none, and the order of the policy `random`."""
        self.config = config
        self.cache = cache
        self._rng = rng
        self._at = Places(config, cache, rng)
        self._life = self._at.life
        self._admission = Admission(config, cache, self._at.waiting, self._at.ratio)
        self._steps = self._at.steps
        self._take_back = TakeBack(self._at, config.take_back_after_s)
        self._num_arrived = 0

    # -- requests in ---------------------------------------------------------------------------------------------------

    def add(self, submit: Submit, now: float) -> list[RequestOutput]:
        """Accept a request, or refuse it with a finish of type "abort". The rid must not be live (ValueError)."""
        if submit.rid in self._life.live:
            raise ValueError(f"request id {submit.rid!r} is in use")
        try:
            req = self._accept(submit, now)
        except RequestError as refused:
            finish = Finish("abort", error=refused.info)
            return [RequestOutput(rid=submit.rid, token_ids=[], finish=finish)]
        done = finish_of(req) if req.output_ids else None
        if done is not None:  # a resumed request that had all its tokens: both sides of a pair decide so
            return [RequestOutput(rid=submit.rid, token_ids=[], finish=done)]
        self._life.admit(req)
        self._admission.wake()
        if req.bootstrap is not None and (half := self._at.rooms.get(req.bootstrap.room)) is not None:
            self._at.end(half, Finish("length"))  # handed over to itself: computed once, by the one who decodes
            req.part, req.bootstrap = "null", None
        if req.part != "decode":
            tokens = req.token_slice(0, req.num_tokens)
            self.cache.begin_prefetch(req.rid, tokens, req.extra_key, max_cached_tokens(req), now)
        if req.bootstrap is None:
            self._at.enqueue(req)
        elif req.part == "prefill":
            req.move_to(Status.BOOTSTRAPPING)
            pd.expect(self._at.rooms, req, self.config, now)
        else:
            req.move_to(Status.PREALLOC)
            self._at.prealloc.queue[req.bootstrap.room] = req
        if req.part == "prefill":
            req.output_limit = len(req.output_ids) + 1
        return []

    def abort(self, rid: str, reason: str, now: float, matched_stop: str | None = None) -> None:
        """End a request; with `matched_stop` as finished by that stop string. Unknown rids are ignored."""
        req = self._life.live.get(rid)
        if req is None:
            return
        if matched_stop is not None:
            self._at.end(req, Finish("stop", matched=matched_stop))
            return
        self._end_with(req, ErrorInfo("AbortError", ABORTED_CODE, reason, stage_of(req), rid))

    def on_transfer_event(self, event: Event, now: float) -> None:
        """What a transfer's `poll` returned. Events of rooms that are not open are ignored."""
        match event:
            case Bootstrapped(room, first_page_idx):
                req = self._at.rooms.get(room)
                if req is not None and req.status is Status.BOOTSTRAPPING:
                    req.next_page_idx = first_page_idx
                    self._at.enqueue(req)
            case Sent():
                self._on_sent(event)
            case Received():
                self._on_received(event)
            case Failed():
                self._on_failed(event)
        self._admission.wake()

    def on_store_event(self, event: StoreEvent, now: float) -> None:
        """What the store worker's `poll` returned."""
        self.cache.on_store_event(event, now)
        self._admission.wake()

    # -- one step ------------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> ForwardBatch | None:
        """The next step, or None when nothing can run now, or `pipeline_depth` steps are in flight. A step is in flight until
        `apply` or `fail_step`."""
        if self.num_in_flight == self.config.pipeline_depth:
            return None
        self._expire(now)
        self._at.admit_received(now)
        decode = self._at.decode
        is_mixed = self.config.enable_mixed_chunk and bool(decode)
        chunks = [] if is_mixed else self._plan_chunks(0, now)
        rows = NO_ROWS
        if not chunks:
            rows, is_short = self._at.make_room()
            # What was just sent back to make room must not take the room again in the same step.
            if not decode if is_short else is_mixed:
                chunks = self._plan_chunks(len(rows), now)
        is_idle = not chunks and not decode and not self._steps
        self._take_back.check(is_idle and self._admission.lacks_pages, now)
        if not chunks and not len(rows):
            if is_idle and not self._at.waiting and self._at.chunked is None:
                self._at.ratio.on_idle()
                self._at.counters.on_idle()
            return None
        plan = assemble(chunks, decode, rows)
        self._steps.begin(plan)
        return plan.batch

    def apply(self, output: ForwardOutput, now: float) -> list[RequestOutput]:
        """Write the tokens of the oldest step in flight into its requests. Returns all outputs that are due, this step's last."""
        plan = self._steps.take_oldest()
        for req, rows in zip(plan.logprob_owners, output.prompt_logprobs, strict=True):
            req.input_logprobs.extend(rows)
        # Decode rows first: a chunk that ends its prompt adds a row.
        if plan.decode:
            self._apply_decode(plan, output)
        drawn = iter(zip(output.next_token_ids, output.logprobs, strict=True))
        for chunk, draws in zip(plan.chunks, plan.chunk_draws, strict=True):
            self._apply_chunk(chunk, next(drawn) if draws else None)
        self._at.counters.on_tokens(len(output.next_token_ids), now)
        self._end_put_off()
        return self._life.take_outputs()

    def fail_step(self, error: ErrorInfo, now: float) -> list[RequestOutput]:
        """The oldest step in flight could not be computed: its requests end with `error`, all others go on."""
        plan = self._steps.take_oldest()
        for req in (*(chunk.req for chunk in plan.chunks), *plan.decode):
            self._end_with(req, error)
        self._end_put_off()
        return self._life.take_outputs()

    # -- what comes out beside steps -----------------------------------------------------------------------------------

    def drain_outputs(self, now: float) -> list[RequestOutput]:
        """Outputs that no step brought: time-outs (checked here), aborts, transfer ends."""
        self._expire(now)
        return self._life.take_outputs()

    def drain_actions(self) -> list[pd.Action]:
        """What to tell the transfer, in order."""
        return self._at.rooms.take_actions()

    def drain_copies(self) -> Copies:
        """Page copies to carry out before the step that `schedule` returned, and before any action."""
        return self.cache.take_copies()

    def drain_store_actions(self) -> list[StoreAction]:
        """What to tell the store's worker, once the copies drained with them were carried out."""
        return self.cache.take_store_actions()

    def next_deadline(self) -> float | None:
        """When `drain_outputs` or `schedule` must be called at the latest, even if nothing else happens."""
        deadlines = (self._life.next_deadline(), self.cache.next_deadline(), self._take_back.deadline)
        return min((one for one in deadlines if one is not None), default=None)

    @property
    def num_in_flight(self) -> int:
        """Steps to `apply` or `fail_step`."""
        return len(self._steps)

    @property
    def is_idle(self) -> bool:
        """No request and no transfer holds anything."""
        return not self._life.live and not self._at.rooms and not self._steps

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, unless idle."""
        return self.is_idle and self.cache.flush()

    def state(self) -> SchedulerState:
        return snapshot(self.cache, self._at)

    def check_integrity(self) -> None:
        """Every page has one owner, every live request one place. Raises AssertionError that names what is wrong."""
        audit(self.cache, self._at)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _accept(self, submit: Submit, now: float) -> Request:
        """Raises `RequestError` if the request is refused."""
        config = self.config
        pool_tokens = self.cache.num_pages * self.cache.page_size
        req = build_request(submit, config, pool_tokens, self._rng, self._num_arrived, now)
        bound = config.max_queued_requests
        if bound is not None and self._at.num_queued >= bound:
            stage = STAGE_OF_MODE[req.part]
            message = f"The request queue is full ({bound} requests wait)."
            raise RequestError(ErrorInfo("ServiceUnavailableError", 503, message, stage, submit.rid, retryable=True))
        if req.bootstrap is not None and self._at.is_room_taken(req):
            message = f"bootstrap_room {req.bootstrap.room} is in use by another request."
            raise refusal(submit, config.mode, message, "bootstrap_room")
        self._num_arrived += 1
        return req

    def _end_with(self, req: Request, error: ErrorInfo) -> None:
        self._at.end(req, Finish("abort", error=with_request_id(error, req.rid)))
        self._admission.wake()

    def _end_put_off(self) -> None:
        """After a step: the ends that waited for it."""
        for req, finish in self._steps.take_ends():
            if self._life.live.get(req.rid) is req:
                self._at.end(req, finish)
                self._admission.wake()

    def _expire(self, now: float) -> None:
        for req in self._life.take_expired(now):
            assert req.deadline_s is not None
            limit_s = req.deadline_s - req.arrival_s
            message = f"The request did not finish within its {limit_s:g} s; it was {req.status.value}."
            self._end_with(req, ErrorInfo("TimeoutError", 504, message, stage_of(req), req.rid))

    def _plan_chunks(self, num_mixed: int, now: float) -> list[Chunk]:
        at = self._at
        if at.chunked is None and not at.waiting:
            return []
        if at.chunked is not None and self._steps.is_ending(at.chunked):
            return []  # it leaves when its last step was applied, and another one can be partly computed then
        expected = sum(min(req.num_output_left, CLIP_MAX_NEW_TOKENS) for req in at.ready)
        held = int((expected + sum(map(future_tokens, at.last_chunks))) * at.ratio.value)
        held += at.prealloc.held_tokens(at.first_waiting_idx)
        slots = self.config.max_running_requests - at.num_running
        chunks = self._admission.plan(at.chunked, at.decode, slots, num_mixed, held, now)
        if chunks:
            at.chunked = None if chunks[-1].is_last else chunks[-1].req
        num_tokens = num_cached = 0
        for chunk in chunks:
            req = chunk.req
            if req.status is not Status.WAITING:
                continue
            req.move_to(Status.PREFILLING)
            at.prealloc.on_admitted(req)
            num_tokens += req.num_tokens
            num_cached += chunk.start
            if req.queue_time_s is None:
                req.queue_time_s = now - req.arrival_s
            if req.logprob_start == 0 and not req.input_logprobs_sent:
                req.input_logprobs = [TokenLogprobs(req.prompt_ids[0], None)]  # no token comes before it
        if num_tokens:
            at.counters.cache_hit_rate = num_cached / num_tokens
        return chunks

    def _apply_decode(self, plan: StepPlan, output: ForwardOutput) -> None:
        first = sum(plan.chunk_draws)
        token_ids = output.next_token_ids[first:]
        emit_token = self._life.emit_token
        ended: list[tuple[Request, Finish]] = []
        for req, token_id, logprobs in zip(plan.decode, token_ids, output.logprobs[first:], strict=True):
            req.num_computed += 1
            output_ids = req.output_ids
            output_ids.append(token_id)
            if token_id in req.stop_ids or len(output_ids) >= req.output_limit:
                finish = finish_of(req)
                assert finish is not None
                ended.append((req, finish))
                emit_token(req, token_id, logprobs, finish)
            else:
                emit_token(req, token_id, logprobs, None)
        self._at.ratio.on_decode_step(len(plan.decode) / len(self._at.decode))
        self._at.decode.advance(plan.decode, token_ids)
        for req, _ in ended:
            self._at.decode.remove(req)
            self._life.finish_pages(req)
        if ended:
            self._admission.wake()

    def _apply_chunk(self, chunk: Chunk, drawn: tuple[int, TokenLogprobs | None] | None) -> None:
        """`drawn`: the next token, where one was sampled."""
        req = chunk.req
        if self._steps.is_ending(req):
            return  # perhaps since the chunk before it failed
        assert req.handle is not None
        req.num_computed = chunk.end
        tokens = req.token_slice(0, chunk.end)
        req.handle, req.pages, duplicates = self.cache.commit(req.handle, tokens, req.pages, req.save_from)
        self._steps.free(duplicates)  # the request's next chunk may be in flight with these in its page table
        to_peer = self._at.rooms.is_open(req)
        if not chunk.is_last:
            if to_peer:
                pd.send_computed(self._at.rooms, req, self.cache.page_size, None)
            return
        if drawn is None:  # max_new_tokens is 0: the prompt was all that was wanted
            self._life.emit(req, finish=Finish("length"))
            self._life.finish_pages(req)
            return
        token_id, logprobs = drawn
        req.output_ids.append(token_id)
        if to_peer:
            req.first_logprobs = logprobs
            first_token = pd.pack_first_token(req, logprobs)
            pd.send_computed(self._at.rooms, req, self.cache.page_size, first_token)
            req.move_to(Status.SENDING)
            return
        self._take_first_token(req, logprobs, self._at.run)

    def _take_first_token(self, req: Request, logprobs: TokenLogprobs | None, go_on: Callable[[Request], None]) -> None:
        """The token that a prefill drew, ours or the peer's, is the last of output_ids."""
        finish = finish_of(req)
        self._life.emit_token(req, req.output_ids[-1], logprobs, finish)
        if finish is None:
            go_on(req)
        else:
            self._life.finish_pages(req)
            self._admission.wake()

    def _on_sent(self, event: Sent) -> None:
        req = self._at.rooms.close(event.room)
        if req is None:
            return
        self._at.counters.on_transfer(event.num_bytes, event.duration_s)
        if req.status is Status.SENDING:
            self._life.emit_token(req, req.output_ids[-1], req.first_logprobs, Finish("length"))
        self._life.finish_pages(req)

    def _on_received(self, event: Received) -> None:
        req = self._at.rooms.close(event.room)
        if req is None:
            return
        self._at.counters.on_transfer(event.num_bytes, event.duration_s)
        self._at.counters.transfer_bootstrap_ms = event.bootstrap_duration_s * 1e3
        if req.status is Status.CANCELLING:
            req.num_computed = req.num_tokens
            self._life.finish_pages(req)
            return
        first = event.first_token
        try:
            logprobs, req.input_logprobs = pd.unpack_logprobs(first)
        except msgspec.DecodeError as error:
            message = f"The prefill's log-probabilities cannot be read: {error}"
            self._end_with(req, ErrorInfo("TransferError", 500, message, "transfer", req.rid, retryable=True))
            return
        req.num_computed = req.num_tokens
        req.num_cached = first.cached_tokens
        req.cached_host, req.cached_store = first.cached_host, first.cached_store
        if req.num_output_left == 0:
            self._life.emit(req, finish=Finish("length"))
            self._life.finish_pages(req)
            return
        req.output_ids.append(first.token_id)
        self._take_first_token(req, logprobs[0] if logprobs and req.return_logprob else None, self._make_ready)

    def _make_ready(self, req: Request) -> None:
        req.move_to(Status.READY)
        self._at.ready.append(req)

    def _on_failed(self, event: Failed) -> None:
        req = self._at.rooms.close(event.room)
        if req is None:
            return
        if req.status is Status.CANCELLING:
            self._life.finish_pages(req)
            return
        if req.status is Status.WITHDRAWING:
            self._life.drop_pages(req)
            req.save_from = 0
            self._at.enqueue(req)
            return
        if req.status is Status.BOOTSTRAPPING:
            self._at.counters.num_bootstrap_failed_total += 1
        else:
            self._at.counters.num_transfer_failed_total += 1
        self._end_with(req, event.error)
