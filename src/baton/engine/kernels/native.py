"""The C kernels as Python sees them: structures, signatures, and `load_kernels`.

Every call takes raw addresses and lets go of the GIL. Shapes and meaning are in the C headers, whose structures these
classes mirror field by field. Callers keep the memory alive. Not here: building (`build`), tensors of a model.
"""

import ctypes
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch
from baton.engine.kernels.build import KernelsUnavailableError, build_library

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
OUT_BF16, OUT_F32, OUT_SILU_MUL = 0, 1, 2
MAX_HEAD_DIM = 512


class LinearStruct(Structure):
    _fields_ = (("w", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64))


class RowsStruct(Structure):
    _fields_ = (("x", c_void_p), ("ldx", c_int64), ("y", c_void_p), ("ldy", c_int64), ("m", c_int64))


class KvPoolStruct(Structure):
    _fields_ = (
        ("base", c_void_p),
        ("page_layers", c_int64),
        ("num_kv_heads", c_int64),
        ("page_size", c_int64),
        ("head_dim", c_int64),
        ("page_heads", c_int64),
    )


class BatchStruct(Structure):
    _fields_ = (
        ("num_seqs", c_int64),
        ("num_tokens", c_int64),
        ("table_width", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("query_lens", c_void_p),
        ("context_lens", c_void_p),
        ("page_tables", c_void_p),
    )


class ExpertLayerStruct(Structure):
    _fields_ = (("router", LinearStruct), ("gate_up", POINTER(LinearStruct)), ("down", POINTER(LinearStruct)))


class ExpertsStruct(Structure):
    _fields_ = (
        ("num_experts", c_int64),
        ("per_token", c_int64),
        ("inner", c_int64),
        ("first", c_int64),
        ("last", c_int64),
        ("normalises", c_int64),
        ("is_dealt", c_int64),
    )


class LayerStruct(Structure):
    _fields_ = (
        ("qkv", LinearStruct),
        ("out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("experts", ExpertLayerStruct),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class FirstColumnsStruct(Structure):
    _fields_ = (
        ("delta", c_int64),
        ("attended", c_int64),
        ("activated", c_int64),
        ("expert_inner", c_int64),
        ("logits", c_int64),
    )


class ModelStruct(Structure):
    _fields_ = (
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("embedding_columns", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("embedding", c_void_p),
        ("rotary", c_void_p),
        ("final_norm", c_void_p),
        ("head", LinearStruct),
        ("layers", POINTER(LayerStruct)),
        ("first", FirstColumnsStruct),
        ("experts", ExpertsStruct),
    )


class SharedStruct(Structure):
    _fields_ = (("delta", c_void_p), ("attended", c_void_p), ("activated", c_void_p))


class ExchangeStruct(Structure):
    _fields_ = (("seats", c_void_p), ("rank", c_int32), ("size", c_int32), ("turn", c_uint32))


# name -> (result, arguments); structures go by reference
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bt_packed_size": (c_int64, (c_int64, c_int64, c_int32)),
    "bt_pack": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int32)),
    "bt_linear": (None, (POINTER(LinearStruct), c_int32, POINTER(RowsStruct), c_int32)),
    "bt_write_kv": (
        None,
        (POINTER(BatchStruct), POINTER(KvPoolStruct), c_int64, c_void_p, c_int64, c_void_p, c_int64),
    ),
    "bt_attention_scratch_bytes": (c_int64, (POINTER(BatchStruct), POINTER(KvPoolStruct), c_int64, c_int32)),
    "bt_attention": (
        None,
        (
            *(POINTER(BatchStruct), POINTER(KvPoolStruct), c_int64, c_int64, c_float),
            *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int32),
        ),
    ),
    "bt_decoder_scratch_bytes": (c_int64, (POINTER(ModelStruct), POINTER(BatchStruct), c_int32)),
    "bt_decoder_run": (
        None,
        (
            *(POINTER(ModelStruct), POINTER(BatchStruct), POINTER(KvPoolStruct), POINTER(SharedStruct), c_void_p),
            *(c_int64, c_int64, POINTER(ExchangeStruct), c_int32),
        ),
    ),
    "bt_decoder_head": (
        None,
        (
            *(POINTER(ModelStruct), POINTER(BatchStruct), POINTER(SharedStruct), c_void_p),
            *(c_void_p, c_int64, c_void_p, c_int64, POINTER(ExchangeStruct), c_int32),
        ),
    ),
    "bt_decoder_expert_borders": (
        c_void_p,
        (POINTER(ModelStruct), POINTER(BatchStruct), c_void_p, c_int32),
    ),
    "bt_exchange_meet": (None, (POINTER(ExchangeStruct),)),
}


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The library with its signatures set, or None (logged once, with the reason) where it cannot run."""
    try:
        library = ctypes.CDLL(str(build_library()))
    except (KernelsUnavailableError, OSError) as error:
        logger.warning(
            "CPU kernels are not available: torch computes instead, slower, and in near-ties the greedy token may "
            "depend on what a request is batched with",
            extra={"reason": str(error)},
        )
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def aligned_empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count] uninitialised CPU memory that starts at a multiple of 64 bytes."""
    size = torch.empty(0, dtype=dtype).element_size()
    memory = torch.empty(count * size + ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT_BYTES
    return memory[start : start + count * size].view(dtype)


class NativeBatch:
    """A `ForwardBatch` as the kernels take it; owns the arrays that the structure points into."""

    def __init__(self, batch: ForwardBatch) -> None:
        self.struct = BatchStruct(
            num_seqs=len(batch.query_lens),
            num_tokens=len(batch.token_ids),
            table_width=batch.page_tables.shape[1] if batch.page_tables.ndim == 2 else 0,
        )
        self._kept: list[NDArray[Any]] = []
        self.struct.token_ids = self._address(batch.token_ids, np.int64)
        self.struct.positions = self._address(batch.positions, np.int64)
        self.struct.query_lens = self._address(batch.query_lens, np.int32)
        self.struct.context_lens = self._address(batch.context_lens, np.int32)
        self.struct.page_tables = self._address(batch.page_tables, np.int32)

    def _address(self, array: NDArray[Any], dtype: type[np.generic]) -> int:
        kept = np.ascontiguousarray(array, dtype)
        self._kept.append(kept)
        return kept.ctypes.data


def kv_pool_struct(kv: torch.Tensor) -> KvPoolStruct:
    """`kv`: [pages, layers, 2, K, S, D] bf16 on the CPU; all layers and heads of a contiguous pool, or consecutive ones of them."""
    _, _, _, kv_heads, page_size, head_dim = kv.shape
    page_heads = kv.stride(2) // (page_size * head_dim)
    return KvPoolStruct(kv.data_ptr(), kv.stride(0) // kv.stride(1), kv_heads, page_size, head_dim, page_heads)


class PackedLinear:
    """A linear layer's weight in the kernels' layout. `weight`: [N, K] bf16 (paired: [2N, K], gate rows then up rows)."""

    def __init__(self, kernels: ctypes.CDLL, weight: torch.Tensor, *, paired: bool = False) -> None:
        rows, self.k = weight.shape
        self.n = rows // 2 if paired else rows
        self._packed = aligned_empty(kernels.bt_packed_size(self.n, self.k, paired), torch.bfloat16)
        self._bias: torch.Tensor | None = None
        source = weight.contiguous()
        kernels.bt_pack(source.data_ptr(), self._packed.data_ptr(), self.n, self.k, paired)

    def set_bias(self, bias: torch.Tensor) -> None:
        """`bias`: one value a row of the weight, any float dtype."""
        self._bias = bias.float().contiguous()

    @property
    def struct(self) -> LinearStruct:
        return LinearStruct(
            self._packed.data_ptr(), None if self._bias is None else self._bias.data_ptr(), self.n, self.k
        )
