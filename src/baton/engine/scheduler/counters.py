"""Numbers for metrics: what the scheduler counts as it goes. Nothing decides anything by them."""

from dataclasses import dataclass

THROUGHPUT_WINDOW_S = 1.0


@dataclass(slots=True)
class Counters:
    num_retracted_total: int = 0
    num_bootstrap_failed_total: int = 0
    num_transfer_failed_total: int = 0
    cache_hit_rate: float = 0.0
    """Cached tokens / all tokens of the last prefill step that admitted a request, or of the last request let in to receive."""
    gen_throughput: float = 0.0
    """Output tokens a second over the last window of at least a second."""
    transfer_speed_gb_s: float = 0.0
    transfer_latency_ms: float = 0.0
    transfer_bootstrap_ms: float = 0.0
    transfer_alloc_ms: float = 0.0
    _window_start_s: float | None = None
    _window_tokens: int = 0

    def on_tokens(self, num_tokens: int, now: float) -> None:
        if self._window_start_s is None:
            self._window_start_s = now
            return
        self._window_tokens += num_tokens
        elapsed = now - self._window_start_s
        if elapsed >= THROUGHPUT_WINDOW_S:
            self.gen_throughput = self._window_tokens / elapsed
            self._window_start_s, self._window_tokens = now, 0

    def on_idle(self) -> None:
        self.gen_throughput = 0.0
        self._window_start_s, self._window_tokens = None, 0

    def on_transfer(self, num_bytes: int, duration_s: float) -> None:
        self.transfer_latency_ms = duration_s * 1e3
        self.transfer_speed_gb_s = num_bytes / duration_s / 1e9 if duration_s > 0 else 0.0
