"""Where each live request is, and the moves that leave a place: an end, a cancelled transfer, a retraction.

Owns the queues, the decode batch and the rooms. Which request moves when is `scheduler`'s decision.
"""

from collections import deque
from collections.abc import Iterator
from random import Random

from baton.engine.scheduler import pd
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.counters import Counters
from baton.engine.scheduler.decode_batch import DecodeBatch
from baton.engine.scheduler.intake import STAGE_OF_MODE
from baton.engine.scheduler.lifecycle import Lifecycle
from baton.engine.scheduler.request import Request, Status
from baton.engine.scheduler.retraction import HEADROOM_STEPS, NewTokenRatio, next_victim
from baton.engine.scheduler.waiting import WaitingQueue
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import Finish

_IN_ROOM_ONLY = (Status.BOOTSTRAPPING, Status.RECEIVING, Status.SENDING, Status.CANCELLING)


class Places:
    """Invariant: every live request is in exactly one of: a room (BOOTSTRAPPING, RECEIVING, SENDING), the preallocation
    queue, the ready queue, the waiting queue, `chunked`, the decode batch, or only in the step in flight (PREFILLING)."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, rng: Random) -> None:
        self._config = config
        self._cache = cache
        self.life = Lifecycle(cache)
        self.counters = Counters()
        self.ratio = NewTokenRatio(config.schedule_conservativeness)
        self.waiting = WaitingQueue(config, cache, rng)
        self.decode = DecodeBatch(cache.page_size)
        self.ready: deque[Request] = deque()
        """Decode mode: received, waiting for a row in the decode batch."""
        self.chunked: Request | None = None
        """The one request whose prompt is partly computed."""
        self.rooms = pd.Rooms()
        self.prealloc = pd.Preallocation(config, cache, self.rooms, self.counters)

    def __iter__(self) -> Iterator[tuple[str, Request]]:
        """(place, request) of every place but the step in flight."""
        yield from (("waiting", req) for req in self.waiting)
        yield from (("prealloc", req) for req in self.prealloc.queue)
        yield from (("ready", req) for req in self.ready)
        yield from (("decode", req) for req in self.decode.requests)
        if self.chunked is not None:
            yield "chunked", self.chunked
        yield from (("room", req) for req in self.rooms if req.status in _IN_ROOM_ONLY)

    @property
    def num_queued(self) -> int:
        """Requests that have not begun: what `max_queued_requests` bounds."""
        bootstrapping = sum(req.status is Status.BOOTSTRAPPING for req in self.rooms)
        return len(self.waiting) + len(self.prealloc.queue) + bootstrapping

    def enqueue(self, req: Request) -> None:
        req.move_to(Status.WAITING)
        self.waiting.add(req)

    def run(self, req: Request) -> None:
        req.move_to(Status.RUNNING)
        self.decode.add(req)

    def end(self, req: Request, finish: Finish) -> None:
        """The client's end, wherever the request is. Its pages go back now, or, when a transfer may touch them, at the
        end event of the room."""
        self._leave(req)
        self.life.emit(req, finish=finish)
        if self.rooms.is_open(req):
            assert req.bootstrap is not None
            reason = finish.error.message if finish.error is not None else "finished"
            self.rooms.act(pd.AbortTransfer(req.bootstrap.room, reason))
            req.move_to(Status.CANCELLING)
        else:
            self.life.finish_pages(req)

    def make_room(self) -> bool:
        """Give every decode row a page for its next token, sending requests back to the queue until that works. A
        request that the whole pool cannot hold ends with an error: nothing else could ever come of it. Returns whether
        anyone had to leave."""
        needs_headroom = False
        while self.decode:
            if needs_headroom and len(self.decode) > 1 and not self._has_headroom():
                self._retract_one()
            elif self.decode.grow(self._cache):
                break
            else:
                needs_headroom = True
                self._retract_one()
        if needs_headroom and self.decode:
            self.ratio.on_retraction(self.decode.requests)
        return needs_headroom

    def _has_headroom(self) -> bool:
        tokens = sum(min(HEADROOM_STEPS, req.num_output_left) for req in self.decode.requests)
        return self._cache.num_available * self._cache.page_size >= tokens

    def _retract_one(self) -> None:
        victim = next_victim((*self.decode.requests, *self.ready))
        if victim.num_computed >= self._cache.num_pages * self._cache.page_size:
            self.end(victim, Finish("abort", error=self._too_large(victim)))
            return
        self._leave(victim)
        self.life.drop_pages(victim)
        victim.num_retractions += 1
        self.counters.num_retracted_total += 1
        self.enqueue(victim)

    def _too_large(self, req: Request) -> ErrorInfo:
        message = (
            f"Out of KV pages: the request has {req.num_tokens} tokens and fills this worker's cache of "
            f"{self._cache.num_pages * self._cache.page_size} tokens alone. Lower max_new_tokens or raise "
            "--max-total-tokens."
        )
        return ErrorInfo("OutOfPagesError", 500, message, STAGE_OF_MODE[self._config.mode], req.rid)

    def _leave(self, req: Request) -> None:
        match req.status:
            case Status.WAITING:
                self.waiting.remove(req)
            case Status.PREALLOC:
                self.prealloc.queue.remove(req)
            case Status.READY:
                self.ready.remove(req)
            case Status.RUNNING:
                self.decode.remove(req)
            case Status.PREFILLING:
                self.chunked = None if self.chunked is req else self.chunked
            case _:
                pass  # only in a room, which closes at its end event
