"""From a checkpoint's tensors to the decoder's parameters: fused, cut to this rank, checked.

Fusing: q, k and v become `qkv`, gate and up become `gate_up`, so that each is one product. `iter_parameters` gives every
parameter as soon as its last part came, so that it can be packed and let go before the next one. Not here: files
(weights/), the layout that a kernel wants (decoder_cpu).

Over several ranks q, k, v, gate, up and the head are cut by output rows and the embedding by columns. The output products
(o, down) have two ways, `Cut`: by "inputs", which leaves one sum over the ranks for each half layer and is what most engines do;
or by "outputs", where ranks exchange activations instead and every sum is formed on one rank, in the order of one rank.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from baton.engine.errors import ModelError
from baton.engine.models.shard import LocalSizes, Shard, local_sizes
from baton.engine.models.spec import ExpertsConfig, ModelConfig
from baton.engine.weights.names import expected_tensors, expert_modules, is_ignorable

Cut = Literal["inputs", "outputs"]


@dataclass(frozen=True, slots=True)
class Part:
    """Where one checkpoint tensor goes: `source[rows, columns]` to rows from `offset` on of parameter `parameter`."""

    parameter: str
    rows: slice
    columns: slice | None
    """None for vectors and for whole rows."""
    offset: int
    fill_zero: bool = False
    """The values belong to another rank (a bias that must be added once)."""


@dataclass(slots=True)
class _Pending:
    tensor: torch.Tensor
    missing_parts: int


def plan_parts(config: ModelConfig, shard: Shard, cut: Cut) -> dict[str, tuple[Part, ...]]:
    """HF name -> where it goes. Parameters are named "layers.3.qkv.weight", "embedding", "final_norm", "head.weight".

    Tensors that go nowhere are those of other stages and other ranks' experts. One rank has no "head.weight" of its own
    where the head is the embedding.
    """
    sizes = local_sizes(config, shard)
    parts = _end_parts(config, shard) if shard.has_head else {}
    for layer in sizes.layers:
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        experts = config.experts_of(layer)
        found = _layer_parts(config, shard, sizes, cut, source, target, is_dense=experts is None)
        parts.update({name: (part,) for name, part in found.items()})
        if experts is not None:
            parts.update(_expert_parts(config, experts, shard, sizes, cut, source, target))
    return parts


def _end_parts(config: ModelConfig, shard: Shard) -> dict[str, tuple[Part, ...]]:
    embedding = Part("embedding", slice(None), slice(*shard.span(config.hidden_size)), 0)
    head = Part("head.weight", slice(*shard.span(config.vocab_size)), None, 0)
    is_shared = config.tie_word_embeddings
    parts: dict[str, tuple[Part, ...]] = {
        "model.embed_tokens.weight": (embedding, head) if is_shared and shard.size > 1 else (embedding,),
        "model.norm.weight": (_whole("final_norm"),),
    }
    if not is_shared:
        parts["lm_head.weight"] = (head,)
    return parts


def own_tensors(config: ModelConfig, shard: Shard) -> frozenset[str]:
    """HF names of what `iter_parameters` needs of a checkpoint; it passes over the others."""
    return frozenset(plan_parts(config, shard, "inputs"))


def iter_parameters(
    config: ModelConfig,
    shard: Shard,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    cut: Cut,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, tensor) in the order in which they become complete.

    Raises `ModelError` naming the tensor that is unknown, given twice, of a wrong shape, or missing at the end.
    """
    parts, shapes = plan_parts(config, shard, cut), expected_tensors(config)
    sizes = _parameter_sizes(parts, shapes)
    pending: dict[str, _Pending] = {}
    seen: set[str] = set()
    for name, tensor in weights:
        if name not in shapes and is_ignorable(name, config):
            continue
        if name not in shapes or name in seen:
            problem = "was given twice" if name in shapes else f"is not part of a {config.architecture}"
            raise ModelError(f"tensor {name} {problem}.")
        if tuple(tensor.shape) != shapes[name]:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)}, the config implies {list(shapes[name])}.")
        seen.add(name)
        for part in parts.pop(name, ()):
            entry = pending.get(part.parameter)
            if entry is None:
                shape, count = sizes[part.parameter]
                entry = pending[part.parameter] = _Pending(torch.empty(shape, dtype=dtype, device=device), count)
            _copy(part, tensor, entry.tensor)
            entry.missing_parts -= 1
            if entry.missing_parts == 0:
                del pending[part.parameter]
                yield part.parameter, entry.tensor
    if parts:
        more = f" (and {len(parts) - 1} more)" if len(parts) > 1 else ""
        raise ModelError(f"missing tensor {next(iter(parts))}{more}.")


def _copy(part: Part, source: torch.Tensor, target: torch.Tensor) -> None:
    cut = source[part.rows] if part.columns is None else source[part.rows, part.columns]
    rows = target[part.offset : part.offset + len(cut)]
    if part.fill_zero:
        rows.zero_()
    else:
        rows.copy_(cut)


