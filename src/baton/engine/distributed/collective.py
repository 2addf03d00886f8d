"""How tensors of several ranks meet, through torch.distributed: NCCL between GPUs, gloo between CPUs where it is asked for.

Sums are formed in the order of ranks on every rank, so the bits depend neither on timing nor on the size of a message (gloo's own
all-reduce cuts a message into pieces that are summed in different orders). Neighbours: `links` does the same over TCP,
`exchange` through shared memory without leaving C. Not here: who the ranks are (`topology`) and how they found one another (`control`).
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from baton.engine.distributed.control import GroupError

STORE_TIMEOUT_S = 120.0
OPERATION_TIMEOUT_S = 3600.0
"""A collective waits for the slowest rank; ranks that are gone are noticed by the heartbeat, not by this."""


def open_store(host: str, port: int, *, is_leader: bool) -> TCPStore:
    """Where the ranks of a process group find one another's addresses. The leader's port 0 is any free one (`store.port`)."""
    timeout = timedelta(seconds=STORE_TIMEOUT_S)
    try:
        return TCPStore(host, port, None, is_leader, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise GroupError(f"the process group's store at {host}:{port} does not answer: {error}") from None


class ProcessGroupCollective:
    """Collectives of one device type. All ranks make the same calls in the same order."""

    def __init__(self, store: TCPStore, name: str, rank: int, size: int, device: torch.device, own_host: str) -> None:
        """`name`: what the ranks of one process group have in common and other groups on the store have not. `own_host`: the
        address under which this rank reached the leader, or the leader's own."""
        self._rank, self._size = rank, size
        self.name = "nccl" if device.type == "cuda" else "gloo"
        self._store = store  # the leader's is the server: it lives as long as the group
        of_group = PrefixStore(name, store)
        try:
            self._group = _nccl(of_group, rank, size) if self.name == "nccl" else _gloo(of_group, rank, size, own_host)
        except RuntimeError as error:
            raise GroupError(f"no {self.name} group of {size} ranks at {own_host}: {error}") from None

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in float32 where they are CPUs, rounded once to `partial`'s dtype."""
        if self.name == "nccl":
            self._group.allreduce([partial]).wait()
            return partial
        total = torch.zeros(partial.shape, dtype=torch.float32)
        for one in self._gather(partial.contiguous()):
            total += one
        return total.to(partial.dtype)

    def gather_columns(self, rows: torch.Tensor, borders: Sequence[int]) -> None:
        """`rows`: [R, W]; this rank has filled columns borders[rank] to borders[rank + 1]; the others' are filled here."""
        widths = [last - first for first, last in pairwise(borders)]
        own = rows.new_empty(len(rows), max(widths))  # gloo and NCCL gather blocks of one size
        own[:, : widths[self._rank]] = rows[:, borders[self._rank] : borders[self._rank + 1]]
        for rank, block in enumerate(self._gather(own)):
            if rank != self._rank:
                rows[:, borders[rank] : borders[rank + 1]] = block[:, : widths[rank]]

    def _gather(self, block: torch.Tensor) -> list[torch.Tensor]:
        blocks = [torch.empty_like(block) for _ in range(self._size)]
        # Bytes, since gloo does not know every dtype.
        sent = block.view(torch.uint8) if self.name == "gloo" else block
        received = [one.view(torch.uint8) if self.name == "gloo" else one for one in blocks]
        self._group.allgather([received], [sent]).wait()
        return blocks


def _gloo(store: Store, rank: int, size: int, own_host: str) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs have another name for it
    options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
    options._timeout = timedelta(seconds=OPERATION_TIMEOUT_S)
    group: Any = ProcessGroupGloo
    return group(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL  # only builds of torch for CUDA have it

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=OPERATION_TIMEOUT_S)
    return ProcessGroupNCCL(store, rank, size, options)
