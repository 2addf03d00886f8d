"""The scheduler's part in handing KV over: rooms, what to tell the transfer, what its events mean.

`Actions` are collected here and carried out by the rank's loop against `transfer.base`; events come back through
`Scheduler.on_transfer_event`. The transfer owns a room's pages until the room's end event, so a request that ends earlier
for its client stays here as CANCELLING. No sockets, no clock.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from baton.engine.scheduler.config import CLIP_MAX_NEW_TOKENS, SchedulerConfig
from baton.engine.scheduler.counters import Counters
from baton.engine.scheduler.request import Request, Status
from baton.engine.scheduler.waiting import MAX_BYPASSED
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.rank import Side, TokenLogprobs
from baton.transfer.base import FirstToken


@dataclass(frozen=True, slots=True)
class Expect:
    """-> PrefillTransfer.expect"""

    room: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class SendPages:
    """-> PrefillTransfer.send; the last of a room carries `first_token`."""

    room: int
    first_page_idx: int
    page_ids: list[int]
    first_token: FirstToken | None


@dataclass(frozen=True, slots=True)
class Receive:
    """-> DecodeTransfer.receive"""

    room: int
    bootstrap_host: str
    bootstrap_port: int
    first_page_idx: int
    page_ids: list[int]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class AbortTransfer:
    """-> abort of that side's transfer. The room's end event still comes."""

    room: int
    reason: str
    side: Side


Action = Expect | SendPages | Receive | AbortTransfer


class Rooms:
    """Open rooms and the actions not yet taken. Invariant: a room is here from its `Expect` or `Receive` until its end
    event."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._actions: list[Action] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def open(self, req: Request, action: Expect | Receive) -> None:
        assert action.room not in self._requests, f"room {action.room} opened twice"
        self._requests[action.room] = req
        self._actions.append(action)

    def act(self, action: Action) -> None:
        self._actions.append(action)

    def is_open(self, req: Request) -> bool:
        return req.bootstrap is not None and self._requests.get(req.bootstrap.room) is req

    def get(self, room: int) -> Request | None:
        return self._requests.get(room)

    def close(self, room: int) -> Request | None:
        """At the end event. None: not a room of ours (its owner was told already)."""
        return self._requests.pop(room, None)

    def take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions


def time_left(req: Request, limit_s: float, now: float) -> float:
    """A step's own time-out, but never past the request's deadline."""
    return limit_s if req.deadline_s is None else max(0.0, min(limit_s, req.deadline_s - now))


def expect(rooms: Rooms, req: Request, config: SchedulerConfig, now: float) -> None:
    """Prefill: a request was accepted."""
    assert req.bootstrap is not None
    rooms.open(req, Expect(req.bootstrap.room, time_left(req, config.bootstrap_timeout_s, now)))


def send_computed(rooms: Rooms, req: Request, page_size: int, first_token: FirstToken | None) -> None:
    """Prefill: hand over what the last chunk completed. Before the end only whole pages: a later chunk still writes into
    a partial one. Pages that the decode side has (next_page_idx starts there) are never sent.

    Called after `commit`, so the pages are the ones that the request's handle locks, not duplicates that were freed.
    """
    assert req.bootstrap is not None
    end = req.num_computed // page_size if first_token is None else -(-req.num_computed // page_size)
    first = min(req.next_page_idx, end)
    page_ids = req.pages[first:end]
    if page_ids or first_token is not None:
        rooms.act(SendPages(req.bootstrap.room, first, page_ids, first_token))
        req.next_page_idx = max(req.next_page_idx, end)


def pack_first_token(req: Request, logprobs: TokenLogprobs | None) -> FirstToken:
    """Prefill: the metadata behind the last page."""
    return FirstToken(
        token_id=req.output_ids[-1],
        cached_tokens=req.num_cached or 0,
        logprobs=b"" if logprobs is None else msgspec.msgpack.encode(logprobs),
        input_logprobs=msgspec.msgpack.encode(req.input_logprobs) if req.input_logprobs else b"",
        cached_host=req.cached_host,
        cached_store=req.cached_store,
    )


