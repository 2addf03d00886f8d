"""The queue of requests that wait for prefill, and the order in which a policy looks at it.

Owns the queue; whether a request fits is `admission`'s question. The queue itself is always in order of arrival, so a
retracted request goes back to its old place.
"""

from bisect import bisect, insort
from collections.abc import Callable, Iterable, Iterator
from random import Random

from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.request import Request
from baton.kvcache.prefix_cache import PrefixCache

LPM_MAX_QUEUE = 128
"""A longer queue is taken first come, first served: matching all of it each step would cost too much (SGLang's bound)."""
IN_BATCH_PREFIX_TOKENS = 32
"""A request whose first tokens are those of one ahead of it, and not cached yet, waits for that one to fill the cache."""
MAX_BYPASSED = 64
"""A request that so many later arrivals overtook goes first, and nothing overtakes it again."""


def _by_arrival(req: Request) -> int:
    return req.arrival_idx


class WaitingQueue:
    def __init__(self, config: SchedulerConfig, cache: PrefixCache, rng: Random) -> None:
        self._config = config
        self._cache = cache
        self._rng = rng
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def first(self) -> Request:
        """The one that arrived first. There must be one."""
        return self._requests[0]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, req: Request) -> None:
        insort(self._requests, req, key=_by_arrival)

    def remove(self, req: Request) -> None:
        self._requests.remove(req)

    def take(self, admitted: Iterable[Request]) -> None:
        """Remove the admitted ones; whoever is left and came before one of them was bypassed."""
        taken = sorted(req.arrival_idx for req in admitted)
        if not taken:
            return
        gone = set(taken)
        self._requests = [req for req in self._requests if req.arrival_idx not in gone]
        for req in self._requests:
            if req.arrival_idx > taken[-1]:
                break
            req.num_bypassed += len(taken) - bisect(taken, req.arrival_idx)

    def in_policy_order(self) -> list[Request]:
        """All that wait, first to be admitted first. Starved requests come before the policy's own order, except that
        priorities are strict: there, starving is what was asked for."""
        config = self._config
        queue = list(self._requests)
        if config.policy == "lpm" and self._cache.shares and len(queue) <= LPM_MAX_QUEUE:
            queue = self._longest_prefix_first(queue)
        elif config.policy == "lof":
            queue.sort(key=lambda req: -req.output_limit)
        elif config.policy == "random":
            self._rng.shuffle(queue)
        if config.enable_priority:
            sign = 1 if config.low_priority_values_first else -1
            queue.sort(key=lambda req: sign * req.priority)
        elif config.policy != "fcfs":
            starved: Callable[[Request], bool] = lambda req: req.num_bypassed < MAX_BYPASSED  # noqa: E731
            queue.sort(key=starved)
        return queue

    def _longest_prefix_first(self, queue: list[Request]) -> list[Request]:
        heads: set[tuple[str | None, tuple[int, ...]]] = set()
        keyed: list[tuple[bool, int, Request]] = []
        for req in queue:
            tokens = req.token_slice(0, req.num_tokens)
            matched = self._cache.match_len(tokens, req.extra_key, len(tokens) - 1)
            delayed = False
            if matched <= IN_BATCH_PREFIX_TOKENS and len(tokens) >= IN_BATCH_PREFIX_TOKENS:
                head = (req.extra_key, tuple(tokens[:IN_BATCH_PREFIX_TOKENS]))
                delayed = head in heads
                heads.add(head)
            keyed.append((delayed, -matched, req))
        keyed.sort(key=lambda entry: entry[:2])
        return [req for _, _, req in keyed]
