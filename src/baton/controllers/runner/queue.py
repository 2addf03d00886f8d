"""A work queue of keys: each waits at most once, and no key is ever worked on twice at the same time.

A key added while it is being worked on waits until that is done. Failures wait longer each time (per key).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable


class KeyQueue:
    """``call_later`` is the loop's by default; tests give one on a virtual clock.

    Invariant: waiting keys are unique, and disjoint from the keys in ``_running`` (those are in ``_again`` instead).
    """

    def __init__(
        self,
        *,
        first_backoff_s: float = 0.1,
        max_backoff_s: float = 60.0,
        call_later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._first_backoff_s, self._max_backoff_s = first_backoff_s, max_backoff_s
        self._call_later = call_later
        self._waiting: deque[str] = deque()
        self._is_waiting: set[str] = set()
        self._running: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._timers: dict[str, int] = {}
        self._gathering: set[str] = set()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running and not self._gathering

    def add(self, key: str) -> None:
        if key in self._running:
            self._again.add(key)
        elif key not in self._is_waiting:
            self._is_waiting.add(key)
            self._waiting.append(key)
            self._wake.set()

    def add_gathered(self, key: str, delay_s: float) -> None:
        """Add after ``delay_s``, unless that was asked for already and is still to come."""
        if delay_s <= 0:
            self.add(key)
        elif key not in self._gathering:
            self._gathering.add(key)

            def due() -> None:
                self._gathering.discard(key)
                self.add(key)

            self._later(delay_s, due)

    def _later(self, delay_s: float, due: Callable[[], None]) -> None:
        call_later = self._call_later or asyncio.get_running_loop().call_later
        call_later(delay_s, due)

    def add_after(self, key: str, delay_s: float) -> None:
        """Add later; only the newest such wish of a key counts."""
        number = self._timers.get(key, 0) + 1
        self._timers[key] = number

        def due() -> None:
            if self._timers.get(key) == number:
                del self._timers[key]
                self.add(key)

        self._later(delay_s, due)

    def add_after_failure(self, key: str) -> float:
        """Add with the key's back-off (doubling, jittered, bounded); returns the delay in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        grown_s = self._first_backoff_s * float(2 ** min(failures, 20))
        delay_s = min(grown_s, self._max_backoff_s) * random.uniform(0.75, 1.0)
        self.add_after(key, delay_s)
        return delay_s

    def forget_failures(self, key: str) -> None:
        self._failures.pop(key, None)

    async def get(self) -> str:
        """The next key; the caller must call :meth:`done` for it."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        key = self._waiting.popleft()
        self._is_waiting.discard(key)
        self._running.add(key)
        return key

    def done(self, key: str) -> None:
        self._running.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
