"""The decoder in C kernels, for bf16 on CPUs with AVX512-BF16: a whole step is one call.

Same model as `decoder`, same parameters, other arithmetic: the residual stream is fp32, and each token's result depends on its
own sequence only, bit for bit (csrc/common.h). Over several ranks no sum is cut, so they give the bits of one rank: each computes
some columns of every product, and all see the whole of what goes into the next one. Where the ranks share memory they write it
there and only meet, within the one call; elsewhere the step runs part by part and a collective fills in the others' columns.
Between pipeline stages the residual stream travels as it is, in fp32, with the last `delta` added: the bits of one stage again.
Not here: the stages themselves (csrc/decoder.c).
"""

import ctypes
from collections.abc import Iterable
from ctypes import byref
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch
from baton.engine.kernels.native import (
    ALIGNMENT_BYTES,
    ExpertLayerStruct,
    ExpertsStruct,
    FirstColumnsStruct,
    LayerStruct,
    LinearStruct,
    ModelStruct,
    NativeBatch,
    PackedLinear,
    SharedStruct,
    aligned_empty,
    kv_pool_struct,
)
from baton.engine.models.decoder import HiddenStates
from baton.engine.models.parameters import iter_parameters
from baton.engine.models.rotary import rotary_table
from baton.engine.models.shard import Shard, head_borders, local_sizes
from baton.engine.models.spec import ModelConfig

_CPU = torch.device("cpu")


