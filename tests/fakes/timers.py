"""Virtual time for transfers: nothing happens until a test says how much time has passed."""

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(order=True)
class _Entry:
    when_s: float
    order: int
    callback: Callable[[], None] = field(compare=False)
    loop: asyncio.AbstractEventLoop | None = field(compare=False)
    cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    """One time for any number of loops. `timers` is a `MakeTimers`; with None as loop, callbacks run inside `advance`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._entries: list[_Entry] = []
        self._order = itertools.count()
        self._lock = threading.Lock()

    def timers(self, loop: asyncio.AbstractEventLoop | None = None) -> "ManualTimers":
        return ManualTimers(self, loop)

    def add(self, delay_s: float, callback: Callable[[], None], loop: asyncio.AbstractEventLoop | None) -> _Entry:
        entry = _Entry(self.now_s + delay_s, next(self._order), callback, loop)
        with self._lock:
            heapq.heappush(self._entries, entry)
        return entry

    def advance(self, seconds: float) -> None:
        """Let time pass: what falls due is run (or posted to its loop) in order."""
        end_s = self.now_s + seconds
        while True:
            with self._lock:
                if not self._entries or self._entries[0].when_s > end_s:
                    break
                entry = heapq.heappop(self._entries)
            self.now_s = max(self.now_s, entry.when_s)
            if not entry.cancelled:
                self._run(entry)
        self.now_s = end_s

    @property
    def num_pending(self) -> int:
        return sum(not entry.cancelled for entry in self._entries)

    def _run(self, entry: _Entry) -> None:
        if entry.loop is None:
            entry.callback()
        elif not entry.loop.is_closed():
            # Cancelling happens on the loop, so look again there.
            entry.loop.call_soon_threadsafe(lambda: None if entry.cancelled else entry.callback())


class ManualTimers:
    """`baton.transfer.timers.Timers` on a `ManualClock`."""

    def __init__(self, clock: ManualClock, loop: asyncio.AbstractEventLoop | None) -> None:
        self._clock, self._loop = clock, loop

    def now(self) -> float:
        return self._clock.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> _Entry:
        return self._clock.add(delay_s, callback, self._loop)
