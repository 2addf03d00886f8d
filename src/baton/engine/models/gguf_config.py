"""GGUF metadata to a `ModelConfig`. Sizes that the tensors themselves show (vocabulary, biases) are taken from them."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from baton.engine.errors import bad_model
from baton.engine.models.hf_config import merge_token_ids
from baton.engine.models.rope import RopeScaling, yarn_attention_factor
from baton.engine.models.spec import Architecture, ExpertsConfig, ModelConfig
from baton.engine.weights.gguf_file import GgufFile, open_gguf

ARCHITECTURES: dict[str, Architecture] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
_FILE_DTYPES = {"F32": "float32", "F16": "float16"}


def config_from_gguf(path: Path) -> ModelConfig:
    """The config that a GGUF file's metadata states; `ModelError` names the file and the key."""
    file = open_gguf(path)
    arch = file.need("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise bad_model(path, f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}.")
    _refuse_unsupported(file, arch)
    hidden_size = file.count(f"{arch}.embedding_length")
    num_heads = file.count(f"{arch}.attention.head_count")
    num_kv_heads = file.count(f"{arch}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise bad_model(path, f"head_count {num_heads} is not a multiple of head_count_kv {num_kv_heads}.")
    head_dim = file.count(f"{arch}.attention.key_length", hidden_size // num_heads)
    if file.count(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise bad_model(path, f"metadata key {arch}.rope.dimension_count: only whole heads ({head_dim}) are rotated.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise bad_model(path, "missing tensor token_embd.weight.")
    context = file.count(f"{arch}.context_length")
    theta = _positive(file, f"{arch}.rope.freq_base", 10000.0)
    return ModelConfig(
        architecture=ARCHITECTURES[arch],
        hidden_size=hidden_size,
        intermediate_size=file.count(f"{arch}.feed_forward_length"),
        num_layers=file.count(f"{arch}.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=int(embedding.shape[1]),
        rms_norm_eps=_short(_positive(file, f"{arch}.attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, arch, theta, head_dim, context),
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        eos_token_ids=merge_token_ids(
            (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")), path
        ),
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        dtype=_FILE_DTYPES.get(embedding.tensor_type.name, "bfloat16"),
        experts=_experts(file, arch) if arch == "qwen3moe" else None,
    )


def _refuse_unsupported(file: GgufFile, arch: str) -> None:
    if arch != "qwen3moe" and file.get(f"{arch}.expert_count", 0):
        raise bad_model(file.path, f"metadata key {arch}.expert_count: mixtures of experts are not supported.")
    window = file.get(f"{arch}.attention.sliding_window", 0)
    if window:
        raise bad_model(
            file.path, f"sliding window attention ({arch}.attention.sliding_window {window}) is not supported."
        )


def _experts(file: GgufFile, arch: str) -> ExpertsConfig | None:
    """The layers with experts are those whose tensors are there; None where no layer has any."""
    num_experts = file.count(f"{arch}.expert_count")
    per_token = file.count(f"{arch}.expert_used_count")
    if per_token > num_experts:
        raise bad_model(
            file.path, f"metadata key {arch}.expert_used_count is {per_token}, but there are {num_experts} experts."
        )
    return ExpertsConfig(
        num_experts,
        per_token,
        file.count(f"{arch}.expert_feed_forward_length"),
        # Files of this architecture do not say it; llama.cpp computes them so.
        normalises_weights=file.get(f"{arch}.expert_weights_norm", True),
        layers=tuple(
            layer
            for layer in range(file.count(f"{arch}.block_count"))
            if f"blk.{layer}.ffn_gate_inp.weight" in file.tensors
        ),
    )


def _positive(file: GgufFile, key: str, default: float | None = None) -> float:
    value: float = file.need(key, float) if default is None else file.get(key, default)
    if not 0 < value < math.inf:
        raise bad_model(file.path, f"metadata key {key} must be a positive number, got {value}.")
    return value


def _short(value: float) -> float:
    """A float32 as the decimal its author wrote: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, arch: str, theta: float, head_dim: int, context: int) -> RopeScaling | None:
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        return _llama3_from_factors(file, np.asarray(factors.data, np.float32), theta, head_dim)
    kind = file.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = _positive(file, f"{arch}.rope.scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "yarn":
        original = file.count(f"{arch}.rope.scaling.original_context_length", context)
        return RopeScaling("yarn", factor, original, attention_factor=yarn_attention_factor(factor))
    raise bad_model(
        file.path, f"metadata key {arch}.rope.scaling.type: {kind!r} is not supported; known: linear, yarn."
    )


def _llama3_from_factors(file: GgufFile, factors: Any, theta: float, head_dim: int) -> RopeScaling:
    """Llama 3.1 and later store the result of their frequency scaling; find the parameters that give it."""
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    for factor in (8.0, 32.0, 16.0, 4.0):
        scaling = RopeScaling("llama3", factor, 8192)
        expected = np.array([_llama3_divisor(scaling, 2 * math.pi / frequency) for frequency in inverse])
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return scaling
    raise bad_model(file.path, "tensor rope_freqs.weight matches no known Llama 3 frequency scaling.")


def _llama3_divisor(scaling: RopeScaling, wavelength: float) -> float:
    """What Llama 3's scaling divides the inverse frequency of this wavelength by."""
    original = scaling.original_max_position_embeddings
    if wavelength < original / scaling.high_freq_factor:
        return 1.0
    if wavelength > original / scaling.low_freq_factor:
        return scaling.factor
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
