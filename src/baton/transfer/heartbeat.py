"""Finds out that a peer is gone although its connection still looks alive (frozen process, cut cable)."""

from collections.abc import Callable

from baton.transfer.timers import Timer, Timers


class Heartbeat:
    """Pings every `interval_s`; after `max_failure` pings in a row without a sign of life calls `dead` once."""

    def __init__(
        self,
        timers: Timers,
        interval_s: float,
        max_failure: int,
        *,
        ping: Callable[[], None],
        dead: Callable[[str], None],
    ) -> None:
        self._timers = timers
        self._interval_s = interval_s
        self._max_failure = max_failure
        self._ping = ping
        self._dead = dead
        self._num_unanswered = 0
        self._timer: Timer | None = timers.call_later(interval_s, self._tick)

    def seen(self) -> None:
        """Any frame from the peer is a sign of life: a long page stream may delay the answer to a ping."""
        self._num_unanswered = 0

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        if self._num_unanswered >= self._max_failure:
            self._timer = None
            self._dead(f"no sign of life for {self._interval_s * self._max_failure:g} s")
            return
        self._num_unanswered += 1
        # The next tick counts from now, not from when this one was due: a process that was itself stopped for a while
        # gives its peers the whole interval to answer.
        self._timer = self._timers.call_later(self._interval_s, self._tick)
        self._ping()
