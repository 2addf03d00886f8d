"""GGUF files of small transformers models, written with the `gguf` package as llama.cpp's converter lays them out."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tests.fakes.models import checkpoint
from transformers import PreTrainedModel

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def gguf_name(hf_name: str) -> str:
    if hf_name in _NAMES:
        return _NAMES[hf_name]
    _, _, layer, rest = hf_name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_MODULES[module]}.{kind}"


def llama_cpp_layout(hf_name: str, value: NDArray[Any], model: PreTrainedModel) -> NDArray[Any]:
    """Llama files hold Q and K with each head's two halves interleaved."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    module = hf_name.split(".")[-2]
    if model.config.model_type != "llama" or module not in heads:
        return value
    count = heads[module]
    halves = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    replaced: Mapping[str, NDArray[np.uint8]] | None = None,
    extra: Mapping[str, NDArray[Any]] | None = None,
    leave_out: str = "",
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Matrices as `kind`, vectors as F32. `replaced`: GGUF name -> raw blocks of `kind`, for kinds that the package
    cannot quantise to. `metadata` overrides: a None leaves the key out."""
    arch = model.config.model_type.replace("_", "")
    writer = gguf.GGUFWriter(path, arch, endianess=endianess)
    for key, value in (_metadata(model) | dict(metadata or {})).items():
        _add(writer, key, value)
    quantisation = gguf.GGMLQuantizationType[kind]
    state = _stacked_experts(checkpoint(model))
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for hf_name, tensor in state.items():
        name = gguf_name(hf_name)
        if name == leave_out:
            continue
        value = np.ascontiguousarray(llama_cpp_layout(hf_name, tensor.float().numpy(), model))
        if value.ndim == 1 or kind == "F32":
            writer.add_tensor(name, value)
        elif replaced is not None:
            writer.add_tensor(name, replaced[name], raw_dtype=quantisation)
        elif kind == "F16":
            writer.add_tensor(name, value.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, quantisation), raw_dtype=quantisation)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    arch = config.model_type.replace("_", "")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
    } | (
        {}
        if arch != "qwen3moe"
        else {
            f"{arch}.expert_count": config.num_experts,
            f"{arch}.expert_used_count": config.num_experts_per_tok,
            f"{arch}.expert_feed_forward_length": config.moe_intermediate_size,
        }
    )


def _stacked_experts(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A layer's experts in one tensor, their number gone from the name."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        found.setdefault(re.sub(r"\.experts\.\d+", ".experts", name), []).append(tensor)
    return {name: torch.stack(ones) if ".experts." in name else ones[0] for name, ones in found.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
