"""What a router is told at start: frozen values with their units; parsing is in `args`, meaning in each user."""

from dataclasses import dataclass, field
from typing import Literal

DURATION_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
PolicyName = Literal["random", "round_robin", "power_of_two", "cache_aware"]
Role = Literal["prefill", "decode", "regular"]
PdProtocol = Literal["sglang", "vllm"]
"""How prefill hands over to decode: both asked at once (bootstrap rooms), or one after the other (kv_transfer_params)."""


@dataclass(frozen=True)
class WorkerSpec:
    """A worker's address and its place in a pair."""

    url: str
    """Scheme, host and port; no path."""
    role: Role
    bootstrap_port: int | None = None
    """Sent as `bootstrap_port`; prefill only. None: the worker's own default is meant (null on the wire)."""


@dataclass(frozen=True)
class KvSource:
    """Where a worker's KV events come from."""

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""


@dataclass(frozen=True)
class CacheAwareConfig:
    threshold: float = 0.3
    """A worker whose tree matches more than this share of the request's text gets the request."""
    balance_abs: int = 64
    """Loads further apart than this many requests (and than `balance_rel`) are balanced instead."""
    balance_rel: float = 1.5
    max_tree_size: int = 2**26
    """Bytes of text remembered per worker."""
    eviction_interval_s: float = 60.0
    max_kv_blocks: int = 2**20
    """Blocks remembered per worker from its KV events; a block takes about 300 bytes here."""


@dataclass(frozen=True)
class RetryConfig:
    max_retries: int = 5
    """0 disables retries."""
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 30.0
    multiplier: float = 1.5
    jitter: float = 0.2
    """Share of the back-off drawn at random, so that retries of many requests spread."""
    migration_limit: int = 3
    """How often one stream may go on elsewhere after it had begun; 0 disables migration."""
    migration_wait_s: float = 60.0
    """How long a request for which there was a pair waits for another when all workers of a role are gone (`retry`)."""


@dataclass(frozen=True)
class BreakerConfig:
    enabled: bool = True
    failure_threshold: int = 10
    success_threshold: int = 3
    open_s: float = 60.0
    window_s: float = 120.0


@dataclass(frozen=True)
class HealthConfig:
    enabled: bool = True
    endpoint: str = "/health"
    interval_s: float = 60.0
    retry_interval_s: float = 0.5
    """Between checks of a worker that is not healthy (yet)."""
    timeout_s: float = 5.0
    failure_threshold: int = 3
    success_threshold: int = 2


@dataclass(frozen=True)
class LimitsConfig:
    max_payload_bytes: int = 512 * 2**20
    max_header_bytes: int = 64 * 2**10
    read_timeout_s: float = 60.0
    """A request's head must have arrived this long after its first byte; its body may not pause for longer."""
    keep_alive_s: float = 75.0
    connect_timeout_s: float = 5.0
    max_concurrent: int = -1
    """-1: no limit."""
    queue_size: int = 100
    queue_timeout_s: float = 60.0


@dataclass(frozen=True)
class RouterConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    pd: bool = True
    pd_protocol: PdProtocol | None = None
    """None: that of the first worker that is healthy (`dialects`)."""
    workers: tuple[WorkerSpec, ...] = ()
    prefill_policy: PolicyName = "cache_aware"
    decode_policy: PolicyName = "cache_aware"
    """Also the policy for regular workers."""
    cache_aware: CacheAwareConfig = field(default_factory=CacheAwareConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    request_timeout_s: float = 1800.0
    shutdown_grace_s: float = 180.0
    api_key: str | None = None
    """Clients must present it; the router presents it to workers on its own calls."""
    request_id_headers: tuple[str, ...] = ("x-request-id",)
    """The first of these that a request has is its id."""
    prometheus_host: str = "127.0.0.1"
    prometheus_port: int | None = None
    """A second listener for /metrics; None: only the main port."""
    kv_sources: dict[str, KvSource] = field(default_factory=dict)
    """Worker URL -> its KV events, for workers that do not tell by themselves (`kv_feed`)."""
    tokenizer: str | None = None
    """Directory of the workers' tokenizer and chat template; None: only prompts of token ids are placed by KV events."""
    chat_template: str | None = None
    """Jinja file in place of the directory's."""
    duration_buckets_s: tuple[float, ...] = DURATION_BUCKETS_S
    """Upper bounds of the duration histograms, ascending."""
    log_level: str = "info"
    access_log: bool = False
