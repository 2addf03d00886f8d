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
from baton.engine.distributed.answers import listen
from baton.engine.distributed.group import LeaderGroup
from baton.engine.distributed.runner import open_runner
from baton.engine.distributed.tiers import LeadingTiers, agree_host_pages
from baton.engine.distributed.transfer import LeadingDecode, LeadingPrefill, takers_of
from baton.engine.errors import ModelError
from baton.engine.handover import open_transfers
from baton.engine.kv_events import open_kv_events
from baton.engine.load import choose_device, load_model
from baton.engine.models.spec import ModelConfig
from baton.engine.runner import Runner
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.scheduler import Scheduler
from baton.engine.tiers import Tiers, choose_host_pages, open_cache, page_shape
from baton.protocol.rank import Ready
from baton.transfer.base import DecodeTransfer, PrefillTransfer, Wake
from baton.transfer.config import TransferConfig

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 256
DEFAULT_CHUNK_TOKENS = {"cpu": 2048, "cuda": 4096}
"""In flight together: where a pipeline has P stages, a chunk is the P-th part, so that all have work sooner."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of one rank, ready to run."""

    scheduler: Scheduler
    runner: Runner
    prefill: PrefillTransfer | None
    decode: DecodeTransfer | None
    """The sides of a hand-over that this worker can be."""
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
    config, num_pages, page_size = model.config, model.num_pages, model.page_size
    runner = model.runner if group is None else open_runner(model, group)
    prefill, decode = open_transfers(args, model, group, wake)
    shape = page_shape(model)
    host_pages = choose_host_pages(args, num_pages, shape.page_bytes)
    tiers: Tiers | None
    if group is not None and not model.has_whole_pages and host_pages:
        cache, own = open_cache(args, model, shape, agree_host_pages(group, host_pages), wake)
        assert own is not None, "there are host pages"
        tiers = LeadingTiers(own, group, wake)
    else:
        cache, tiers = open_cache(args, model, shape, host_pages, wake)
    if group is not None:
        sides = [one for one in (prefill, decode) if isinstance(one, LeadingPrefill | LeadingDecode)]
        listen(group, {**takers_of(sides), **(tiers.takers if isinstance(tiers, LeadingTiers) else {})})
    settings = scheduler_config(args, config, model.context_len, device, runner.depth)
    scheduler = Scheduler(settings, cache, random.Random(args.random_seed))
    logger.info(
        "rank is ready model=%s dtype=%s device=%s ranks=%d stages=%d attention=%s threads=%d pages=%d page_size=%d context_len=%d load_s=%.2f",
        model.path, shape.dtype, device, 1 if group is None else group.size,
        1 if model.shard.stage is None else model.shard.stage.size, runner.attention_backend, model.num_threads, num_pages, page_size, model.context_len, model.load_weights_s,
    )  # fmt: skip
    note_batch_dependence(runner, shape.dtype, device)
    ready = Ready(
        max_total_num_tokens=num_pages * page_size,
        max_req_input_len=min(model.context_len, num_pages * page_size) - 1,
        context_len=model.context_len,
        vocab_size=config.vocab_size,
        page_size=page_size,
        bootstrap_port=args.disaggregation_bootstrap_port if args.prefills_for_others else None,
        load_weights_s=model.load_weights_s,
        device=str(device),
        attention_backend=runner.attention_backend,
    )
    return Engine(scheduler, runner, prefill, decode, ready, tiers, open_kv_events(args, cache, page_size))


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
    chunk = args.chunked_prefill_size or DEFAULT_CHUNK_TOKENS[device.type] // depth
    is_pair = args.disaggregation_mode != "null"
    return SchedulerConfig(
        context_len=context_len,
        mode=args.disaggregation_mode,
        policy=args.schedule_policy,
        eos_token_ids=config.eos_token_ids,
        max_running_requests=max_running_requests(args, depth),
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


def max_running_requests(args: EngineArgs, depth: int) -> int:
    """Those that decode are spread evenly over `depth` steps in flight, so a bound of each step is one of all."""
    asked = args.max_running_requests or DEFAULT_MAX_RUNNING_REQUESTS
    if depth == 1 or args.pp_max_micro_batch_size is None:
        return asked
    return min(asked, depth * args.pp_max_micro_batch_size)
