"""Counters of one side's transfers, for /metrics."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TransferStats:
    """A snapshot. `last_*` are of the last transfer that succeeded and moved at least one byte."""

    num_bytes: int = 0
    num_succeeded: int = 0
    num_failed: int = 0
    """Aborted ones included."""
    last_speed_gb_s: float = 0.0
    last_latency_ms: float = 0.0
    last_bootstrap_ms: float = 0.0

    def succeeded(self, num_bytes: int, duration_s: float, bootstrap_s: float) -> "TransferStats":
        """With one more success."""
        total = replace(self, num_bytes=self.num_bytes + num_bytes, num_succeeded=self.num_succeeded + 1)
        if not num_bytes:
            return total
        return replace(
            total,
            last_speed_gb_s=num_bytes / max(duration_s, 1e-9) / 1e9,
            last_latency_ms=duration_s * 1e3,
            last_bootstrap_ms=bootstrap_s * 1e3,
        )

    def failed(self) -> "TransferStats":
        """With one more failure."""
        return replace(self, num_failed=self.num_failed + 1)
