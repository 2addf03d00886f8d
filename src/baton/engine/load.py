"""What every rank does before its first step: read the config, take KV memory, load its part of the weights.

With several ranks they agree on the number of pages before memory is taken, and none goes on before all have their weights.
Every "choose" of the flags about model and memory is decided here. Not here: scheduler and transfer (`assemble`).
"""

import logging
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from baton.engine.args import EngineArgs
from baton.engine.distributed.connect import Pool
from baton.engine.distributed.fits import need_fit
from baton.engine.distributed.group import Group
from baton.engine.distributed.ring import Ring
from baton.engine.distributed.topology import Topology
from baton.engine.errors import ModelError
from baton.engine.free_memory import free_memory_bytes
from baton.engine.models.config import load_config
from baton.engine.models.parameters import own_tensors
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.models.spec import ModelConfig
from baton.engine.models.stages import PARTITIONS, Stage, plan_stages
from baton.engine.runner import ModelRunner, computes_in_c, kv_from_pages, kv_page_bytes, kv_page_shape
from baton.engine.weights.fingerprint import model_fingerprint
from baton.engine.weights.loader import open_weights
from baton.engine.weights.names import expected_tensors
from baton.engine.weights.resolve import resolve_model
from baton.kvcache.page_memory import PageMemory

logger = logging.getLogger(__name__)

DEFAULT_PAGE_SIZE = 16
DEFAULT_CUDA_MEMORY_SHARE = 0.85
"""Weights and KV pool together, of the device's free memory at start."""
DEFAULT_CPU_POOL_SHARE = 0.1
"""KV pool, of the memory that is available at start: a laptop runs several workers and other programs."""
DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, with its KV pool."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    context_len: int
    page_size: int
    num_pages: int
    shard: Shard
    has_whole_pages: bool
    """The pool's pages hold all layers and heads: it is one rank's, or shared by all."""
    ring: Ring | None
    """To the neighbours in a pipeline of several stages."""
    memory: PageMemory | None
    """The pool's bytes where it lies in host memory."""
    kv: torch.Tensor
    """The pool: [num_pages, L, 2, K, S, D]; of all ranks where they share it."""
    runner: ModelRunner
    fingerprint: str
    load_weights_s: float
    num_threads: int


