"""Prometheus metrics under SGLang's names (`sglang:*`), only those that are truly measured here.

Requests are counted as they pass; the schedulers' gauges are written from one snapshot of each at every scrape. Names of both
SGLang generations (0.4.10 and 0.5.6) are exposed where they differ, the misspelt `infight` included, so that dashboards
of either work.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.engine.server.generation import Generation
from baton.protocol.rank import Ready, SchedulerState

TTFT_BUCKETS_S = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
ITL_BUCKETS_S = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080, 0.100, 0.200, 0.400, 0.600,
    0.800, 1.000, 2.000, 4.000, 6.000, 8.000,
)  # fmt: skip
E2E_BUCKETS_S = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 600, 1200, 1800, 2400)
QUEUE_BUCKETS_S = (
    0.0,
    0.001,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1,
    2,
    3,
    4,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    100,
    200,
)
TOKEN_BUCKETS = (
    100,
    300,
    500,
    700,
    1000,
    1500,
    2000,
    3000,
    4000,
    5000,
    6000,
    7000,
    8000,
    9000,
    10000,
    12000,
    15000,
    20000,
)
RETRACTION_BUCKETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 25, 30, 40, 50, 75, 100)


class RequestObserver(Protocol):
    """What counts requests as they pass."""

    def on_tokens(self, generation: Generation, num_new_tokens: int, last_token_at: float | None) -> None:
        """A step gave `num_new_tokens`; `last_token_at` is when the sequence got a token before."""

    def on_finish(self, generation: Generation) -> None: ...


class StateCollector(Protocol):
    """What shows the schedulers' states at a scrape."""

    states: list[SchedulerState]
    """Of each engine."""


class RequestMetrics:
    """What SGLang calls the tokenizer metrics: one observation per request or token, labelled by model."""

    def __init__(
        self,
        model_name: str,
        registry: CollectorRegistry,
        *,
        ttft_buckets: Sequence[float] | None = None,
        itl_buckets: Sequence[float] | None = None,
        e2e_buckets: Sequence[float] | None = None,
        with_token_histograms: bool = False,
    ) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"sglang:{name}", text, ["model_name"], registry=registry).labels(model_name)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"sglang:{name}", text, ["model_name"], buckets=buckets, registry=registry).labels(
                model_name
            )

        self._prompt_tokens = counter("prompt_tokens_total", "Number of prefill tokens processed.")
        self._generation_tokens = counter("generation_tokens_total", "Number of generation tokens processed.")
        self._cached_tokens = counter("cached_tokens_total", "Number of cached prompt tokens.")
        self._requests = counter("num_requests_total", "Number of requests processed.")
        self._aborted = counter("num_aborted_requests_total", "Number of requests aborted.")
        self._ttft = histogram("time_to_first_token_seconds", "Time to first token.", ttft_buckets or TTFT_BUCKETS_S)
        self._itl = histogram("inter_token_latency_seconds", "Time between tokens.", itl_buckets or ITL_BUCKETS_S)
        self._e2e = histogram("e2e_request_latency_seconds", "Request latency.", e2e_buckets or E2E_BUCKETS_S)
        self._queue_time = histogram("queue_time_seconds", "Time in the rank's queue.", QUEUE_BUCKETS_S)
        self._retractions = histogram("num_retractions", "Retractions per request.", RETRACTION_BUCKETS)
        self._histograms: tuple[Histogram, Histogram] | None = None
        if with_token_histograms:
            self._histograms = (
                histogram("prompt_tokens_histogram", "Prompt tokens per request.", TOKEN_BUCKETS),
                histogram("generation_tokens_histogram", "Generated tokens per request.", TOKEN_BUCKETS),
            )

    def on_tokens(self, generation: Generation, num_new_tokens: int, last_token_at: float | None) -> None:
        """A step gave `num_new_tokens`; `last_token_at` is when the sequence got a token before."""
        now = generation.timings.last_token
        if num_new_tokens == 0 or now is None:
            return
        if last_token_at is None:
            self._ttft.observe(now - generation.timings.created)
            return
        interval = (now - last_token_at) / num_new_tokens
        for _ in range(num_new_tokens):
            self._itl.observe(interval)

    def on_finish(self, generation: Generation) -> None:
        assert generation.finish is not None
        if generation.finish.type == "abort":
            self._aborted.inc()
        num_generated = generation.completion_tokens - generation.num_resumed
        self._requests.inc()
        self._prompt_tokens.inc(generation.prompt_tokens)
        self._generation_tokens.inc(num_generated)
        self._cached_tokens.inc(generation.cached_tokens)
        self._e2e.observe((generation.timings.finished or time.monotonic()) - generation.timings.created)
        self._queue_time.observe(generation.queue_time_s)
        self._retractions.observe(generation.num_retractions)
        if self._histograms is not None:
            self._histograms[0].observe(generation.prompt_tokens)
            self._histograms[1].observe(num_generated)


