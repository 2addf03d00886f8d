"""Settings and counters of the tiers below the device. Where flags name them and metrics print them is the engine's business."""

from dataclasses import dataclass
from typing import Literal

from baton.kvcache.radix_tree import EVICTION_POLICIES, EvictionPolicy

WritePolicy = Literal["write_through", "write_through_selective", "write_back"]
PrefetchPolicy = Literal["best_effort", "wait_complete", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Defaults are SGLang's. Raises ValueError naming the field that is wrong."""

    host_pages: int
    has_store: bool = False
    write_policy: WritePolicy = "write_through"
    """A page goes to the host tier when it is computed (write_through), when it is used again (write_through_selective), or when
    the device evicts it (write_back). From there it goes to the store."""
    eviction_policy: EvictionPolicy = "lru"
    """Of the host tier."""
    load_back_threshold: int = 10
    """Tokens: fewer than these are computed, not loaded."""
    prefetch_policy: PrefetchPolicy = "best_effort"
    prefetch_threshold: int = 256
    """Tokens: for fewer the store is not asked, and fewer are not read."""
    prefetch_timeout_base_s: float = 1.0
    prefetch_timeout_per_ki_token_s: float = 0.25
    """`timeout` waits for base + this for every 1024 tokens that the store was asked for."""
    max_read_share: float = 0.5
    max_write_share: float = 0.25
    """How much of the host tier reads from, and writes to, the store may hold at a time: a store that hangs leaves the rest."""

    def __post_init__(self) -> None:
        if self.host_pages < 1:
            raise ValueError(f"host_pages must be at least 1, got {self.host_pages}")
        for name, known in (
            ("write_policy", ("write_through", "write_through_selective", "write_back")),
            ("eviction_policy", EVICTION_POLICIES),
            ("prefetch_policy", ("best_effort", "wait_complete", "timeout")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in (
            "load_back_threshold",
            "prefetch_threshold",
            "prefetch_timeout_base_s",
            "prefetch_timeout_per_ki_token_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_read_share", "max_write_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")


@dataclass(slots=True)
class TierCounters:
    """Pages, since the start, unless the name says otherwise."""

    host_pages_total: int = 0
    """The host tier's size."""
    host_pages_used: int = 0
    """Now."""
    saved: int = 0
    """Device to host."""
    loaded: int = 0
    """Host to device."""
    device_evicted: int = 0
    host_evicted: int = 0
    prefetched: int = 0
    """Store to host."""
    backed_up: int = 0
    """Host to store."""
    saves_skipped: int = 0
    """Not saved, since the host tier had no page that could be evicted."""
    reads_skipped: int = 0
    """The store had them, the host tier no room."""
    writes_skipped: int = 0
    """Evicted from the host tier before their write began."""
    reads_failed: int = 0
    """The store had said it has them, but they came late, damaged or not at all."""
    writes_failed: int = 0
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    store_hit_tokens: int = 0
