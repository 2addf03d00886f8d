"""Put one rank together from its flags: model, KV pool, scheduler, transfer. Runs once, before the loop.

Every "choose" of the flags (None) is decided here, in one place, and said in one log line. Not here: the loop (`rank`), what
flags mean to a user (`args`).
"""

import logging
import os
import random
import time
from dataclasses import dataclass

import torch

from baton.engine.args import EngineArgs
from baton.engine.errors import ModelError
from baton.engine.models.config import load_config
from baton.engine.models.spec import ModelConfig
from baton.engine.runner import ModelRunner, kv_from_pages, kv_page_bytes
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.scheduler import Scheduler
from baton.engine.weights.fingerprint import model_fingerprint
from baton.engine.weights.loader import open_weights
from baton.engine.weights.names import expected_tensors
from baton.engine.weights.resolve import resolve_model
from baton.kvcache.page_memory import PageMemory
from baton.kvcache.prefix_cache import PrefixCache, UnsharedCache
from baton.protocol.pod import listen_host
from baton.protocol.rank import Ready
from baton.transfer.base import DecodeTransfer, PageLayout, PrefillTransfer, Wake
from baton.transfer.config import TransferConfig, parse_backend
from baton.transfer.decode import open_decode_transfer
from baton.transfer.prefill import open_prefill_transfer

logger = logging.getLogger(__name__)

DEFAULT_PAGE_SIZE = 16
DEFAULT_MAX_RUNNING_REQUESTS = 256
DEFAULT_CHUNK_TOKENS = {"cpu": 2048, "cuda": 4096}
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
class Engine:
    """The parts of one rank, ready to run."""

    scheduler: Scheduler
    runner: ModelRunner
    transfer: PrefillTransfer | DecodeTransfer | None
    ready: Ready


def assemble(args: EngineArgs, wake: Wake) -> Engine:
    """Load the model and build everything around it. `wake` ends the loop's wait (any thread).

    Raises `BatonError` for a model or a flag that cannot be served and `MemoryError` when the pool has no room.
    """
    started_s = time.monotonic()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and args.disaggregation_mode != "null":
        raise ModelError("--disaggregation-mode: handing KV over from GPU memory is not served yet; use --device cpu.")
    path = resolve_model(args.model_path, args.revision)
    config = load_config(path, trust_remote_code=args.trust_remote_code)
    dtype = DTYPES[config.dtype if args.dtype == "auto" else args.dtype]
    context_len = args.context_length or config.max_position_embeddings
    page_size = args.page_size or DEFAULT_PAGE_SIZE
    page_bytes = kv_page_bytes(config, dtype, page_size)
    num_pages = choose_num_pages(args, config, dtype, device, context_len, page_size)
    memory, kv = allocate_kv(config, dtype, device, num_pages, page_size)
    runner = ModelRunner(
        config,
        open_weights(path, args.load_format, config, dummy_seed=args.random_seed or 0),
        dtype=dtype,
        device=device,
        kv=kv,
        num_positions=context_len,
        attention_backend=args.own_attention_backend,
    )
    load_weights_s = time.monotonic() - started_s
    layout = PageLayout(
        model=model_fingerprint(path, config, args.load_format, dummy_seed=args.random_seed or 0),
        dtype=str(dtype).removeprefix("torch."),
        page_size=page_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_bytes=page_bytes,
    )
    transfer = None if memory is None else open_transfer(args, memory, layout, wake)
    cache_type = UnsharedCache if args.disable_radix_cache else PrefixCache
    cache = cache_type(num_pages, page_size, args.radix_eviction_policy)
    scheduler = Scheduler(scheduler_config(args, config, context_len, device), cache, random.Random(args.random_seed))
    logger.info(
        "rank is ready model=%s dtype=%s device=%s attention=%s threads=%d pages=%d page_size=%d context_len=%d load_s=%.2f",
        path, layout.dtype, device, runner.attention_backend, torch.get_num_threads(), num_pages, page_size, context_len,
        load_weights_s,
    )  # fmt: skip
    note_batch_dependence(runner, layout.dtype, device)
    ready = Ready(
        max_total_num_tokens=num_pages * page_size,
        max_req_input_len=min(context_len, num_pages * page_size) - 1,
        context_len=context_len,
        vocab_size=config.vocab_size,
        page_size=page_size,
        bootstrap_port=args.disaggregation_bootstrap_port if args.disaggregation_mode == "prefill" else None,
        load_weights_s=load_weights_s,
        device=str(device),
        attention_backend=runner.attention_backend,
    )
    return Engine(scheduler, runner, transfer, ready)


