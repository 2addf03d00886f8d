"""Which of a worker's data-parallel engines gets a prompt (`--load-balance-method`): one small object per method.

Decided for a prompt, not for a sequence: its choices (n > 1) share its prefix, so they go to one engine. No clock, no I/O. Neighbours:
`engines` asks and sends. Not here: which worker gets a request (the router).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.engine.args import EngineArgs
from baton.protocol.errors import bad_request
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Mode, Ready, Submit, part_of

BUSIER_REQUESTS = 4
BUSIER_FACTOR = 1.5
"""cache_aware: an engine is much busier than another with so many more requests, and so many times as many."""


@dataclass(slots=True)
class EngineLoad:
    """What one engine has in progress."""

    num_requests: int = 0
    """Sequences."""
    num_tokens: int = 0
    """Of their prompts, and what they have generated."""


class Balancer(Protocol):
    def choose(self, submit: Submit, loads: Sequence[EngineLoad]) -> int:
        """The engine's index."""


class RoundRobin:
    def __init__(self) -> None:
        self._turn = -1

    def choose(self, submit: Submit, loads: Sequence[EngineLoad]) -> int:
        self._turn += 1
        return self._turn % len(loads)


class _Fewest:
    """The engine that has the least; those that have the same take turns."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, submit: Submit, loads: Sequence[EngineLoad]) -> int:
        count = len(loads)
        after = ((self._last + step) % count for step in range(1, count + 1))
        self._last = min(after, key=lambda index: self._amount(loads[index]))
        return self._last

    def _amount(self, load: EngineLoad) -> int:
        raise NotImplementedError


class TotalRequests(_Fewest):
    def _amount(self, load: EngineLoad) -> int:
        return load.num_requests


class TotalTokens(_Fewest):
    def _amount(self, load: EngineLoad) -> int:
        return load.num_tokens


class CacheAware:
    """The engine that got the longest beginning of the prompt before, unless it is much busier than the idlest one.

    A beginning counts in whole pages, as in the prefix cache; what was sent to an engine is remembered for as many pages as its pool
    has, the least recently sent go first. Answers are not: the next turn's prompt finds its engine by the turns before.
    """

    def __init__(self, page_size: int, max_pages: int) -> None:
        self._page_size = page_size
        self._max_pages = max_pages
        self._sent: dict[int, OrderedDict[int, None]] = {}
        """Engine -> keys of page-aligned beginnings, least recently sent first."""
        self._idlest = TotalRequests()

    def choose(self, submit: Submit, loads: Sequence[EngineLoad]) -> int:
        keys = self._keys(submit)
        chosen = self._idlest.choose(submit, loads)
        matched = {index: self._num_known(index, keys) for index in range(len(loads))}
        best = max(matched, key=lambda index: (matched[index], -loads[index].num_requests))
        if matched[best] > matched[chosen] and not _is_much_busier(loads[best], loads[chosen]):
            chosen = best
        self._remember(chosen, keys)
        return chosen

    def _keys(self, submit: Submit) -> list[int]:
        """One for each beginning of whole pages, shortest first."""
        ids, size = submit.input_ids, self._page_size
        key = hash(submit.extra_key)
        keys = []
        for start in range(0, len(ids) - size + 1, size):
            key = hash((key, *ids[start : start + size]))
            keys.append(key)
        return keys

    def _num_known(self, index: int, keys: Sequence[int]) -> int:
        sent = self._sent.get(index, OrderedDict())
        # Beginnings of what was sent were sent too, and are forgotten after it: the boundary can be searched for.
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high + 1) // 2
            if keys[middle - 1] in sent:
                low = middle
            else:
                high = middle - 1
        return low

    def _remember(self, index: int, keys: Sequence[int]) -> None:
        sent = self._sent.setdefault(index, OrderedDict())
        for key in reversed(keys):
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._max_pages:
            sent.popitem(last=False)


def _is_much_busier(one: EngineLoad, other: EngineLoad) -> bool:
    more = one.num_requests - other.num_requests
    return more > BUSIER_REQUESTS and one.num_requests > BUSIER_FACTOR * other.num_requests


def make_balancer(method: str, page_size: int, max_pages: int) -> Balancer:
    """`max_pages`: of one engine's pool."""
    if method in ("total_requests", "shortest_queue"):
        return TotalRequests()
    if method in ("total_tokens", "minimum_tokens"):
        return TotalTokens()
    if method == "cache_aware":
        return CacheAware(page_size, max_pages)
    return RoundRobin()


@dataclass(slots=True)
class Dispatcher:
    """Says for every sequence of a request where it goes."""

    balancer: Balancer
    follows_room: bool = False
    """SGLang's rule: the engine is the request's bootstrap room modulo the number of engines."""
    mode: Mode = "null"
    """A prefill must follow its room, whatever the request asks for: the decode side computes from it which engine it meets."""
    first_dp_rank: int = 0
    """The number of the first engine (see `EngineArgs.dp_group`)."""

    def dispatch(self, submits: Sequence[Submit], loads: list[EngineLoad], dp_rank: int | None) -> list[int]:
        """The engine's index for each of `submits`. `dp_rank`: the one that the request asks for.

        `loads` are counted up as sequences are given out. Raises `RequestError` (400) for an engine that there is not.
        """
        found: list[int] = []
        for position, submit in enumerate(submits):
            before = submits[position - 1] if position else None
            if (of_room := self._by_room(submit, len(loads), asks_for_another=dp_rank is not None)) is not None:
                chosen = of_room
            elif dp_rank is not None:
                chosen = _existing(dp_rank, len(loads))
            elif before is not None and before.input_ids is submit.input_ids:
                chosen = found[-1]
            else:
                chosen = self.balancer.choose(submit, loads)
            found.append(chosen)
            loads[chosen].num_requests += 1
            loads[chosen].num_tokens += len(submit.input_ids)
        return found

    def _by_room(self, submit: Submit, num_engines: int, *, asks_for_another: bool) -> int | None:
        """The engine that the request's room means; None: it decides nothing here."""
        bootstrap = submit.bootstrap
        if bootstrap is None or bootstrap.host == FAKE_BOOTSTRAP_HOST:
            return None
        must_follow = part_of(self.mode, bootstrap) == "prefill"
        if not must_follow and (asks_for_another or not self.follows_room):
            return None
        return (bootstrap.room - self.first_dp_rank) % num_engines


def _existing(dp_rank: int, num_engines: int) -> int:
    if not 0 <= dp_rank < num_engines:
        raise bad_request(f"data_parallel_rank must be in [0, {num_engines}), got {dp_rank}.", "data_parallel_rank")
    return dp_rank


def dispatcher_of(args: EngineArgs, ready: Ready) -> Dispatcher:
    """What the flags ask for. `ready`: of every engine."""
    balancer = make_balancer(args.load_balance_method, ready.page_size, ready.max_total_num_tokens // ready.page_size)
    follows_room = args.load_balance_method == "follow_bootstrap_room"
    return Dispatcher(balancer, follows_room, args.disaggregation_mode, args.dp_rank)
