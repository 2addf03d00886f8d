"""The scheduler's state as numbers, for metrics and health. Reads, changes nothing."""

from dataclasses import asdict

from baton.engine.scheduler.places import Places
from baton.engine.scheduler.request import Status
from baton.kvcache.prefix_cache import PrefixCache
from baton.kvcache.tiered_cache import TieredCache
from baton.protocol.rank import SchedulerState


def snapshot(cache: PrefixCache, at: Places) -> SchedulerState:
    """Requests in transfer are not among `num_running`; they have their own fields."""
    counters = at.counters
    in_rooms = [req.status for req in at.rooms]
    return SchedulerState(
        num_running=at.num_running,
        num_waiting=len(at.waiting),
        num_used_tokens=(cache.num_pages - cache.num_available) * cache.page_size,
        max_total_num_tokens=cache.num_pages * cache.page_size,
        num_retracted_total=counters.num_retracted_total,
        cache_hit_rate=counters.cache_hit_rate,
        gen_throughput=counters.gen_throughput,
        new_token_ratio=at.ratio.value,
        num_prefill_prealloc=in_rooms.count(Status.BOOTSTRAPPING),
        num_prefill_inflight=in_rooms.count(Status.SENDING),
        num_decode_prealloc=len(at.prealloc.queue),
        num_decode_transfer=in_rooms.count(Status.RECEIVING) + in_rooms.count(Status.WITHDRAWING),
        num_bootstrap_failed_total=counters.num_bootstrap_failed_total,
        num_transfer_failed_total=counters.num_transfer_failed_total,
        kv_transfer_speed_gb_s=counters.transfer_speed_gb_s,
        kv_transfer_latency_ms=counters.transfer_latency_ms,
        kv_transfer_bootstrap_ms=counters.transfer_bootstrap_ms,
        kv_transfer_alloc_ms=counters.transfer_alloc_ms,
        free_pages=cache.num_free,
        evictable_pages=cache.num_evictable,
        protected_pages=cache.num_protected,
        tiers=asdict(cache.counters) if isinstance(cache, TieredCache) else {},
        in_use_pages=cache.num_pages - cache.num_free - cache.num_evictable - cache.num_protected,
    )
