"""The rank's cache and its hands on the lower tiers: page copies to and from host memory, and the store's worker.

`open_cache` builds what the flags ask for; `Tiers` carries out what the cache decided (`kvcache.tiers`) and decides nothing. Built
by `assemble`, called by the rank's loop.
"""

import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

import torch

from baton.engine.args import EngineArgs
from baton.engine.errors import ModelError
from baton.engine.page_copies import PageCopier
from baton.kvcache.keyed_cache import KeyedCache
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.page_memory import PageMemory
from baton.kvcache.prefix_cache import PrefixCache, UnsharedCache
from baton.kvcache.stores.base import StoreConfig
from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.open import open_store, parse_extra_config
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.stores.worker import StoreWorker
from baton.kvcache.tier_config import TierConfig
from baton.kvcache.tiered_cache import TieredCache
from baton.kvcache.tiers import Copies, StoreAction, StoreEvent
from baton.transfer.base import Wake

logger = logging.getLogger(__name__)


class Tiers:
    def __init__(self, copier: PageCopier, worker: StoreWorker | None) -> None:
        self._copier = copier
        self._worker = worker

    @property
    def has_store(self) -> bool:
        return self._worker is not None

    def poll(self) -> list[StoreEvent]:
        """What the store answered since the last call; the worker wakes the loop when there is something."""
        return [] if self._worker is None else self._worker.poll()

    def move(self, copies: Copies, actions: list[StoreAction]) -> None:
        """The copies first: a `Write` reads what they wrote."""
        if copies:
            self._copier.carry_out(copies)
        if self._worker is not None:
            for action in actions:
                self._worker.do(action)

    def store_stats(self) -> Mapping[str, float]:
        return {} if self._worker is None else self._worker.stats()

    def clear_store(self) -> Future[bool]:
        """Forget every object of the store. The loop is woken when the future has its result."""
        assert self._worker is not None
        return self._worker.clear()


def open_cache(
    args: EngineArgs, fingerprint: str, shape: PageShape, kv: torch.Tensor, wake: Wake
) -> tuple[PrefixCache, Tiers | None]:
    """The cache over the pool `kv` [num_pages, ...]. `fingerprint`: of the model; `shape`: of this rank's pages.

    Raises `ModelError` and `StoreError` for flags that cannot be served.
    """
    num_pages = kv.shape[0]
    eviction = args.radix_eviction_policy
    keys = PageKeys(fingerprint, shape.dtype, shape.page_size)
    if args.disable_radix_cache:
        return UnsharedCache(num_pages, shape.page_size, eviction), None
    with_events = args.kv_events is not None
    if not args.has_tiers:
        if not with_events:
            return PrefixCache(num_pages, shape.page_size, eviction), None
        return KeyedCache(num_pages, shape.page_size, eviction, keys, with_events), None
    config = TierConfig(
        host_pages=choose_host_pages(args, num_pages, shape.page_bytes),
        write_policy=args.hicache_write_policy,
        eviction_policy=args.hicache_eviction_policy,
        prefetch_policy=args.hicache_storage_prefetch_policy,
    )
    host = PageMemory.create(config.host_pages, shape.page_bytes + SEAL_BYTES)
    worker = None
    if args.hicache_storage_backend is not None:
        config, worker = open_worker(args, config, shape, host, wake)
    logger.info(
        "host tier pages=%d bytes=%.2fGB write=%s store=%s prefetch=%s",
        config.host_pages, host.array.nbytes / 1e9, config.write_policy, args.hicache_storage_backend, config.prefetch_policy,
    )  # fmt: skip
    cache = TieredCache(num_pages, shape.page_size, eviction, keys, config, with_events)
    return cache, Tiers(PageCopier(kv, host), worker)


def open_worker(
    args: EngineArgs, config: TierConfig, shape: PageShape, host: PageMemory, wake: Wake
) -> tuple[TierConfig, StoreWorker]:
    """The store that the flags name, with a worker; `config` with what the flags say of the store. Raises `StoreError`."""
    assert args.hicache_storage_backend is not None
    prefetch, extra = parse_extra_config(args.hicache_storage_backend_extra_config)
    scheme = ObjectScheme(args.hicache_storage_key_scheme, shape)
    store = open_store(args.hicache_storage_backend, StoreConfig(object_bytes=scheme.object_bytes, extra=extra))
    config = replace(
        config,
        has_store=True,
        prefetch_threshold=prefetch.prefetch_threshold,
        prefetch_timeout_base_s=prefetch.prefetch_timeout_base_s,
        prefetch_timeout_per_ki_token_s=prefetch.prefetch_timeout_per_ki_token_s,
    )
    return config, StoreWorker(store, scheme, host, wake)


def choose_host_pages(args: EngineArgs, num_pages: int, page_bytes: int) -> int:
    """Pages of the host tier: --hicache-size, or --hicache-ratio times the device's. Raises `ModelError`."""
    flag = "--hicache-size" if args.hicache_size else "--hicache-ratio"
    host_pages = int(args.hicache_size * 1e9 / page_bytes if args.hicache_size else args.hicache_ratio * num_pages)
    if host_pages <= num_pages and args.disaggregation_mode != "decode":
        raise ModelError(
            f"{flag}: a host tier of {host_pages} pages is no larger than the device's {num_pages}, and would hold nothing "
            "that the device does not; raise it, or lower --max-total-tokens."
        )
    needed, available = host_pages * page_bytes, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ModelError(
            f"{flag}: a host tier of {needed / 1e9:.1f} GB does not fit; {available / 1e9:.1f} GB are free."
        )
    return max(1, host_pages)
