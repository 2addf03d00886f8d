"""Where each live request is, and the moves that leave a place: an end, a cancelled transfer, a retraction.

Owns the queues, the decode batch and the rooms. Which request moves when is `scheduler`'s decision.
"""

from collections import deque
from collections.abc import Iterator
from random import Random

from baton.engine.scheduler import pd
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.counters import Counters
from baton.engine.scheduler.decode_batch import DecodeBatch, Rows
from baton.engine.scheduler.inflight import StepsInFlight
from baton.engine.scheduler.lifecycle import Lifecycle
from baton.engine.scheduler.request import Request, Status
from baton.engine.scheduler.retraction import HEADROOM_STEPS, NewTokenRatio, next_victim
from baton.engine.scheduler.waiting import WaitingQueue
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import STAGE_OF_MODE, Finish

_IN_ROOM_ONLY = (Status.BOOTSTRAPPING, Status.RECEIVING, Status.WITHDRAWING, Status.SENDING, Status.CANCELLING)


class Places:
    """Invariant: every live request is in exactly one of: a room (BOOTSTRAPPING, RECEIVING, WITHDRAWING, SENDING), the
    preallocation queue, the ready queue, the waiting queue, `chunked`, the decode batch, or only in a step in flight
    (PREFILLING: its last chunk)."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, rng: Random) -> None:
        self._config = config
        self._cache = cache
        self.life = Lifecycle(cache)
        self.counters = Counters()
        self.ratio = NewTokenRatio(config.schedule_conservativeness)
        self.waiting = WaitingQueue(config, cache, rng)
        self.decode = DecodeBatch(cache.page_size)
        self.ready: deque[Request] = deque()
        """Decode: received, waiting for a row in the decode batch."""
        self.chunked: Request | None = None
        """The one request whose prompt is in part neither computed nor in a step in flight."""
        self.steps = StepsInFlight(config.pipeline_depth, cache)
        self.rooms = pd.Rooms()
        self.prealloc = pd.Preallocation(config, cache, self.rooms, self.counters)

    def __iter__(self) -> Iterator[tuple[str, Request]]:
        yield from (("waiting", req) for req in self.waiting)
        yield from (("prealloc", req) for req in self.prealloc.queue.values())
        yield from (("ready", req) for req in self.ready)
        yield from (("decode", req) for req in self.decode.requests)
        if self.chunked is not None:
            yield "chunked", self.chunked
        yield from (("step", req) for req in self.last_chunks)
        yield from (("room", req) for req in self.rooms if req.status in _IN_ROOM_ONLY)

    @property
    def last_chunks(self) -> list[Request]:
        """Requests whose last chunk is in a step in flight."""
        return [req for req in self.steps.prefilling if req is not self.chunked]

    @property
    def num_running(self) -> int:
        """Requests that hold pages to compute with."""
        return len(self.decode) + len(self.ready) + (self.chunked is not None) + len(self.last_chunks)

    @property
    def num_queued(self) -> int:
        """Requests that have not begun: what `max_queued_requests` bounds."""
        bootstrapping = sum(req.status is Status.BOOTSTRAPPING for req in self.rooms)
        return len(self.waiting) + len(self.prealloc.queue) + bootstrapping

    @property
    def first_waiting_idx(self) -> int | None:
        """Arrival of the first of those whose prompt is still to be computed here."""
        waiting = [self.waiting.first] if self.waiting else []
        if self.chunked is not None:
            waiting.append(self.chunked)
        return min((req.arrival_idx for req in waiting), default=None)

    def is_room_taken(self, req: Request) -> bool:
        """Whether the room of a new request is somebody else's. The other half of the same request, which this worker was
        asked to prefill for itself, is nobody else."""
        assert req.bootstrap is not None
        room = req.bootstrap.room
        holder = self.rooms.get(room) or self.prealloc.queue.get(room)
        if holder is None:
            return False
        return (holder.part, holder.status, req.part) != ("prefill", Status.BOOTSTRAPPING, "decode")

    def enqueue(self, req: Request) -> None:
        req.move_to(Status.WAITING)
        self.waiting.add(req)

    def run(self, req: Request) -> None:
        req.move_to(Status.RUNNING)
        self.decode.add(req)

    def end(self, req: Request, finish: Finish) -> None:
        """The client's end, wherever the request is, once no step in flight has it. Its pages go back then, or, when a transfer
        may touch them, at the end event of the room."""
        if req in self.steps:
            self.steps.put_off(req, finish)
            return
        self._leave(req)
        self.life.emit(req, finish=finish)
        if self.rooms.is_open(req):
            assert req.bootstrap is not None and req.part != "null"
            reason = finish.error.message if finish.error is not None else "finished"
            self.rooms.act(pd.AbortTransfer(req.bootstrap.room, reason, req.part))
            req.move_to(Status.CANCELLING)
        else:
            self.life.finish_pages(req)

    def admit_received(self, now: float) -> None:
        """Decode: the received join the decode batch, and others are let in to receive, but nobody before one whose prompt
        waits to be computed and who came earlier (as the retracted did)."""
        # A partly computed prompt does not count: it may itself wait for the pages that the received ones hold.
        while self.ready and len(self.decode) < self._config.max_running_requests:
            self.run(self.ready.popleft())
        if not self.prealloc.queue:
            return
        receiving = [req for req in self.rooms if req.status is Status.RECEIVING]
        in_memory = [*self.decode.requests, *self.ready, *self.last_chunks, *receiving]
        # Twice as many as may run: receiving takes time, and the next ones should be there when a row gets free.
        num_slots = 2 * self._config.max_running_requests - len(in_memory)
        self.prealloc.run(in_memory, num_slots, self.first_waiting_idx, now)

    def make_room(self) -> tuple[Rows, bool]:
        """The decode rows of the next step, each with a page for its next token; and whether pages were short.

        If they are, requests are sent back to the queue until there are enough. A request that the whole pool cannot
        hold ends with an error: nothing else could ever come of it. Who leaves is chosen from all that run, so while
        steps are in flight nobody does, and there are no rows: those steps may free what is missing.
        """
        depth = self.steps.depth
        if self.steps:
            rows = self.decode.due(depth)
            has_room = self.decode.grow(self._cache, rows)
            return (rows if has_room else rows[:0]), not has_room
        needs_headroom = False
        while self.decode:
            if needs_headroom and len(self.decode) > 1 and not self._has_headroom():
                self._retract_one()
            elif self.decode.grow(self._cache, self.decode.all_rows()):
                break
            else:
                needs_headroom = True
                self._retract_one()
        if needs_headroom and self.decode:
            self.ratio.on_retraction(self.decode.requests)
        return self.decode.due(depth), needs_headroom

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
        return ErrorInfo("OutOfPagesError", 500, message, STAGE_OF_MODE[req.part], req.rid)

    def _leave(self, req: Request) -> None:
        match req.status:
            case Status.WAITING:
                self.waiting.remove(req)
            case Status.PREALLOC:
                assert req.bootstrap is not None
                del self.prealloc.queue[req.bootstrap.room]
            case Status.READY:
                self.ready.remove(req)
            case Status.RUNNING:
                self.decode.remove(req)
            case Status.PREFILLING:
                self.chunked = None if self.chunked is req else self.chunked
            case _:
                pass  # only in a room, which closes at its end event
