"""Host tier and store for the scheduler's tests: they hold what `PagedRunner` calls KV, and break on request."""

from collections import deque
from random import Random

from tests.fakes.paged_runner import JUNK, PagedRunner

from baton.kvcache.tiers import Cancel, Copies, Found, PagesRead, Query, Read, StoreAction, StoreEvent, Write, Written

Page = dict[int, int]
"""Slot -> state."""


class LowerTiers:
    """`store` may be shared by several workers. What is not ours to read is junk."""

    def __init__(self, runner: PagedRunner, store: dict[bytes, Page], seed: int) -> None:
        self._runner = runner
        self._store = store
        self._rng = Random(seed)
        self._host: dict[int, Page] = {}
        self._actions: deque[StoreAction] = deque()

    def move(self, copies: Copies, actions: list[StoreAction]) -> None:
        """As the rank's loop does: saves, loads, then the store hears of it."""
        size = self._runner.page_size
        for device_page, host_page in copies.saves:
            self._host[host_page] = self._runner.read_page(device_page)
        for host_page, device_page in copies.loads:
            self._runner.write_page(device_page, self._host[host_page])
        for action in actions:
            if isinstance(action, Read):
                for page in action.host_pages:
                    self._host[page] = dict.fromkeys(range(size), JUNK)
            self._actions.append(action)

    def answer(self) -> list[StoreEvent]:
        """The store's events for the oldest action; sometimes none yet, sometimes it fails."""
        if not self._actions or self._rng.random() < 0.3:
            return []
        fails = self._rng.random() < 0.1
        match self._actions.popleft():
            case Query(op, keys):
                found = next((i for i, key in enumerate(keys) if key not in self._store), len(keys))
                return [Found(op, 0 if fails else found)]
            case Read(op, keys, host_pages):
                return self._read(op, keys, host_pages, fails)
            case Write(op, keys, host_pages):
                for key, page in zip(keys, host_pages, strict=True):
                    if not fails:
                        self._store[key] = dict(self._host[page])
                return [Written(op, [not fails] * len(keys))]
            case Cancel():
                return []

    def _read(self, op: int, keys: list[bytes], host_pages: list[int], fails: bool) -> list[StoreEvent]:
        ok = [not fails and key in self._store and self._rng.random() > 0.05 for key in keys]
        for key, page, good in zip(keys, host_pages, ok, strict=True):
            if good:
                self._host[page] = dict(self._store[key])
        cut = self._rng.randint(0, len(keys))
        return [PagesRead(op, 0, ok[:cut], is_last=False), PagesRead(op, cut, ok[cut:], is_last=True)]

    @property
    def is_settled(self) -> bool:
        return not self._actions
