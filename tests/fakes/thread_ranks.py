"""Ranks as threads of one process, with collectives over a barrier."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from baton.engine.models.shard import Shard

T = TypeVar("T")


class ThreadRanks(Generic[T]):
    def __init__(self, size: int) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._given: dict[int, torch.Tensor] = {}

    def run(self, work: Callable[[Shard], T]) -> list[T]:
        """What `work` gives on each rank."""
        with ThreadPoolExecutor(self._size) as executor:
            return list(executor.map(lambda rank: work(Shard(rank, self._size, self.of_rank(rank))), range(self._size)))

    def of_rank(self, rank: int) -> "ThreadCollective":
        return ThreadCollective(self, rank)

    def exchange(self, rank: int, own: torch.Tensor) -> list[torch.Tensor]:
        """Copies of what all ranks give."""
        self._given[rank] = own.clone()
        self._barrier.wait()
        given = [self._given[other] for other in range(self._size)]
        self._barrier.wait()
        return given


class ThreadCollective:
    def __init__(self, ranks: ThreadRanks[T], rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return torch.stack([one.float() for one in self._ranks.exchange(self._rank, partial)]).sum(0).to(partial.dtype)

    def gather_columns(self, rows: torch.Tensor, borders: Sequence[int]) -> None:
        for rank, given in enumerate(self._ranks.exchange(self._rank, rows)):
            own = slice(borders[rank], borders[rank + 1])
            rows[:, own] = given[:, own]