_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("num_running_reqs", "num_running", "The number of running requests."),
    ("num_used_tokens", "num_used_tokens", "The number of used KV tokens."),
    ("gen_throughput", "gen_throughput", "The generation throughput (token/s)."),
    ("num_queue_reqs", "num_waiting", "The number of requests in the waiting queue."),
    ("cache_hit_rate", "cache_hit_rate", "The prefix cache hit rate."),
    ("max_total_num_tokens", "max_total_num_tokens", "The size of the KV pool in tokens."),
    ("num_retracted_reqs", "num_retracted_total", "The number of retracted requests."),
    ("total_retracted_reqs", "num_retracted_total", "The number of retracted requests (0.4.10 name)."),
    ("num_prefill_prealloc_queue_reqs", "num_prefill_prealloc", "Requests in the prefill bootstrap queue."),
    ("num_prefill_inflight_queue_reqs", "num_prefill_inflight", "Requests whose KV is being sent."),
    ("num_prefill_infight_queue_reqs", "num_prefill_inflight", "Requests whose KV is being sent (0.4.10 spelling)."),
    ("num_decode_prealloc_queue_reqs", "num_decode_prealloc", "Requests waiting for pages on the decode side."),
    ("num_decode_transfer_queue_reqs", "num_decode_transfer", "Requests whose KV is being received."),
    ("num_bootstrap_failed_reqs", "num_bootstrap_failed_total", "Failed bootstraps (0.4.10 name)."),
    ("num_transfer_failed_reqs", "num_transfer_failed_total", "Failed transfers (0.4.10 name)."),
    ("kv_transfer_speed_gb_s", "kv_transfer_speed_gb_s", "The speed of the last KV transfer in GB/s."),
    ("kv_transfer_latency_ms", "kv_transfer_latency_ms", "The duration of the last KV transfer in ms."),
    ("kv_transfer_bootstrap_ms", "kv_transfer_bootstrap_ms", "The bootstrap time of the last KV transfer in ms."),
    ("kv_transfer_alloc_ms", "kv_transfer_alloc_ms", "The allocation wait of the last KV transfer in ms."),
    ("new_token_ratio", "new_token_ratio", "The scheduler's estimate of how much of max_new_tokens is used."),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("num_bootstrap_failed_reqs", "num_bootstrap_failed_total", "The number of failed bootstraps."),
    ("num_transfer_failed_reqs", "num_transfer_failed_total", "The number of failed transfers."),
)


_TIER_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("hicache_host_used_tokens", "host_pages_used", "Tokens in the host tier."),
    ("hicache_host_total_tokens", "host_pages_total", "The size of the host tier in tokens."),
)
_TIER_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("prefetched_tokens", "prefetched", "Tokens brought from the store to the host tier."),
    ("backuped_tokens", "backed_up", "Tokens written from the host tier to the store."),
    ("load_back_tokens", "loaded", "Tokens loaded from the host tier to the device."),
    ("evicted_tokens", "device_evicted", "Tokens evicted from the device."),
    ("hicache_saved_tokens", "saved", "Tokens copied from the device to the host tier."),
    ("hicache_host_evicted_tokens", "host_evicted", "Tokens evicted from the host tier."),
    ("hicache_skipped_saves_tokens", "saves_skipped", "Tokens not saved, as every page of the host tier was busy."),
    (
        "hicache_skipped_reads_tokens",
        "reads_skipped",
        "Tokens not read from the store, for want of room in the host tier.",
    ),
    ("hicache_skipped_writes_tokens", "writes_skipped", "Tokens that left the host tier before their write began."),
    (
        "hicache_failed_reads_tokens",
        "reads_failed",
        "Tokens that the store has and that came late, damaged or not at all.",
    ),
    ("hicache_failed_writes_tokens", "writes_failed", "Tokens that the store did not take."),
)
"""In pages there, in tokens here."""
_HITS: tuple[tuple[str, str], ...] = (
    ("device", "device_hit_tokens"), ("host", "host_hit_tokens"), ("storage", "store_hit_tokens"),
)  # fmt: skip


