"""Qwen3-MoE against transformers: routing, layers with and without experts, prefill, chunks, decode, prefix hits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import CPU, baton_config, make_decoder, nan_pool, run_steps
from tests.fakes.models import checkpoint, hf_model
from tests.fakes.oracle import assert_logits_close, hf_rounded, oracle_logits
from tests.fakes.thread_ranks import ThreadRanks
from transformers import PreTrainedModel

from baton.engine.args import engine_args
from baton.engine.attention.torch_native import TorchAttention
from baton.engine.errors import ModelError
from baton.engine.flags import FlagError
from baton.engine.kernels.native import load_kernels
from baton.engine.load import load_model
from baton.engine.models.config import load_config
from baton.engine.models.decoder import Decoder, TorchDecoder
from baton.engine.models.decoder_cpu import CpuDecoder
from baton.engine.models.hf_config import config_from_dict
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.runner import ModelRunner, computes_in_c, kv_from_pages, kv_page_bytes
from baton.engine.vllm.args import engine_flags, vllm_args
from baton.engine.weights.loader import open_weights

LENGTHS = (40, 1, 23)
STEPS = {
    "prefill": [[Query(seq, 0, length) for seq, length in enumerate(LENGTHS)]],
    "chunks and decode": [
        [Query(0, 0, 32), Query(1, 0, 1)],
        [Query(2, 0, 20), Query(0, 32, 37)],
        *([Query(0, 37 + done, 38 + done), Query(2, 20 + done, 21 + done)] for done in range(3)),
    ],
}
needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C kernels on this machine")
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "weights that are not normalised": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "a dense layer": {"mlp_only_layers": [1], "num_hidden_layers": 3, "tie_word_embeddings": True},
}


def random_tokens() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("kind", ["torch-float32", "torch-bfloat16", pytest.param("kernels", marks=needs_kernels)])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_transformers(changes: dict[str, Any], steps: list[list[Query]], kind: str) -> None:
    model = hf_model("qwen3-moe", **changes)
    tokens = random_tokens()
    sequences = PagedSequences(tokens, page_size=16)
    found = run_steps(make_decoder(kind, model, sequences.num_pages, 16), sequences, steps)
    if kind == "torch-float32":
        for seq, logits in found.items():
            assert_logits_close(logits, tokens[seq], model, kind)
        return
    # bf16: transformers and we choose another expert for some tokens in near-ties, which changes them by much.
    rounded = hf_rounded(model)
    exact = torch.cat(oracle_logits(rounded, tokens, torch.float32))
    theirs = torch.cat(oracle_logits(rounded, tokens, torch.bfloat16))
    ours = torch.cat([found[seq] for seq in range(len(tokens))])
    found_errors, allowed = error_of_tokens(ours, exact), error_of_tokens(theirs, exact)
    for quantile in (0.5, 0.8):
        assert found_errors.quantile(quantile) <= 1.33 * allowed.quantile(quantile)


def error_of_tokens(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (found - exact).square().mean(dim=-1).sqrt()


def make_rank(model: PreTrainedModel, shard: Shard, dtype: torch.dtype, num_pages: int) -> Decoder:
    config = baton_config(model)
    pages = np.zeros((num_pages, kv_page_bytes(config, dtype, 16, shard)), np.uint8)
    kv = kv_from_pages(pages, config, dtype, 16, shard)
    kernels = load_kernels()
    if dtype == torch.bfloat16 and kernels is not None:
        return CpuDecoder(
            config, checkpoint(model), kernels=kernels, kv=kv, num_positions=512, num_threads=1, shard=shard
        )
    return TorchDecoder(
        config,
        checkpoint(model),
        attention=TorchAttention(kv),
        num_positions=512,
        dtype=dtype,
        device=CPU,
        shard=shard,
    )


def ranks_and_one(size: int, ep_size: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of each of the ranks, and of a single one."""
    model = hf_model("qwen3-moe", mlp_only_layers=[0])
    sequences = PagedSequences([np.random.default_rng(0).integers(0, 256, 50).tolist()], 16)
    steps = [[Query(0, 0, 49)], [Query(0, 49, 50)]]  # a single token leaves some ranks without experts

    def run(shard: Shard) -> torch.Tensor:
        decoder = make_rank(model, replace(shard, ep_size=min(ep_size, shard.size)), dtype, sequences.num_pages)
        return run_steps(decoder, sequences, steps)[0]

    return ThreadRanks[torch.Tensor](size).run(run), run(Shard())


@pytest.mark.parametrize(("size", "ep_size"), [(2, 1), (2, 2), (3, 3), (4, 1), (4, 2)])
def test_ranks_together_are_one_model(size: int, ep_size: int) -> None:
    of_ranks, expected = ranks_and_one(size, ep_size, torch.float32)
    for logits in of_ranks:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@needs_kernels
