"""A transformers model as Baton's decoder, in torch or in C kernels, over a KV pool full of NaN."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.models import checkpoint
from transformers import PreTrainedModel

from baton.engine.attention.torch_native import TorchAttention
from baton.engine.kernels.native import load_kernels
from baton.engine.models.decoder import Decoder, TorchDecoder
from baton.engine.models.decoder_cpu import CpuDecoder
from baton.engine.models.hf_config import config_from_dict
from baton.engine.models.shard import Shard
from baton.engine.models.spec import ModelConfig

CPU = torch.device("cpu")


def baton_config(model: PreTrainedModel) -> ModelConfig:
    raw = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return config_from_dict(raw, {}, Path("config.json"))


def nan_pool(config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Whoever reads a slot that nobody wrote gets a NaN, and with it a failing test."""
    shape = (num_pages, config.num_layers, 2, config.num_kv_heads, page_size, config.head_dim)
    return torch.full(shape, float("nan"), dtype=dtype)


def make_decoder(
    kind: str,
    model: PreTrainedModel,
    num_pages: int,
    page_size: int,
    *,
    num_threads: int = 1,
    kv: torch.Tensor | None = None,
) -> Decoder:
    """`kind`: "torch-float32", "torch-bfloat16" or "kernels"."""
    config = baton_config(model)
    dtype = torch.float32 if kind == "torch-float32" else torch.bfloat16
    pool = nan_pool(config, num_pages, page_size, dtype) if kv is None else kv
    weights = checkpoint(model)
    if kind == "kernels":
        kernels = load_kernels()
        assert kernels is not None
        return CpuDecoder(
            config, weights, kernels=kernels, kv=pool, num_positions=512, num_threads=num_threads, shard=Shard()
        )
    attention = TorchAttention(pool)
    return TorchDecoder(config, weights, attention=attention, num_positions=512, dtype=dtype, device=CPU, shard=Shard())


def run_steps(decoder: Decoder, sequences: PagedSequences, steps: Sequence[Sequence[Query]]) -> dict[int, torch.Tensor]:
    """Logits of all tokens of each sequence, [length, V], put together from the steps that computed them."""
    parts: dict[int, dict[int, torch.Tensor]] = {}
    for queries in steps:
        batch = sequences.batch(queries)
        logits = decoder.forward(batch).logits(np.arange(len(batch.token_ids))).clone()
        rows = iter(logits)
        for query in queries:
            for position in range(query.start, query.stop):
                parts.setdefault(query.seq, {})[position] = next(rows)
    return {seq: torch.stack([rows[position] for position in sorted(rows)]) for seq, rows in parts.items()}
