"""Small random models in Hugging Face's own classes, saved by transformers: the oracle for loading and arithmetic."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied-biased": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
}
"""Name -> config class, model class, what is special about it."""
MOE_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "experts_implementation": "eager",
        },
    ),
}
"""As FAMILIES; models whose layers have experts."""


def hf_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of 2 layers, hidden size 64, 4 heads over 2 KV heads, 256 tokens; biases are not zero."""
    config_class, model_class, special = (FAMILIES | MOE_FAMILIES)[family]
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": None,
    }
    config = config_class(**(sizes | special | changes))
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
            elif name.endswith("norm.weight"):
                parameter.normal_(mean=1.0, std=0.1)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.2)  # experts that differ in weight
            elif ".mlp.experts." in name:
                parameter.normal_(std=0.1)
    return model


def checkpoint(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `save_pretrained` writes: in memory transformers keeps a layer's experts in one tensor."""
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(".mlp.experts"):
            yield name, tensor
            continue
        for index, expert in enumerate(tensor):
            if kind == "down_proj":
                yield f"{stem}.{index}.down_proj.weight", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{stem}.{index}.gate_proj.weight", gate
                yield f"{stem}.{index}.up_proj.weight", up
