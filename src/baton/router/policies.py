"""Which worker gets a request: one small object per policy, all with `choose(key, view, prompt)`.

`key` is the request's text as bytes (see `body.RequestView.cache_key`), `view` the workers that may take it (never
empty), `prompt` its tokens where they are known and wanted (see `prompts`). No clock, no I/O; randomness is injected. State (a counter, a prefix tree) belongs to the policy object.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol, TypeVar

from baton.router.config import CacheAwareConfig, PolicyName
from baton.router.kv_index import KvIndex, Prompt
from baton.router.radix import PrefixTree


class Candidate(Protocol):
    """What a policy may know of a worker."""

    @property
    def url(self) -> str: ...
    @property
    def active(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    name: PolicyName

    def choose(self, key: bytes, view: Sequence[C], prompt: Prompt | None = None) -> C:
        """One of `view`, which is not empty."""
        ...

    def forget(self, url: str) -> None:
        """The worker left, or came back with empty caches."""
        ...


def _load(worker: Candidate) -> int:
    return worker.active


class RandomPolicy:
    name: PolicyName = "random"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, key: bytes, view: Sequence[C], prompt: Prompt | None = None) -> C:
        return view[int(self._rng.random() * len(view))]

    def forget(self, url: str) -> None:
        """Nothing is remembered."""


class RoundRobin:
    name: PolicyName = "round_robin"

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, key: bytes, view: Sequence[C], prompt: Prompt | None = None) -> C:
        self._turn += 1
        return view[self._turn % len(view)]

    def forget(self, url: str) -> None:
        """Nothing is remembered."""


class PowerOfTwo:
    """The less loaded of two workers drawn at random."""

    name: PolicyName = "power_of_two"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, key: bytes, view: Sequence[C], prompt: Prompt | None = None) -> C:
        if len(view) == 1:
            return view[0]
        first = int(self._rng.random() * len(view))
        second = int(self._rng.random() * (len(view) - 1))
        second += second >= first
        return min(view[first], view[second], key=_load)

    def forget(self, url: str) -> None:
        """Nothing is remembered."""


class CacheAware:
    """The worker that has most of the prompt cached, unless loads are too far apart; else the one with the least cached.

    Loads are too far apart when max - min > balance_abs and max > balance_rel * min: then the least loaded gets it. What a
    worker has cached is known exactly where it publishes KV events and the prompt's tokens are known (`index`); else the
    text that was sent to it counts as cached (`tree`).
    """

    name: PolicyName = "cache_aware"

    def __init__(self, config: CacheAwareConfig) -> None:
        self._config = config
        self.tree = PrefixTree(config.max_tree_size)
        self.index = KvIndex(config.max_kv_blocks)
        self.partly_known: set[str] = set()
        """Workers of the index whose events were not heard from the first on: what was sent to them counts too."""
        self.on_forget: Callable[[str], None] = lambda url: None

    def choose(self, key: bytes, view: Sequence[C], prompt: Prompt | None = None) -> C:
        chosen = view[0] if len(view) == 1 else self._best(key, view, prompt)
        if key:
            self.tree.insert(key, chosen.url)
        if prompt is not None and chosen.url in self.index:
            prompt.holds.append((self.index, self.index.hold(chosen.url, prompt)))
        return chosen

    def _best(self, key: bytes, view: Sequence[C], prompt: Prompt | None) -> C:
        """Plain loops: this runs for every request."""
        config = self._config
        least, most_active = view[0], view[0].active
        for worker in view:
            active = worker.active
            if active < least.active:
                least = worker
            elif active > most_active:
                most_active = active
        if most_active - least.active > config.balance_abs and most_active > config.balance_rel * least.active:
            return least
        if prompt is not None and prompt.num_tokens and self.index:
            return self._best_known(key, view, prompt)
        matched = self.tree.match(key)
        if matched:
            best, best_length = least, matched.get(least.url, 0)
            for worker in view:
                length = matched.get(worker.url, 0)
                if length > best_length or (length == best_length and worker.active < best.active):
                    best, best_length = worker, length
            if best_length > config.threshold * len(key):
                return best
        sizes = self.tree.size
        return min(view, key=lambda worker: (sizes.get(worker.url, 0), worker.active))

    def _best_known(self, key: bytes, view: Sequence[C], prompt: Prompt) -> C:
        """Shares of tokens where the index speaks, shares of text elsewhere."""
        index = self.index
        known = index.match(prompt)
        are_known = [worker.url in index and worker.url not in self.partly_known for worker in view]
        guessed = {} if all(are_known) else self.tree.match(key)
        best, best_share = view[0], -1.0
        for worker, is_known in zip(view, are_known, strict=True):
            share = known.get(worker.url, 0) / prompt.num_tokens
            if not is_known and key:
                share = max(share, guessed.get(worker.url, 0) / len(key))
            if share > best_share or (share == best_share and worker.active < best.active):
                best, best_share = worker, share
        if best_share > self._config.threshold:
            return best
        if all(worker.url in index for worker in view):
            return min(view, key=lambda worker: (index.num_blocks(worker.url), worker.active))
        sizes = self.tree.size
        return min(view, key=lambda worker: (sizes.get(worker.url, 0), worker.active))

    def forget(self, url: str) -> None:
        self.tree.remove(url)
        self.index.remove(url)
        self.on_forget(url)


def make_policy(name: PolicyName, config: CacheAwareConfig, rng: Random) -> Policy:
    """A fresh policy object; prefill and decode never share one."""
    if name == "random":
        return RandomPolicy(rng)
    if name == "round_robin":
        return RoundRobin()
    if name == "power_of_two":
        return PowerOfTwo(rng)
    return CacheAware(config)
