"""Workers cut into ranks: their slices as tensor and pipeline parallelism make them, and transfers of all ranks in this process."""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.fakes.transfer_pair import DEADLINE_S, Side

from baton.kvcache.page_memory import PageMemory
from baton.transfer.base import PageLayout
from baton.transfer.config import TransferConfig
from baton.transfer.decode import RankDecodeTransfer
from baton.transfer.prefill import RankPrefillTransfer, registration
from baton.transfer.ranks import WorkerRanks
from baton.transfer.slices import Slice, slice_bytes, whole_slice

HEAD_BYTES = 96


def layout_of(num_layers: int, num_kv_heads: int) -> PageLayout:
    return PageLayout("model", "bfloat16", 4, num_layers, num_kv_heads, 12, 2 * num_layers * num_kv_heads * HEAD_BYTES)


def tensor_slices(layout: PageLayout, tp_size: int, borders: Sequence[int] = ()) -> list[Slice]:
    """Of stages that begin at layer 0 and at `borders`, with `tp_size` ranks each; with more ranks than heads a head has several."""
    heads, edges = layout.num_kv_heads, [0, *borders, layout.num_layers]
    spans = [
        (rank * heads // tp_size, max(rank * heads // tp_size + 1, (rank + 1) * heads // tp_size))
        for rank in range(tp_size)
    ]
    return [Slice(stage, span) for stage in itertools.pairwise(edges) for span in spans]


def cut(pages: NDArray[np.uint8], layout: PageLayout, part: Slice) -> NDArray[np.uint8]:
    """[num_pages, page_bytes] -> what of it a rank with `part` holds, packed [num_pages, part_bytes]. Index by index: an oracle."""
    num_heads = layout.num_kv_heads
    columns = [
        ((layer * 2 + kv) * num_heads + head) * HEAD_BYTES + byte
        for layer in range(*part.layers) for kv in range(2) for head in range(*part.kv_heads) for byte in range(HEAD_BYTES)
    ]  # fmt: skip
    return pages[:, columns]


class Ranks:
    """A prefill and a decode worker of several ranks, each with a pool; the prefill's hold slices of the same random pages."""

    def __init__(
        self,
        port: int,
        layout: PageLayout,
        sources: Sequence[Slice],
        targets: Sequence[Slice],
        backend: str,
        num_pages: int = 8,
    ) -> None:
        self._port = port
        config = TransferConfig(backend="auto" if backend == "shm" else "tcp")
        shape = num_pages, slice_bytes(layout, whole_slice(layout))
        self.whole: NDArray[np.uint8] = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
        self.pools = [PageMemory.create(num_pages, slice_bytes(layout, part)) for part in [*sources, *targets]]
        self.targets = list(zip(targets, self.pools[len(sources) :], strict=True))
        self.prefills, self.decodes = [], list[Side]()
        for rank, (part, pool) in enumerate(zip(sources, self.pools, strict=False)):
            pool.array[:] = cut(self.whole, layout, part)
            wake = threading.Event()
            transfer = RankPrefillTransfer(
                pool, layout, config, "127.0.0.1", part, wake.set, facing="127.0.0.1", leads=rank == 0
            )
            self.prefills.append(Side(transfer, wake))
        entries = [
            registration(rank, len(sources), 1, one.transfer.address, part)
            for rank, (one, part) in enumerate(zip(self.prefills, sources, strict=True))
        ]
        self.prefills[0].transfer.register(("127.0.0.1", port), entries)
        assert self.prefills[0].transfer.wait_registered(DEADLINE_S)
        for rank, (_, pool) in enumerate(self.targets):
            wake = threading.Event()
            ranks = WorkerRanks(rank, tuple(targets), "decode worker")
            self.decodes.append(Side(RankDecodeTransfer(pool, layout, config, "test", ranks, wake.set), wake))

    def expect(self, room: int) -> None:
        for one in self.prefills:
            one.transfer.expect(room, 60.0)

    def receive(self, room: int, page_ids: Sequence[int]) -> None:
        for one in self.decodes:
            one.transfer.receive(room, "127.0.0.1", self._port, 0, page_ids, 60.0)

    def send(self, room: int, page_ids: Sequence[int], first_token: Any) -> None:
        for one in self.prefills:
            one.transfer.send(room, 0, page_ids, first_token)

    def close(self) -> None:
        for one in [*self.decodes, *self.prefills]:
            one.transfer.close()
        for pool in self.pools:
            pool.close()


@contextlib.contextmanager
def open_ranks(*args: Any, **settings: Any) -> Iterator[Ranks]:
    ranks = Ranks(*args, **settings)
    try:
        yield ranks
    finally:
        ranks.close()
