"""Time for the transfer: every time-out and heart-beat goes through `Timers`, so that tests run on a virtual clock.

Not here: the time limits of a connect or an HTTP call, which wait for the kernel and therefore use the event loop's time.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    def cancel(self) -> None: ...


class Timers(Protocol):
    """`call_later` runs `callback` on the transfer's thread."""

    def now(self) -> float: ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer: ...


class LoopTimers:
    """Real time: the event loop's monotonic clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return self._loop.call_later(delay_s, callback)


MakeTimers = Callable[[asyncio.AbstractEventLoop], Timers]
