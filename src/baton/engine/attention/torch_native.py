"""Attention in plain torch, for any dtype and device: the reference that other backends are compared with.

Sequences with one new token go together, padded to the longest; a longer query goes alone, in blocks of rows, since
two matrix products with a softmax between them are several times faster on CPUs than the fused SDPA. The result of a row may depend
on the batch in its last bits (padding, block shapes): `cpu` is the backend whose rows never do.
"""

import math

import torch

from baton.engine.batch import ForwardBatch

QUERY_BLOCK = 256


class TorchAttention:
    """Reads pages through a gathered copy of each sequence's keys and values."""

    name = "torch_native"

    def __init__(self, kv: torch.Tensor) -> None:
        """`kv`: [pages, L, 2, K, S, D]."""
        self._kv = kv
        self._page_size = kv.shape[4]

    def plan(self, batch: ForwardBatch) -> None:
        device = self._kv.device
        self._query_lens = batch.query_lens.tolist()
        self._context_lens = batch.context_lens.tolist()
        self._tables = torch.from_numpy(batch.page_tables).long().to(device)
        positions = torch.from_numpy(batch.positions).to(device)
        lens = torch.from_numpy(batch.query_lens).long().to(device)
        seqs = torch.repeat_interleave(torch.arange(len(self._query_lens), device=device), lens)
        self._pages = self._tables[seqs, positions // self._page_size]
        self._slots = positions % self._page_size
        starts = (torch.cumsum(lens, 0) - lens).tolist()
        self._prefills = [(seq, start) for seq, start in enumerate(starts) if self._query_lens[seq] > 1]
        decodes = [(seq, start) for seq, start in enumerate(starts) if self._query_lens[seq] == 1]
        self._decode_seqs = torch.tensor([seq for seq, _ in decodes], dtype=torch.long, device=device)
        self._decode_rows = torch.tensor([start for _, start in decodes], dtype=torch.long, device=device)

    def write_kv(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._kv[self._pages, layer, 0, :, self._slots] = k
        self._kv[self._pages, layer, 1, :, self._slots] = v

    def forward(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        if len(self._decode_seqs):
            out[self._decode_rows] = self._decode(layer, q[self._decode_rows])
        for seq, start in self._prefills:
            rows = slice(start, start + self._query_lens[seq])
            out[rows] = self._prefill(layer, q[rows], seq)
        return out

    def _decode(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [n, H, D], one row for each of the decoding sequences."""
        seqs = self._decode_seqs.tolist()
        lens = torch.tensor([self._context_lens[seq] for seq in seqs], device=q.device)
        num_pages = math.ceil(max(self._context_lens[seq] for seq in seqs) / self._page_size)
        k, v = self._gather(layer, self._tables[self._decode_seqs, :num_pages])
        hidden = torch.arange(k.shape[2], device=q.device)[None, :] >= lens[:, None]
        # An unused slot may hold anything: a NaN times a weight of zero would still be a NaN.
        v = v.masked_fill(hidden[:, None, :, None], 0.0)
        grouped = q.view(len(seqs), k.shape[1], -1, q.shape[2])
        return _attend(grouped, k, v, hidden[:, None, None, :]).reshape(q.shape)

    def _prefill(self, layer: int, q: torch.Tensor, seq: int) -> torch.Tensor:
        """q [n, H, D], the new tokens of one sequence."""
        length, context = len(q), self._context_lens[seq]
        num_pages = math.ceil(context / self._page_size)
        k, v = self._gather(layer, self._tables[seq : seq + 1, :num_pages])
        kv_heads = k.shape[1]
        out = torch.empty_like(q)
        for first in range(0, length, QUERY_BLOCK):
            block = q[first : first + QUERY_BLOCK]
            rows, start = len(block), context - length + first
            visible = start + rows
            keys = torch.arange(visible, device=q.device)
            hidden = keys[None, :] > (start + torch.arange(rows, device=q.device))[:, None]
            grouped = block.view(rows, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)  # [K, G, rows, D]
            group = grouped.shape[1]
            flat = grouped.reshape(1, kv_heads, group * rows, q.shape[2])
            done = _attend(flat, k[:, :, :visible], v[:, :, :visible], hidden.repeat(group, 1))
            out[first : first + rows] = done.view(kv_heads, group, rows, -1).permute(2, 0, 1, 3).reshape(block.shape)
        return out

    def _gather(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tables [n, pages] -> keys, values [n, K, pages * S, D]."""
        n, num_pages = tables.shape
        both = self._kv[tables, layer]  # [n, pages, 2, K, S, D]
        both = both.permute(2, 0, 3, 1, 4, 5).reshape(2, n, both.shape[3], num_pages * self._page_size, -1)
        return both[0], both[1]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """q [n, K, rows, D], k and v [n, K, keys, D], hidden [.., rows or 1, keys] -> [n, K, rows, D]; softmax in fp32."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    return torch.matmul(weights.to(v.dtype), v)