@pytest.mark.parametrize(("size", "ep_size"), [(2, 1), (2, 2), (3, 3), (4, 4), (4, 1)])
def test_ranks_in_c_give_the_bits_of_one(size: int, ep_size: int) -> None:
    of_ranks, expected = ranks_and_one(size, ep_size, torch.bfloat16)
    assert all(torch.equal(logits, expected) for logits in of_ranks)


@pytest.mark.parametrize(("size", "ep_size"), [(4, 1), (4, 2), (3, 3), (8, 8)])
def test_every_part_of_every_expert_is_on_one_rank(size: int, ep_size: int) -> None:
    config = baton_config(hf_model("qwen3-moe", num_attention_heads=8, num_key_value_heads=8))
    collective = ThreadRanks[None](size).of_rank(0)
    found = [
        (expert, column)
        for rank in range(size)
        for sizes in [local_sizes(config, Shard(rank, size, collective, ep_size=ep_size))]
        for expert in range(*sizes.experts)
        for column in range(*sizes.expert_inner)
    ]
    assert sorted(found) == [(expert, column) for expert in range(8) for column in range(48)]


def test_a_saved_model_in_several_files_gives_its_tokens(tmp_path: Path) -> None:
    model = hf_model("qwen3-moe", num_hidden_layers=3, mlp_only_layers=[1])
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config = load_config(tmp_path)
    decoder = TorchDecoder(
        config,
        open_weights(tmp_path, "auto", config),
        attention=TorchAttention(nan_pool(config, 8, 16, torch.float32)),
        num_positions=512,
        dtype=torch.float32,
        device=CPU,
        shard=Shard(),
    )
    tokens = random_tokens()[:1]
    found = run_steps(decoder, PagedSequences(tokens, 16), [[Query(0, 0, LENGTHS[0])]])
    assert_logits_close(found[0], tokens[0], model, "torch-float32")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts": None}, "missing field num_experts"),
        ({"num_experts": 0}, "field num_experts must be a positive integer, got 0"),
        ({"num_experts_per_tok": None}, "missing field num_experts_per_tok"),
        ({"num_experts_per_tok": 9}, "field num_experts_per_tok is 9, but there are 8 experts"),
        ({"moe_intermediate_size": None}, "missing field moe_intermediate_size"),
        ({"norm_topk_prob": "yes"}, "field norm_topk_prob must be true or false, got 'yes'"),
        ({"decoder_sparse_step": 0}, "field decoder_sparse_step must be a positive integer, got 0"),
        ({"mlp_only_layers": 3}, "field mlp_only_layers must be a list of layer numbers, got 3"),
        ({"mlp_only_layers": [True]}, "field mlp_only_layers must be a list of layer numbers"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding window attention"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], problem: str) -> None:
    raw = hf_model("qwen3-moe").config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    raw["num_experts"] = raw.pop("num_local_experts")
    with pytest.raises(ModelError, match=f"^config.json: .*{problem}"):
        config_from_dict(raw | changes, {}, Path("config.json"))


def test_a_checkpoint_without_one_expert_is_refused() -> None:
    model = hf_model("qwen3-moe")
    config = baton_config(model)
    weights = [(name, tensor) for name, tensor in checkpoint(model) if ".1.mlp.experts.7.up_proj" not in name]
    with pytest.raises(ModelError, match=r"missing tensor model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight"):
        ModelRunner(config, weights, dtype=torch.float32, device=CPU, kv=nan_pool(config, 1, 16, torch.float32))


def test_ep_size_is_for_ranks_and_experts(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--ep-size 2 must divide --tp-size 3"):
        engine_args(["--model-path", "m", "--tp-size", "3", "--ep-size", "2"])
    of_vllm = engine_flags(vllm_args(["--model", "m", "-tp", "2", "--enable-expert-parallel"]))
    assert engine_args(of_vllm).ep_size == 2
    hf_model("llama").save_pretrained(tmp_path)
    flags = ["--model-path", str(tmp_path), "--tp-size", "2", "--ep-size", "2", "--max-total-tokens", "64"]
    with pytest.raises(ModelError, match="--ep-size 2: this LlamaForCausalLM has no experts"):
        load_model(engine_args(flags), CPU)
    hf_model("qwen3-moe").save_pretrained(tmp_path)
    load_model(engine_args(flags), CPU)  # one rank of a CPU computes what two would
    with pytest.raises(ModelError, match="--ep-size 16: the model has 8 experts"):
        load_model(engine_args([*flags, "--tp-size", "16", "--ep-size", "16"]), CPU)


@needs_kernels
def test_what_the_kernels_cannot_deal_out_is_left_to_torch() -> None:
    config = baton_config(hf_model("qwen3-moe"))
    assert computes_in_c("auto", config, torch.bfloat16, CPU, 4, 4)
    assert not computes_in_c("auto", config, torch.bfloat16, CPU, 4, 2)
    with pytest.raises(ModelError, match="--attention-backend cpu needs an --ep-size of 1 or 4, got 2"):
        computes_in_c("cpu", config, torch.bfloat16, CPU, 4, 2)
