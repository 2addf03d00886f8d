"""Small random models in Hugging Face's own classes, saved by transformers: the oracle for loading and arithmetic."""

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


def hf_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of 2 layers, hidden size 64, 4 heads over 2 KV heads, 256 tokens; biases are not zero."""
    config_class, model_class, special = FAMILIES[family]
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
    return model
