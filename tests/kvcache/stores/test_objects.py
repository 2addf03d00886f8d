"""Names that are shared exactly where bytes are the same, and pages cut so that deployments of different sizes share them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.seal import SEAL_BYTES

MODEL = PageShape(layers=range(4), kv_heads=range(3), page_size=4, head_dim=2, dtype="bfloat16", dtype_bytes=2)
KEYS = [bytes([i]) * 32 for i in range(2)]
Bytes = NDArray[np.uint8]


def numbers_of_model() -> Bytes:
    """Two pages of the whole model: uint8 [page, layer, K/V, head, bytes of a head]."""
    shape = (len(KEYS), len(MODEL.layers), 2, len(MODEL.kv_heads), MODEL.head_bytes)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class Rank:
    """Writes and reads pages of its heads through a dict of objects, as a worker does."""

    def __init__(self, kv_heads: range, store: dict[str, bytes], scheme: str = "unified") -> None:
        self.kv_heads, self._store = kv_heads, store
        self.scheme = ObjectScheme(scheme, replace(MODEL, kv_heads=kv_heads))
        self._objects = self.scheme.open(len(KEYS))
        self._names = [name for key in KEYS for name in self.scheme.names(key)]

    def write(self, numbers: Bytes) -> None:
        pages = self._empty_pages()
        for page, page_numbers in zip(pages, self._own(numbers), strict=True):
            page[:-SEAL_BYTES] = page_numbers.reshape(-1)
        self._objects.before_put(pages, self._names)
        buffers = self._objects.buffers(pages)
        assert all(len(buffer) == self.scheme.object_bytes for buffer in buffers)
        self._store |= {name: buffer.tobytes() for name, buffer in zip(self._names, buffers, strict=True)}

    def read(self) -> tuple[Bytes, list[bool]]:
        """[page, layer, K/V, own head, bytes], and which objects verified."""
        pages = self._empty_pages()
        got = []
        for name, buffer in zip(self._names, self._objects.buffers(pages), strict=True):
            got.append(name in self._store)
            buffer[:] = np.frombuffer(self._store.get(name, bytes(len(buffer))), dtype=np.uint8)
        ok = self._objects.after_get(pages, self._names, got)
        shape = (len(MODEL.layers), 2, len(self.kv_heads), MODEL.head_bytes)
        return np.stack([page[:-SEAL_BYTES].reshape(shape) for page in pages]), ok

    def holds(self, numbers: Bytes) -> bool:
        mine, ok = self.read()
        return all(ok) and np.array_equal(mine, self._own(numbers))

    def _own(self, numbers: Bytes) -> Bytes:
        return numbers[:, :, :, self.kv_heads.start : self.kv_heads.stop]

    def _empty_pages(self) -> Sequence[Bytes]:
        return list(np.zeros((len(KEYS), self.scheme.shape.page_bytes + SEAL_BYTES), dtype=np.uint8))


SPLITS = {1: [range(3)], 2: [range(2), range(2, 3)], 3: [range(1), range(1, 2), range(2, 3)]}


@pytest.mark.parametrize("writers", SPLITS)
@pytest.mark.parametrize("readers", SPLITS)
def test_unified_objects_are_shared_between_tensor_parallel_sizes(writers: int, readers: int) -> None:
    store: dict[str, bytes] = {}
    numbers = numbers_of_model()
    for heads in SPLITS[writers]:
        Rank(heads, store).write(numbers)
    assert len(store) == len(KEYS) * 3
    assert all(Rank(heads, store).holds(numbers) for heads in SPLITS[readers])


def test_default_objects_are_shared_only_by_ranks_with_the_same_heads() -> None:
    store: dict[str, bytes] = {}
    numbers = numbers_of_model()
    Rank(range(2), store, "default").write(numbers)
    assert Rank(range(2), store, "default").holds(numbers)
    assert not any(Rank(range(3), store, "default").read()[1])
    assert not any(Rank(range(1, 3), store, "default").read()[1])


@pytest.mark.parametrize("scheme", ["default", "unified"])
def test_bytes_of_other_heads_or_another_page_under_our_name_do_not_verify(scheme: str) -> None:
    store: dict[str, bytes] = {}
    for heads in (range(1), range(1, 2)):
        Rank(heads, store, scheme).write(numbers_of_model())
    names = list(store)  # page 0 and 1 of head 0, then of head 1
    for other in ([1, 0, 3, 2], [2, 3, 0, 1]):
        mixed = {name: store[names[i]] for name, i in zip(names, other, strict=True)}
        assert not any(Rank(range(1), mixed, scheme).read()[1])


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"page_size": 2, "head_dim": 4}, {"layers": range(1, 5)}, {"head_dim": 4}]
)
@pytest.mark.parametrize("scheme", ["default", "unified"])
def test_another_layout_has_other_names(scheme: str, change: dict[str, object]) -> None:
    ours = ObjectScheme(scheme, MODEL).names(KEYS[0])
    theirs = ObjectScheme(scheme, replace(MODEL, **change)).names(KEYS[0])  # type: ignore[arg-type]
    assert not set(ours) & set(theirs)


def test_a_name_says_key_layout_layers_and_heads() -> None:
    digest = MODEL.digest
    assert len(digest) == 16
    assert ObjectScheme("default", MODEL).names(KEYS[1]) == [f"{KEYS[1].hex()}_{digest}_L0-4_H0-3"]
    assert ObjectScheme("unified", MODEL).names(KEYS[1])[2] == f"{KEYS[1].hex()}_{digest}_L0-4_H2-3"
