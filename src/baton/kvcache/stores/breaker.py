"""The breaker of one direction of a store: when to stop asking, when to probe, when to trust again. Pure: time comes in.

up --failures in a row--> down --retry_at, probe passes--> trial --first good call--> up
                           ^----- probe fails -----'         '---- first failure ----> down (twice the wait)

Calls are of kinds, and a good one of one kind says nothing of another: a store that finds everything and can read nothing is down.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Breaker:
    max_failures: int
    first_wait_s: float
    max_wait_s: float
    state: str = "up"
    """up, down or trial"""
    retry_at: float = 0.0
    """While down: when to probe."""
    _failures: dict[str, int] = field(default_factory=dict)
    """In a row, by kind."""
    _cause: str = ""
    """The kind that took it down: a call of this kind ends the trial."""
    _wait_s: float = field(default=0.0)

    @property
    def is_down(self) -> bool:
        return self.state == "down"

    def failed(self, now: float, kind: str) -> bool:
        """A call or a probe failed. True if that takes the store down (it was not down before)."""
        self._failures[kind] = self._failures.get(kind, 0) + 1
        if self.state == "up" and self._failures[kind] < self.max_failures:
            return False
        return self.open(now, kind)

    def open(self, now: float, kind: str) -> bool:
        """Down at once, after one hanging call. True if it was not down before."""
        was_down, self.state = self.is_down, "down"
        if not was_down:
            self._cause = kind
        self._wait_s = min(2 * self._wait_s, self.max_wait_s) if self._wait_s else self.first_wait_s
        self.retry_at = now + self._wait_s
        return not was_down

    def probed(self) -> None:
        """The probe passed."""
        self.state = "trial"

    def succeeded(self, kind: str) -> bool:
        """A call passed in time. True if the store is up again by that."""
        self._failures.pop(kind, None)
        if self.state != "trial" or kind != self._cause:
            return False
        self.state, self._wait_s = "up", 0.0
        return True
