"""Stages of a pipeline, one after the other in this process, give the logits of one stage; layers are dealt out by weight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import CPU, baton_config, make_decoder, nan_pool
from tests.fakes.models import checkpoint, hf_model
from tests.fakes.thread_ranks import ThreadRanks
from transformers import PreTrainedModel

from baton.engine.attention.torch_native import TorchAttention
from baton.engine.errors import ModelError
from baton.engine.kernels.native import load_kernels
from baton.engine.models.decoder import Decoder, TorchDecoder
from baton.engine.models.decoder_cpu import CpuDecoder
from baton.engine.models.parameters import own_tensors
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.models.stages import Stage, plan_stages
from baton.engine.weights.loader import open_weights
from baton.engine.weights.names import expected_tensors

STEPS = [[Query(0, 0, 40)], [Query(1, 0, 9), Query(0, 40, 41)], [Query(0, 41, 42), Query(1, 9, 10)]]


def make_stage(model: PreTrainedModel, shard: Shard, pool: torch.Tensor) -> Decoder:
    """`pool`: of whole pages; the stage gets its layers and heads of it."""
    config = baton_config(model)
    sizes = local_sizes(config, shard)
    kv = pool[:, sizes.layers.start : sizes.layers.stop, :, slice(*sizes.kv_heads)]
    if pool.dtype == torch.float32:
        return TorchDecoder(
            config,
            checkpoint(model),
            attention=TorchAttention(kv),
            num_positions=512,
            dtype=pool.dtype,
            device=CPU,
            shard=shard,
        )
    kernels = load_kernels()
    assert kernels is not None
    return CpuDecoder(config, checkpoint(model), kernels=kernels, kv=kv, num_positions=512, num_threads=1, shard=shard)


def run(stages: list[Decoder], sequences: PagedSequences) -> list[torch.Tensor]:
    """Logits of all rows of each step; half of them are asked for at a time, in another order."""
    found = []
    for queries in STEPS:
        batch = sequences.batch(queries)
        hidden: torch.Tensor | None = None
        for stage in stages[:-1]:
            hidden = stage.forward(batch, hidden).left()
        rows = np.arange(len(batch.token_ids))[::-1].copy()
        returned = stages[-1].forward(batch, hidden).left(rows)
        parts = [stages[0].head(batch, part).clone() for part in returned.tensor_split(2) if len(part)]
        found.append(torch.cat(parts).flip(0))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes", "num_stages", "tp_size"),
    [
        ("llama-tied-biased", {"num_hidden_layers": 3}, 2, 1),
        ("llama", {"num_hidden_layers": 4}, 3, 1),
        ("qwen2", {"num_hidden_layers": 4}, 4, 1),
        ("qwen3", {"num_hidden_layers": 3}, 2, 2),
        ("qwen3-moe", {"num_hidden_layers": 4, "mlp_only_layers": [1]}, 3, 2),
    ],
)
def test_stages_together_are_one_model(
    family: str, changes: dict[str, Any], num_stages: int, tp_size: int, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and load_kernels() is None:
        pytest.skip("no C kernels on this machine")
    model = hf_model(family, **changes)
    config = baton_config(model)
    sequences = PagedSequences([np.random.default_rng(0).integers(0, 256, n).tolist() for n in (50, 20)], 16)
    kind = "torch-float32" if dtype == torch.float32 else "kernels"
    alone = make_decoder(kind, model, sequences.num_pages, 16)
    batches = [sequences.batch(queries) for queries in STEPS]
    expected = [alone.forward(batch).logits(np.arange(len(batch.token_ids))).clone() for batch in batches]
    borders = plan_stages(config, num_stages, {})
    pool = nan_pool(config, sequences.num_pages, 16, dtype)

    def of_rank(shard: Shard) -> list[torch.Tensor]:
        stages = [
            make_stage(model, Shard(shard.rank, shard.size, shard.collective, stage=Stage(index, borders)), pool)
            for index in range(num_stages)
        ]
        return run(stages, sequences)

    for found in ThreadRanks[list[torch.Tensor]](tp_size).run(of_rank):
        for ours, theirs in zip(found, expected, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(ours, theirs), "the kernels' bits do not depend on the number of stages"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_stage_reads_its_own_tensors_only(tmp_path: Path, load_format: str) -> None:
    model = hf_model("qwen3-moe", num_hidden_layers=4, mlp_only_layers=[1])
    model.save_pretrained(tmp_path)
    config = baton_config(model)
    borders = plan_stages(config, 3, {})
    read: list[str] = []
    for index in range(3):
        own = own_tensors(config, Shard(stage=Stage(index, borders)))
        found = [name for name, _ in open_weights(tmp_path, load_format, config, wanted=own)]
        assert sorted(found) == sorted(own)
        read += found
        assert ("lm_head.weight" in own) == (index == 0)
    assert sorted(read) == sorted(expected_tensors(config))


def test_the_head_counts_when_layers_are_dealt_out() -> None:
    config = baton_config(hf_model("llama", num_hidden_layers=8, vocab_size=256))
    layer = sum(one.numel() for name, one in hf_model("llama").named_parameters() if ".layers.0." in name)
    assert 0 < 256 * config.hidden_size < layer
    assert plan_stages(config, 1, {}) == (0, 8)
    assert plan_stages(config, 2, {}) == (0, 4, 8)
    assert plan_stages(config, 3, {}) == (0, 2, 5, 8)
    assert plan_stages(config, 8, {}) == tuple(range(9))
    large = baton_config(
        hf_model("llama", num_hidden_layers=8, vocab_size=256 * 8 * layer // (256 * config.hidden_size))
    )
    assert plan_stages(large, 2, {}) == (0, 1, 8), "the head weighs as much as all layers"


def test_a_partition_decides() -> None:
    config = baton_config(hf_model("llama", num_hidden_layers=8))
    assert plan_stages(config, 3, {"SGLANG_PP_LAYER_PARTITION": "2, 5,1"}) == (0, 2, 7, 8)
    assert plan_stages(config, 2, {"VLLM_PP_LAYER_PARTITION": "3,5"}) == (0, 3, 8)
    assert plan_stages(config, 1, {"SGLANG_PP_LAYER_PARTITION": "2,5,1"}) == (0, 8), "there are no stages"
    merged = plan_stages(config, 2, {"SGLANG_PP_LAYER_PARTITION": "1,2,4,1"}, num_asked=4)
    assert merged == (0, 3, 8), "fewer stages run than were asked for"


@pytest.mark.parametrize("text", ["4,4", "4,4,1", "8,0,0", "a,4,4", "9,-1,0", ","])
def test_a_partition_that_does_not_fit_is_named(text: str) -> None:
    config = baton_config(hf_model("llama", num_hidden_layers=8))
    with pytest.raises(ModelError, match="SGLANG_PP_LAYER_PARTITION must be 3 numbers of at least 1"):
        plan_stages(config, 3, {"SGLANG_PP_LAYER_PARTITION": text})


def test_more_stages_than_layers_are_refused() -> None:
    config = baton_config(hf_model("llama", num_hidden_layers=2))
    with pytest.raises(ModelError, match="--pp-size 3: the model has 2 layers"):
        plan_stages(config, 3, {})
