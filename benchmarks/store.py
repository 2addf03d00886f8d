"""The embedded store beside what the page cache gives this machine in the same run, and beside the engines it was chosen over.

    .venv/bin/python benchmarks/store.py --json benchmarks/results/store.json

Every method writes and reads the same bytes (from and to a host tier that has been touched), once per round; methods take turns,
so that all of them meet the same noise; the disk is idle before each write (sync); figures are medians. CPU seconds per GB stand
up to a busy machine, rates do not.
- worker: ours, from `do(Write)` or `do(Read)` to its last event: pages sealed and verified, batches, events, both threads.
- store: the file store alone, in batches as the worker makes them, full all the time (every put evicts).
- plain: `pwrite` over a file that exists, `preadv` from it: the limit. plain fresh: `pwrite` into a new file.
- with --peers: one file per object (SGLang's way), SQLite with blobs, and LMDB if it is installed; none of them seals.
Also: how long opening a store with 100,000 objects takes.
"""

import argparse
import hashlib
import json
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.kvcache.page_memory import PageMemory
from baton.kvcache.stores.base import StoreConfig
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.file_index import stride_of
from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.stores.worker import StoreWorker, WorkerConfig
from baton.kvcache.tiers import PagesRead, Read, StoreAction, Write, Written
from host import describe_machine

Pages = Sequence[NDArray[np.uint8]]
PAGE_BYTES = (98_304, 368_640, 1 << 20, 2 << 20)
"""368,640: 16 tokens of SmolLM2-135M in bf16."""
DEADLINE_S = 60.0
NUM_INDEXED = 100_000


class Method(Protocol):
    def write(self, keys: list[bytes], pages: Pages) -> None: ...

    def read(self, keys: list[bytes], pages: Pages) -> None: ...

    def close(self) -> None: ...


def open_file_store(directory: Path, object_bytes: int, num_objects: int) -> FileStore:
    extra = {"path": str(directory), "capacity": stride_of(object_bytes) * num_objects}
    return FileStore(StoreConfig(object_bytes=object_bytes, extra=extra))


class Worker:
    """`memory`: first the pages that are written, then as many that are read into."""

    def __init__(self, directory: Path, memory: PageMemory) -> None:
        payload = memory.page_bytes - SEAL_BYTES
        shape = PageShape(
            layers=range(1), kv_heads=range(1), page_size=1, head_dim=payload // 2, dtype="uint8", dtype_bytes=1
        )
        self._num_pages = memory.num_pages // 2
        self._wake = threading.Event()
        store = open_file_store(directory, memory.page_bytes, self._num_pages)
        self._worker = StoreWorker(store, ObjectScheme("default", shape), memory, self._wake.set)

    def write(self, keys: list[bytes], pages: Pages) -> None:
        assert all(self._ok(Write(0, keys, list(range(self._num_pages))))), "a page was not written"

    def read(self, keys: list[bytes], pages: Pages) -> None:
        host_pages = list(range(self._num_pages, 2 * self._num_pages))
        assert all(self._ok(Read(0, keys, host_pages))), "a page was not read"

    def _ok(self, action: StoreAction) -> list[bool]:
        self._worker.do(action)
        ok: list[bool] = []
        while self._wake.wait(DEADLINE_S):
            self._wake.clear()
            for event in self._worker.poll():
                assert isinstance(event, PagesRead | Written)
                ok += event.ok
            if len(ok) == self._num_pages:
                return ok
        raise TimeoutError("the worker says nothing")

    def close(self) -> None:
        self._worker.close()


