"""Tiers of ranks that do not share their KV pool: each keeps its heads of a page in its own host memory and store.

Rank 0's cache decides. What it decides goes to every rank over the control connection, in order with the steps, so host page n is the
same tokens everywhere. Each rank's store answers for itself; the cache hears of a page what all ranks can stand for (`Merge`).
Nobody polls: a thread per follower reads what it sends (`answers`) and wakes the leader's loop, a thread in the follower sends what
its store answered. A rank that is lost ends the group (`heartbeat`). Not here: how one rank moves pages (`engine.tiers`).
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from baton.engine.distributed.answers import Take
from baton.engine.distributed.control import GroupError, Phases
from baton.engine.distributed.group import FollowerGroup, LeaderGroup
from baton.engine.distributed.messages import (
    Answers,
    AskStore,
    Clear,
    Cleared,
    Move,
    StoreIs,
    TierAnswer,
    TierOrder,
    decode_event,
    decode_move,
    encode_event,
    encode_move,
)
from baton.engine.tiers import OwnTiers
from baton.kvcache.tiers import Copies, Found, Late, PagesRead, StoreAction, StoreEvent, Written
from baton.transfer.base import Wake

logger = logging.getLogger(__name__)


def agree_host_pages(group: Phases, own_pages: int) -> int:
    """The host pages of every rank: those of the smallest. All ranks have tiers: that the flags are equal was seen to at start."""
    return min(map(int, group.phase("tiers", str(own_pages))))


@dataclass(slots=True)
class _Operation:
    """What the ranks answered so far, by rank."""

    found: dict[int, int] = field(default_factory=dict)
    ok: dict[int, list[bool]] = field(default_factory=dict)
    """Of a read or write, page by page from the first."""
    ended: set[int] = field(default_factory=set)
    num_told: int = 0
    """Pages of a read that the cache knows of."""


class Merge:
    """One event of all ranks out of their own: as many pages as the poorest found, a page is ok where it is on every rank, and
    the last event comes when every rank's did. Invariant: an operation is kept until then."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._operations: dict[int, _Operation] = {}

    def add(self, rank: int, event: StoreEvent) -> StoreEvent | None:
        """What the cache may hear now. That one rank is late it hears at once."""
        if isinstance(event, Late):
            return event
        operation = self._operations.setdefault(event.op, _Operation())
        match event:
            case Found(op, num_pages):
                operation.found[rank] = num_pages
                if len(operation.found) < self._num_ranks:
                    return None
                del self._operations[op]
                return Found(op, min(operation.found.values()))
            case Written(op, ok):
                operation.ok[rank] = ok
                if len(operation.ok) < self._num_ranks:
                    return None
                del self._operations[op]
                return Written(op, _everywhere(operation.ok, 0, len(ok)))
            case _:
                return self._add_read(rank, event, operation)

    def _add_read(self, rank: int, event: PagesRead, operation: _Operation) -> PagesRead | None:
        answers = operation.ok.setdefault(rank, [])
        if event.first != len(answers):
            raise GroupError(f"rank {rank} answered for page {event.first} of a read where {len(answers)} comes next")
        answers += event.ok
        if event.is_last:
            operation.ended.add(rank)
        if len(operation.ok) < self._num_ranks:
            return None
        first, end = operation.num_told, min(len(ok) for ok in operation.ok.values())
        is_last = len(operation.ended) == self._num_ranks
        if first == end and not is_last:
            return None
        operation.num_told = end
        if is_last:
            del self._operations[event.op]
        return PagesRead(event.op, first, _everywhere(operation.ok, first, end), is_last)


def _everywhere(ok: dict[int, list[bool]], first: int, end: int) -> list[bool]:
    return [all(pages) for pages in zip(*(one[first:end] for one in ok.values()), strict=True)]


