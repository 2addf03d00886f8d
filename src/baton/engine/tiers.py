"""The rank's cache and its hands on the lower tiers: page copies to and from host memory, and the store's worker.

`open_cache` builds what the flags ask for; `Tiers` carry out what the cache decided (`kvcache.tiers`) and decide nothing. Built
by `assemble`, called by the rank's loop. Not here: ranks that do not share their pool (`distributed.tiers`).
"""

import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from baton.engine.args import EngineArgs
from baton.engine.errors import ModelError
from baton.engine.free_memory import free_memory_bytes
from baton.engine.load import LoadedModel
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.models.spec import ModelConfig
from baton.engine.page_copies import PageCopier
from baton.kvcache.keyed_cache import KeyedCache
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.page_memory import PageMemory
from baton.kvcache.prefix_cache import PrefixCache, UnsharedCache
from baton.kvcache.stores.base import StoreConfig
from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.open import PrefetchSettings, open_store, parse_extra_config
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.stores.worker import StoreWorker
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiered_cache import TieredCache
from baton.kvcache.tiers import Copies, StoreAction, StoreEvent, Write, Written
from baton.transfer.base import Wake

logger = logging.getLogger(__name__)


class Tiers(Protocol):
    """What moves pages for the rank's loop: this rank's hands, or a group's."""

    @property
    def has_store(self) -> bool: ...

    def poll(self) -> list[StoreEvent]:
        """What the store answered since the last call; the loop is woken when there is something."""

    def move(self, copies: Copies, actions: list[StoreAction]) -> None:
        """The copies first: a `Write` reads what they wrote."""

    def store_stats(self) -> Mapping[str, float]: ...

    def clear_store(self) -> Future[bool]:
        """Forget every object of the store. The loop is woken when the future has its result."""

    def close(self) -> None:
        """End the store's threads. What is on its way to the store may be lost."""


class OwnTiers:
    """Those of one rank. `writes`: False where another rank puts the same objects into the same store."""

    def __init__(self, copier: PageCopier, worker: StoreWorker | None, wake: Wake, *, writes: bool = True) -> None:
        self._copier = copier
        self._worker = worker
        self._wake = wake
        self._writes = writes
        self._written_elsewhere: deque[Written] = deque()

    @property
    def has_store(self) -> bool:
        return self._worker is not None

    def poll(self) -> list[StoreEvent]:
        events: list[StoreEvent] = []
        while self._written_elsewhere:
            events.append(self._written_elsewhere.popleft())
        return events if self._worker is None else events + self._worker.poll()

    def move(self, copies: Copies, actions: list[StoreAction]) -> None:
        if copies:
            self._copier.carry_out(copies)
        if self._worker is None:
            return
        for action in actions:
            if isinstance(action, Write) and not self._writes:
                self._written_elsewhere.append(Written(action.op, [True] * len(action.keys)))
                self._wake()
            else:
                self._worker.do(action)

    def store_stats(self) -> Mapping[str, float]:
        return {} if self._worker is None else self._worker.stats()

    def clear_store(self) -> Future[bool]:
        assert self._worker is not None
        return self._worker.clear()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def page_shape(model: LoadedModel) -> PageShape:
    """What a page of this rank's pool holds, as the store names it. A pool that ranks share has whole pages."""
    config = model.config
    sizes = local_sizes(config, Shard() if model.has_whole_pages else model.shard)
    return PageShape(
        layers=sizes.layers,
        kv_heads=range(*sizes.kv_heads),
        page_size=model.page_size,
        head_dim=config.head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_bytes=model.dtype.itemsize,
    )


