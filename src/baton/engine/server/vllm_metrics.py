"""Prometheus metrics under vLLM's names (`vllm:*`, 0.10, deprecated ones included), only those that are truly measured here.

Not here, for want of a measurement: `iteration_tokens_total`, `request_params_n`, `lora_requests_info`.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.engine.args import EngineArgs
from baton.engine.server.generation import Generation
from baton.engine.server.metrics import token_usage
from baton.protocol.rank import Ready, SchedulerState

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    7680.0,
)  # fmt: skip
PREFILL_TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_LABELS = ("model_name", "engine")


def token_buckets(max_tokens: int) -> list[int]:
    """1, 2, 5, 10, ... up to `max_tokens`."""
    values = [factor * 10**exponent for exponent in range(len(str(max_tokens))) for factor in (1, 2, 5)]
    return [value for value in values if value <= max_tokens]


class VllmRequestMetrics:
    """Requests, counted as they pass, for each of `num_engines` engines from number `first_dp_rank` on."""

    def __init__(
        self,
        model_name: str,
        registry: CollectorRegistry,
        *,
        max_tokens: int | None = None,
        num_engines: int = 1,
        first_dp_rank: int = 0,
    ) -> None:
        """`max_tokens` bounds the buckets of token counts; none: a million."""
        families: dict[str, Counter | Histogram] = {}
        self._engines = {
            dp_rank: _EngineRequests(model_name, str(dp_rank), registry, families, max_tokens)
            for dp_rank in range(first_dp_rank, first_dp_rank + num_engines)
        }

    def on_tokens(self, generation: Generation, num_new_tokens: int, last_token_at: float | None) -> None:
        """A step gave `num_new_tokens`; `last_token_at` is when the sequence got a token before."""
        self._engines[generation.dp_rank].on_tokens(generation, num_new_tokens, last_token_at)

    def on_finish(self, generation: Generation) -> None:
        self._engines[generation.dp_rank].on_finish(generation)


class _EngineRequests:
    """The requests of one engine. `families`: what all engines' metrics belong to, made by the first one."""

    def __init__(
        self,
        model_name: str,
        engine: str,
        registry: CollectorRegistry,
        families: dict[str, Counter | Histogram],
        max_tokens: int | None,
    ) -> None:
        def counter(name: str, text: str, **more: str) -> Counter:
            if name not in families:
                families[name] = Counter(f"vllm:{name}", text, (*_LABELS, *more), registry=registry)
            found = families[name].labels(model_name, engine, *more.values())
            assert isinstance(found, Counter)
            return found

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            if name not in families:
                families[name] = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=registry)
            found = families[name].labels(model_name, engine)
            assert isinstance(found, Histogram)
            return found

        def seconds(name: str, text: str) -> Histogram:
            return histogram(f"{name}_seconds", f"Histogram of {text} in seconds.", REQUEST_BUCKETS_S)

        tokens = token_buckets(max_tokens or 10**6)
        self._prompt_tokens = counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generation_tokens = counter("generation_tokens", "Number of generation tokens processed.")
        self._queries = [
            counter(name, "Prefix cache queries, in terms of number of queried tokens.")
            for name in ("prefix_cache_queries", "gpu_prefix_cache_queries")
        ]
        self._hits = [
            counter(name, "Prefix cache hits, in terms of number of cached tokens.")
            for name in ("prefix_cache_hits", "gpu_prefix_cache_hits")
        ]
        self._success = {
            reason: counter("request_success", "Count of successfully processed requests.", finished_reason=reason)
            for reason in ("stop", "length", "abort")
        }
        self._request_prompt = histogram("request_prompt_tokens", "Number of prefill tokens processed.", tokens)
        self._request_generated = histogram(
            "request_generation_tokens", "Number of generation tokens processed.", tokens
        )
        self._request_max_generated = histogram(
            "request_max_num_generation_tokens", "Histogram of maximum number of requested generation tokens.", tokens
        )
        self._max_tokens = histogram(
            "request_params_max_tokens", "Histogram of the max_tokens request parameter.", tokens
        )
        self._ttft = histogram(
            "time_to_first_token_seconds", "Histogram of time to first token in seconds.", TTFT_BUCKETS_S
        )
        self._itl = [
            histogram(f"{name}_seconds", "Histogram of time per output token in seconds.", ITL_BUCKETS_S)
            for name in ("time_per_output_token", "inter_token_latency")
        ]
        self._per_prefill_token = histogram(
            "time_per_prefill_token_request_seconds", "Time spent per token during prefill.", PREFILL_TOKEN_BUCKETS_S
        )
        self._e2e = seconds("e2e_request_latency", "e2e request latency")
        self._queue = seconds("request_queue_time", "time spent in WAITING phase for request")
        self._inference = seconds("request_inference_time", "time spent in RUNNING phase for request")
        self._prefill = seconds("request_prefill_time", "time spent in PREFILL phase for request")
        self._decode = seconds("request_decode_time", "time spent in DECODE phase for request")

    def on_tokens(self, generation: Generation, num_new_tokens: int, last_token_at: float | None) -> None:
        """A step gave `num_new_tokens`; `last_token_at` is when the sequence got a token before."""
        now = generation.timings.last_token
        if num_new_tokens == 0 or now is None:
            return
        self._generation_tokens.inc(num_new_tokens)
        if last_token_at is None:
            self._ttft.observe(now - generation.timings.created)
            self._prompt_tokens.inc(generation.prompt_tokens)
            for queries, hits in zip(self._queries, self._hits, strict=True):
                queries.inc(generation.prompt_tokens)
                hits.inc(generation.cached_tokens)
            return
        interval = (now - last_token_at) / num_new_tokens
        for histogram in self._itl:
            for _ in range(num_new_tokens):
                histogram.observe(interval)

    def on_finish(self, generation: Generation) -> None:
        assert generation.finish is not None
        timings = generation.timings
        num_generated = generation.completion_tokens - generation.num_resumed
        self._success[generation.finish.type].inc()
        self._e2e.observe((timings.finished or time.monotonic()) - timings.created)
        self._request_prompt.observe(generation.prompt_tokens)
        self._request_generated.observe(num_generated)
        self._request_max_generated.observe(num_generated)
        if generation.submit.sampling.max_new_tokens is not None:
            self._max_tokens.observe(generation.submit.sampling.max_new_tokens)
        if timings.first_token is None or timings.last_token is None:
            return
        started = timings.created + generation.queue_time_s
        self._queue.observe(generation.queue_time_s)
        self._prefill.observe(timings.first_token - started)
        self._per_prefill_token.observe((timings.first_token - started) / max(1, generation.prompt_tokens))
        self._inference.observe(timings.last_token - started)
        self._decode.observe(timings.last_token - timings.first_token)


