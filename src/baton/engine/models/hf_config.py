"""`config.json` and `generation_config.json` (Hugging Face, old and new style) to a `ModelConfig`.

Fields that change the arithmetic and have no safe default are required; what an architecture fixes (Qwen2's q, k, v
bias, Qwen3's head norm) is written here once. Not here: reading files, GGUF.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from baton.engine.errors import bad_model
from baton.engine.models.rope import parse_rope
from baton.engine.models.spec import DTYPES, KNOWN_ARCHITECTURES, Architecture, ExpertsConfig, ModelConfig


def config_from_dict(raw: dict[str, Any], generation: dict[str, Any], file: Path) -> ModelConfig:
    """Validate a parsed `config.json`. `file` is only named in errors (`ModelError`)."""
    fields = _Fields(raw, file)
    architecture = _architecture(raw, file)
    _refuse_unsupported(raw, architecture, file)
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    # Only Llama may leave it out (a model older than grouped heads); Qwen's own defaults there are of no other model.
    num_kv_heads = fields.count("num_key_value_heads", num_heads if architecture == "LlamaForCausalLM" else None)
    if num_heads % num_kv_heads:
        raise bad_model(
            file, f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}."
        )
    max_positions = fields.count("max_position_embeddings")
    try:
        rope_theta, rope_scaling = parse_rope(raw, max_positions)
    except ValueError as error:
        raise bad_model(file, str(error)) from None
    qkv_bias, out_bias, mlp_bias = _biases(raw, architecture)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
        vocab_size=fields.count("vocab_size"),
        rms_norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=qkv_bias,
        attention_out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        eos_token_ids=merge_token_ids((generation.get("eos_token_id"), raw.get("eos_token_id")), file),
        bos_token_id=_first_token_id(generation.get("bos_token_id"), raw.get("bos_token_id")),
        dtype=_dtype(raw, file),
        experts=_experts(fields, raw, file) if architecture == "Qwen3MoeForCausalLM" else None,
    )


def merge_token_ids(values: Iterable[Any], file: Path) -> tuple[int, ...]:
    """Token ids of several fields (an id, a list, or nothing each), in order, without repeats."""
    merged: dict[int, None] = {}
    for value in values:
        if value is None:
            continue
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise bad_model(file, f"field eos_token_id must hold token ids, got {token_id!r}.")
            merged[token_id] = None
    return tuple(merged)


class _Fields:
    """Typed access to a parsed JSON object; errors name file and field."""

    def __init__(self, raw: dict[str, Any], file: Path) -> None:
        self._raw = raw
        self._file = file

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; a missing or null field gives `default`, or an error when there is none."""
        value = self._raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise bad_model(self._file, f"missing field {name}.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise bad_model(self._file, f"field {name} must be a positive integer, got {value!r}.")
        return value

    def positive(self, name: str) -> float:
        value = self._raw.get(name)
        if value is None:
            raise bad_model(self._file, f"missing field {name}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise bad_model(self._file, f"field {name} must be a positive number, got {value!r}.")
        return float(value)


def _architecture(raw: dict[str, Any], file: Path) -> Architecture:
    stated = raw.get("architectures")
    if not isinstance(stated, list) or not stated:
        raise bad_model(file, "missing field architectures.")
    for known in KNOWN_ARCHITECTURES:
        if stated[0] == known:
            return known
    raise bad_model(file, f"unknown architecture {stated[0]!r}; known: {', '.join(KNOWN_ARCHITECTURES)}.")


def _refuse_unsupported(raw: dict[str, Any], architecture: Architecture, file: Path) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise bad_model(file, f"field hidden_act: {activation!r} is not supported; only silu.")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise bad_model(file, f"field quantization_config: {method!r} checkpoints are not supported.")
    if _slides(raw, architecture):
        raise bad_model(
            file, f"sliding window attention (sliding_window {raw.get('sliding_window')}) is not supported."
        )


def _slides(raw: dict[str, Any], architecture: Architecture) -> bool:
    """Whether any layer attends to a window only. Qwen configs carry a window that they do not use."""
    if "sliding_attention" in (raw.get("layer_types") or ()):
        return True
    if architecture == "LlamaForCausalLM":
        return raw.get("sliding_window") is not None
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return False
    if architecture == "Qwen3MoeForCausalLM":
        return True
    # Layers from max_window_layers on slide; when the config lists layer_types, that list has been looked at.
    return not raw.get("layer_types") and raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 32)


def _biases(raw: dict[str, Any], architecture: Architecture) -> tuple[bool, bool, bool]:
    """(q, k and v; attention output; MLP)."""
    if architecture == "Qwen2ForCausalLM":
        return True, False, False
    attention = bool(raw.get("attention_bias", False))
    mlp = bool(raw.get("mlp_bias", False)) if architecture == "LlamaForCausalLM" else False
    return attention, attention, mlp


def _head_dim(fields: _Fields, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    """Qwen3's default is 128 whatever the hidden size; the others divide."""
    return fields.count("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads)


def _experts(fields: _Fields, raw: dict[str, Any], file: Path) -> ExpertsConfig | None:
    """None where no layer has experts."""
    num_layers = fields.count("num_hidden_layers")
    step = fields.count("decoder_sparse_step", 1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in dense):
        raise bad_model(file, f"field mlp_only_layers must be a list of layer numbers, got {dense!r}.")
    normalises = raw.get("norm_topk_prob", False)
    if not isinstance(normalises, bool):
        raise bad_model(file, f"field norm_topk_prob must be true or false, got {normalises!r}.")
    # transformers 5 writes another name than the models were published with.
    num_experts = fields.count("num_experts" if "num_local_experts" not in raw else "num_local_experts")
    per_token = fields.count("num_experts_per_tok")
    if per_token > num_experts:
        raise bad_model(file, f"field num_experts_per_tok is {per_token}, but there are {num_experts} experts.")
    size = fields.count("moe_intermediate_size")
    layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
    return ExpertsConfig(num_experts, per_token, size, normalises, layers) if layers else None


def _first_token_id(*values: Any) -> int | None:
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _dtype(raw: dict[str, Any], file: Path) -> str:
    value = raw.get("dtype", raw.get("torch_dtype"))
    if value is None:
        return "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise bad_model(file, f"field dtype: {value!r} is not supported; known: {', '.join(DTYPES)}.")
    return name
