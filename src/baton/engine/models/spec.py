"""What a model is: its architecture and sizes. Read by `config.load_config`, used by models, weights and runner.

No torch, no files, no flags (--dtype and --context-length are applied where the engine is put together).
"""

from dataclasses import dataclass
from typing import Literal

from baton.engine.models.rope import RopeScaling

Architecture = Literal["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]

KNOWN_ARCHITECTURES: tuple[Architecture, ...] = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The mixture of experts of a model: some layers have a router and experts where the others have one feed-forward part.

    Invariant: 1 <= num_experts_per_token <= num_experts.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    """Of one expert."""
    normalises_weights: bool
    """The weights of a token's experts are scaled to a sum of 1 (norm_topk_prob)."""
    layers: tuple[int, ...]
    """Indices of the layers that have experts, ascending."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the engine needs to know about a model except its weights.

    Invariant: num_heads % num_kv_heads == 0. `head_dim` is stated, never hidden_size / num_heads by assumption.
    """

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    """None: plain rotary embedding."""
    max_position_embeddings: int
    """The context length in tokens that the model states."""
    tie_word_embeddings: bool
    """The head is the embedding; the weights then hold no `lm_head.weight`."""
    attention_bias: bool
    """Bias on the q, k and v projections."""
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each head of q and k before the rotary embedding (Qwen3)."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a sequence: those of the generation config first, then the model's; may be empty."""
    bos_token_id: int | None
    dtype: str
    """The checkpoint's dtype: "bfloat16", "float16" or "float32"."""
    experts: ExpertsConfig | None = None

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """None: layer `layer` has one feed-forward part."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None
