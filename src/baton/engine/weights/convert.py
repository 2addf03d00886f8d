"""A GGUF file written out as a Hugging Face model directory, dequantised once, so that workers start quickly."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from baton.engine.models.gguf_config import config_from_gguf
from baton.engine.models.rope import RopeScaling
from baton.engine.models.spec import ExpertsConfig, ModelConfig
from baton.engine.weights.gguf_tokenizer import tokenizer_config_from_gguf, tokenizer_from_gguf
from baton.engine.weights.gguf_weights import gguf_weights

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def convert_gguf(gguf_path: Path, directory: Path) -> None:
    """Fill the existing, empty `directory` with config, generation config, tokenizer and `model.safetensors` in the
    config's dtype. `ModelError` as from reading the GGUF file."""
    config = config_from_gguf(gguf_path)
    _write_json(directory / "config.json", hf_config(config))
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    _write_json(directory / "generation_config.json", generation)
    tokenizer_from_gguf(gguf_path).save(str(directory / "tokenizer.json"))
    tokenizer_config = tokenizer_config_from_gguf(gguf_path)
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    special = {name: tokenizer_config[name] for name in _SPECIAL_TOKENS if name in tokenizer_config}
    _write_json(directory / "special_tokens_map.json", special)
    dtype = getattr(torch, config.dtype)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in gguf_weights(gguf_path, config)}
    weights_file = directory / "model.safetensors"
    save_file(tensors, weights_file, metadata={"format": "pt"})
    weights_file.chmod((directory / "config.json").stat().st_mode)  # safetensors leaves it readable by its owner only


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that says what `config` says."""
    fields: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
    }
    if config.experts is not None:
        fields |= _expert_fields(config.experts, config.num_layers)
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _rope_fields(config.rope_scaling)
    if config.architecture != "Qwen2ForCausalLM":
        fields["attention_bias"] = config.attention_bias
    if config.architecture == "LlamaForCausalLM":
        fields["mlp_bias"] = config.mlp_bias
    if config.bos_token_id is not None:
        fields["bos_token_id"] = config.bos_token_id
    if config.eos_token_ids:
        ids = list(config.eos_token_ids)
        fields["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return fields


def _expert_fields(experts: ExpertsConfig, num_layers: int) -> dict[str, Any]:
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalises_weights,
        "mlp_only_layers": [layer for layer in range(num_layers) if layer not in experts.layers],
    }


def _rope_fields(scaling: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "linear":
        return fields
    fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return fields | {name: getattr(scaling, name) for name in names[scaling.type]}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
