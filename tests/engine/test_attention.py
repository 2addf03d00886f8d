"""Every attention backend against the definition of attention, computed in float64 from contiguous keys and values."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query

from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.cpu import CpuAttention
from baton.engine.attention.torch_native import TorchAttention
from baton.engine.kernels.native import load_kernels

LAYERS, LAYER = 2, 1
MakeBackend = Callable[[torch.Tensor], AttentionBackend]


def make_cpu(kv: torch.Tensor) -> AttentionBackend:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C kernels on this machine")
    return CpuAttention(kernels, kv, num_threads=2)


BACKENDS: dict[str, tuple[MakeBackend, torch.dtype, float]] = {
    "torch-float32": (TorchAttention, torch.float32, 2e-5),
    "torch-bfloat16": (TorchAttention, torch.bfloat16, 2e-2),
    "torch-float16": (TorchAttention, torch.float16, 3e-3),
    "kernels": (make_cpu, torch.bfloat16, 2e-2),
}
STEPS = {
    "prefill": [[Query(0, 0, 150), Query(1, 0, 1), Query(2, 0, 37)]],
    "long decode": [[Query(0, 0, 149), Query(1, 0, 1)], [Query(0, 149, 150)]],
    "chunk beside decode": [[Query(0, 0, 130), Query(2, 0, 36)], [Query(2, 36, 37), Query(0, 130, 150)]],
}


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [T, H, D], k and v [T, K, D] of one whole sequence -> [T, H, D] in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    causal = torch.ones(len(q), len(q)).tril().bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~causal, float("-inf")).softmax(-1), v)


def check(
    make: MakeBackend,
    dtype: torch.dtype,
    tolerance: float,
    steps: list[list[Query]],
    heads: tuple[int, int, int],
    page_size: int,
) -> None:
    num_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(0)
    lengths = [150, 1, 37]
    qs, ks, vs = (
        [torch.randn(n, count, dim, generator=generator).to(dtype) for n in lengths]
        for count in (num_heads, kv_heads, kv_heads)
    )
    sequences = PagedSequences([[0] * n for n in lengths], page_size)
    kv = torch.full((sequences.num_pages, LAYERS, 2, kv_heads, page_size, dim), float("nan"), dtype=dtype)
    backend = make(kv)
    for queries in steps:
        backend.plan(sequences.batch(queries))
        q, k, v = (torch.cat([part[u.seq][u.start : u.stop] for u in queries]) for part in (qs, ks, vs))
        backend.write_kv(LAYER, k, v)
        rows = iter(backend.forward(LAYER, q).split([u.stop - u.start for u in queries]))
        for query in queries:
            expected = definition(qs[query.seq], ks[query.seq], vs[query.seq])[query.start : query.stop]
            torch.testing.assert_close(next(rows).double(), expected, rtol=tolerance, atol=tolerance)
    assert kv[:, 1 - LAYER].isnan().all()


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_and_page_sizes(backend: str, page_size: int, steps: list[list[Query]]) -> None:
    check(*BACKENDS[backend], steps, (6, 2, 64), page_size)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("backend", ["torch-float32", "kernels"])
def test_groups_and_head_sizes(backend: str, group: int, dim: int) -> None:
    check(*BACKENDS[backend], STEPS["chunk beside decode"], (2 * group, 2, dim), 16)


def test_a_long_request_is_split_without_a_trace() -> None:
    """One thread takes the blocks one after another, several threads share them: the same bits."""
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C kernels on this machine")
    sequences = PagedSequences([[0] * 3000], 16)
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(sequences.num_pages, 1, 2, 1, 16, 64, generator=generator).bfloat16()
    q = torch.randn(5, 4, 64, generator=generator).bfloat16()
    batch = sequences.batch([Query(0, 2995, 3000)])
    results = []
    for num_threads in (1, 2, 3, 7):
        backend = CpuAttention(kernels, kv, num_threads)
        backend.plan(batch)
        results.append(backend.forward(0, q))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert np.isfinite(results[0].float().numpy()).all()
