"""How many requests may be in progress at once (`--max-concurrent-requests`), and the bounded queue before that."""

import asyncio
from collections import deque

from baton.router.config import LimitsConfig
from baton.router.errors import router_error


class Admission:
    """`in_progress <= max_concurrent`; waiting requests enter first come first served."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._max = limits.max_concurrent
        self._queue_size = limits.queue_size
        self._timeout_s = limits.queue_timeout_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_progress = 0

    @property
    def is_unlimited(self) -> bool:
        return self._max < 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def enter(self) -> None:
        """Raises `RequestError`: 429 when the queue is full, 408 after `queue_timeout_s` in it."""
        if self.in_progress < self._max:
            self.in_progress += 1
            return
        if len(self._waiting) >= self._queue_size:
            raise router_error(
                429,
                f"{self.in_progress} requests are in progress and {len(self._waiting)} wait; the queue is full"
                " (--max-concurrent-requests, --queue-size).",
                kind="queue_full",
                retryable=True,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._timeout_s):
                await turn
        except TimeoutError:
            self._gave_up(turn)
            raise router_error(
                408, f"No place became free within {self._timeout_s:g} s (--queue-timeout-secs).",
                kind="queue_timeout", retryable=True,
            ) from None  # fmt: skip
        except asyncio.CancelledError:
            self._gave_up(turn)
            raise

    def _gave_up(self, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn.done() and not turn.cancelled():  # the place was given at the same moment: pass it on
            self.leave()

    def leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_progress -= 1