class Store:
    def __init__(self, directory: Path, pages: Pages) -> None:
        self._store = open_file_store(directory, len(pages[0]), len(pages))
        self._batch = max(1, min(WorkerConfig().max_batch_pages, WorkerConfig().batch_bytes // len(pages[0])))

    def write(self, keys: list[bytes], pages: Pages) -> None:
        for i in range(0, len(keys), self._batch):
            names = [key.hex() for key in keys[i : i + self._batch]]
            assert all(self._store.batch_put(names, pages[i : i + self._batch]))

    def read(self, keys: list[bytes], pages: Pages) -> None:
        for i in range(0, len(keys), self._batch):
            names = [key.hex() for key in keys[i : i + self._batch]]
            assert all(self._store.batch_get(names, pages[i : i + self._batch]))

    def close(self) -> None:
        self._store.close()


class Plain:
    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path, self._fresh = path, fresh
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def write(self, keys: list[bytes], pages: Pages) -> None:
        if self._fresh:
            self.close()
            self._path.unlink()
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT)
        stride = stride_of(len(pages[0]))
        for i, page in enumerate(pages):
            os.pwrite(self._fd, page.data, i * stride)

    def read(self, keys: list[bytes], pages: Pages) -> None:
        stride = stride_of(len(pages[0]))
        for i, page in enumerate(pages):
            os.preadv(self._fd, [page.data], i * stride)

    def close(self) -> None:
        os.close(self._fd)


class FilePerObject:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, keys: list[bytes], pages: Pages) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        for key, page in zip(keys, pages, strict=True):
            path = self._directory / key.hex()
            fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT)
            os.write(fd, page.data)
            os.close(fd)
            Path(f"{path}.new").rename(path)

    def read(self, keys: list[bytes], pages: Pages) -> None:
        for key, page in zip(keys, pages, strict=True):
            fd = os.open(self._directory / key.hex(), os.O_RDONLY)
            os.readv(fd, [page.data])
            os.close(fd)

    def close(self) -> None:
        shutil.rmtree(self._directory)


