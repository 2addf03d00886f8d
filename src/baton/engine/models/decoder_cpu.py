"""The decoder in C kernels, for bf16 on CPUs with AVX512-BF16: a whole step is one call.

Same model as `decoder`, same parameters, other arithmetic: the residual stream is fp32, and each token's result depends on its
own sequence only, bit for bit (csrc/common.h). Not here: the stages themselves (csrc/decoder.c).
"""

import ctypes
from collections.abc import Iterable
from ctypes import byref

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch
from baton.engine.kernels.native import (
    LayerStruct,
    LinearStruct,
    ModelStruct,
    NativeBatch,
    PackedLinear,
    aligned_empty,
    kv_pool_struct,
)
from baton.engine.models.decoder import HiddenStates
from baton.engine.models.parameters import iter_parameters
from baton.engine.models.rotary import rotary_table
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.models.spec import ModelConfig

_CPU = torch.device("cpu")
_LINEARS = ("qkv", "out", "gate_up", "down")


class CpuDecoder:
    """`kv`: [pages, L, 2, K, S, D] bf16, contiguous. Raises `ModelError` for wrong weights."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        kernels: ctypes.CDLL,
        kv: torch.Tensor,
        num_positions: int,
        num_threads: int,
        shard: Shard,
    ) -> None:
        self._config, self._shard, self._kernels, self._num_threads = config, shard, kernels, num_threads
        self._kv = kv
        self._pool = kv_pool_struct(kv)
        self._linears: dict[str, PackedLinear] = {}
        self._vectors: dict[str, torch.Tensor] = {"rotary": rotary_table(config, num_positions, _CPU)}
        self._load(weights)
        self._model = self._build_model()
        self._scratch = aligned_empty(0, torch.uint8)
        self._logits = torch.empty(0, config.vocab_size)

    def forward(self, batch: ForwardBatch) -> HiddenStates:
        native = NativeBatch(batch)
        model, batch_ref = byref(self._model), byref(native.struct)
        size = self._kernels.bt_decoder_scratch_bytes(model, batch_ref, self._num_threads)
        if size > len(self._scratch):
            self._scratch = aligned_empty(size + size // 4, torch.uint8)
        halves = 2 * self._config.num_layers
        step = halves if self._shard.size == 1 else 1
        for half in range(0, halves, step):
            self._kernels.bt_decoder_run(
                model, batch_ref, byref(self._pool), self._scratch.data_ptr(), half, half + step, self._num_threads
            )
            if self._shard.size > 1:
                self._reduce_delta(len(batch.token_ids))
        return _CpuHidden(self, native)

    def head(self, native: NativeBatch, rows: NDArray[np.int64]) -> torch.Tensor:
        """[R, V] float32, overwritten by the next call."""
        if len(rows) > len(self._logits):
            self._logits = torch.empty(len(rows), self._config.vocab_size)
        logits = self._logits[: len(rows)]
        self._kernels.bt_decoder_head(
            *(byref(self._model), byref(native.struct), self._scratch.data_ptr(), rows.ctypes.data, len(rows)),
            *(logits.data_ptr(), self._config.vocab_size, self._num_threads),
        )
        return logits

    def _reduce_delta(self, num_tokens: int) -> None:
        count = num_tokens * self._config.hidden_size
        delta = self._scratch[: 2 * count].view(torch.bfloat16)
        delta.copy_(self._shard.all_reduce(delta))

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        biases: dict[str, torch.Tensor] = {}
        for name, tensor in iter_parameters(self._config, self._shard, weights, dtype=torch.bfloat16, device=_CPU):
            module, _, kind = name.rpartition(".")
            if kind == "weight":
                self._linears[module] = PackedLinear(self._kernels, tensor, paired=module.endswith("gate_up"))
            elif kind == "bias":
                biases[module] = tensor
            elif name == "embedding":
                self._vectors[name] = tensor
                if self._config.tie_word_embeddings:
                    self._linears["head"] = PackedLinear(self._kernels, tensor)
            else:
                self._vectors[name] = tensor.float()
        for module, bias in biases.items():
            self._linears[module].set_bias(bias)

    def _build_model(self) -> ModelStruct:
        config, sizes = self._config, local_sizes(self._config, self._shard)
        layers = (LayerStruct * config.num_layers)()
        for index in range(config.num_layers):
            layers[index] = self._build_layer(f"layers.{index}.")
        return ModelStruct(
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=sizes.intermediate_size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            embedding=self._address("embedding"),
            rotary=self._address("rotary"),
            final_norm=self._address("final_norm"),
            head=self._linears["head"].struct,
            layers=layers,
        )

    def _build_layer(self, prefix: str) -> LayerStruct:
        linears: dict[str, LinearStruct] = {name: self._linears[prefix + name].struct for name in _LINEARS}
        norms = {name: self._address(prefix + name) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")}
        return LayerStruct(**linears, **norms)

    def _address(self, name: str) -> int | None:
        vector = self._vectors.get(name)
        return None if vector is None else vector.data_ptr()


class _CpuHidden:
    def __init__(self, decoder: CpuDecoder, native: NativeBatch) -> None:
        self._decoder = decoder
        self._native = native

    def logits(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return self._decoder.head(self._native, np.ascontiguousarray(rows, np.int64))
