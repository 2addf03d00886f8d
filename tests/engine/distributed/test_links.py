"""TCP links between ranks: tensors of any size meet whole, whoever comes first, and a rank that is gone is named."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch

from baton.engine.distributed.control import GroupError
from baton.engine.distributed.links import LinkCollective

WAIT_S = 20.0
BUFFER_BYTES = 8192


@contextlib.contextmanager
def linked(size: int) -> Iterator[list[LinkCollective]]:
    """Ranks whose sockets hold next to nothing: every larger message needs its reader. What would hang fails instead."""
    links: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    ends: list[socket.socket] = []
    for low, high in combinations(range(size), 2):
        links[low][high], links[high][low] = pair = socket.socketpair()
        ends += pair
    for one in ends:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def give_up() -> None:
        for one in ends:
            one.shutdown(socket.SHUT_RDWR)

    watchdog = threading.Timer(WAIT_S, give_up)
    watchdog.start()
    ranks = [LinkCollective(rank, one) for rank, one in enumerate(links)]
    try:
        yield ranks
    finally:
        watchdog.cancel()
        for rank in ranks:
            rank.close()


@pytest.mark.parametrize(("num_rows", "size"), [(1, 2), (1, 4), (3000, 2), (3000, 3), (3000, 4)])
def test_columns_and_sums_of_all_ranks_meet_on_each(num_rows: int, size: int) -> None:
    whole = torch.randn(num_rows, 40).bfloat16()
    partials = [torch.randn(num_rows, 40) for _ in range(size)]
    borders = [0, 5, 5, 22, 40] if size == 4 else [40 * rank // size for rank in range(size + 1)]

    def compute(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.zeros_like(whole)
        rows[:, borders[rank] : borders[rank + 1]] = whole[:, borders[rank] : borders[rank + 1]]
        ranks[rank].gather_columns(rows, borders)
        return rows, ranks[rank].all_reduce(partials[rank].clone())

    with linked(size) as ranks, ThreadPoolExecutor(size) as executor:
        for rows, total in executor.map(compute, range(size), timeout=WAIT_S):
            assert torch.equal(rows, whole)
            assert torch.equal(total, sum(partials[1:], start=partials[0]))


@pytest.mark.parametrize("num_rows", [1, 3000])
def test_a_rank_that_is_gone_is_named(num_rows: int) -> None:
    with linked(2) as (ours, other):
        other.close()
        with pytest.raises(GroupError, match="rank 1 is gone"):
            ours.all_reduce(torch.zeros(num_rows, 40))
