"""Two ranks with half a model each, in two threads with a real reduction, give the logits of one rank."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import CPU, baton_config, make_decoder
from tests.fakes.models import FAMILIES, hf_model
from transformers import PreTrainedModel

from baton.engine.attention.torch_native import TorchAttention
from baton.engine.errors import ModelError
from baton.engine.kernels.native import load_kernels
from baton.engine.models.decoder import Decoder, TorchDecoder
from baton.engine.models.decoder_cpu import CpuDecoder
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.runner import kv_from_pages, kv_page_bytes

SIZE = 3
"""Ranks; 4 kv heads and 96 feed-forward columns: the heads are split unevenly."""


class Reduction:
    """Sums over the threads of the ranks."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(SIZE, timeout=30)
        self._partials: dict[int, torch.Tensor] = {}

    def of_rank(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(partial: torch.Tensor) -> torch.Tensor:
            self._partials[rank] = partial.float().clone()
            self._barrier.wait()
            total = torch.stack([self._partials[other] for other in range(SIZE)]).sum(0)
            self._barrier.wait()
            return total.to(partial.dtype)

        return reduce


def make_rank(model: PreTrainedModel, shard: Shard, dtype: torch.dtype, num_pages: int) -> Decoder:
    config = baton_config(model)
    pages = np.zeros((num_pages, kv_page_bytes(config, dtype, 16, shard)), np.uint8)
    kv = kv_from_pages(pages, config, dtype, 16, shard)
    weights = model.state_dict().items()
    if dtype == torch.float32:
        attention = TorchAttention(kv)
        return TorchDecoder(
            config, weights, attention=attention, num_positions=512, dtype=dtype, device=CPU, shard=shard
        )
    kernels = load_kernels()
    assert kernels is not None
    return CpuDecoder(config, weights, kernels=kernels, kv=kv, num_positions=512, num_threads=1, shard=shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied-biased", "qwen3"])
def test_ranks_together_are_one_model(family: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and load_kernels() is None:
        pytest.skip("no C kernels on this machine")
    assert family in FAMILIES
    model = hf_model(family, num_attention_heads=8, num_key_value_heads=4, attention_bias=True)
    sequences = PagedSequences([np.random.default_rng(0).integers(0, 256, 50).tolist()], 16)
    batch, rows = sequences.batch([Query(0, 0, 50)]), np.arange(50)
    kind = "torch-float32" if dtype == torch.float32 else "kernels"
    expected = make_decoder(kind, model, sequences.num_pages, 16).forward(batch).logits(rows)
    reduction = Reduction()

    def run(rank: int) -> torch.Tensor:
        decoder = make_rank(model, Shard(rank, SIZE, reduction.of_rank(rank)), dtype, sequences.num_pages)
        return decoder.forward(batch).logits(rows)

    with ThreadPoolExecutor(SIZE) as executor:
        results = list(executor.map(run, range(SIZE)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for logits in results:
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_more_ranks_than_kv_heads_are_refused() -> None:
    config = baton_config(hf_model("llama"))
    with pytest.raises(ModelError, match="3 ranks cannot share 2 kv heads"):
        local_sizes(config, Shard(0, 3, lambda tensor: tensor))
