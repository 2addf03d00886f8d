"""Which way the ranks' tensors meet: shared memory, TCP links or a process group. Settled by all ranks together, step by step.

The ranks of a pipeline stage have a collective of their own; stages are connected by a ring.

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
from baton.engine.distributed.links import LinkCollective, open_links
from baton.engine.distributed.ring import Ring, open_ring
from baton.engine.models.shard import Collective, Shard
from baton.kvcache.page_memory import PageMemory

logger = logging.getLogger(__name__)

COLLECTIVE = "BATON_COLLECTIVE"
"""Environment variable of the leader, for CPUs: "auto"; "tcp" or "gloo" leave shared memory alone (to measure, to test)."""
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV pool that all ranks would share: its pages, with the layers and heads of all ranks."""

    num_pages: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class Connected:
    shard: Shard
    """Of this rank's stage; which layers these are is not known here."""
    ranks_on_host: int
    memory: PageMemory | None
    """The pool that all ranks share; None: each rank has its own, with its own layers and heads."""
    ring: Ring | None
    """None: one stage."""

    def close(self) -> None:
        if isinstance(self.shard.collective, LinkCollective):
            self.shard.collective.close()
        if self.ring is not None:
            self.ring.close()


def connect(group: Phases, device: torch.device, pool: Pool, *, in_c: bool) -> Connected:
    """`in_c`: the model is computed by the C decoder. Raises `GroupError`."""
    topology = group.topology
    boots = group.phase("host", _boot_id())
    ranks_on_host = boots.count(boots[group.rank])
    way = "nccl" if device.type == "cuda" else group.phase("way", _wanted_way() if group.rank == 0 else "")[0]
    can_share = way == "auto" and in_c and group.size <= MAX_RANKS and ranks_on_host == group.size
    shared = _share_memory(group, pool) if can_share else None
    exchange, memory = (None, None) if shared is None else shared
    collective: Collective | None = None
    if shared is None and topology.tp_size > 1:
        collective = _open_process_group(group, device) if way in ("nccl", "gloo") else open_links(group)
    ring = open_ring(group) if topology.pp_size > 1 else None
    name = "shared memory" if shared is not None else way if way in ("nccl", "gloo") else "tcp"
    logger.info(
        "rank %d of %d is connected by %s at %s stage=%d/%d",
        group.rank, group.size, name, group.own_host, topology.stage + 1, topology.pp_size,
    )  # fmt: skip
    shard = Shard(topology.tp_rank, topology.tp_size, collective, exchange)
    return Connected(shard, ranks_on_host, memory, ring)


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
    topology = group.topology
    collective = ProcessGroupCollective(
        store, f"stage {topology.stage}", topology.tp_rank, topology.tp_size, device, group.own_host
    )
    group.phase("collective")
    return collective


def _share_memory(group: Phases, pool: Pool) -> tuple[SharedExchange | None, PageMemory] | None:
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
    topology = group.topology
    shared = fetch(
        connection, topology.tp_rank, topology.tp_size, pool.num_pages, pool.page_bytes, stage=topology.stage
    )
    group.phase("memory")
    return shared


def _offer_memory(group: Phases, pool: Pool) -> tuple[SharedExchange | None, PageMemory] | None:
    topology = group.topology
    offer = _open_offer(pool, topology.pp_size if topology.tp_size > 1 else 0)
    group.phase("offer", _NONE if offer is None else offer.name)
    if offer is None:
        return None
    is_taken = False
    try:
        if _NONE in group.phase("reach"):
            return None
        offer.give(group.size - 1)
        exchange = offer.take(topology.tp_size)
        group.phase("memory")
        is_taken = True
        return exchange, offer.pool
    finally:
        offer.close(keeps_pool=is_taken)


def _open_offer(pool: Pool, num_exchanges: int) -> MemoryOffer | None:
    try:
        return MemoryOffer(pool.num_pages, pool.page_bytes, num_exchanges)
    except OSError as error:
        logger.info("ranks cannot share memory here: %s", error)
        return None


def _boot_id() -> str:
    """The same for all processes under one kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"pid {os.getpid()}"
