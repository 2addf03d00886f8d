"""Which waiting requests enter this prefill step, and how many of their tokens: the budget.

Takes pages from the cache for those it admits. It moves no status and builds no batch; it never frees a page that a
request owns.
"""

from dataclasses import dataclass

from baton.engine.scheduler.config import CLIP_MAX_NEW_TOKENS, SchedulerConfig
from baton.engine.scheduler.decode_batch import DecodeBatch
from baton.engine.scheduler.request import Request
from baton.engine.scheduler.retraction import NewTokenRatio
from baton.engine.scheduler.waiting import MAX_BYPASSED, WaitingQueue
from baton.kvcache.prefix_cache import PrefixCache

MAX_MISFITS = 16
"""Requests that do not fit before a round gives up looking for one that does."""
RETRY_STEPS = 16
"""Steps after which a full pool is looked at again, even if no request ended: the expected output has shrunk."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start .. end - 1 of one request are computed in this step. Pages for them are in its page table."""

    req: Request
    start: int
    end: int
    is_last: bool
    """The next token can be drawn after it."""


@dataclass(slots=True)
class _Budget:
    """What is left for this step. All in tokens."""

    chunk: int | None
    input: int
    reserved: int
    """Of the available pages, needed later by requests that are in already."""
    slots: int


class Admission:
    def __init__(
        self, config: SchedulerConfig, cache: PrefixCache, waiting: WaitingQueue, ratio: NewTokenRatio
    ) -> None:
        self._config = config
        self._cache = cache
        self._waiting = waiting
        self._ratio = ratio
        page = cache.page_size
        size = config.chunked_prefill_size
        # Chunks end at page borders, so that whole pages can be shared and sent; one page is the least.
        self._chunk_tokens = None if size is None else max(min(size, config.max_prefill_tokens) // page * page, page)
        # After a round that found no room: steps to wait, and the decode rows there were. One less is a reason to retry.
        self._steps_to_wait = 0
        self._rows_when_full = 0
        self.lacks_pages = False
        """The last plan is empty, for want of pages."""

    def wake(self) -> None:
        """Something changed (an arrival, an end): look at the queue again."""
        self._steps_to_wait = 0

    def plan(
        self, chunked: Request | None, decode: DecodeBatch, num_slots: int, num_mixed: int, held: int, now: float
    ) -> list[Chunk]:
        """The chunks of this step; the admitted have left the queue and hold handle and pages.

        `chunked`: the one request whose prompt is partly computed; it goes first. `num_slots`: requests that may be
        added to the running ones. `num_mixed`: decode rows that share the step. `held`: tokens to keep for requests
        that are neither waiting nor in `decode`. A request whose prefetch is worth waiting for is passed over.
        """
        self.lacks_pages = False
        if chunked is None and (not self._waiting or num_slots <= 0):
            return []
        if chunked is None and self._steps_to_wait > 0 and len(decode) >= self._rows_when_full:
            self._steps_to_wait -= 1
            return []
        page = self._cache.page_size
        running = int(decode.reserve_tokens(CLIP_MAX_NEW_TOKENS) * self._ratio.value)
        chunk_tokens = self._chunk_tokens
        if chunk_tokens is not None:
            chunk_tokens = max((chunk_tokens - num_mixed) // page * page, page)
        budget = _Budget(chunk_tokens, max(self._config.max_prefill_tokens - num_mixed, 1), running + held, num_slots)
        chunks: list[Chunk] = []
        if chunked is not None:
            chunk = self._continue(chunked, budget)
            if chunk is None:
                self.lacks_pages = True
                return []
            chunks.append(chunk)
        if chunked is None or chunks[0].is_last:
            is_alone = chunked is None and not decode and held == 0
            misfits = self._admit_waiting(chunks, budget, is_alone, now)
            self.lacks_pages = misfits > 0 and not chunks
            if self.lacks_pages and len(decode):
                self._steps_to_wait, self._rows_when_full = RETRY_STEPS, len(decode)
        return chunks

    def _continue(self, req: Request, budget: _Budget) -> Chunk | None:
        """The next chunk of a request that holds pages already. Takes what pages there are."""
        page = self._cache.page_size
        start, total = req.num_begun, req.num_tokens
        room = (len(req.pages) + self._cache.num_available) * page - start
        size = min(total - start, room, total if budget.chunk is None else budget.chunk)
        end = start + size
        if end < total:
            end = end // page * page
        if end <= start:
            return None
        fresh = self._cache.allocate(-(-end // page) - len(req.pages))
        assert fresh is not None, "room was computed from the pages available"
        req.pages += fresh
        return self._chunk(req, start, end, budget)

    def _admit_waiting(self, chunks: list[Chunk], budget: _Budget, is_alone: bool, now: float) -> int:
        """Append what is admitted to `chunks`; returns how many did not fit."""
        admitted: list[Request] = []
        misfits = 0
        may_pass = MAX_BYPASSED
        for req in self._waiting.in_policy_order():
            if budget.slots <= 0 or budget.input <= 0 or budget.chunk == 0 or may_pass <= 0:
                break
            if self._cache.awaits_prefetch(req.rid, now):
                continue
            chunk = self._try(req, budget, is_first=not chunks, is_alone=is_alone and not chunks)
            if chunk is None:
                misfits += 1
                may_pass = min(may_pass, MAX_BYPASSED - req.num_bypassed)
                if misfits >= MAX_MISFITS:
                    break
                continue
            chunks.append(chunk)
            admitted.append(req)
            budget.slots -= 1
            may_pass -= misfits > 0
            if not chunk.is_last:
                break
        self._waiting.take(admitted)
        return misfits

    def _try(self, req: Request, budget: _Budget, is_first: bool, is_alone: bool) -> Chunk | None:
        """Lock the cached prefix and take pages, or leave everything as it was and return None."""
        cache, page = self._cache, self._cache.page_size
        total = req.num_tokens
        tokens = req.token_slice(0, total)
        match = cache.match_prefix(tokens, req.extra_key, max_cached_tokens(req))
        start = match.num_tokens + match.num_loadable * page
        end = total
        if budget.chunk is not None and end - start > budget.chunk:
            end = start + budget.chunk // page * page
        future = future_tokens(req)
        needed = (-(-(total + future) // page) - len(match.pages)) * page
        fits = is_alone or needed <= cache.num_available * page - budget.reserved
        # A prompt over the step's budget may still go alone: nothing smaller would ever come of waiting.
        in_step = end > start and (is_first or end - start <= budget.input)
        fresh = cache.allocate(-(-end // page) - len(match.pages)) if fits and in_step else None
        if fresh is None:
            cache.release(match.handle)
            return None
        cached = cache.load(match, fresh[: match.num_loadable])
        cache.end_prefetch(req.rid)
        if req.num_cached is None:
            req.num_cached = min(start, len(req.prompt_ids))
            req.cached_host, req.cached_store = cached.host, cached.store
        req.handle, req.pages, req.num_computed = match.handle, match.pages + fresh, start
        return self._chunk(req, start, end, budget)

    def _chunk(self, req: Request, start: int, end: int, budget: _Budget) -> Chunk:
        budget.input -= end - start
        if budget.chunk is not None:
            budget.chunk = max(0, budget.chunk - (end - start)) // self._cache.page_size * self._cache.page_size
        budget.reserved += req.num_tokens - end + future_tokens(req)
        req.num_begun = end
        return Chunk(req, start, end, end == req.num_tokens)


def future_tokens(req: Request) -> int:
    """KV of output tokens still to come. The last token drawn needs none."""
    return min(max(0, req.num_output_left - 1), CLIP_MAX_NEW_TOKENS)


def max_cached_tokens(req: Request) -> int:
    """How much of a request may come from the cache: at least its last token is computed (its logits are needed), and
    everything from the position before the first whose log-probability was asked for."""
    limit = req.num_tokens - 1
    if req.logprob_start is not None and not req.input_logprobs_sent:
        limit = min(limit, max(req.logprob_start - 1, 0))
    return limit