def _parameter_sizes(
    parts: dict[str, tuple[Part, ...]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """parameter -> (shape, number of parts)."""
    sizes: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, targets in parts.items():
        source = shapes[name]
        for part in targets:
            rows = len(range(source[0])[part.rows])
            rest = source[1:] if part.columns is None else (len(range(source[1])[part.columns]),)
            shape, count = sizes.get(part.parameter, ((0, *rest), 0))
            sizes[part.parameter] = ((shape[0] + rows, *rest), count + 1)
    return sizes


def _whole(parameter: str) -> Part:
    return Part(parameter, slice(None), None, 0)


def _layer_parts(
    config: ModelConfig, shard: Shard, sizes: LocalSizes, cut: Cut, source: str, target: str, *, is_dense: bool
) -> dict[str, Part]:
    """Attention and norms; the feed-forward part where it `is_dense`."""
    dim = config.head_dim
    kv_rows = slice(sizes.kv_heads[0] * dim, sizes.kv_heads[1] * dim)
    q_rows = slice(sizes.heads[0] * dim, sizes.heads[1] * dim)
    q_count, kv_count = q_rows.stop - q_rows.start, kv_rows.stop - kv_rows.start
    inner = slice(*sizes.inner)
    columns = {  # HF module -> (fused parameter, rows of this rank, offset in the fused one, has a bias)
        "self_attn.q_proj": ("qkv", q_rows, 0, config.attention_bias),
        "self_attn.k_proj": ("qkv", kv_rows, q_count, config.attention_bias),
        "self_attn.v_proj": ("qkv", kv_rows, q_count + kv_count, config.attention_bias),
    }
    if is_dense:
        columns["mlp.gate_proj"] = ("gate_up", inner, 0, config.mlp_bias)
        columns["mlp.up_proj"] = ("gate_up", inner, inner.stop - inner.start, config.mlp_bias)
    parts: dict[str, Part] = {}
    for module, (name, rows, offset, has_bias) in columns.items():
        parts[f"{source}{module}.weight"] = Part(f"{target}{name}.weight", rows, None, offset)
        if has_bias:
            parts[f"{source}{module}.bias"] = Part(f"{target}{name}.bias", rows, None, offset)
    own_hidden = slice(*shard.span(config.hidden_size))
    outputs = [("self_attn.o_proj", "out", q_rows, config.attention_out_bias)]
    if is_dense:
        outputs.append(("mlp.down_proj", "down", inner, config.mlp_bias))
    for module, name, inputs, has_bias in outputs:
        rows, columns_in = (slice(None), inputs) if cut == "inputs" else (own_hidden, None)
        parts[f"{source}{module}.weight"] = Part(f"{target}{name}.weight", rows, columns_in, 0)
        if has_bias:
            is_anothers = cut == "inputs" and shard.rank != 0
            parts[f"{source}{module}.bias"] = Part(f"{target}{name}.bias", rows, None, 0, is_anothers)
    parts[f"{source}input_layernorm.weight"] = _whole(f"{target}attention_norm")
    parts[f"{source}post_attention_layernorm.weight"] = _whole(f"{target}mlp_norm")
    if config.qk_norm:
        parts[f"{source}self_attn.q_norm.weight"] = _whole(f"{target}q_norm")
        parts[f"{source}self_attn.k_norm.weight"] = _whole(f"{target}k_norm")
    return parts


def _expert_parts(
    config: ModelConfig,
    experts: ExpertsConfig,
    shard: Shard,
    sizes: LocalSizes,
    cut: Cut,
    source: str,
    target: str,
) -> dict[str, tuple[Part, ...]]:
    """The router, whole, and this rank's experts, one below the other: "experts.gate_up.weight" [experts * 2 columns, E] and
    "experts.down.weight" [experts * E or own columns of E, inputs]."""
    parts: dict[str, tuple[Part, ...]] = {f"{source}mlp.gate.weight": (_whole(f"{target}router.weight"),)}
    inner, own_hidden = slice(*sizes.expert_inner), slice(*shard.span(config.hidden_size))
    width = inner.stop - inner.start
    down_rows, inputs = (slice(None), inner) if cut == "inputs" else (own_hidden, None)
    if cut == "outputs" and shard.ep_size > 1:
        down_rows = slice(None)  # whole experts
    down_height = len(range(config.hidden_size)[down_rows])
    for place, module in enumerate(expert_modules(experts)[slice(*sizes.experts)]):
        names = [f"{source}{module}.{name}_proj.weight" for name in ("gate", "up", "down")]
        gate_up, down = f"{target}experts.gate_up.weight", f"{target}experts.down.weight"
        parts[names[0]] = (Part(gate_up, inner, None, 2 * place * width),)
        parts[names[1]] = (Part(gate_up, inner, None, (2 * place + 1) * width),)
        parts[names[2]] = (Part(down, down_rows, inputs, place * down_height),)
    return parts
