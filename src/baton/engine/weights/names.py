"""Which tensors a model has: Hugging Face names and shapes from a `ModelConfig`, and llama.cpp's names for them.

Name maps as data, no torch. Weights are (out, in) as `torch.nn.functional.linear` takes them.
"""

from baton.engine.models.spec import ExpertsConfig, ModelConfig

_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    # A layer's experts in one tensor [experts, out, in].
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor that a model of this config has, embedding first, layer after layer.

    A tied head has no entry: it is the embedding.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes.update(_layer_tensors(config, config.experts_of(layer), f"model.layers.{layer}."))
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def expert_modules(experts: ExpertsConfig) -> list[str]:
    """HF names of a layer's experts, in their order."""
    return [f"mlp.experts.{index}" for index in range(experts.num_experts)]


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors that checkpoints carry and nobody needs: rotary buffers, and the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def hf_name_of_gguf(name: str) -> str | None:
    """The HF name of a GGUF tensor, without the number where all experts of a layer are one; None for one that the models
    here do not have."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, kind = rest.rpartition(".")
    if prefix != "blk" or not layer.isdigit() or module not in _GGUF_LAYER or kind not in ("weight", "bias"):
        return None
    return f"model.layers.{layer}.{_GGUF_LAYER[module]}.{kind}"


def _layer_tensors(config: ModelConfig, experts: ExpertsConfig | None, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_size, config.attention_out_bias),
    }
    if experts is not None:
        linears["mlp.gate"] = (experts.num_experts, hidden, False)
        inner = experts.intermediate_size
    for mlp in ["mlp"] if experts is None else expert_modules(experts):
        linears[f"{mlp}.gate_proj"] = (inner, hidden, config.mlp_bias)
        linears[f"{mlp}.up_proj"] = (inner, hidden, config.mlp_bias)
        linears[f"{mlp}.down_proj"] = (hidden, inner, config.mlp_bias)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, has_bias) in linears.items():
        shapes[f"{prefix}{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{prefix}{name}.bias"] = (rows,)
    if config.qk_norm:
        shapes[f"{prefix}self_attn.q_norm.weight"] = (head_dim,)
        shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
    return shapes
