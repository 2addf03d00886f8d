"""Which part of a model one rank holds, and how the ranks' partial results meet.

Column-parallel layers (q, k, v, gate, up) are cut by output rows, row-parallel ones (o, down) by input columns, so one
reduction ends each half layer. Splits may be uneven. Not here: process groups; a shard of several ranks takes its
reduction from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.engine.errors import ModelError
from baton.engine.models.spec import ModelConfig

AllReduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`. Invariant: size == 1, or `reduce` is given."""

    rank: int = 0
    size: int = 1
    reduce: AllReduce | None = None
    """Sums a tensor over the ranks, in place or not, and gives the sum."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {self.rank}")
        if self.size > 1 and self.reduce is None:
            raise ValueError("a shard of several ranks needs a reduction")

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial if self.reduce is None else self.reduce(partial)

    def span(self, total: int) -> tuple[int, int]:
        """First and one-behind-last unit of this rank; the ranks' spans follow one another and cover `total`."""
        return total * self.rank // self.size, total * (self.rank + 1) // self.size


@dataclass(frozen=True, slots=True)
class LocalSizes:
    """What this rank computes of each layer."""

    kv_heads: tuple[int, int]
    """First and one-behind-last kv head; query heads follow their kv heads."""
    group: int
    """Query heads for each kv head."""
    inner: tuple[int, int]
    """Span of the feed-forward size."""

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def intermediate_size(self) -> int:
        return self.inner[1] - self.inner[0]


def local_sizes(config: ModelConfig, shard: Shard) -> LocalSizes:
    if shard.size > config.num_kv_heads:
        raise ModelError(
            f"{shard.size} ranks cannot share {config.num_kv_heads} kv heads; use at most that many ranks."
        )
    group = config.num_heads // config.num_kv_heads
    return LocalSizes(shard.span(config.num_kv_heads), group, shard.span(config.intermediate_size))
