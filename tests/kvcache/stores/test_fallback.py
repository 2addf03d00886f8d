"""Two stores as one: what is put, found and read when either of them lost objects or fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fakes.dict_store import DictStore
from tests.fakes.store_conformance import CHECKS, OBJECT_BYTES, MakeStore

from baton.kvcache.stores.base import StoreConfig, StoreError
from baton.kvcache.stores.fallback import RETRY_S, FallbackStore, open_with_fallback
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.open import open_store

SIZE = 64
NAMES = ["a", "b", "c", "d", "e"]


class Bed:
    def __init__(self) -> None:
        config = StoreConfig(object_bytes=SIZE)
        self.first, self.second, self.now = DictStore(config), DictStore(config), 100.0
        self.store = FallbackStore(self.first, self.second, clock=lambda: self.now)
        self.values = np.random.default_rng(0).integers(0, 256, (len(NAMES), SIZE), dtype=np.uint8)
        assert self.store.batch_put(NAMES, list(self.values)) == [True] * len(NAMES)

    def read(self) -> list[bool]:
        targets = np.zeros_like(self.values)
        done = self.store.batch_get(NAMES, list(targets))
        assert all((targets[index] == self.values[index]).all() for index, ok in enumerate(done) if ok)
        return done


def fail(_: str) -> None:
    raise StoreError("told to fail")


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_a_store(check: Callable[[MakeStore], None]) -> None:
    objects: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
    config = StoreConfig(object_bytes=OBJECT_BYTES)
    check(lambda: FallbackStore(*(DictStore(config, shared) for shared in objects)))


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
    broken: DictStore = getattr(bed, which)
    other = bed.second if which == "first" else bed.first
    broken.before = fail
    del other.objects["d"]
    assert bed.store.batch_exists(NAMES) == 3
    assert bed.read() == [name != "d" for name in NAMES]
    assert bed.store.batch_put(["f"], [bed.values[0]]) == [True]
    calls = len(broken.calls)
    bed.read()
    assert len(broken.calls) == calls, "not asked again at once"
    bed.now += RETRY_S
    broken.before = lambda _: None
    assert bed.read() == [True] * len(NAMES)


def test_both_failing_is_a_failure() -> None:
    bed = Bed()
    bed.first.before = bed.second.before = fail
    for call in (
        lambda: bed.store.batch_exists(NAMES), bed.read, lambda: bed.store.batch_put(NAMES, list(bed.values))
    ):  # fmt: skip
        with pytest.raises(StoreError, match="neither"):
            call()
        bed.now += RETRY_S
    assert bed.store.batch_exists([]) == 0


def test_clear_discard_and_stats_concern_both() -> None:
    bed = Bed()
    bed.store.discard(["c"])
    assert bed.store.batch_exists(NAMES) == 2
    bed.store.batch_put(["c"], [bed.values[2]])
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
