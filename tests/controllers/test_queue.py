"""The work queue on a virtual clock: one key waits once, runs once, and comes back when it should."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from baton.controllers.runner.queue import KeyQueue


class Timers:
    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def call_later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + delay_s, len(self._due), action))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while self._due and self._due[0][0] <= self.now:
            heapq.heappop(self._due)[2]()


async def test_a_key_waits_once_and_is_never_run_twice_at_a_time() -> None:
    queue = KeyQueue()
    for key in ("a", "b", "a"):
        queue.add(key)
    assert (len(queue), await queue.get(), len(queue)) == (2, "a", 1)
    queue.add("a")  # changed while it is worked on
    assert len(queue) == 1
    assert await queue.get() == "b"
    queue.done("a")
    assert await queue.get() == "a"
    queue.done("a")
    queue.done("b")
    assert queue.is_idle


async def test_back_off_doubles_up_to_a_bound_and_is_forgotten_on_success() -> None:
    timers = Timers()
    queue = KeyQueue(first_backoff_s=1, max_backoff_s=8, call_later=timers.call_later)
    delays = []
    for _ in range(6):
        delays.append(queue.add_after_failure("a"))
        timers.advance(delays[-1])
        assert await queue.get() == "a"
        queue.done("a")
    for delay, bound in zip(delays, [1, 2, 4, 8, 8, 8], strict=True):
        assert 0.75 * bound <= delay <= bound
    queue.forget_failures("a")
    assert queue.add_after_failure("a") <= 1


async def test_only_the_newest_delay_of_a_key_counts() -> None:
    timers = Timers()
    queue = KeyQueue(call_later=timers.call_later)
    queue.add_after("a", 5)
    queue.add_after("a", 10)
    timers.advance(5)
    assert len(queue) == 0
    timers.advance(5)
    assert len(queue) == 1


async def test_changes_are_gathered_without_being_put_off_for_ever() -> None:
    timers = Timers()
    queue = KeyQueue(call_later=timers.call_later)
    for _ in range(4):
        queue.add_gathered("a", 1.0)
        timers.advance(0.3)
    assert len(queue) == 1
    assert await queue.get() == "a"
