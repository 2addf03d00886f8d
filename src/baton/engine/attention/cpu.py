"""Attention by the C kernels: bf16, pages read in place, and each row's bits independent of the batch.

The decoder of `models.decoder_cpu` runs the same kernel inside its own step; this class is the kernel behind the
common interface. Not here: the arithmetic (kernels/csrc/attention.h).
"""

import ctypes
from ctypes import byref

import torch

from baton.engine.batch import ForwardBatch
from baton.engine.kernels.native import MAX_HEAD_DIM, NativeBatch, aligned_empty, kv_pool_struct


class CpuAttention:
    """`kv`: [pages, L, 2, K, S, D] bf16, contiguous, on the CPU. See `supports`."""

    name = "cpu"

    def __init__(self, kernels: ctypes.CDLL, kv: torch.Tensor, num_threads: int) -> None:
        self._kernels = kernels
        self._kv = kv  # keeps the memory that the structure points into
        self._pool = kv_pool_struct(kv)
        self._num_threads = num_threads
        self._scratch = aligned_empty(0, torch.uint8)

    @staticmethod
    def supports(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
        return dtype == torch.bfloat16 and device.type == "cpu" and head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM

    def plan(self, batch: ForwardBatch) -> None:
        self._batch = NativeBatch(batch)

    def write_kv(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        k, v = _rows_contiguous(k), _rows_contiguous(v)
        self._kernels.bt_write_kv(
            byref(self._batch.struct), byref(self._pool), layer, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)
        )

    def forward(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        q = _rows_contiguous(q)
        heads, head_dim = q.shape[1:]
        batch, pool = byref(self._batch.struct), byref(self._pool)
        size = self._kernels.bt_attention_scratch_bytes(batch, pool, heads, self._num_threads)
        if size > len(self._scratch):
            self._scratch = aligned_empty(size, torch.uint8)
        out = torch.empty(q.shape, dtype=q.dtype)
        self._kernels.bt_attention(
            *(batch, pool, heads, layer, head_dim**-0.5, q.data_ptr(), q.stride(0)),
            *(out.data_ptr(), out.stride(0), self._scratch.data_ptr(), self._num_threads),
        )
        return out


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, D] whose heads lie side by side; rows may be apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
