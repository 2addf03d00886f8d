"""Which way the ranks' tensors meet: shared memory, TCP links or a process group. Settled by all ranks together, step by step.

Shared memory is for the C decoder with all ranks on one host; other CPU ranks have TCP links, GPUs NCCL. gloo only where it is asked for.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.engine.distributed.collective import ProcessGroupCollective, open_store
from baton.engine.distributed.control import GroupError, Phases
from baton.engine.distributed.exchange import MAX_RANKS, MemoryOffer, SharedExchange, fetch, reach
from baton.engine.distributed.links import open_links
from baton.engine.models.shard import Shard
from baton.kvcache.page_memory import PageMemory

logger = logging.getLogger(__name__)

COLLECTIVE = "BATON_COLLECTIVE"
"""Environment variable of the leader, for CPUs: "auto"; "tcp" or "gloo" leave shared memory alone (to measure, to test)."""
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV pool that all ranks would share: its pages, with the heads of all ranks."""

    num_pages: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class Connected:
    shard: Shard
    ranks_on_host: int
    memory: PageMemory | None
    """The pool that all ranks share; None: each rank has its own, with its own heads."""


def connect(group: Phases, device: torch.device, pool: Pool, *, in_c: bool) -> Connected:
    """`in_c`: the model is computed by the C decoder. Raises `GroupError`."""
    boots = group.phase("host", _boot_id())
    ranks_on_host = boots.count(boots[group.rank])
    way = "nccl" if device.type == "cuda" else group.phase("way", _wanted_way() if group.rank == 0 else "")[0]
    can_share = way == "auto" and in_c and group.size <= MAX_RANKS and ranks_on_host == group.size
    shared = _share_memory(group, pool) if can_share else None
    if shared is not None:
        exchange, memory = shared
        logger.info("rank %d of %d shares memory with the others", group.rank, group.size)
        return Connected(Shard(group.rank, group.size, None, exchange), ranks_on_host, memory)
    collective = _open_process_group(group, device) if way in ("nccl", "gloo") else open_links(group)
    name = way if way in ("nccl", "gloo") else "tcp"
    logger.info("rank %d of %d is connected by %s at %s", group.rank, group.size, name, group.own_host)
    return Connected(Shard(group.rank, group.size, collective), ranks_on_host, None)


def _wanted_way() -> str:
    wanted = os.environ.get(COLLECTIVE, "auto")
    if wanted not in ("auto", "tcp", "gloo"):
        raise GroupError(f"{COLLECTIVE} must be auto, tcp or gloo, got {wanted!r}")
    return wanted


def _open_process_group(group: Phases, device: torch.device) -> ProcessGroupCollective:
    if group.rank == 0:
        store = open_store(group.leader_host, 0, is_leader=True)
        group.phase("store", str(store.port))
    else:
        (port, *_) = group.phase("store")
        store = open_store(group.leader_host, int(port), is_leader=False)
    collective = ProcessGroupCollective(store, group.rank, group.size, device, group.own_host)
    group.phase("collective")
    return collective


def _share_memory(group: Phases, pool: Pool) -> tuple[SharedExchange, PageMemory] | None:
    """None, on all ranks, where one of them cannot have it."""
    if group.rank == 0:
        return _offer_memory(group, pool)
    (name, *_) = group.phase("offer")
    if name == _NONE:
        return None
    connection = reach(name)
    reached = group.phase("reach", _NONE if connection is None else "")
    if connection is None:
        return None
    if _NONE in reached:
        connection.close()
        return None
    shared = fetch(connection, group.rank, group.size, pool.num_pages, pool.page_bytes)
    group.phase("memory")
    return shared


def _offer_memory(group: Phases, pool: Pool) -> tuple[SharedExchange, PageMemory] | None:
    offer = _open_offer(pool)
    group.phase("offer", _NONE if offer is None else offer.name)
    if offer is None:
        return None
    is_taken = False
    try:
        if _NONE in group.phase("reach"):
            return None
        offer.give(group.size - 1)
        exchange = offer.take(group.size)
        group.phase("memory")
        is_taken = True
        return exchange, offer.pool
    finally:
        offer.close(keeps_pool=is_taken)


def _open_offer(pool: Pool) -> MemoryOffer | None:
    try:
        return MemoryOffer(pool.num_pages, pool.page_bytes)
    except OSError as error:
        logger.info("ranks cannot share memory here: %s", error)
        return None


def _boot_id() -> str:
    """The same for all processes under one kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"pid {os.getpid()}"
