"""Which part of a model one rank holds, and how the ranks' results meet.

A rank is one of those that share the layers of a pipeline stage (`stages`); without stages, all of them. Heads, feed-forward columns, hidden columns and vocabulary are cut into one span for each rank; spans may be uneven. With more ranks
than kv heads a kv head is held by several ranks, which share its query heads. How a product is cut is the decoder's
choice (`parameters.Cut`). Not here: process groups; a shard of several ranks takes its collective from outside.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.engine.errors import ModelError
from baton.engine.models.spec import ModelConfig
from baton.engine.models.stages import Stage


class Collective(Protocol):
    """What ranks do together. All make the same calls in the same order."""

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, on each of them; in place or not."""

    def gather_columns(self, rows: torch.Tensor, borders: Sequence[int]) -> None:
        """`rows`: [R, W]; rank r has filled columns borders[r] to borders[r + 1]; the others' are filled in here."""


class Exchange(Protocol):
    """Memory that all ranks of one host share, and the C structure by which they meet (kernels/csrc/exchange.h)."""

    @property
    def struct(self) -> ctypes.Structure:
        """Belongs to the kernels while a call runs."""

    @property
    def memory(self) -> torch.Tensor:
        """uint8, 64-byte aligned, the same bytes on all ranks."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of the `size` ranks of a stage. Invariant: size == 1, or one of `collective` and `exchange` is given."""

    rank: int = 0
    size: int = 1
    collective: Collective | None = None
    exchange: Exchange | None = None
    """For the C decoder, where all ranks share memory."""
    ep_size: int = 1
    """Into how many parts a layer's experts are dealt out; the ranks of one part, size / ep_size of them, cut its experts."""
    stage: Stage | None = None
    """None: all layers."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {self.rank}")
        if self.size > 1 and self.collective is None and self.exchange is None:
            raise ValueError("a shard of several ranks needs a collective or an exchange")
        if self.size % self.ep_size:
            raise ValueError(f"{self.size} ranks cannot be dealt into {self.ep_size} parts")

    @property
    def has_head(self) -> bool:
        """Whether embedding, final norm and head are here."""
        return self.stage is None or self.stage.is_first

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial if self.collective is None else self.collective.all_reduce(partial)

    def gather_columns(self, rows: torch.Tensor, borders: Sequence[int]) -> None:
        if self.collective is not None:
            self.collective.gather_columns(rows, borders)

    def span(self, total: int) -> tuple[int, int]:
        """First and one-behind-last unit of this rank; the ranks' spans follow one another and cover `total`."""
        return span_of(total, self.rank, self.size)

    def borders(self, total: int) -> list[int]:
        """Where the spans of all ranks begin, and `total`."""
        return [total * rank // self.size for rank in range(self.size + 1)]


@dataclass(frozen=True, slots=True)
class LocalSizes:
    """Which layers this rank computes, and what of each."""

    layers: range
    """Of the whole model's."""
    kv_heads: tuple[int, int]
    """First and one-behind-last kv head."""
    heads: tuple[int, int]
    """The query heads that this rank computes; all of them attend to `kv_heads`."""
    inner: tuple[int, int]
    """Span of the feed-forward size."""

    experts: tuple[int, int] = (0, 0)
    """First and one-behind-last expert of which this rank computes something."""
    expert_inner: tuple[int, int] = (0, 0)
    """Span of each such expert's feed-forward size."""

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def num_heads(self) -> int:
        return self.heads[1] - self.heads[0]

    @property
    def intermediate_size(self) -> int:
        return self.inner[1] - self.inner[0]


def local_sizes(config: ModelConfig, shard: Shard) -> LocalSizes:
    """Raises `ModelError` where a rank would have nothing to do."""
    if shard.size > config.num_heads or shard.size > config.intermediate_size:
        raise ModelError(
            f"{shard.size} ranks cannot share {config.num_heads} query heads and {config.intermediate_size} "
            "feed-forward columns; use at most as many ranks as there are of either."
        )
    kv_heads, heads = _head_spans(config, shard.rank, shard.size)
    experts, expert_inner = _expert_spans(config, shard)
    layers = range(config.num_layers) if shard.stage is None else shard.stage.layers
    return LocalSizes(layers, kv_heads, heads, shard.span(config.intermediate_size), experts, expert_inner)


def _expert_spans(config: ModelConfig, shard: Shard) -> tuple[tuple[int, int], tuple[int, int]]:
    """(experts, columns of each) of a rank."""
    experts = config.experts
    if experts is None:
        return (0, 0), (0, 0)
    cuts = shard.size // shard.ep_size
    if shard.ep_size > experts.num_experts or cuts > experts.intermediate_size:
        raise ModelError(
            f"{shard.size} ranks with --ep-size {shard.ep_size} cannot share {experts.num_experts} experts of "
            f"{experts.intermediate_size} feed-forward columns."
        )
    part, place = divmod(shard.rank, cuts)
    return span_of(experts.num_experts, part, shard.ep_size), span_of(experts.intermediate_size, place, cuts)


def span_of(total: int, part: int, num_parts: int) -> tuple[int, int]:
    """First and one-behind-last of part `part` where `total` is cut into `num_parts` parts as even as possible."""
    return total * part // num_parts, total * (part + 1) // num_parts


def head_borders(config: ModelConfig, size: int) -> list[int]:
    """The query heads at which the ranks' spans begin, and their number."""
    return [_head_spans(config, rank, size)[1][0] for rank in range(size)] + [config.num_heads]


def _head_spans(config: ModelConfig, rank: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kv heads, query heads) of a rank."""
    total, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    if size <= total:
        first, last = total * rank // size, total * (rank + 1) // size
        return (first, last), (first * group, last * group)
    # kv head h belongs to ranks size * h // total .. size * (h + 1) // total.
    kv_head = next(h for h in range(total) if rank < size * (h + 1) // total)
    first_rank, count = size * kv_head // total, size * (kv_head + 1) // total - size * kv_head // total
    if count > group:
        raise ModelError(f"{size} ranks cannot share {config.num_heads} query heads over {total} kv heads.")
    place = rank - first_rank
    start = kv_head * group
    return (kv_head, kv_head + 1), (start + group * place // count, start + group * (place + 1) // count)
