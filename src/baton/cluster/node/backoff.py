"""When a container that ended runs again. Pure arithmetic on epoch seconds, as a kubelet does it.

The first restart comes at once, then 10 s after the end, 20 s, 40 s, ... at most 5 minutes; a run of 10 minutes forgives all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    initial_s: float = 10.0
    max_s: float = 300.0
    forgiven_after_s: float = 600.0

    def after_restart(self, current_s: float) -> float:
        """The wait that a failure of the run that starts now, after a failed one, costs."""
        return self.initial_s if current_s <= 0 else min(current_s * 2, self.max_s)

    def after_run(self, current_s: float, ran_s: float) -> float:
        """The wait to keep after a run that took `ran_s`."""
        return 0.0 if ran_s >= self.forgiven_after_s else current_s


def should_restart(policy: str, code: int) -> bool:
    """`policy` is the pod's restartPolicy (or a sidecar's)."""
    return policy == "Always" or (policy == "OnFailure" and code != 0)