_GAUGES = (
    ("num_requests_running", "Number of requests in model execution batches."),
    ("num_requests_waiting", "Number of requests waiting to be processed."),
    ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."),
    ("gpu_cache_usage_perc", "GPU KV-cache usage. DEPRECATED: Use vllm:kv_cache_usage_perc instead."),
)


class VllmSchedulerMetrics(Collector):
    """The schedulers' gauges, from the last snapshots. The scrape handler refreshes `states` first."""

    def __init__(
        self, model_name: str, args: EngineArgs, readies: Sequence[Ready], registry: CollectorRegistry
    ) -> None:
        self.states = [SchedulerState(max_total_num_tokens=one.max_total_num_tokens) for one in readies]
        self._values = [(model_name, str(args.dp_rank + index)) for index in range(len(readies))]
        self._cache_configs = [
            {
                "block_size": str(one.page_size),
                "cache_dtype": args.kv_cache_dtype,
                "enable_prefix_caching": str(not args.disable_radix_cache),
                "gpu_memory_utilization": str(args.mem_fraction_static or ""),
                "num_gpu_blocks": str(one.max_total_num_tokens // one.page_size),
                "engine": engine,
            }
            for one, (_, engine) in zip(readies, self._values, strict=True)
        ]
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        gauges = [GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS) for name, text in _GAUGES]
        preemptions = CounterMetricFamily(
            "vllm:num_preemptions", "Cumulative number of preemption from the engine.", labels=_LABELS
        )
        for state, labels in zip(self.states, self._values, strict=True):
            usage = token_usage(state)
            for gauge, value in zip(gauges, (state.num_running, state.num_waiting, usage, usage), strict=True):
                gauge.add_metric(labels, value)
            preemptions.add_metric(labels, state.num_retracted_total)
        yield from gauges
        yield preemptions
        names = list(self._cache_configs[0])
        info = GaugeMetricFamily("vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=names)
        for config in self._cache_configs:
            info.add_metric(list(config.values()), 1)
        yield info
