"""Several ranks with a part of a model each, as threads with real collectives, give the logits of one rank."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import CPU, baton_config, make_decoder
from tests.fakes.models import hf_model
from tests.fakes.thread_ranks import ThreadRanks
from transformers import PreTrainedModel

from baton.engine.attention.torch_native import TorchAttention
from baton.engine.errors import ModelError
from baton.engine.kernels.native import load_kernels
from baton.engine.models.decoder import Decoder, TorchDecoder
from baton.engine.models.decoder_cpu import CpuDecoder
from baton.engine.models.shard import Shard, head_borders, local_sizes
from baton.engine.runner import kv_from_pages, kv_page_bytes

UNEVEN: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 90, "head_dim": 16}
"""The demo model's 9 query and 3 kv heads."""


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
@pytest.mark.parametrize(
    ("family", "changes", "size"),
    [
        ("llama-tied-biased", {"num_attention_heads": 8, "num_key_value_heads": 4}, 2),
        ("llama-tied-biased", {"num_attention_heads": 8, "num_key_value_heads": 4}, 3),
        ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}, 4),
        ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 2}, 4),  # each kv head on two ranks
        ("llama", UNEVEN, 2),
        ("llama", UNEVEN, 4),  # the last kv head on two ranks, with one and two query heads
    ],
)
def test_ranks_together_are_one_model(family: str, changes: dict[str, Any], size: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and load_kernels() is None:
        pytest.skip("no C kernels on this machine")
    model = hf_model(family, **changes)
    sequences = PagedSequences([np.random.default_rng(0).integers(0, 256, 50).tolist()], 16)
    batch, rows = sequences.batch([Query(0, 0, 50)]), np.arange(50)
    kind = "torch-float32" if dtype == torch.float32 else "kernels"
    expected = make_decoder(kind, model, sequences.num_pages, 16).forward(batch).logits(rows).clone()

    def run(shard: Shard) -> torch.Tensor:
        return make_rank(model, shard, dtype, sequences.num_pages).forward(batch).logits(rows).clone()

    for logits in ThreadRanks[torch.Tensor](size).run(run):
        if dtype == torch.float32:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        else:
            assert torch.equal(logits, expected), "the kernels' bits do not depend on the number of ranks"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 2), (9, 3, 3), (9, 3, 4), (9, 3, 9), (8, 4, 3), (8, 2, 8)]
)
def test_every_query_head_is_computed_once_with_its_kv_head(heads: int, kv_heads: int, size: int) -> None:
    config = baton_config(hf_model("llama", hidden_size=144, num_attention_heads=heads, num_key_value_heads=kv_heads))
    sizes = [local_sizes(config, Shard(rank, size, ThreadRanks[None](size).of_rank(rank))) for rank in range(size)]
    assert [head for one in sizes for head in range(*one.heads)] == list(range(heads))
    assert head_borders(config, size) == [one.heads[0] for one in sizes] + [heads]
    for one in sizes:
        assert one.num_heads >= 1
        assert {head * kv_heads // heads for head in range(*one.heads)} == set(range(*one.kv_heads))
        assert one.num_heads % one.num_kv_heads == 0


@pytest.mark.parametrize(("kv_heads", "size"), [(2, 5), (4, 7)])
def test_more_ranks_than_heads_can_feed_are_refused(kv_heads: int, size: int) -> None:
    config = baton_config(hf_model("llama", num_attention_heads=4, num_key_value_heads=kv_heads))
    with pytest.raises(ModelError, match=f"{size} ranks cannot share 4 query heads"):
        for rank in range(size):
            local_sizes(config, Shard(rank, size, ThreadRanks[None](size).of_rank(rank)))