class LeadingTiers:
    """Implements `engine.tiers.Tiers` on rank 0 for all ranks. `wake` is called from other threads when `poll` has news."""

    def __init__(self, own: OwnTiers, group: LeaderGroup, wake: Wake) -> None:
        self._own, self._group, self._wake = own, group, wake
        self._merge = Merge(group.size)
        self._inbox: deque[tuple[int, StoreEvent]] = deque()
        self._clears: deque[_Clearing] = deque()
        self._clears_lock = threading.Lock()
        self._is_up = dict.fromkeys(group.followers, True)
        """What each follower last said of its store."""
        self.takers: dict[type, Take] = dict.fromkeys((Answers, StoreIs, Cleared), self._take)
        """Who takes what the followers send (`answers`)."""

    @property
    def has_store(self) -> bool:
        return self._own.has_store

    def poll(self) -> list[StoreEvent]:
        """Raises `GroupError` for an answer that does not fit."""
        events = [(0, event) for event in self._own.poll()]
        while self._inbox:
            events.append(self._inbox.popleft())
        merged = (self._merge.add(rank, event) for rank, event in events)
        return [event for event in merged if event is not None]

    def move(self, copies: Copies, actions: list[StoreAction]) -> None:
        if copies or actions:
            self._group.send(encode_move(copies, actions))
            self._own.move(copies, actions)

    def store_stats(self) -> Mapping[str, float]:
        """This rank's counts; `up` where it is on all ranks, as the others said when they were last asked."""
        stats = dict(self._own.store_stats())
        if stats:
            stats["up"] = min(stats["up"], *map(float, self._is_up.values()))
            self._group.send(AskStore())
        return stats

    def clear_store(self) -> Future[bool]:
        clearing = _Clearing(self._group.size)
        with self._clears_lock:
            self._clears.append(clearing)
        self._group.send(Clear())
        self._own.clear_store().add_done_callback(lambda done: self._cleared(clearing, 0, done.result()))
        return clearing.done

    def close(self) -> None:
        """The followers' tiers end with their processes."""
        self._own.close()

    def _cleared(self, clearing: "_Clearing", rank: int, ok: bool) -> None:
        with self._clears_lock:
            clearing.answers[rank] = ok
            if len(clearing.answers) < clearing.num_ranks:
                return
            self._clears.remove(clearing)
        clearing.done.set_result(all(clearing.answers.values()))
        self._wake()

    def _take(self, rank: int, message: TierAnswer) -> None:
        match message:
            case Answers(answers):
                self._inbox.extend((rank, decode_event(one)) for one in answers)
                self._wake()
            case StoreIs(up):
                self._is_up[rank] = up
            case Cleared(ok):
                with self._clears_lock:
                    clearing = next(one for one in self._clears if rank not in one.answers)
                self._cleared(clearing, rank, ok)


class _Clearing:
    """A call to empty the stores of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.answers: dict[int, bool] = {}
        self.done: Future[bool] = Future()


class FollowingTiers:
    """The hands of any other rank, for its main thread; a thread of its own sends what the store answers."""

    def __init__(self, group: FollowerGroup) -> None:
        self._group = group
        self._outbox: queue.SimpleQueue[TierAnswer | None] = queue.SimpleQueue()
        """None: look what the store has answered."""

    def wake(self) -> None:
        """From any thread: the store has answered."""
        self._outbox.put(None)

    def start(self, own: OwnTiers) -> None:
        self._own = own
        threading.Thread(target=self._send, name="tiers-answers", daemon=True).start()

    def obey(self, order: TierOrder) -> None:
        match order:
            case Move():
                self._own.move(*decode_move(order))
            case AskStore():
                self._outbox.put(StoreIs(self._own.store_stats()["up"] > 0))
            case Clear():
                self._own.clear_store().add_done_callback(lambda done: self._outbox.put(Cleared(done.result())))

    def _send(self) -> None:
        try:
            while True:
                message = self._outbox.get()
                if message is None:
                    events = self._own.poll()
                    message = Answers([encode_event(event) for event in events]) if events else None
                if message is not None:
                    self._group.send(message)
        except GroupError as error:
            logger.debug("the leader hears no more answers: %s", error)
