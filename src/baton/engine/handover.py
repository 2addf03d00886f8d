"""A rank's sides of the hand-over, as its flags and its pool ask for: for `assemble` on rank 0, and for followers.

Ranks that share their pool are one to a peer: rank 0 alone has a transfer. Where each has its own, all have one. Not here: how pages
travel (`transfer`), how the ranks of a worker act together (`distributed.transfer`).
"""

import logging
import os
from dataclasses import dataclass

from baton.engine.args import EngineArgs
from baton.engine.distributed.control import Phases
from baton.engine.distributed.group import FollowerGroup, LeaderGroup
from baton.engine.distributed.transfer import (
    FollowingTransfers,
    LeadingDecode,
    LeadingPrefill,
    open_decode_rank,
    open_prefill_rank,
)
from baton.engine.load import LoadedModel
from baton.engine.runner import kv_page_bytes
from baton.engine.tiers import page_shape
from baton.kvcache.page_memory import PageMemory
from baton.protocol.pod import listen_host
from baton.transfer.base import DecodeTransfer, PageLayout, PrefillTransfer, Wake
from baton.transfer.config import TransferConfig, parse_backend
from baton.transfer.decode import open_decode_transfer
from baton.transfer.prefill import open_prefill_transfer
from baton.transfer.slices import Slice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _HandOver:
    config: TransferConfig
    layout: PageLayout
    """Of whole pages."""
    own: Slice
    """What the pages of this rank's pool hold."""
    host: str
    """Where rank 0 listens."""
    bootstrap_url: str
    """Of the prefill worker's HTTP process, as rank 0 reaches it."""


def open_transfers(
    args: EngineArgs, model: LoadedModel, group: LeaderGroup | None, wake: Wake
) -> tuple[PrefillTransfer | None, DecodeTransfer | None]:
    """Of rank 0, for all ranks: as many sides as its mode has. Raises `BatonError`, OSError."""
    memory = model.memory
    if args.disaggregation_mode == "null" or memory is None:
        return None, None
    ask = _hand_over(args, model)
    prefill: PrefillTransfer | None = None
    decode: DecodeTransfer | None = None
    if not model.has_whole_pages and ask.config.backend != "fake":
        assert group is not None, "one rank has whole pages"
        if args.prefills_for_others:
            prefill = LeadingPrefill(_open_prefill_rank(ask, memory, group, wake), group, wake)
        if args.decodes_for_others:
            decode = LeadingDecode(_open_decode_rank(ask, memory, group, wake), group, wake)
        return prefill, decode
    if args.prefills_for_others:
        url = ask.bootstrap_url
        prefill = open_prefill_transfer(memory, ask.layout, ask.config, host=ask.host, bootstrap_url=url, wake=wake)
    if args.decodes_for_others:
        decode = open_decode_transfer(memory, ask.layout, ask.config, host=ask.host, wake=wake)
    return prefill, decode


def follow_transfer(args: EngineArgs, model: LoadedModel, group: FollowerGroup) -> FollowingTransfers | None:
    """Of any other rank. Raises `BatonError`, OSError."""
    if args.disaggregation_mode == "null" or model.memory is None or model.has_whole_pages:
        return None
    ask = _hand_over(args, model)
    if ask.config.backend == "fake":
        return None
    transfers = FollowingTransfers(group)
    prefill, decode = None, None
    if args.prefills_for_others:
        prefill = _open_prefill_rank(ask, model.memory, group, transfers.wake)
    if args.decodes_for_others:
        decode = _open_decode_rank(ask, model.memory, group, transfers.wake)
    transfers.start(prefill, decode)
    return transfers


def _open_prefill_rank(ask: _HandOver, memory: PageMemory, group: Phases, wake: Wake) -> PrefillTransfer:
    return open_prefill_rank(group, memory, ask.layout, ask.own, ask.config, ask.host, ask.bootstrap_url, wake)


def _open_decode_rank(ask: _HandOver, memory: PageMemory, group: Phases, wake: Wake) -> DecodeTransfer:
    return open_decode_rank(group, memory, ask.layout, ask.own, ask.config, ask.host, wake)


def _hand_over(args: EngineArgs, model: LoadedModel) -> _HandOver:
    """Raises `TransferConfigError` for a flag or variable that cannot be used."""
    backend, note = parse_backend(args.disaggregation_transfer_backend)
    if note:
        logger.info("--disaggregation-transfer-backend %s: %s", args.disaggregation_transfer_backend, note)
    host = listen_host(args.host)
    shape = page_shape(model)
    return _HandOver(
        config=TransferConfig.from_env(os.environ, backend=backend, dp_rank=args.dp_group, dp_size=args.dp_size),
        layout=PageLayout(
            model=model.fingerprint,
            dtype=shape.dtype,
            page_size=model.page_size,
            num_layers=model.config.num_layers,
            num_kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
            page_bytes=kv_page_bytes(model.config, model.dtype, model.page_size),
        ),
        own=Slice((shape.layers.start, shape.layers.stop), (shape.kv_heads.start, shape.kv_heads.stop)),
        host=host,
        bootstrap_url=f"http://{_dialled(host)}:{args.disaggregation_bootstrap_port}",
    )


def _dialled(host: str) -> str:
    """An address at which this process reaches what listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{local}]" if ":" in local else local
