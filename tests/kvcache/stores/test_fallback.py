"""Two stores as one: what is put, found and read when either of them lost objects or fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.kvcache.stores.base import Object, StoreConfig, StoreError
from baton.kvcache.stores.fallback import RETRY_S, FallbackStore, open_with_fallback
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.open import open_store

SIZE = 64
NAMES = ["a", "b", "c", "d", "e"]


class Memory:
    """A store in a dict that can be told to fail."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_broken = False
        self.calls = 0

    def _called(self) -> None:
        self.calls += 1
        if self.is_broken:
            raise StoreError("told to fail")

    def register(self, memory: Any) -> None: ...

    def batch_exists(self, names: Sequence[str]) -> int:
        self._called()
        return next((index for index, name in enumerate(names) if name not in self.objects), len(names))

    def batch_get(self, names: Sequence[str], targets: Sequence[Object]) -> list[bool]:
        self._called()
        for name, target in zip(names, targets, strict=True):
            if name in self.objects:
                target[:] = np.frombuffer(self.objects[name], np.uint8)
        return [name in self.objects for name in names]

    def batch_put(self, names: Sequence[str], objects: Sequence[Object]) -> list[bool]:
        self._called()
        self.objects |= {name: one.tobytes() for name, one in zip(names, objects, strict=True)}
        return [True] * len(names)

    def clear(self) -> None:
        self.objects.clear()

    def stats(self) -> dict[str, float]:
        return {"num_objects": float(len(self.objects))}

    def close(self) -> None: ...


class Bed:
    def __init__(self) -> None:
        self.first, self.second, self.now = Memory(), Memory(), 100.0
        self.store = FallbackStore(self.first, self.second, clock=lambda: self.now)
        self.values = np.random.default_rng(0).integers(0, 256, (len(NAMES), SIZE), dtype=np.uint8)
        assert self.store.batch_put(NAMES, list(self.values)) == [True] * len(NAMES)

    def read(self) -> list[bool]:
        targets = np.zeros_like(self.values)
        done = self.store.batch_get(NAMES, list(targets))
        assert all((targets[index] == self.values[index]).all() for index, ok in enumerate(done) if ok)
        return done


@pytest.mark.parametrize(
    ("lost_by_first", "lost_by_second", "count"),
    [("", "", 5), ("abcde", "", 5), ("b", "", 5), ("bd", "ac", 5), ("", "abcde", 5), ("ace", "bd", 5), ("c", "c", 2)],
)
def test_what_either_has_is_there(lost_by_first: str, lost_by_second: str, count: int) -> None:
    bed = Bed()
    for store, lost in ((bed.first, lost_by_first), (bed.second, lost_by_second)):
        for name in lost:
            del store.objects[name]
    assert bed.store.batch_exists(NAMES) == count
    assert bed.read() == [not (name in lost_by_first and name in lost_by_second) for name in NAMES]
    assert bed.store.stats()["objects_read"] == len(NAMES) - len(lost_by_first)


@pytest.mark.parametrize("which", ["first", "second"])
def test_one_may_fail(which: str) -> None:
    bed = Bed()
    broken: Memory = getattr(bed, which)
    other = bed.second if which == "first" else bed.first
    broken.is_broken = True
    del other.objects["d"]
    assert bed.store.batch_exists(NAMES) == 3
    assert bed.read() == [name != "d" for name in NAMES]
    assert bed.store.batch_put(["f"], [bed.values[0]]) == [True]
    calls = broken.calls
    bed.read()
    assert broken.calls == calls, "not asked again at once"
    bed.now += RETRY_S
    broken.is_broken = False
    assert bed.read() == [True] * len(NAMES)


def test_both_failing_is_a_failure() -> None:
    bed = Bed()
    bed.first.is_broken = bed.second.is_broken = True
    for call in (
        lambda: bed.store.batch_exists(NAMES), bed.read, lambda: bed.store.batch_put(NAMES, list(bed.values))
    ):  # fmt: skip
        with pytest.raises(StoreError, match="neither"):
            call()
        bed.now += RETRY_S
    assert bed.store.batch_exists([]) == 0


def test_clear_and_stats_concern_both() -> None:
    bed = Bed()
    assert bed.store.stats()["num_objects"] == bed.store.stats()["fallback_num_objects"] == len(NAMES)
    bed.store.clear()
    assert bed.store.batch_exists(NAMES) == 0


def test_a_mooncake_that_is_not_there_is_no_obstacle(tmp_path: Path) -> None:
    """The whole way from the extra config, with files below."""
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    values = np.random.default_rng(1).integers(0, 256, (2, SIZE), dtype=np.uint8)
    extra = {"master_server_address": "127.0.0.1:9", "fallback": {"backend": "file", "path": str(tmp_path)}}
    store = open_store("mooncake", StoreConfig(object_bytes=SIZE, extra=extra))
    try:
        store.register(values)
        assert store.batch_put(["x", "y"], list(values)) == [True, True]
        assert store.batch_exists(["x", "y", "z"]) == 2
    finally:
        store.close()
    alone = FileStore(StoreConfig(object_bytes=SIZE, extra={"path": str(tmp_path)}))
    target = np.zeros(SIZE, np.uint8)
    assert alone.batch_get(["y"], [target]) == [True]
    assert (target == values[1]).all()
    alone.close()


@pytest.mark.parametrize("fallback", ["file", {"path": "/x"}, {"backend": "file", "fallback": {"backend": "file"}}])
def test_a_bad_fallback_is_named(fallback: Any) -> None:
    config = StoreConfig(object_bytes=SIZE, extra={"fallback": fallback})
    with pytest.raises(StoreError, match="fallback"):
        open_with_fallback("file", config, open_store)
