"""The decoder of Llama, Qwen2, Qwen3 and Qwen3-MoE in torch: any dtype, any device, any attention backend, any shard.

What differs between them is data: biases, q/k norms and experts (`feed_forward`) are present or not. `decoder_cpu` is the same model in C.
Over several ranks: one sum for each half layer, and the ranks' columns of embedding and logits put side by side. A pipeline stage runs
its own layers and leaves hidden states to the next one.
Not here: sampling, which request a row is, KV page bookkeeping.

Shape letters: T tokens, R rows whose logits are wanted, E hidden size, V vocabulary, H, K, D as in attention.base.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from baton.engine.attention.base import AttentionBackend
from baton.engine.batch import ForwardBatch
from baton.engine.models.feed_forward import DenseFeedForward, ExpertFeedForward
from baton.engine.models.parameters import iter_parameters
from baton.engine.models.rotary import rotary_table
from baton.engine.models.shard import LocalSizes, Shard, local_sizes
from baton.engine.models.spec import ExpertsConfig, ModelConfig


class HiddenStates(Protocol):
    """The result of one step, valid until the next one of the same decoder."""

    def logits(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """[R, V] float32 of tokens `rows` of the batch (0..T-1, R <= T)."""

    def left(self, rows: NDArray[np.int64] | None = None) -> torch.Tensor:
        """[R, E] of `hidden_dtype`, the caller's own: what the layers so far made of tokens `rows` (None: of all)."""


class Decoder(Protocol):
    """Of one stage. What `HiddenStates.left` gives on one stage, `forward` and `head` take on another, bit for bit."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of hidden states between stages."""

    def forward(self, batch: ForwardBatch, hidden: torch.Tensor | None = None) -> HiddenStates:
        """Run the stage's layers over the batch's new tokens; writes their keys and values.

        `hidden`: [T, E] that the stage before left; None: this is the first one.
        """

    def head(self, batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        """[R, V] float32 of what the last stage left of some tokens of `batch`, [R, E]; on the first stage, R <= T."""


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    feed_forward: DenseFeedForward | ExpertFeedForward
    qkv_bias: torch.Tensor | None
    out_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class TorchDecoder:
    """Weights on one device, loaded when constructed."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        attention: AttentionBackend,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard,
    ) -> None:
        """`num_positions`: the longest sequence, in tokens. Raises `ModelError` for wrong weights."""
        self._config, self._shard, self._attention, self._device = config, shard, attention, device
        self._sizes = local_sizes(config, shard)
        self.hidden_size, self.hidden_dtype = config.hidden_size, dtype
        tensors = dict(iter_parameters(config, shard, weights, dtype=dtype, device=device, cut="inputs"))
        if shard.has_head:
            self._embedding = tensors["embedding"]
            self._final_norm = tensors["final_norm"]
            self._head = tensors.get("head.weight", self._embedding)
        self._layers = [_layer(config, self._sizes, tensors, index) for index in self._sizes.layers]
        self._rotary = rotary_table(config, num_positions, device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, hidden: torch.Tensor | None = None) -> HiddenStates:
        self._attention.plan(batch)
        rotary = self._rotary[torch.from_numpy(batch.positions).to(self._device)]
        if hidden is None:
            token_ids = torch.from_numpy(batch.token_ids).to(self._device)
            hidden = self._whole_rows(F.embedding(token_ids, self._embedding), self._config.hidden_size)
        for index, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.attention_norm, self._config.rms_norm_eps)
            hidden = hidden + self._shard.all_reduce(self._attend(index, layer, normed, rotary))
            normed = rms_norm(hidden, layer.mlp_norm, self._config.rms_norm_eps)
            hidden = hidden + self._shard.all_reduce(layer.feed_forward(normed))
        return _TorchHidden(self, hidden)

    def _attend(self, index: int, layer: _Layer, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        sizes, dim = self._sizes, self._config.head_dim
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, dim)
        q, k, v = torch.split(qkv, [sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, self._config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, self._config.rms_norm_eps)
        self._attention.write_kv(index, rotate(k, rotary), v)
        attended = self._attention.forward(index, rotate(q, rotary))
        return F.linear(attended.reshape(len(x), -1), layer.out, layer.out_bias)

    def head(self, batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] before the final norm -> [R, V] float32."""
        logits = F.linear(rms_norm(hidden, self._final_norm, self._config.rms_norm_eps), self._head).float()
        return self._whole_rows(logits, self._config.vocab_size)

    def _whole_rows(self, own: torch.Tensor, width: int) -> torch.Tensor:
        """[rows, this rank's columns] -> [rows, width] of all ranks."""
        if self._shard.size == 1:
            return own
        first, last = self._shard.span(width)
        rows = own.new_empty(len(own), width)
        rows[:, first:last] = own
        self._shard.gather_columns(rows, self._shard.borders(width))
        return rows


class _TorchHidden:
    def __init__(self, decoder: TorchDecoder, hidden: torch.Tensor) -> None:
        self._decoder = decoder
        self._hidden = hidden

    def logits(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return self._decoder.logits(self.left(rows))

    @torch.inference_mode()
    def left(self, rows: NDArray[np.int64] | None = None) -> torch.Tensor:
        return self._hidden if rows is None else self._hidden[torch.from_numpy(rows).to(self._hidden.device)]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, in fp32; x's dtype comes back."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], rotary [T, D] (cosines, sines) -> [T, heads, D] in x's dtype; computed in fp32."""
    cosine, sine = rotary[:, None, :].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def _layer(config: ModelConfig, sizes: LocalSizes, tensors: dict[str, torch.Tensor], index: int) -> _Layer:
    prefix = f"layers.{index}."
    return _Layer(
        attention_norm=tensors[f"{prefix}attention_norm"],
        mlp_norm=tensors[f"{prefix}mlp_norm"],
        qkv=tensors[f"{prefix}qkv.weight"],
        out=tensors[f"{prefix}out.weight"],
        feed_forward=_feed_forward(config.experts_of(index), sizes, tensors, prefix),
        qkv_bias=tensors.get(f"{prefix}qkv.bias"),
        out_bias=tensors.get(f"{prefix}out.bias"),
        q_norm=tensors.get(f"{prefix}q_norm"),
        k_norm=tensors.get(f"{prefix}k_norm"),
    )


def _feed_forward(
    experts: ExpertsConfig | None, sizes: LocalSizes, tensors: dict[str, torch.Tensor], prefix: str
) -> DenseFeedForward | ExpertFeedForward:
    if experts is not None:
        names = ("router.weight", "experts.gate_up.weight", "experts.down.weight")
        return ExpertFeedForward(experts, sizes, *(tensors[prefix + name] for name in names))
    return DenseFeedForward(
        tensors[f"{prefix}gate_up.weight"],
        tensors[f"{prefix}down.weight"],
        tensors.get(f"{prefix}gate_up.bias"),
        tensors.get(f"{prefix}down.bias"),
    )