def note_batch_dependence(runner: ModelRunner, dtype: str, device: torch.device) -> None:
    """Say once where greedy answers are not promised to be the same bits in every batch."""
    if not runner.is_batch_invariant:
        logger.info(
            "arithmetic depends on the batch here (dtype %s on %s): greedy answers may differ in near-ties between runs",
            dtype, device,
        )  # fmt: skip


def choose_num_pages(
    args: EngineArgs, config: ModelConfig, dtype: torch.dtype, device: torch.device, context_len: int, page_size: int
) -> int:
    """Pages of the KV pool: --max-total-tokens, or a share of the memory there is."""
    if args.max_total_tokens is not None:
        return max(1, args.max_total_tokens // page_size)
    page_bytes = kv_page_bytes(config, dtype, page_size)
    if device.type == "cuda":
        weights = sum(_product(shape) for shape in expected_tensors(config).values()) * dtype.itemsize
        free, _ = torch.cuda.mem_get_info(device)
        budget = free * (args.mem_fraction_static or DEFAULT_CUDA_MEMORY_SHARE) - weights
        if budget < page_bytes:
            raise ModelError(
                f"--mem-fraction-static: weights of {weights / 1e9:.1f} GB leave no room for KV on {device} "
                f"({free / 1e9:.1f} GB free)."
            )
        return int(budget // page_bytes)
    # At least one sequence of full length must fit, whatever else runs here; memory is taken only when touched.
    return max(-(-context_len // page_size), int(_available_memory_bytes() * DEFAULT_CPU_POOL_SHARE) // page_bytes)


def allocate_kv(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, num_pages: int, page_size: int
) -> tuple[PageMemory | None, torch.Tensor]:
    """The KV pool [num_pages, L, 2, K, S, D]: on a CPU over memory that another process can map."""
    if device.type == "cpu":
        memory = PageMemory.create(num_pages, kv_page_bytes(config, dtype, page_size))
        return memory, kv_from_pages(memory.array, config, dtype, page_size)
    shape = (num_pages, config.num_layers, 2, config.num_kv_heads, page_size, config.head_dim)
    return None, torch.zeros(shape, dtype=dtype, device=device)


def scheduler_config(args: EngineArgs, config: ModelConfig, context_len: int, device: torch.device) -> SchedulerConfig:
    transfer_config = TransferConfig.from_env(os.environ)
    chunk = args.chunked_prefill_size or DEFAULT_CHUNK_TOKENS[device.type]
    is_pair = args.disaggregation_mode != "null"
    return SchedulerConfig(
        context_len=context_len,
        mode=args.disaggregation_mode,
        policy=args.schedule_policy,
        eos_token_ids=config.eos_token_ids,
        max_running_requests=args.max_running_requests or DEFAULT_MAX_RUNNING_REQUESTS,
        # SGLang ignores the bound with disaggregation: both sides of a pair must take or refuse the same request.
        max_queued_requests=None if is_pair else args.max_queued_requests,
        chunked_prefill_size=None if chunk == -1 else chunk,
        max_prefill_tokens=args.max_prefill_tokens,
        enable_mixed_chunk=args.enable_mixed_chunk,
        schedule_conservativeness=args.schedule_conservativeness,
        enable_priority=args.enable_priority_scheduling,
        low_priority_values_first=args.schedule_low_priority_values_first,
        num_reserved_decode_tokens=args.num_reserved_decode_tokens,
        bootstrap_timeout_s=transfer_config.bootstrap_timeout_s,
        receive_timeout_s=transfer_config.waiting_timeout_s,
        default_bootstrap_port=args.disaggregation_bootstrap_port,
    )


def open_transfer(
    args: EngineArgs, memory: PageMemory, layout: PageLayout, wake: Wake
) -> PrefillTransfer | DecodeTransfer | None:
    """This rank's side of the hand-over, if it has one."""
    if args.disaggregation_mode == "null":
        return None
    backend, note = parse_backend(args.disaggregation_transfer_backend)
    if note:
        logger.info("--disaggregation-transfer-backend %s: %s", args.disaggregation_transfer_backend, note)
    config = TransferConfig.from_env(os.environ, backend=backend)
    host = listen_host(args.host)
    if args.disaggregation_mode == "decode":
        return open_decode_transfer(memory, layout, config, host=host, wake=wake)
    bootstrap_url = f"http://{_dialled(host)}:{args.disaggregation_bootstrap_port}"
    return open_prefill_transfer(memory, layout, config, host=host, bootstrap_url=bootstrap_url, wake=wake)


def _dialled(host: str) -> str:
    """An address at which this process reaches what listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{local}]" if ":" in local else local


def _available_memory_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
