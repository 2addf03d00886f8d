"""The live requests and their ends: exactly one finish for each rid, pages given back exactly once.

Owns the table of requests the client still waits for, their deadlines, and the outputs not yet handed out. Which queue a
request sits in is the scheduler's business.
"""

import heapq
from collections.abc import Sequence

from baton.engine.scheduler.request import Request, Status
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.rank import Finish, RequestOutput, TokenLogprobs


class Lifecycle:
    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self.live: dict[str, Request] = {}
        """By rid. Invariant: a request is here until its finish was emitted."""
        self._outputs: list[RequestOutput] = []
        self._deadlines: list[tuple[float, int, Request]] = []

    def admit(self, req: Request) -> None:
        self.live[req.rid] = req
        if req.deadline_s is not None:
            heapq.heappush(self._deadlines, (req.deadline_s, req.arrival_idx, req))

    def emit(
        self,
        req: Request,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[TokenLogprobs] = (),
        finish: Finish | None = None,
    ) -> None:
        """One output row; with a finish it is the last, and the rid is free again."""
        input_logprobs: list[TokenLogprobs] = []
        if (token_ids or finish is not None) and req.input_logprobs and not req.input_logprobs_sent:
            input_logprobs = req.input_logprobs
        if token_ids:
            req.input_logprobs_sent = True
        if finish is not None:
            assert self.live.pop(req.rid, None) is req, f"{req.rid} finished twice"
            self._cache.end_prefetch(req.rid)
        self._outputs.append(
            RequestOutput(
                rid=req.rid,
                token_ids=list(token_ids),
                finish=finish,
                cached_tokens=req.num_cached or 0,
                logprobs=list(logprobs),
                input_logprobs=input_logprobs,
                num_retractions=req.num_retractions,
                queue_time_s=req.queue_time_s or 0.0,
                cached_host=req.cached_host,
                cached_store=req.cached_store,
            )
        )

    def emit_token(self, req: Request, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        """`emit` of one token, cheap where it is one of many in a decode step."""
        if finish is not None or logprobs is not None or not req.input_logprobs_sent:
            self.emit(req, (token_id,), () if logprobs is None else (logprobs,), finish)
            return
        self._outputs.append(
            RequestOutput(
                req.rid, [token_id], None, req.num_cached or 0, [], [], req.num_retractions, req.queue_time_s or 0.0,
                req.cached_host, req.cached_store,
            )
        )  # fmt: skip

    def take_outputs(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def finish_pages(self, req: Request) -> None:
        """Give the pages back and leave what was computed in the prefix tree."""
        if req.handle is not None:
            self._cache.finish(req.handle, req.token_slice(0, req.num_computed), req.pages, req.save_from)
        req.handle, req.pages = None, []
        req.move_to(Status.FINISHED)

    def drop_pages(self, req: Request) -> None:
        """Give the pages back, unshared; the request starts over."""
        if req.handle is not None:
            self._cache.drop(req.handle, req.pages)
        req.handle, req.pages, req.num_computed = None, [], 0

    def next_deadline(self) -> float | None:
        while self._deadlines and self._is_over(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_expired(self, now: float) -> list[Request]:
        """Live requests whose deadline has come; each is returned once."""
        expired = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            expired.append(heapq.heappop(self._deadlines)[2])
        return expired

    def _is_over(self, req: Request) -> bool:
        return self.live.get(req.rid) is not req