class CpuDecoder:
    """`kv`: [pages, L, 2, K, S, D] bf16; this rank's layers and heads of a contiguous pool. Raises `ModelError` for wrong weights."""

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
        self._sizes = local_sizes(config, shard)
        self.hidden_size, self.hidden_dtype = config.hidden_size, torch.float32
        self._kv = kv
        self._pool = kv_pool_struct(kv)
        self._linears: dict[str, PackedLinear] = {}
        self._experts: dict[str, list[PackedLinear]] = {}
        self._arrays: list[ctypes.Array[LinearStruct]] = []  # what the model's structures point to
        self._vectors: dict[str, torch.Tensor] = {"rotary": rotary_table(config, num_positions, _CPU)}
        self._load(weights)
        self._model = self._build_model()
        self._exchange = None if shard.exchange is None else byref(shard.exchange.struct)
        self._scratch = aligned_empty(0, torch.uint8)
        self._memory = aligned_empty(0, torch.uint8) if shard.exchange is None else shard.exchange.memory

    def forward(self, batch: ForwardBatch, hidden: torch.Tensor | None = None) -> HiddenStates:
        native = NativeBatch(batch)
        model, batch_ref = byref(self._model), byref(native.struct)
        size = self._kernels.bt_decoder_scratch_bytes(model, batch_ref, self._num_threads)
        if size > len(self._scratch):
            self._scratch = aligned_empty(size + size // 4, torch.uint8)
        shared = self._share(len(batch.token_ids))
        if hidden is not None:
            self._enter(shared, hidden)
        # Part 0 is the embedding.
        first_part, end = int(hidden is not None), 1 + 4 * len(self._sizes.layers)
        in_one = self._shard.size == 1 or self._exchange is not None
        for first, last in [(first_part, end)] if in_one else pairwise(range(first_part, end + 1)):
            self._kernels.bt_decoder_run(
                *(model, batch_ref, byref(self._pool), byref(shared.struct), self._scratch.data_ptr()),
                *(first, last, self._exchange, self._num_threads),
            )
            if not in_one:
                self._gather(native, shared, first)
        return _CpuHidden(self, native, shared)

    def head(self, batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        shared = self._share(len(batch.token_ids))
        self._enter(shared, hidden)
        return self.logits(NativeBatch(batch), shared, np.arange(len(hidden)))

    def logits(self, native: NativeBatch, shared: "_Shared", rows: NDArray[np.int64]) -> torch.Tensor:
        """[R, V] float32, overwritten by the next call."""
        vocab = self._config.vocab_size
        logits = self._take([(len(rows), vocab)], torch.float32, shared.end)[0]
        self._kernels.bt_decoder_head(
            *(byref(self._model), byref(native.struct), byref(shared.struct), self._scratch.data_ptr()),
            *(rows.ctypes.data, len(rows), logits.data_ptr(), vocab, self._exchange, self._num_threads),
        )
        if self._exchange is None:
            self._shard.gather_columns(logits, self._shard.borders(vocab))
        return logits

    def leave(self, shared: "_Shared", rows: NDArray[np.int64] | None) -> torch.Tensor:
        """[R, E] float32: the residual of the step that last ran, after all its parts."""
        residual, delta = self._residual(len(shared.delta)), shared.delta
        if rows is not None:
            picked = torch.from_numpy(rows)
            residual, delta = residual[picked], delta[picked]
        left = residual + delta
        if self._exchange is not None:
            # No rank may write the next `delta` before all have read this one.
            self._kernels.bt_exchange_meet(self._exchange)
        return left

    def _enter(self, shared: "_Shared", hidden: torch.Tensor) -> None:
        """Go on where another stage left, in the first rows of the scratch."""
        self._residual(len(hidden)).copy_(hidden)
        shared.delta[: len(hidden)].fill_(-0.0)  # added to any number, -0.0 too, it changes nothing

    def _residual(self, num_rows: int) -> torch.Tensor:
        """[rows, E]: the scratch of every step begins with it (csrc/decoder.c)."""
        width = self._config.hidden_size
        return self._scratch[: num_rows * width * 4].view(torch.float32).view(num_rows, width)

    def _share(self, num_tokens: int) -> "_Shared":
        """The tensors of a step that all ranks see whole."""
        config = self._config
        activated = config.intermediate_size
        if config.experts is not None:
            of_pair = config.hidden_size if self._shard.ep_size > 1 else config.experts.intermediate_size
            activated = max(activated, of_pair * config.experts.num_experts_per_token)
        widths = (config.hidden_size, config.num_heads * config.head_dim, activated)
        tensors = self._take([(num_tokens, width) for width in widths], torch.bfloat16, 0)
        return _Shared(*tensors)

    def _take(self, shapes: list[tuple[int, int]], dtype: torch.dtype, start: int) -> list[torch.Tensor]:
        """Tensors side by side in the shared memory, from byte `start` on; private memory grows as needed."""
        starts = list(accumulate((_padded(m * n * dtype.itemsize) for m, n in shapes), initial=start))
        if starts[-1] > len(self._memory):
            if self._exchange is not None:
                raise MemoryError(
                    f"a step needs {starts[-1]} bytes of shared memory, the ranks have {len(self._memory)}"
                )
            self._memory = aligned_empty(starts[-1] + starts[-1] // 4, torch.uint8)  # whoever uses the old keeps it
        return [
            self._memory[first : first + m * n * dtype.itemsize].view(dtype).view(m, n)
            for first, (m, n) in zip(starts, shapes, strict=False)
        ]

    def _gather(self, native: NativeBatch, shared: "_Shared", part: int) -> None:
        """Fill in what the other ranks computed in a part."""
        config, shard = self._config, self._shard
        if part % 4 == 1:
            shard.gather_columns(shared.attended, [h * config.head_dim for h in head_borders(config, shard.size)])
        elif part % 4 == 3 and config.experts_of(self._sizes.layers[part // 4]) is not None:
            self._gather_pairs(native, shared)
        elif part % 4 == 3:
            inner = config.intermediate_size
            shard.gather_columns(shared.rows_of_activated(len(shared.delta), inner), shard.borders(inner))
        else:
            shard.gather_columns(shared.delta, shard.borders(config.hidden_size))

    def _gather_pairs(self, native: NativeBatch, shared: "_Shared") -> None:
        """Fill in what the other ranks computed of pairs of token and expert (kernels/csrc/experts.h)."""
        experts, shard = self._config.experts, self._shard
        assert experts is not None
        num_pairs = len(shared.delta) * experts.num_experts_per_token
        if shard.ep_size == 1:
            inner = experts.intermediate_size
            shard.gather_columns(shared.rows_of_activated(num_pairs, inner), shard.borders(inner))
            return
        address = self._kernels.bt_decoder_expert_borders(
            byref(self._model), byref(native.struct), self._scratch.data_ptr(), self._num_threads
        )
        first_rows = (ctypes.c_int32 * (experts.num_experts + 1)).from_address(address)
        rows = shared.rows_of_activated(num_pairs, self._config.hidden_size)
        shard.gather_columns(rows.T, [first_rows[expert] for expert in shard.borders(experts.num_experts)])

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        biases: dict[str, torch.Tensor] = {}
        parameters = iter_parameters(
            self._config, self._shard, weights, dtype=torch.bfloat16, device=_CPU, cut="outputs"
        )
        for name, tensor in parameters:
            module, _, kind = name.rpartition(".")
            if ".experts." in module:
                own = tensor.chunk(self._sizes.experts[1] - self._sizes.experts[0])
                paired = module.endswith("gate_up")
                self._experts[module] = [PackedLinear(self._kernels, one, paired=paired) for one in own]
            elif kind == "weight":
                self._linears[module] = PackedLinear(self._kernels, tensor, paired=module.endswith("gate_up"))
            elif kind == "bias":
                biases[module] = tensor
            elif name == "embedding":
                self._vectors[name] = tensor
                if self._config.tie_word_embeddings and self._shard.size == 1:
                    self._linears["head"] = PackedLinear(self._kernels, tensor)
            else:
                self._vectors[name] = tensor.float()
        for module, bias in biases.items():
            self._linears[module].set_bias(bias)

    def _build_model(self) -> ModelStruct:
        config, sizes, shard = self._config, self._sizes, self._shard
        layers = (LayerStruct * len(sizes.layers))(*map(self._build_layer, sizes.layers))
        return ModelStruct(
            num_layers=len(sizes.layers),
            hidden=config.hidden_size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=config.head_dim,
            embedding_columns=self._vectors["embedding"].shape[1] if shard.has_head else 0,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            embedding=self._address("embedding"),
            rotary=self._address("rotary"),
            final_norm=self._address("final_norm"),
            head=self._linears["head"].struct if shard.has_head else LinearStruct(),
            layers=layers,
            first=FirstColumnsStruct(
                delta=shard.span(config.hidden_size)[0],
                attended=sizes.heads[0] * config.head_dim,
                activated=sizes.inner[0],
                expert_inner=sizes.expert_inner[0],
                logits=shard.span(config.vocab_size)[0],
            ),
            experts=self._build_experts(),
        )

    def _build_experts(self) -> ExpertsStruct:
        experts, sizes = self._config.experts, self._sizes
        if experts is None:
            return ExpertsStruct()
        return ExpertsStruct(
            num_experts=experts.num_experts,
            per_token=experts.num_experts_per_token,
            inner=experts.intermediate_size,
            first=sizes.experts[0],
            last=sizes.experts[1],
            normalises=experts.normalises_weights,
            is_dealt=self._shard.ep_size > 1,
        )

    def _build_layer(self, index: int) -> LayerStruct:
        prefix = f"layers.{index}."
        if self._config.experts_of(index) is None:
            names, experts = ["qkv", "out", "gate_up", "down"], ExpertLayerStruct()
        else:
            names, experts = ["qkv", "out"], self._build_expert_layer(prefix)
        linears: dict[str, LinearStruct] = {name: self._linears[prefix + name].struct for name in names}
        norms = {name: self._address(prefix + name) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")}
        return LayerStruct(**linears, **norms, experts=experts)

    def _build_expert_layer(self, prefix: str) -> ExpertLayerStruct:
        arrays = []
        for name in ("gate_up", "down"):
            own = self._experts[f"{prefix}experts.{name}"]
            arrays.append((LinearStruct * len(own))(*(one.struct for one in own)))
        self._arrays += arrays
        return ExpertLayerStruct(self._linears[f"{prefix}router"].struct, *arrays)

    def _address(self, name: str) -> int | None:
        vector = self._vectors.get(name)
        return None if vector is None else vector.data_ptr()


class _Shared:
    """The tensors of one step that all ranks see whole: [T, E], [T, all H D] and [T, F] or more (see `Shared` in C), bf16."""

    def __init__(self, delta: torch.Tensor, attended: torch.Tensor, activated: torch.Tensor) -> None:
        self.delta, self.attended, self.activated = delta, attended, activated
        self.struct = SharedStruct(delta.data_ptr(), attended.data_ptr(), activated.data_ptr())
        self.end = sum(_padded(one.nbytes) for one in (delta, attended, activated))
        """Bytes of the shared memory in use."""

    def rows_of_activated(self, num_rows: int, width: int) -> torch.Tensor:
        """[num_rows, width] at the start of `activated`, which has room for the widest layer."""
        return self.activated.view(-1)[: num_rows * width].view(num_rows, width)


class _CpuHidden:
    def __init__(self, decoder: CpuDecoder, native: NativeBatch, shared: _Shared) -> None:
        self._decoder, self._native, self._shared = decoder, native, shared

    def logits(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return self._decoder.logits(self._native, self._shared, np.ascontiguousarray(rows, np.int64))

    def left(self, rows: NDArray[np.int64] | None = None) -> torch.Tensor:
        return self._decoder.leave(self._shared, rows)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
