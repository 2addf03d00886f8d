"""Logits of transformers, and how near to them ours have to be."""

import torch
from transformers import PreTrainedModel


def oracle_logits(model: PreTrainedModel, tokens: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers' logits [length, V] in float32, computed in `dtype` with weights rounded as `dtype`."""
    same = type(model)(model.config).eval()
    same.load_state_dict(model.state_dict())
    same = same.to(dtype)
    with torch.inference_mode():
        return [same(torch.tensor([ids])).logits[0].float() for ids in tokens]


def hf_rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose float32 weights are bf16 numbers."""
    same = type(model)(model.config).eval()
    same.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    return same


def assert_logits_close(found: torch.Tensor, tokens: list[int], model: PreTrainedModel, kind: str) -> None:
    """`found`: [length, V] of all tokens of one sequence; `kind` as in `decoders.make_decoder`."""
    if kind == "torch-float32":
        torch.testing.assert_close(found, oracle_logits(model, [tokens], torch.float32)[0], rtol=2e-4, atol=2e-4)
        return
    # bf16: as near to the exact result as transformers' own bf16 is, up to a third.
    rounded = hf_rounded(model)
    exact = oracle_logits(rounded, [tokens], torch.float32)[0]
    allowed = (oracle_logits(rounded, [tokens], torch.bfloat16)[0] - exact).square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() <= 1.33 * allowed
    assert (found - exact).abs().max() <= 8 * allowed
