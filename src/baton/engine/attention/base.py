"""The contract of attention: one step's plan, then for each layer write the new keys and values and attend.

A step mixes prefill chunks, decode tokens and prefix hits freely; a backend sees only lengths and page tables. Every
implementation passes tests/engine/test_attention.py. Not here: projections, rotary embedding, which request a row is.

Shape letters: T tokens of the batch, B sequences, H query heads, K kv heads, D head dim, S page size, L layers.
"""

from typing import Protocol

import torch

from baton.engine.batch import ForwardBatch


class AttentionBackend(Protocol):
    """Attention over one KV pool, a tensor [pages, L, 2, K, S, D]; 2 is keys, then values.

    `plan` comes first in each step; `write_kv` of a layer comes before its `forward`. Query t attends to every position up to
    and including its own.
    """

    @property
    def name(self) -> str: ...

    def plan(self, batch: ForwardBatch) -> None:
        """Prepare a step: whatever depends on lengths and page tables only."""

    def write_kv(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """`k`, `v`: [T, K, D], keys already rotated, into the slots of the batch's positions."""

    def forward(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """`q`: [T, H, D] rotated -> [T, H, D] in q's dtype; scores are scaled by 1 / sqrt(D)."""
