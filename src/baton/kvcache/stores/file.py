"""The embedded store: objects in files of one directory, shared by all workers of a host, bounded in size.

One data file for each object size, cut into slots that are written with one `pwrite` and read with one `preadv`; which object lies
where is `file_index`'s. No lock is held while bytes move. A reader whose slot is given to another object meanwhile notices it by
looking the object up again; what slips through all the same (a process that died, stopped for minutes, or lost power at the
wrong moment) has no valid seal, and the worker takes it as a miss.

Chosen after measuring LMDB, SQLite with blobs, and one file per object, SGLang's way (`benchmarks/store.py --peers`). For pages of
369 KB and more, writing takes 0.6 of LMDB's CPU time (as much at 98 KB); at 369 KB one file per object takes 10 times ours, SQLite
6 times. Reading is cheaper with LMDB (0.4 to 0.85 of ours), but its writer copies while it holds the one lock.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from baton.kvcache.stores.base import Object, StoreConfig, StoreError
from baton.kvcache.stores.file_index import FileIndex, Slot, stride_of
from baton.kvcache.stores.sizes import parse_size

FORMAT = 1
"""Part of the directory's name, so that versions with other formats share a path and not their files."""
DEFAULT_SHARE = 0.25
"""Capacity, if none is given: this much of the disk space that is free or ours."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_GROWTH_S = 30.0
"""After the disk was full, only slots that exist are used for this long."""
_ROOM_BYTES = 4 << 20
"""Given back to a full disk: the index needs some to go on."""
_PUNCH_HOLE_KEEP_SIZE = 0x03


class FileStore:
    """A `base.Store`. Extra config: `path`, the directory; `capacity`, e.g. "10gb", the most that all workers together keep there."""

    def __init__(self, config: StoreConfig, clock: Callable[[], float] = time.monotonic) -> None:
        unknown = sorted(set(config.extra) - {"path", "capacity"})
        if unknown:
            raise StoreError(
                f"file: unknown keys in the extra config: {', '.join(unknown)}; known are path and capacity"
            )
        if not isinstance(config.extra.get("path"), str):
            raise StoreError("file: path (a directory) wants a text")
        self._size = config.object_bytes
        self._stride = stride_of(self._size)
        self._clock = clock
        self._no_growth_before = clock()
        self._num_truncated = 0
        """Objects that the data file was too short for."""
        self._files: dict[int, int] = {}
        self._files_lock = threading.Lock()
        path = Path(config.extra["path"]).expanduser()
        self.directory = path / f"baton-kv-v{FORMAT}"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.capacity = self._choose_capacity(config.extra.get("capacity"))
            self._index = FileIndex(self.directory, self.capacity, self._release)
            self._fd = self._file(self._size)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"file: path {path}: {error}; give a local directory that this user may write to"
            ) from error

    def register(self, memory: object) -> None:
        """Any memory will do."""

    def batch_exists(self, names: Sequence[str]) -> int:
        slots = self._index.lookup([_key(name) for name in names], self._size, consecutive=True)
        return len(slots) - (None in slots)

    def batch_get(self, names: Sequence[str], targets: Sequence[Object]) -> list[bool]:
        keys = [_key(name) for name in names]
        slots = self._index.lookup(keys, self._size)
        read = [slot is not None and self._read(slot, target) for slot, target in zip(slots, targets, strict=True)]
        still = self._index.lookup(keys, self._size)
        got = [ok and slot == now for ok, slot, now in zip(read, slots, still, strict=True)]
        lost = [
            key
            for key, ok, slot, now, target in zip(keys, read, slots, still, targets, strict=True)
            if not ok and slot is not None and slot == now and len(target) == self._size
        ]
        with self._no_space_is_no_failure():
            self._index.touch([key for key, ok in zip(keys, got, strict=True) if ok])
            if lost:
                self._num_truncated += len(lost)
                self._index.discard(lost, self._size)
        return got

    def batch_put(self, names: Sequence[str], objects: Sequence[Object]) -> list[bool]:
        keys = [_key(name) for name in names]
        there = [slot is not None for slot in self._index.lookup(keys, self._size)]
        with self._no_space_is_no_failure():
            self._index.touch([key for key, is_there in zip(keys, there, strict=True) if is_there])
            wanted = [i for i, is_there in enumerate(there) if not is_there]
            for i, ok in zip(wanted, self._put([keys[i] for i in wanted], [objects[i] for i in wanted]), strict=False):
                there[i] = ok
        return there

    def discard(self, names: Sequence[str]) -> None:
        self._index.discard([_key(name) for name in names], self._size)

    def clear(self) -> None:
        self._index.clear(lambda size: os.ftruncate(self._file(size), 0))

    def stats(self) -> Mapping[str, float]:
        totals = self._index.totals
        return {
            "used_bytes": totals.held_bytes,
            "capacity_bytes": self.capacity,
            "num_objects": totals.num_objects,
            "evicted_objects": totals.evicted,
            "truncated_objects": self._num_truncated,
        }

    def close(self) -> None:
        self._index.close()
        with self._files_lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _read(self, slot: int, target: Object) -> bool:
        return os.preadv(self._fd, [target.data], slot * self._stride) == self._size == len(target)

    def _put(self, keys: Sequence[int], objects: Sequence[Object]) -> list[bool]:
        """For as many as there was room for, whether they are there now."""
        if not keys:
            return []
        slots = self._index.reserve(self._size, len(keys), grow=self._clock() >= self._no_growth_before)
        num_written = self._write_all(objects, slots)
        return self._index.publish(slots[:num_written], keys[:num_written])

    def _write_all(self, objects: Sequence[Object], slots: Sequence[Slot]) -> int:
        """How many were written; the slots of the rest are given back. A full disk ends it, other errors are raised."""
        num_written = 0
        try:
            for data, slot in zip(objects, slots, strict=False):
                _write(self._fd, data, slot.number * self._stride)
                num_written += 1
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._disk_is_full()
        finally:
            if num_written < len(slots):
                self._index.drop(self._size, slots[num_written:])
        return num_written

    def _disk_is_full(self) -> None:
        self._no_growth_before = self._clock() + _NO_GROWTH_S
        self._index.make_room(_ROOM_BYTES)

    @contextlib.contextmanager
    def _no_space_is_no_failure(self) -> Iterator[None]:
        """The index cannot grow either when the disk is full: then a put is refused, and a read not noted."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            self._disk_is_full()

    def _file(self, size: int) -> int:
        """The descriptor of the data file for objects of `size` bytes."""
        with self._files_lock:
            if size not in self._files:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._files[size] = os.open(self.directory / f"objects-{size}.data", flags, 0o600)
            return self._files[size]

    def _release(self, size: int, slot: int) -> None:
        stride = stride_of(size)
        _punch_hole(self._file(size), slot * stride, stride)

    def _choose_capacity(self, wanted: object) -> int:
        if wanted is None:
            disk = os.statvfs(self.directory)
            ours = sum(file.stat().st_blocks * 512 for file in self.directory.glob("objects-*"))
            return int((disk.f_bavail * disk.f_frsize + ours) * DEFAULT_SHARE)
        try:
            capacity = parse_size(wanted)
        except ValueError as error:
            raise StoreError(f"file: capacity is {wanted!r}: {error}") from error
        if capacity < self._stride:
            raise StoreError(f"file: capacity is {wanted!r}, but one object alone takes {self._stride} bytes")
        return capacity


def _key(name: str) -> int:
    """63 bits of a hash: positive, the index's row id. Two names with one key would only cost a miss, since the seal has the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def _write(fd: int, data: Object, offset: int) -> None:
    view = data.data
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks back and keep the file's length. OSError where the file system cannot do that."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(fd), ctypes.c_int(_PUNCH_HOLE_KEEP_SIZE), ctypes.c_int64(offset), ctypes.c_int64(length))
    if libc.fallocate64(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot release space of a data file: {os.strerror(code)}")
