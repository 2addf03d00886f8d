"""The file store beyond the conformance suite: restarts, eviction, several sizes, full and broken disks, killed processes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from baton.kvcache.stores.base import Object, StoreConfig, StoreError
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.file_index import stride_of

SIZE = 5000
STRIDE = stride_of(SIZE)


def open_store(path: Path, num_objects: int = 10, size: int = SIZE) -> FileStore:
    """With room for `num_objects` of SIZE."""
    return FileStore(StoreConfig(object_bytes=size, extra={"path": str(path), "capacity": num_objects * STRIDE}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = open_store(tmp_path)
    yield store
    store._index.check_integrity()
    store.close()


def object_of(name: str, size: int = SIZE) -> Object:
    return np.random.default_rng(sum(map(ord, name))).integers(0, 256, size, dtype=np.uint8)


def put(store: FileStore, names: Sequence[str], size: int = SIZE) -> list[bool]:
    return store.batch_put(names, [object_of(name, size) for name in names])


def held(store: FileStore, names: Sequence[str], size: int = SIZE) -> str:
    """Those that are there, after a check of their bytes; reading counts as use."""
    targets = list(np.zeros((len(names), size), dtype=np.uint8))
    got = store.batch_get(names, targets)
    for name, ok, target in zip(names, got, targets, strict=True):
        assert not ok or np.array_equal(target, object_of(name, size))
    return "".join(name for name, ok in zip(names, got, strict=True) if ok)


def disk_bytes(store: FileStore) -> int:
    return sum(file.stat().st_blocks * 512 for file in store.directory.glob("objects-*"))


def test_contents_survive_a_restart(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    put(first, "abc")
    first.close()
    second = open_store(tmp_path)
    assert second.batch_exists("abcd") == 3 and held(second, "abc") == "abc"
    assert second.stats()["num_objects"] == 3
    second.close()


def test_the_least_recently_used_are_evicted_within_the_bound(store: FileStore) -> None:
    put(store, "abcdefghij")
    assert held(store, "bdf") == "bdf"
    assert put(store, "klmnopq") == [True] * 7
    assert held(store, "abcdefghijklmnopq") == "bdfklmnopq"
    assert store.stats()["used_bytes"] == 10 * STRIDE == disk_bytes(store)
    assert store.stats()["evicted_objects"] == 7


@pytest.mark.parametrize("used_by", ["put", "get"])
def test_of_one_prefix_the_end_goes_first(store: FileStore, used_by: str) -> None:
    if used_by == "put":
        put(store, "abcdefghij")
    else:
        put(store, "jihgfedcba")
        held(store, "abcdefghij")
    put(store, "xyz")
    assert held(store, "abcdefghij") == "abcdefg"


def test_the_smaller_capacity_holds_whoever_filled_it(store: FileStore, tmp_path: Path) -> None:
    small = open_store(tmp_path, num_objects=4)
    put(store, "abcdefghij")
    assert put(small, "x") == [True]
    assert disk_bytes(store) == 4 * STRIDE and held(store, "abcdefghijx") == "abcx"
    small.close()


def test_a_put_that_finds_its_objects_there_counts_as_use(store: FileStore) -> None:
    put(store, "abcdefghij")
    assert put(store, "ab") == [True, True]
    put(store, "qrstuvwx")
    assert held(store, "abcdefghij") == "ab"


def test_the_use_of_one_process_counts_for_the_evictions_of_another(store: FileStore, tmp_path: Path) -> None:
    put(store, "abcdefghij")
    other = open_store(tmp_path)
    assert held(other, "ab") == "ab"
    other.close()
    put(store, "qrstuvwx")
    assert held(store, "abcdefghij") == "ab"


def test_more_than_the_capacity_in_one_put_is_refused_in_part(store: FileStore) -> None:
    put(store, "AB")
    assert put(store, "abcdefghijklm") == [True] * 10 + [False] * 3
    assert held(store, "abcdefghijklmAB") == "abcdefghij"


def test_models_with_other_page_sizes_share_the_bound(store: FileStore, tmp_path: Path) -> None:
    large = 3 * STRIDE
    other = open_store(tmp_path, size=large)
    put(store, "abcdefghij")
    assert put(other, "xy", large) == [True, True]
    assert held(other, "xy", large) == "xy" and held(store, "abcdefghij") == "abcd"
    assert disk_bytes(store) == 10 * STRIDE
    assert put(store, "klm") == [True] * 3
    assert (held(store, "abcdefghijklm"), held(other, "xy", large)) == ("abcdklm", "x")
    assert disk_bytes(store) <= 10 * STRIDE
    other._index.check_integrity()
    other.close()


def test_less_capacity_after_a_restart_gives_disk_space_back(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    put(first, "abcdefghij")
    first.close()
    second = open_store(tmp_path, num_objects=4)
    assert disk_bytes(second) == 4 * STRIDE == second.stats()["used_bytes"]
    assert held(second, "abcdefghij") == "abcd"
    second._index.check_integrity()
    second.close()


def test_a_discarded_object_can_be_put_again(store: FileStore) -> None:
    put(store, "abc")
    store.discard(["b"])
    assert held(store, "abc") == "ac"
    assert put(store, "b") == [True] and held(store, "abc") == "abc"


def test_a_full_disk_refuses_new_objects_and_goes_on_with_the_slots_it_has(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "abcd")
    really = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset >= 5 * STRIDE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert put(store, "efg") == [True, False, False]
    assert put(store, "fg") == [True, True]
    assert held(store, "abcdefg") == "aefg"  # one more than needed was given back, for the index
    store._index.check_integrity()


def test_a_disk_too_full_for_the_index_refuses_puts_and_still_reads(store: FileStore) -> None:
    put(store, "abc")
    db = store._index._changes
    (num_pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={num_pages}")
    store._index._capacity = 1 << 40
    names = [f"n{i}" for i in range(2000)]
    assert not all(put(store, names))
    assert held(store, "abc") == "ab"


def test_another_write_error_is_the_callers_and_leaves_nothing_half_written(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="Input/output error"):
            put(store, "ab")
    assert store.stats()["num_objects"] == 0
    assert put(store, "ab") == [True, True] and held(store, "ab") == "ab"


def test_an_object_that_moved_while_it_was_read_is_a_miss(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "abcdefghij")
    really = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        monkeypatch.undo()
        put(store, "klmnopqrst")
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert store.batch_get(["j"], [np.zeros(SIZE, dtype=np.uint8)]) == [False]


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    put(store, "abc")
    store.close()
    (store.directory / "index.sqlite").write_bytes(b"nothing that SQLite would know" * 1000)
    again = open_store(tmp_path)
    assert held(again, "abc") == "" and put(again, "abc") == [True] * 3 and held(again, "abc") == "abc"
    again.close()


def test_its_directory_is_nobody_elses(store: FileStore) -> None:
    assert store.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"path": "/proc/nowhere"}, "path /proc/nowhere"),
        ({"path": 5}, "path"),
        ({"path": "here", "capacity": "lots"}, "capacity is 'lots'"),
        ({"path": "here", "capacity": "1kb"}, "capacity is '1kb'"),
        ({"path": "here", "capcity": "1gb"}, "capcity"),
    ],
)
def test_settings_that_cannot_work_are_named(
    extra: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=message):
        FileStore(StoreConfig(object_bytes=SIZE, extra=extra))


def test_processes_killed_at_any_moment_leave_no_wrong_object(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fakes.store_crash", str(tmp_path), "20", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failed"] == result["wrong"] == 0
    assert result["verified"] > 50
    assert result["used_bytes"] <= result["capacity_bytes"] and result["blocks_bytes"] <= result["capacity_bytes"]