def unpack_logprobs(first: FirstToken) -> tuple[list[TokenLogprobs], list[TokenLogprobs]]:
    """Decode: (of the first token: none or one, of the prompt). Raises msgspec.DecodeError on bytes that are neither."""
    own = [msgspec.msgpack.decode(first.logprobs, type=TokenLogprobs)] if first.logprobs else []
    prompt = msgspec.msgpack.decode(first.input_logprobs, type=list[TokenLogprobs]) if first.input_logprobs else []
    return own, prompt


class Preallocation:
    """Decode: the queue of requests that wait for pages to receive into, first come, first served."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, rooms: Rooms, counters: Counters) -> None:
        self._config = config
        self._cache = cache
        self._rooms = rooms
        self._counters = counters
        self.queue: dict[int, Request] = {}
        """By room, in order of arrival."""

    @property
    def head(self) -> Request | None:
        return next(iter(self.queue.values()), None)

    def held_tokens(self, first_waiting_idx: int | None) -> int:
        """What admissions keep free for the head of the queue: nothing, until too many that came later overtook it."""
        head = self.head
        if head is None or first_waiting_idx is None or first_waiting_idx < head.arrival_idx:
            return 0
        return head.num_tokens if head.num_bypassed >= MAX_BYPASSED else 0

    def on_admitted(self, req: Request) -> None:
        """A request that waited for prefill goes ahead."""
        head = self.head
        if head is not None and head.arrival_idx < req.arrival_idx:
            head.num_bypassed += 1

    def run(self, in_memory: list[Request], num_slots: int, before_idx: int | None, now: float) -> None:
        """Let requests in while they fit. `in_memory`: those that are running, ready or receiving. `before_idx`: only those
        that arrived before it, where it is set."""
        reserved_tokens = self._config.num_reserved_decode_tokens
        reserved = sum(min(req.num_output_left, reserved_tokens) for req in in_memory)
        retractable = sum(req.num_tokens for req in in_memory if req.status is Status.RUNNING)
        is_alone = not in_memory
        while (req := self.head) is not None and num_slots > 0:
            if before_idx is not None and req.arrival_idx > before_idx:
                return
            if not self._try(req, reserved, retractable, is_alone, now):
                return
            assert req.bootstrap is not None
            del self.queue[req.bootstrap.room]
            reserved += min(req.num_output_left, reserved_tokens)
            is_alone = False
            num_slots -= 1

    def _try(self, req: Request, reserved: int, retractable: int, is_alone: bool, now: float) -> bool:
        """It fits if its tokens and its reserve fit beside the reserves of the others, and so would its whole output if
        all that run were retracted (SGLang's rule). Alone it only needs pages for its tokens."""
        cache, page = self._cache, self._cache.page_size
        assert req.bootstrap is not None
        total = req.num_tokens
        match = cache.match_prefix(req.token_slice(0, total), req.extra_key, total)
        num_loaded = match.num_loadable
        matched = match.num_tokens + num_loaded * page
        missing = -(-total // page) - len(match.pages)
        room = cache.num_available * page - reserved
        own_reserve = min(req.num_output_left, self._config.num_reserved_decode_tokens)
        whole = missing * page + min(req.num_output_left, CLIP_MAX_NEW_TOKENS) - retractable
        fits = is_alone or max(missing * page + own_reserve, whole) <= room
        fresh = cache.allocate(missing) if fits else None
        if fresh is None:
            cache.release(match.handle)
            return False
        cache.load(match, fresh[:num_loaded])
        first_page_idx = len(match.pages) + num_loaded
        req.handle, req.pages, req.num_computed = match.handle, match.pages + fresh, matched
        req.save_from = total // page
        req.move_to(Status.RECEIVING)
        self._counters.transfer_alloc_ms = (now - req.arrival_s) * 1e3
        self._counters.cache_hit_rate = matched / total
        req.queue_time_s = now - req.arrival_s
        port = req.bootstrap.port if req.bootstrap.port is not None else self._config.default_bootstrap_port
        timeout_s = time_left(req, self._config.receive_timeout_s, now)
        # A copy: the page table grows, the transfer keeps its list.
        received = list(fresh[num_loaded:])
        self._rooms.open(
            req, Receive(req.bootstrap.room, req.bootstrap.host, port, first_page_idx, received, timeout_s)
        )
        return True