class Sqlite:
    """One transaction for 32 objects. Those of the round before are deleted, so that their pages are used again; so with LMDB."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("page_size=65536", "journal_mode=WAL", "synchronous=OFF"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE objects (key BLOB PRIMARY KEY, data BLOB)")
        self._before: list[bytes] = []

    def write(self, keys: list[bytes], pages: Pages) -> None:
        for i in range(0, len(keys), 32):
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM objects WHERE key=?", [(key,) for key in self._before[i : i + 32]])
            rows = zip(keys[i : i + 32], (page.data for page in pages[i : i + 32]), strict=True)
            self._db.executemany("INSERT INTO objects VALUES (?, ?)", rows)
            self._db.execute("COMMIT")
        self._before = keys

    def read(self, keys: list[bytes], pages: Pages) -> None:
        for key, page in zip(keys, pages, strict=True):
            (data,) = self._db.execute("SELECT data FROM objects WHERE key=?", (key,)).fetchone()
            np.copyto(page, np.frombuffer(data, dtype=np.uint8))

    def close(self) -> None:
        self._db.close()


class Lmdb:
    """Written through the map and not synced: the fastest it offers. Its one writer copies while it holds the lock."""

    def __init__(self, directory: Path, num_bytes: int) -> None:
        import lmdb

        self._env = lmdb.open(str(directory), map_size=4 * num_bytes, sync=False, metasync=False, writemap=True)
        self._before: list[bytes] = []

    def write(self, keys: list[bytes], pages: Pages) -> None:
        for i in range(0, len(keys), 32):
            with self._env.begin(write=True) as transaction:
                for key in self._before[i : i + 32]:
                    transaction.delete(key)
                for key, page in zip(keys[i : i + 32], pages[i : i + 32], strict=True):
                    transaction.put(key, page.data)
        self._before = keys

    def read(self, keys: list[bytes], pages: Pages) -> None:
        with self._env.begin(buffers=True) as transaction:
            for key, page in zip(keys, pages, strict=True):
                np.copyto(page, np.frombuffer(transaction.get(key), dtype=np.uint8))

    def close(self) -> None:
        self._env.close()


def open_methods(directory: Path, memory: PageMemory, source: Pages, *, peers: bool) -> dict[str, Method]:
    methods: dict[str, Method] = {
        "worker": Worker(directory / "worker", memory),
        "store": Store(directory / "store", source),
        "plain": Plain(directory / "plain", fresh=False),
        "plain fresh": Plain(directory / "fresh", fresh=True),
    }
    if peers:
        methods["file per object"] = FilePerObject(directory / "files")
        methods["sqlite"] = Sqlite(directory / "sqlite")
        if find_spec("lmdb"):
            methods["lmdb"] = Lmdb(directory / "lmdb", sum(map(len, source)))
    return methods


def measure(directory: Path, page_bytes: int, total_bytes: int, rounds: int, *, peers: bool) -> dict[str, Any]:
    num_pages = total_bytes // page_bytes
    memory = PageMemory.create(2 * num_pages, page_bytes + SEAL_BYTES)
    memory.array[:] = np.random.default_rng(0).integers(0, 256, memory.array.shape, dtype=np.uint8)
    source, target = list(memory.array[:num_pages]), list(memory.array[num_pages:])
    methods = open_methods(directory, memory, source, peers=peers)
    rates: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in methods}
    cpu: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in methods}
    num_bytes = memory.array.nbytes // 2
    for number in range(rounds + 1):
        keys = [hashlib.sha256(f"{number} {i}".encode()).digest() for i in range(num_pages)]
        for name, method in methods.items():
            os.sync()
            memory.array[num_pages:] = 0
            for what, call, pages in (("write", method.write, source), ("read", method.read, target)):
                started, cpu_s = time.perf_counter(), time.process_time()
                call(keys, pages)
                duration_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
                if number:  # The first round fills the stores.
                    rates[name][what].append(num_bytes / duration_s / 1e9)
                    cpu[name][what].append(cpu_s / num_bytes * 1e9)
            assert np.array_equal(memory.array[:num_pages], memory.array[num_pages:]), f"{name}: other bytes came back"
    for method in methods.values():
        method.close()
    medians, cpu_medians = (
        {name: {what: statistics.median(values) for what, values in of.items()} for name, of in figures.items()}
        for figures in (rates, cpu)
    )
    ratios = {
        f"{ours} / plain": {what: medians[ours][what] / medians["plain"][what] for what in ("write", "read")}
        for ours in ("worker", "store")
    }
    return {
        "page_bytes": page_bytes,
        "bytes": num_bytes,
        "gb_s": medians,
        "cpu_s_per_gb": cpu_medians,
        "ratios": ratios,
        "rounds_gb_s": rates,
    }


def measure_start(directory: Path) -> dict[str, float]:
    """Seconds to open a store that holds NUM_INDEXED objects, and to ask it for one."""
    pages = list(np.zeros((1000, 64), dtype=np.uint8))
    store = open_file_store(directory, 64, NUM_INDEXED)
    for i in range(0, NUM_INDEXED, len(pages)):
        store.batch_put([str(i + j) for j in range(len(pages))], pages)
    store.close()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        store = open_file_store(directory, 64, NUM_INDEXED)
        assert store.batch_exists(["77777"]) == 1
        times.append(time.perf_counter() - started)
        store.close()
    return {"num_objects": NUM_INDEXED, "open_s": statistics.median(times)}


def show(result: dict[str, Any]) -> None:
    print(f"\npages of {result['page_bytes']:,} bytes, {result['bytes'] / 2**20:.0f} MiB a run, GB/s")
    for name, of in result["gb_s"].items():
        spans = {what: result["rounds_gb_s"][name][what] for what in of}
        cpu = result["cpu_s_per_gb"][name]
        figures = (
            f"{what} {of[what]:5.2f} ({min(span):.2f} .. {max(span):.2f}) {cpu[what]:.3f} CPU s/GB"
            for what, span in spans.items()
        )
        print(f"  {name:16}", "   ".join(figures))
    for name, of in result["ratios"].items():
        print(f"  {name:16} write {of['write']:.2f}   read {of['read']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256, help="bytes written and read per run, in MiB")
    parser.add_argument("--page-bytes", type=int, nargs="+", default=list(PAGE_BYTES))
    parser.add_argument("--peers", action="store_true", help="also the engines that the file store was chosen over")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; the default is the temporary directory")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    machine = describe_machine()
    print("  ".join(f"{name}={value}" for name, value in machine.items()))
    results = []
    for page_bytes in arguments.page_bytes:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            results.append(
                measure(Path(directory), page_bytes, arguments.mib << 20, arguments.rounds, peers=arguments.peers)
            )
        show(results[-1])
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        start = measure_start(Path(directory))
    print(f"\nopening a store of {start['num_objects']:,} objects: {start['open_s'] * 1000:.0f} ms")
    if arguments.json:
        command = "python " + " ".join(["benchmarks/store.py", *sys.argv[1:]])
        report = {"command": command, "machine": machine, "results": results, "start": start}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