class SchedulerMetrics(Collector):
    """The schedulers' gauges, from the last snapshots. The scrape handler refreshes `states` first."""

    def __init__(
        self,
        model_name: str,
        readies: Sequence[Ready],
        startup_s: float,
        registry: CollectorRegistry,
        *,
        first_dp_rank: int = 0,
    ) -> None:
        self.states = [SchedulerState(max_total_num_tokens=one.max_total_num_tokens) for one in readies]
        self._page_size = readies[0].page_size
        labels = {"model_name": model_name, "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}
        self._values = [tuple(labels.values())]
        if len(readies) > 1 or first_dp_rank:
            self._values = [(*labels.values(), str(first_dp_rank + index)) for index in range(len(readies))]
            labels["dp_rank"] = ""
        self._labels = tuple(labels)
        """Names; `_values` has theirs for each engine."""
        self._fixed: dict[str, tuple[list[float], str]] = {
            "engine_startup_time": ([startup_s] * len(readies), "Seconds from process start to ready."),
            "engine_load_weights_time": ([one.load_weights_s for one in readies], "Seconds to load the weights."),
        }
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for name, attribute, text in _GAUGES:
            yield self._gauge(name, text, [getattr(one, attribute) for one in self.states])
        yield self._gauge("token_usage", "The share of the KV pool in use.", [token_usage(one) for one in self.states])
        for name, (values, text) in self._fixed.items():
            yield self._gauge(name, text, values)
        for name, attribute, text in _COUNTERS:
            yield self._counter(name, text, [getattr(one, attribute) for one in self.states])

        if self.states[0].tiers:
            yield from self._tiers([one.tiers for one in self.states])
        for name in self.states[0].store:
            text = "Of the store tier and its worker; `up` is 0 while it is down."
            yield self._gauge(f"hicache_storage_{name}", text, [one.store.get(name, 0.0) for one in self.states])

    def _tiers(self, tiers: Sequence[dict[str, float]]) -> Iterator[Metric]:
        for name, key, text in _TIER_GAUGES:
            yield self._gauge(name, text, [one.get(key, 0) * self._page_size for one in tiers])
        for name, key, text in _TIER_COUNTERS:
            yield self._counter(name, text, [one.get(key, 0) * self._page_size for one in tiers])
        hits = CounterMetricFamily(
            "sglang:hicache_hit_tokens", "Prompt tokens not computed, by tier.", labels=[*self._labels, "cache_source"]
        )
        for labels, one in zip(self._values, tiers, strict=True):
            for source, key in _HITS:
                hits.add_metric([*labels, source], one.get(key, 0))
        yield hits

    def _gauge(self, name: str, text: str, values: Sequence[float]) -> Metric:
        """`values`: of each engine."""
        return self._filled(GaugeMetricFamily(f"sglang:{name}", text, labels=self._labels), values)

    def _counter(self, name: str, text: str, values: Sequence[float]) -> Metric:
        return self._filled(CounterMetricFamily(f"sglang:{name}", text, labels=self._labels), values)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, values: Sequence[float]) -> Metric:
        for labels, value in zip(self._values, values, strict=True):
            family.add_metric(labels, value)
        return family


def token_usage(state: SchedulerState) -> float:
    return state.num_used_tokens / state.max_total_num_tokens if state.max_total_num_tokens else 0.0
