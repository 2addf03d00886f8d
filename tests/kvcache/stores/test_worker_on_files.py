"""The worker with the real file store: pages outlive the worker, and what happens to the files is never served."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from baton.kvcache.page_memory import PageMemory
from baton.kvcache.stores.base import StoreConfig
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.file_index import stride_of
from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.stores.worker import StoreWorker
from baton.kvcache.tiers import Found, PagesRead, Query, Read, StoreAction, Write, Written

SHAPE = PageShape(layers=range(3), kv_heads=range(2), page_size=16, head_dim=32, dtype="bfloat16", dtype_bytes=2)
SCHEME = ObjectScheme("default", SHAPE)
STRIDE = stride_of(SCHEME.object_bytes)
NUM_PAGES = 6
KEYS = [bytes([i]) * 32 for i in range(NUM_PAGES)]
LIMIT_S = 10.0


class Rank:
    def __init__(self, path: Path) -> None:
        self.memory = PageMemory.create(NUM_PAGES, SHAPE.page_bytes + SEAL_BYTES)
        self._woken = threading.Event()
        extra = {"path": str(path), "capacity": 100 * STRIDE}
        self.store = FileStore(StoreConfig(object_bytes=SCHEME.object_bytes, extra=extra))
        self.worker = StoreWorker(self.store, SCHEME, self.memory, self._woken.set)

    def ask(self, action: StoreAction) -> object:
        self.worker.do(action)
        while not (events := self.worker.poll()):
            assert self._woken.wait(LIMIT_S)
            self._woken.clear()
        return events[0]

    def write(self, seed: int = 0) -> None:
        self.memory.array[:, :-SEAL_BYTES] = numbers(seed)
        assert self.ask(Write(1, KEYS, list(range(NUM_PAGES)))) == Written(1, [True] * NUM_PAGES)

    def close(self) -> None:
        self.worker.close()
        self.memory.close()


def numbers(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (NUM_PAGES, SHAPE.page_bytes), dtype=np.uint8)


def flip(data: bytearray) -> None:
    data[2 * STRIDE + 1000] ^= 4


def truncate(data: bytearray) -> None:
    del data[2 * STRIDE + 100 :]


def zero(data: bytearray) -> None:
    """As after a power failure: the index knows it, the bytes never came."""
    data[2 * STRIDE : 3 * STRIDE] = bytes(STRIDE)


def swap(data: bytearray) -> None:
    data[2 * STRIDE : 3 * STRIDE] = data[STRIDE : 2 * STRIDE]


def foreign_seal(data: bytearray) -> None:
    """The payload of one page with the seal of another."""
    end = SCHEME.object_bytes
    data[2 * STRIDE + end - SEAL_BYTES : 2 * STRIDE + end] = data[STRIDE + end - SEAL_BYTES : STRIDE + end]


@pytest.mark.parametrize("damage", [flip, truncate, zero, swap, foreign_seal])
def test_damaged_pages_are_misses_that_can_be_written_again(
    damage: Callable[[bytearray], None], tmp_path: Path
) -> None:
    rank = Rank(tmp_path)
    rank.write()
    rank.close()
    (file,) = rank.store.directory.glob("objects-*.data")
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)

    rank = Rank(tmp_path)
    assert rank.ask(Query(1, KEYS)) == Found(1, NUM_PAGES)
    event = rank.ask(Read(2, KEYS, list(range(NUM_PAGES))))
    assert isinstance(event, PagesRead) and event.ok[:3] == [True, True, False] and event.is_last
    for page in (0, 1):
        assert np.array_equal(rank.memory.array[page, :-SEAL_BYTES], numbers(0)[page])
    assert rank.worker.stats()["damaged"] + rank.worker.stats()["store_truncated_objects"] in (1, 4)
    rank.write()
    assert rank.ask(Read(3, KEYS, list(range(NUM_PAGES)))) == PagesRead(3, 0, [True] * NUM_PAGES, True)
    assert np.array_equal(rank.memory.array[:, :-SEAL_BYTES], numbers(0))
    rank.close()


def test_host_pages_without_room_for_the_seal_are_refused(tmp_path: Path) -> None:
    store = FileStore(StoreConfig(object_bytes=SCHEME.object_bytes, extra={"path": str(tmp_path)}))
    with PageMemory.create(1, SHAPE.page_bytes) as memory, pytest.raises(ValueError, match="payload and seal need"):
        StoreWorker(store, SCHEME, memory, lambda: None)
    store.close()
