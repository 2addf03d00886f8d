"""The HTTP process's view of its rank: sequences by id, calls with an answer, and what happens when the rank is gone.

Owns the table of sequences in flight. Every sequence started here ends exactly once: by the rank's last row, by a stop
string, by its deadline, or by `fail` when the rank is lost. Neighbours: `channel` carries the messages, `generation` makes
text. Not here: HTTP, request formats.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from baton.engine.detokenizer import Vocabulary
from baton.engine.server.channel import FROZEN_S, ServerChannel
from baton.engine.server.generation import Generation, Job
from baton.engine.server.metrics import RequestObserver
from baton.protocol.errors import ABORTED_CODE, WORKER_LOST, BatonError, ErrorInfo, RequestError, bad_request
from baton.protocol.rank import (
    STAGE_OF_MODE,
    Abort,
    CheckIntegrity,
    ClearStore,
    DrainStore,
    Fatal,
    Finish,
    FlushCache,
    FromRank,
    GetState,
    Mode,
    Part,
    Ready,
    Reply,
    SchedulerState,
    StepOutput,
    Submit,
    part_of,
)

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 20.0
"""How long a call may stay unanswered before the rank counts as hung (SGLang's health check time-out)."""

CallType = type[GetState] | type[FlushCache] | type[ClearStore] | type[DrainStore] | type[CheckIntegrity]


class RankLostError(BatonError):
    """The rank process died, reported that it cannot go on, or does not answer."""


def duplicate_rid(rid: str) -> RequestError:
    return bad_request(f"Duplicate request ID detected: {rid}", "rid")


class EngineClient:
    """The first rank of one engine. All methods run in the event loop."""

    def __init__(
        self,
        channel: ServerChannel,
        vocabulary: Vocabulary | None,
        *,
        mode: Mode,
        metrics: RequestObserver | None = None,
        dp_rank: int = 0,
    ) -> None:
        self.dp_rank = dp_rank
        self._channel = channel
        self._vocabulary = vocabulary
        self._mode: Mode = mode
        self._metrics = metrics
        self._jobs: dict[str, tuple[Generation, Job]] = {}
        """By the rank's id."""
        self._rids: Counter[str] = Counter()
        """Ids that callers know, of the sequences in `_jobs`; not of those prefilled for others, whose caller is done with an id
        when the decode worker has answered, and may use it again while this side still waits for its acknowledgement."""
        self._leaving: set[str] = set()
        """The rank's ids of sequences that ended on this side first: their last row is still to come."""
        self._calls: dict[int, tuple[float, asyncio.Future[Reply | SchedulerState]]] = {}
        self._call_ids = itertools.count(1)
        self._ready: asyncio.Future[Ready] | None = None
        self.num_tokens = 0
        """Of the sequences in `_jobs`: their prompts, and what was generated."""
        self.last_state = SchedulerState()
        self.last_heard = time.monotonic()
        """When the rank last said anything (monotonic clock)."""
        self.lost_reason: str | None = None
        self.on_lost: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to listen, in the running loop."""
        self._ready = asyncio.get_running_loop().create_future()
        self._channel.start(self._on_message)

    async def wait_ready(self, timeout_s: float) -> Ready:
        """The rank's `Ready`. Raises `RankLostError` if it fails to start in time."""
        assert self._ready is not None, "start() comes first"
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            raise RankLostError(f"the rank was not ready after {timeout_s:.0f} s") from None

    @property
    def num_in_flight(self) -> int:
        return len(self._jobs)

    def jobs(self) -> Iterator[Job]:
        """The HTTP request of each sequence in flight."""
        return (job for _, job in self._jobs.values())

    def is_in_flight(self, rid: str) -> bool:
        return self._rids[rid] > 0

    def need_new_rid(self, rid: str) -> None:
        """Raises `RequestError` (400) for an id in use."""
        if self.is_in_flight(rid):
            raise duplicate_rid(rid)

    def generation_of(self, submit: Submit, index: int, *, is_measured: bool) -> Generation:
        """A new sequence, that `begin` starts."""
        return Generation(
            submit,
            index,
            self._vocabulary,
            rank_rid=self._rank_rid(submit.rid),
            is_measured=is_measured,
            dp_rank=self.dp_rank,
        )

    def begin(self, generation: Generation, job: Job) -> None:
        """Send `generation` to the rank, unless a resume has ended it."""
        if generation.finish is not None:
            job.note(generation)
            return
        self._jobs[generation.rank_rid] = (generation, job)
        self._rids[generation.rid] += self._part(generation) != "prefill"
        self.num_tokens += generation.prompt_tokens + generation.completion_tokens
        self._channel.send(msgspec.structs.replace(generation.submit, rid=generation.rank_rid))

    def abort(self, rid_prefix: str, *, reason: str = "Aborted") -> int:
        """End every sequence whose id starts with `rid_prefix` ("": all) for its user. How many there were."""
        found = [one for one, _ in self._jobs.values() if one.rid.startswith(rid_prefix)]
        for generation in found:
            generation.was_aborted_by_user = True
            self._channel.send(Abort(generation.rank_rid, reason))
        return len(found)

    async def state(self, timeout_s: float = CALL_TIMEOUT_S) -> SchedulerState:
        """A fresh snapshot. Raises `RankLostError` when the rank does not answer in time."""
        answer = await self._call(GetState, timeout_s)
        assert isinstance(answer, SchedulerState)
        return answer

    async def flush_cache(self, timeout_s: float = CALL_TIMEOUT_S) -> Reply:
        answer = await self._call(FlushCache, timeout_s)
        assert isinstance(answer, Reply)
        return answer

    async def clear_store(self, timeout_s: float = CALL_TIMEOUT_S) -> Reply:
        answer = await self._call(ClearStore, timeout_s)
        assert isinstance(answer, Reply)
        return answer

    async def drain_store(self, timeout_s: float) -> Reply:
        """Returns when the store has every page that is to go there. Raises `RankLostError` when that takes longer."""
        answer = await self._call(DrainStore, timeout_s)
        assert isinstance(answer, Reply)
        return answer

    async def check_integrity(self, timeout_s: float = CALL_TIMEOUT_S) -> Reply:
        answer = await self._call(CheckIntegrity, timeout_s)
        assert isinstance(answer, Reply)
        return answer

    def silence_s(self) -> float:
        """How long the oldest unanswered call has waited; 0 when none waits."""
        # A call that gave up waiting stays in the table until the rank answers it: that is what tells a busy rank, which
        # answers late, from a hung one.
        return max((time.monotonic() - asked for asked, _ in self._calls.values()), default=0.0)

    def fail(self, reason: str) -> None:
        """The rank is gone: end everything that waits for it, with an error that says a retry elsewhere may help."""
        if self.lost_reason is not None:
            return
        self.lost_reason = reason
        logger.error("the rank is lost: %s (requests in flight: %d)", reason, len(self._jobs))
        for generation, job in list(self._jobs.values()):
            generation.end(Finish("abort", error=self.lost_error(generation)))
            self._finished(generation)
            job.note(generation)
        for _, answer in self._calls.values():
            if not answer.done():
                answer.set_exception(RankLostError(reason))
                answer.exception()  # a caller that gave up waiting does not look at it
        self._calls.clear()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(RankLostError(reason))
            self._ready.exception()
        self.on_lost()

    def end_all(self, reason: str) -> None:
        """End what is in flight, with an error that says a retry elsewhere may help; the rank goes on."""
        for generation, job in list(self._jobs.values()):
            stage = STAGE_OF_MODE[self._part(generation)]
            self._leave(generation, ErrorInfo(WORKER_LOST, 503, reason, stage, generation.rid, retryable=True))
            job.note(generation)

    async def watch(self, limit_s: float, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Call `fail` when requests wait and the rank has not answered for `limit_s`. Runs until cancelled."""
        while self.lost_reason is None:
            await sleep(max(0.05, min(10.0, limit_s / 4)))
            if not self._jobs and not self._calls:
                continue
            if self.silence_s() > limit_s:
                self.fail(f"it did not answer for {limit_s:.0f} s (--watchdog-timeout)")
            elif not self._calls:
                # Sequences may wait long for good reasons; a rank that is alive still answers this.
                self._ask(GetState)

    async def watch_beats(self, limit_s: float = FROZEN_S) -> None:
        """Call `fail` when the rank's process has stood still for `limit_s`."""
        await self._channel.until_silent(limit_s)
        self.fail(f"its process has stood still for {limit_s:g} s: it is stopped or hung")

    def _ask(self, message_type: CallType) -> "asyncio.Future[Reply | SchedulerState]":
        if self.lost_reason is not None:
            raise RankLostError(self.lost_reason)
        call_id = next(self._call_ids)
        answer: asyncio.Future[Reply | SchedulerState] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = (time.monotonic(), answer)
        self._channel.send(message_type(call_id))
        return answer

    async def _call(self, message_type: CallType, timeout_s: float) -> Reply | SchedulerState:
        answer = self._ask(message_type)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), timeout_s)
        except TimeoutError:
            raise RankLostError(f"the rank did not answer within {timeout_s:g} s") from None

    def _on_message(self, message: FromRank) -> None:
        self.last_heard = time.monotonic()
        match message:
            case StepOutput():
                self._on_step(message)
            case SchedulerState() | Reply():
                if isinstance(message, SchedulerState):
                    self.last_state = message
                _, answer = self._calls.pop(message.call_id, (0.0, None))
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
            case Fatal():
                self.fail(message.message)

    def _rank_rid(self, rid: str) -> str:
        """`rid`, or another name while the rank still knows an earlier sequence by it: rows are told apart by id."""
        name = rid
        while name in self._leaving or name in self._jobs:
            name = f"{rid}~{next(self._call_ids)}"
        return name

    def _on_step(self, step: StepOutput) -> None:
        for row in step.outputs:
            if row.rid in self._leaving:
                if row.finish is not None:
                    self._leaving.remove(row.rid)
                continue
            entry = self._jobs.get(row.rid)
            if entry is None:
                continue
            generation, job = entry
            num_before = generation.completion_tokens
            last_token_at = generation.timings.last_token
            abort = generation.feed(row)
            num_new = generation.completion_tokens - num_before
            self.num_tokens += num_new
            if abort is not None:
                self._leaving.add(row.rid)
                self._channel.send(abort)
            if self._metrics is not None and generation.is_measured:
                self._metrics.on_tokens(generation, num_new, last_token_at)
            if generation.finish is not None:
                self._finished(generation)
            job.note(generation)

    def end(self, generation: Generation, reason: str) -> None:
        """End one sequence on this side now, for whoever waits for it no more; the rank follows."""
        stage = STAGE_OF_MODE[self._part(generation)]
        info = ErrorInfo("AbortError", ABORTED_CODE, reason, stage, generation.rid, retryable=False)
        if reason == "deadline exceeded":
            info = ErrorInfo("TimeoutError", 504, reason, stage, generation.rid, retryable=False)
        self._leave(generation, info)

    def _leave(self, generation: Generation, info: ErrorInfo) -> None:
        """End one sequence on this side now; the rank follows."""
        self._leaving.add(generation.rank_rid)
        self._channel.send(Abort(generation.rank_rid, info.message))
        generation.end(Finish("abort", error=info))
        self._finished(generation)

    def _finished(self, generation: Generation) -> None:
        if self._jobs.pop(generation.rank_rid, None) is None:
            return
        self.num_tokens -= generation.prompt_tokens + generation.completion_tokens
        self._rids[generation.rid] -= self._part(generation) != "prefill"
        if not self._rids[generation.rid]:
            del self._rids[generation.rid]
        if self._metrics is not None and generation.is_measured:
            self._metrics.on_finish(generation)

    def _part(self, generation: Generation) -> Part:
        return part_of(self._mode, generation.submit.bootstrap)

    def lost_error(self, generation: Generation | None = None) -> ErrorInfo:
        message = f"the worker's model process is gone: {self.lost_reason}"
        if generation is None:
            return ErrorInfo(WORKER_LOST, 503, message, STAGE_OF_MODE[self._mode], retryable=True)
        stage = STAGE_OF_MODE[self._part(generation)]
        return ErrorInfo(WORKER_LOST, 503, message, stage, generation.rid, retryable=True)
