"""Put one rank together from its flags: model, KV pool, scheduler, transfer. Runs once, before the loop.

Every "choose" of the flags (None) is decided here, in one place, and said in one log line. Not here: the loop (`rank`), what
flags mean to a user (`args`).
"""

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.engine.args import EngineArgs
from baton.engine.distributed.group import LeaderGroup
from baton.engine.distributed.runner import open_runner
from baton.engine.distributed.tiers import LeadingTiers, agree_host_pages
from baton.engine.errors import ModelError
from baton.engine.kv_events import open_kv_events
from baton.engine.load import choose_device, load_model
from baton.engine.models.spec import ModelConfig
from baton.engine.runner import Runner, kv_page_bytes
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.scheduler import Scheduler
from baton.engine.tiers import Tiers, choose_host_pages, open_cache, page_shape
from baton.kvcache.page_memory import PageMemory
from baton.protocol.pod import listen_host
from baton.protocol.rank import Ready
from baton.transfer.base import DecodeTransfer, PageLayout, PrefillTransfer, Wake
from baton.transfer.config import TransferConfig, parse_backend
from baton.transfer.decode import open_decode_transfer
from baton.transfer.prefill import open_prefill_transfer

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 256
DEFAULT_CHUNK_TOKENS = {"cpu": 2048, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of one rank, ready to run."""

    scheduler: Scheduler
    runner: Runner
    transfer: PrefillTransfer | DecodeTransfer | None
    ready: Ready
    tiers: Tiers | None
    publish_kv_events: Callable[[], None] | None
    """Tells subscribers what changed in the cache since the last call."""


def assemble(args: EngineArgs, wake: Wake, group: LeaderGroup | None = None) -> Engine:
    """Load the model and build everything around it. `wake` ends the loop's wait (any thread). `group`: the
    other ranks, if there are any.

    Raises what `load_model` raises.
    """
    device = choose_device(args)
    if device.type == "cuda" and args.disaggregation_mode != "null":
        raise ModelError("--disaggregation-mode: handing KV over from GPU memory is not served yet; use --device cpu.")
    model = load_model(args, device, group)
    if not model.has_whole_pages:
        need_one_pool(args)
    config, memory, num_pages, page_size = model.config, model.memory, model.num_pages, model.page_size
    runner = model.runner if group is None else open_runner(model, group)
    layout = PageLayout(
        model=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        page_size=page_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_bytes=kv_page_bytes(config, model.dtype, page_size),
    )
    transfer = None if memory is None else open_transfer(args, memory, layout, wake)
    shape = page_shape(model)
    host_pages = choose_host_pages(args, num_pages, shape.page_bytes)
    tiers: Tiers | None
    if group is not None and not model.has_whole_pages and host_pages:
        cache, own = open_cache(args, model, shape, agree_host_pages(group, host_pages), wake)
        assert own is not None, "there are host pages"
        tiers = LeadingTiers(own, group, wake)
    else:
        cache, tiers = open_cache(args, model, shape, host_pages, wake)
    settings = scheduler_config(args, config, model.context_len, device, runner.depth)
    scheduler = Scheduler(settings, cache, random.Random(args.random_seed))
    logger.info(
        "rank is ready model=%s dtype=%s device=%s ranks=%d stages=%d attention=%s threads=%d pages=%d page_size=%d context_len=%d load_s=%.2f",
        model.path, layout.dtype, device, 1 if group is None else group.size,
        1 if model.shard.stage is None else model.shard.stage.size, runner.attention_backend, model.num_threads, num_pages, page_size, model.context_len, model.load_weights_s,
    )  # fmt: skip
    note_batch_dependence(runner, layout.dtype, device)
    ready = Ready(
        max_total_num_tokens=num_pages * page_size,
        max_req_input_len=min(model.context_len, num_pages * page_size) - 1,
        context_len=model.context_len,
        vocab_size=config.vocab_size,
        page_size=page_size,
        bootstrap_port=args.disaggregation_bootstrap_port if args.disaggregation_mode == "prefill" else None,
        load_weights_s=model.load_weights_s,
        device=str(device),
        attention_backend=runner.attention_backend,
    )
    return Engine(scheduler, runner, transfer, ready, tiers, open_kv_events(args, cache, page_size))


def need_one_pool(args: EngineArgs) -> None:
    """Raises `ModelError` for what this rank cannot do while other ranks keep their heads of a page to themselves."""
    if args.disaggregation_mode != "null":
        raise ModelError(
            f"--disaggregation-mode {args.disaggregation_mode}: with several ranks it needs a KV pool that they share, on one CPU "
            "host with bfloat16 kernels; ranks on several hosts or devices are not served yet."
        )


def note_batch_dependence(runner: Runner, dtype: str, device: torch.device) -> None:
    """Say once where greedy answers are not promised to be the same bits in every batch."""
    if not runner.is_batch_invariant:
        logger.info(
            "arithmetic depends on the batch here (dtype %s on %s): greedy answers may differ in near-ties between runs",
            dtype, device,
        )  # fmt: skip


def scheduler_config(
    args: EngineArgs, config: ModelConfig, context_len: int, device: torch.device, depth: int
) -> SchedulerConfig:
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
        pipeline_depth=depth,
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