def open_cache(
    args: EngineArgs, model: LoadedModel, shape: PageShape, host_pages: int, wake: Wake
) -> tuple[PrefixCache, OwnTiers | None]:
    """The cache over the model's pool. `shape`: of its pages; `host_pages`: as `choose_host_pages` or all ranks together decided.

    Raises `StoreError` for flags that cannot be served.
    """
    num_pages = model.num_pages
    eviction = args.radix_eviction_policy
    keys = PageKeys(model.fingerprint, shape.dtype, shape.page_size)
    if args.disable_radix_cache:
        return UnsharedCache(num_pages, shape.page_size, eviction), None
    with_events = args.kv_events is not None
    if not args.has_tiers:
        if not with_events:
            return PrefixCache(num_pages, shape.page_size, eviction), None
        return KeyedCache(num_pages, shape.page_size, eviction, keys, with_events), None
    tiers, prefetch = open_tiers(args, model, shape, host_pages, wake)
    config = TierConfig(
        host_pages=host_pages,
        write_policy=args.hicache_write_policy,
        eviction_policy=args.hicache_eviction_policy,
        prefetch_policy=args.hicache_storage_prefetch_policy,
        has_store=tiers.has_store,
        prefetch_threshold=prefetch.prefetch_threshold,
        prefetch_timeout_base_s=prefetch.prefetch_timeout_base_s,
        prefetch_timeout_per_ki_token_s=prefetch.prefetch_timeout_per_ki_token_s,
    )
    return TieredCache(num_pages, shape.page_size, eviction, keys, config, with_events), tiers


def open_tiers(
    args: EngineArgs, model: LoadedModel, shape: PageShape, host_pages: int, wake: Wake
) -> tuple[OwnTiers, PrefetchSettings]:
    """This rank's host memory and its store, if there is one. Raises `StoreError`."""
    host = PageMemory.create(host_pages, shape.page_bytes + SEAL_BYTES)
    backend, worker = args.hicache_storage_backend, None
    prefetch, extra = parse_extra_config(None if backend is None else args.hicache_storage_backend_extra_config)
    if backend is not None:
        scheme = ObjectScheme(args.hicache_storage_key_scheme, shape)
        store = open_store(backend, StoreConfig(object_bytes=scheme.object_bytes, extra=extra))
        worker = StoreWorker(store, scheme, host, wake)
    logger.info(
        "host tier pages=%d bytes=%.2fGB write=%s store=%s prefetch=%s",
        host_pages, host.array.nbytes / 1e9, args.hicache_write_policy, backend, args.hicache_storage_prefetch_policy,
    )  # fmt: skip
    # A file store is its host's; the replicas of a head may be on others. What falls back to one is put there by everyone.
    is_one_store = backend == "mooncake" and "fallback" not in extra
    writes = model.has_whole_pages or not (is_one_store and is_replica(model.config, model.shard))
    return OwnTiers(PageCopier(model.kv, host), worker, wake, writes=writes), prefetch


def is_replica(config: ModelConfig, shard: Shard) -> bool:
    """Whether the rank before has the same layers and KV heads."""
    if shard.rank == 0:
        return False
    before = replace(shard, rank=shard.rank - 1)
    return local_sizes(config, before).kv_heads == local_sizes(config, shard).kv_heads


def choose_host_pages(args: EngineArgs, num_pages: int, page_bytes: int) -> int:
    """Pages of the host tier: --hicache-size (of each rank that has its own pool), or --hicache-ratio times the device's; 0 without
    tiers. Raises `ModelError`."""
    if not args.has_tiers:
        return 0
    flag = "--hicache-size" if args.hicache_size else "--hicache-ratio"
    host_pages = int(args.hicache_size * 1e9 / page_bytes if args.hicache_size else args.hicache_ratio * num_pages)
    if host_pages <= num_pages and args.disaggregation_mode != "decode":
        raise ModelError(
            f"{flag}: a host tier of {host_pages} pages is no larger than the device's {num_pages}, and would hold nothing "
            "that the device does not; raise it, or lower --max-total-tokens."
        )
    # Memory is taken when it is touched: what the other engines of this host have promised to theirs still counts as free.
    needed, available = host_pages * page_bytes, free_memory_bytes()
    if needed * args.dp_size > available:
        times = "" if args.dp_size == 1 else f" for each of {args.dp_size} engines"
        raise ModelError(
            f"{flag}: a host tier of {needed / 1e9:.1f} GB{times} does not fit; {available / 1e9:.1f} GB are free."
        )
    return max(1, host_pages)