def choose_device(args: EngineArgs, local_rank: int = 0) -> torch.device:
    """The device of this process."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(kind, local_rank) if kind == "cuda" and local_rank else torch.device(kind)


def load_model(args: EngineArgs, device: torch.device, group: Group | None = None) -> LoadedModel:
    """Raises `BatonError` for a model or a flag that cannot be served, or a group that does not come together, and
    `MemoryError` when the pool has no room. `group` None: one rank."""
    started_s = time.monotonic()
    path = resolve_model(args.model_path, args.revision)
    config = load_config(path, trust_remote_code=args.trust_remote_code)
    dtype = DTYPES[config.dtype if args.dtype == "auto" else args.dtype]
    context_len = args.context_length or config.max_position_embeddings
    page_size = args.page_size or DEFAULT_PAGE_SIZE
    fingerprint = model_fingerprint(path, config, args.load_format, dummy_seed=args.random_seed or 0)
    topology = Topology() if group is None else group.topology
    need_fit(args, config, topology, os.environ)
    if args.tp_size > config.num_heads and topology.rank == 0:
        given = (args.tp_size, config.num_heads)
        logger.warning("--tp-size %d is served here, but not on GPUs: the model has %d query heads", *given)
    ep_size = choose_ep_size(args.ep_size, device, topology.tp_size)
    borders = plan_stages(config, topology.pp_size, os.environ, topology.asked_pp)
    stage = None if topology.pp_size == 1 else Stage(topology.stage, borders)
    in_c = computes_in_c(args.own_attention_backend, config, dtype, device, topology.tp_size, ep_size)
    layers = range(config.num_layers) if stage is None else stage.layers
    num_pages = choose_num_pages(args, config, dtype, device, context_len, page_size, topology.tp_size, layers)
    connected = None
    if group is not None:
        facts = {
            "--model-path (contents)": fingerprint,
            "--dtype": str(dtype).removeprefix("torch."),
            "--device": device.type,
            "--attention-backend": "cpu" if in_c else "torch_native",
            "--tp-size": str(args.tp_size),
            "--pp-size": str(args.pp_size),
            f"{PARTITIONS[0]} (layers at which stages begin)": ",".join(map(str, borders[:-1])),
            "--ep-size": str(args.ep_size),
            "--nnodes": str(args.nnodes),
            "--page-size": str(page_size),
            "--context-length": str(context_len),
            "--disaggregation-mode": args.disaggregation_mode,
            "--disaggregation-transfer-backend": args.disaggregation_transfer_backend,
            "--enable-hierarchical-cache": str(args.has_tiers),
            "--hicache-storage-backend": str(args.hicache_storage_backend),
            "--hicache-storage-key-scheme": args.hicache_storage_key_scheme,
        }
        num_pages = group.agree(facts, num_pages)
        connected = group.connect(device, Pool(num_pages, kv_page_bytes(config, dtype, page_size)), in_c=in_c)
    shard = Shard() if connected is None else replace(connected.shard, ep_size=ep_size, stage=stage)
    memory = None if connected is None else connected.memory
    has_whole_pages = group is None or memory is not None
    if memory is None:
        memory, kv = allocate_kv(config, dtype, device, num_pages, page_size, shard)
        own_kv = kv
    else:
        sizes = local_sizes(config, shard)
        kv = kv_from_pages(memory.array, config, dtype, page_size)
        own_kv = kv[:, sizes.layers.start : sizes.layers.stop, :, slice(*sizes.kv_heads)]
    ranks_on_host = 1 if connected is None else connected.ranks_on_host
    num_threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks_on_host))
    # More threads than cores would spend a step's time waiting for one another at OpenMP's barriers, which spin.
    torch.set_num_threads(num_threads)
    wanted = own_tensors(config, shard)
    runner = ModelRunner(
        config,
        open_weights(path, args.load_format, config, dummy_seed=args.random_seed or 0, wanted=wanted),
        dtype=dtype,
        device=device,
        kv=own_kv,
        num_positions=context_len,
        attention_backend=args.own_attention_backend,
        shard=shard,
        num_threads=num_threads,
    )
    load_weights_s = time.monotonic() - started_s
    if group is not None:
        group.finish_loading()
    return LoadedModel(
        path, config, dtype, device, context_len, page_size, num_pages, shard, has_whole_pages,
        None if connected is None else connected.ring, memory, kv, runner, fingerprint, load_weights_s, num_threads,
    )  # fmt: skip


def choose_ep_size(asked: int, device: torch.device, num_ranks: int) -> int:
    """--ep-size, or less where fewer ranks run than --tp-size asks for."""
    ep_size = math.gcd(asked, num_ranks)
    if ep_size != asked:
        logger.warning("--ep-size %d: %d, since %d rank(s) run", asked, ep_size, num_ranks)
    if device.type == "cpu" and ep_size not in (1, num_ranks):
        logger.warning(
            "--ep-size %d of %d ranks is computed by torch; the C kernels know 1 and %d", ep_size, num_ranks, num_ranks
        )
    return ep_size


def choose_num_pages(
    args: EngineArgs,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    context_len: int,
    page_size: int,
    tp_size: int,
    layers: range,
) -> int:
    """Pages of the KV pool: --max-total-tokens, or a share of the memory there is."""
    if args.max_total_tokens is not None:
        return max(1, args.max_total_tokens // page_size)
    page_bytes = kv_page_bytes(config, dtype, page_size)
    if device.type == "cuda":
        others = tuple(f"model.layers.{layer}." for layer in range(config.num_layers) if layer not in layers)
        own = [shape for name, shape in expected_tensors(config).items() if not name.startswith(others)]
        weights = sum(map(math.prod, own)) * dtype.itemsize // tp_size
        heads = -(-config.num_kv_heads // tp_size)  # the largest share
        page_bytes = page_bytes // (config.num_kv_heads * config.num_layers) * heads * len(layers)
        free, _ = torch.cuda.mem_get_info(device)
        budget = free * (args.mem_fraction_static or DEFAULT_CUDA_MEMORY_SHARE) - weights
        if budget < page_bytes:
            raise ModelError(
                f"--mem-fraction-static: weights of {weights / 1e9:.1f} GB leave no room for KV on {device} "
                f"({free / 1e9:.1f} GB free)."
            )
        return int(budget // page_bytes)
    # At least one sequence of full length must fit, whatever else runs here; memory is taken only when touched.
    return max(-(-context_len // page_size), int(free_memory_bytes() * DEFAULT_CPU_POOL_SHARE) // page_bytes)


def allocate_kv(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, num_pages: int, page_size: int, shard: Shard
) -> tuple[PageMemory | None, torch.Tensor]:
    """This rank's KV pool [num_pages, L, 2, K, S, D]: on a CPU over memory that another process can map."""
    if device.type == "cpu":
        memory = PageMemory.create(num_pages, kv_page_bytes(config, dtype, page_size, shard))
        return memory, kv_from_pages(memory.array, config, dtype, page_size, shard)
    return None, torch.zeros((num_pages, *kv_page_shape(config, page_size, shard)), dtype=dtype, device=device)
