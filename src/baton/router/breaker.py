"""A circuit breaker per worker: a pure state machine; the clock comes in with each call.

What counts is decided by the caller (`retry.blames`): answers 4xx and 503, clients that leave and time-outs say nothing
about whether a worker is broken and must not reach `on_failure`.
"""

from collections import deque
from typing import Literal

from baton.router.config import BreakerConfig

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """closed -> open after `failure_threshold` failures in `window_s` with no success between;
    open -> half_open after `open_s`; half_open -> closed after `success_threshold` successes, -> open on a failure."""

    __slots__ = ("_config", "_failures_s", "_opened_s", "_successes", "state", "transitions")

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._failures_s: deque[float] = deque(maxlen=max(config.failure_threshold, 1))
        self._opened_s = 0.0
        self._successes = 0
        self.state: State = "closed"
        self.transitions = 0

    def allows(self, now_s: float) -> bool:
        """Whether a request may go to this worker; moves open to half_open when its time has come."""
        if self.state == "open" and now_s - self._opened_s >= self._config.open_s:
            self._to("half_open")
            self._successes = 0
        return self.state != "open"

    def on_success(self) -> None:
        if self.state == "closed":
            if self._failures_s:
                self._failures_s.clear()
        elif self.state == "half_open":
            self._successes += 1
            if self._successes >= self._config.success_threshold:
                self._failures_s.clear()
                self._to("closed")

    def on_failure(self, now_s: float) -> None:
        if not self._config.enabled:
            return
        if self.state == "half_open":
            self._open(now_s)
        elif self.state == "closed":
            failures = self._failures_s
            failures.append(now_s)
            while now_s - failures[0] > self._config.window_s:
                failures.popleft()
            if len(failures) >= self._config.failure_threshold:
                self._open(now_s)

    def reset(self) -> None:
        """Back to closed: the worker has just been seen healthy after it was gone (it restarted)."""
        self._failures_s.clear()
        if self.state != "closed":
            self._to("closed")

    def _open(self, now_s: float) -> None:
        self._opened_s = now_s
        self._to("open")

    def _to(self, state: State) -> None:
        self.state = state
        self.transitions += 1
