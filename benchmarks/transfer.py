"""Hand-over of KV pages between two processes, beside what plain Python reaches on this machine in the same run.

    .venv/bin/python benchmarks/transfer.py --json benchmarks/results/transfer.json

Every method moves the same 256 MiB from the pool of one process to the pool of another (both touched, huge pages where the
system allows them), once per round; methods take turns, so that all of them meet the same noise; figures are medians.
- shm, tcp: ours, from `send` to the `Sent` event: checksums made and verified, metadata handed over, acknowledged.
- plain shm: a pipeline of four 1 MiB slots in shared memory, copied in by the sender and out by the receiver, with tokens
  over a socket pair; no checksum. "hot" copies from and to one and the same 1 MiB, so that no pool is touched at all.
- plain tcp: `sendall` of 1 MiB pieces, `recv_into` the pool, over loopback; no checksum.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray

from baton.kvcache.page_memory import PageMemory
from baton.transfer.base import Bootstrapped, DecodeTransfer, FirstToken, PageLayout, PrefillTransfer, Sent
from baton.transfer.bootstrap import bootstrap_app
from baton.transfer.config import TransferConfig
from baton.transfer.decode import open_decode_transfer
from baton.transfer.prefill import open_prefill_transfer
from host import describe_machine

Bytes = NDArray[np.uint8]

SLOT_BYTES, NUM_SLOTS = 1 << 20, 4
PAGE_SIZES = (368_640, 1 << 20)
"""16 tokens of SmolLM2-135M in bf16; a page of 1 MiB."""
RATIOS = (("shm", "plain shm"), ("shm", "plain shm, hot"), ("tcp", "plain tcp"))
SEED = 0
DEADLINE_S = 60.0


def layout_of(page_bytes: int) -> PageLayout:
    return PageLayout("benchmark", "uint8", 16, 1, 1, page_bytes // 32, page_bytes)


def next_event(transfer: DecodeTransfer | PrefillTransfer, wake: threading.Event) -> Any:
    while not (events := transfer.poll()):
        if not wake.wait(DEADLINE_S):
            raise TimeoutError("the transfer says nothing")
        wake.clear()
    return events[0]


def receiver(pipe: Connection, shape: tuple[int, int], slots_name: str, tokens: socket.socket, port: int) -> None:
    """The child process: per command (method, bootstrap port or number of bytes) receives once into its pool and answers
    with a sum over the pool. A command of None ends it."""
    memory = PageMemory.create(*shape)
    memory.array[:] = 1
    flat = memory.array.reshape(-1)
    wake = threading.Event()
    transfers = {
        name: open_decode_transfer(memory, layout_of(shape[1]), TransferConfig(backend=backend), host="", wake=wake.set)
        for name, backend in (("shm", "auto"), ("tcp", "tcp"))
    }
    shared = SharedMemory(slots_name)
    slots: Bytes = np.frombuffer(shared.buf, dtype=np.uint8)[: NUM_SLOTS * SLOT_BYTES].reshape(NUM_SLOTS, SLOT_BYTES)
    stream = socket.create_connection(("127.0.0.1", port))
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        method, room, argument = command
        cpu_s = time.process_time()
        if method in transfers:
            transfers[method].receive(room, "127.0.0.1", argument, 0, range(shape[0]), DEADLINE_S)
            event = next_event(transfers[method], wake)
            assert transfers[method].session_modes() == {(("127.0.0.1", argument), 0): method}, event
        elif method == "plain tcp":
            view = memoryview(flat.data)[:argument]
            while view:
                view = view[stream.recv_into(view) :]
        else:
            copy_out(slots, tokens, flat[:argument], hot=method == "plain shm, hot")
        pipe.send(time.process_time() - cpu_s)
        pipe.send(int(flat[::4093].sum(dtype=np.int64)))
        flat[:] = 1
    for transfer in transfers.values():
        transfer.close()
    del slots
    shared.close()


def copy_out(slots: Bytes, tokens: socket.socket, target: Bytes, *, hot: bool) -> None:
    for i in range(len(target) // SLOT_BYTES):
        tokens.recv(1)
        start = 0 if hot else i * SLOT_BYTES
        np.copyto(target[start : start + SLOT_BYTES], slots[i % NUM_SLOTS])
        tokens.send(b"x")


class Bench:
    """One page size: the sender's pool, its transfer, and the child process that receives."""

    def __init__(self, page_bytes: int, total_bytes: int, bootstrap_port: int) -> None:
        shape = (total_bytes // page_bytes, page_bytes)
        self.num_bytes = shape[0] * page_bytes
        self.plain_bytes = self.num_bytes // SLOT_BYTES * SLOT_BYTES
        self._memory = PageMemory.create(*shape)
        self._memory.array[:] = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
        self._flat = self._memory.array.reshape(-1)
        self._wake = threading.Event()
        self._port = bootstrap_port
        self._transfer = open_prefill_transfer(
            self._memory,
            layout_of(page_bytes),
            TransferConfig(),
            host="127.0.0.1",
            bootstrap_url=f"http://127.0.0.1:{bootstrap_port}",
            wake=self._wake.set,
        )
        assert self._transfer.wait_registered(DEADLINE_S)
        self._shared = SharedMemory(create=True, size=NUM_SLOTS * SLOT_BYTES)
        self._slots = np.frombuffer(self._shared.buf, dtype=np.uint8)[: NUM_SLOTS * SLOT_BYTES]
        self._slots = self._slots.reshape(NUM_SLOTS, SLOT_BYTES)
        self._tokens, theirs = socket.socketpair()
        self._rooms = iter(range(1, 1 << 30))
        self._child_cpu_s = 0.0
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            arguments = (child_pipe, shape, self._shared.name, theirs, listener.getsockname()[1])
            self._child = context.Process(target=receiver, args=arguments)
            self._child.start()
            self._stream, _ = listener.accept()
        assert self._pipe.recv() == "ready"

    def run(self, method: str) -> tuple[float, float]:
        """Move the pool once; GB/s, and CPU seconds of both processes per GB. AssertionError when other bytes arrived."""
        cpu_s = time.process_time()
        if method in ("shm", "tcp"):
            num_bytes, duration_s = self.num_bytes, self._run_ours(method)
        else:
            num_bytes, duration_s = self.plain_bytes, self._run_plain(method)
        cpu_s = time.process_time() - cpu_s + self._child_cpu_s
        arrived = self._pipe.recv()
        if method != "plain shm, hot":
            expected = np.ones(len(self._flat), dtype=np.uint8)
            expected[:num_bytes] = self._flat[:num_bytes]
            assert arrived == int(expected[::4093].sum(dtype=np.int64)), f"{method}: other bytes arrived"
        return num_bytes / duration_s / 1e9, cpu_s / num_bytes * 1e9

    def _run_ours(self, method: str) -> float:
        room = next(self._rooms)
        self._transfer.expect(room, DEADLINE_S)
        self._pipe.send((method, room, self._port))
        event = next_event(self._transfer, self._wake)
        assert isinstance(event, Bootstrapped), event
        started = time.perf_counter()
        self._transfer.send(room, 0, range(len(self._memory.array)), FirstToken(token_id=1, cached_tokens=0))
        event = next_event(self._transfer, self._wake)
        duration_s = time.perf_counter() - started
        assert isinstance(event, Sent), event
        self._child_cpu_s = self._pipe.recv()
        return duration_s

    def _run_plain(self, method: str) -> float:
        self._pipe.send((method, 0, self.plain_bytes))
        started = time.perf_counter()
        if method == "plain tcp":
            self._stream.sendall(self._flat[: self.plain_bytes].data)
        else:
            self._copy_in(hot=method == "plain shm, hot")
        self._child_cpu_s = self._pipe.recv()
        return time.perf_counter() - started

    def _copy_in(self, *, hot: bool) -> None:
        num_free = NUM_SLOTS
        for i in range(self.plain_bytes // SLOT_BYTES):
            if num_free == 0:
                num_free += len(self._tokens.recv(NUM_SLOTS))
            start = 0 if hot else i * SLOT_BYTES
            np.copyto(self._slots[i % NUM_SLOTS], self._flat[start : start + SLOT_BYTES])
            num_free -= 1
            self._tokens.send(b"x")
        while num_free < NUM_SLOTS:
            num_free += len(self._tokens.recv(NUM_SLOTS))

    def close(self) -> None:
        self._pipe.send(None)
        self._child.join(DEADLINE_S)
        self._transfer.close()
        self._stream.close()
        self._tokens.close()
        del self._slots
        self._shared.close()
        self._shared.unlink()


def serve_bootstrap() -> int:
    """A bootstrap server of its own (each page size registers anew and replaces the entry); returns the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(bootstrap_app(), log_level="error"))
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    return int(listener.getsockname()[1])


def measure(page_bytes: int, total_bytes: int, rounds: int) -> dict[str, Any]:
    bench = Bench(page_bytes, total_bytes, serve_bootstrap())
    methods = ("shm", "plain shm", "plain shm, hot", "tcp", "plain tcp")
    rates: dict[str, list[float]] = {method: [] for method in methods}
    cpu: dict[str, list[float]] = {method: [] for method in methods}
    try:
        for method in methods:
            bench.run(method)  # Maps, connects, touches the memory.
        for _ in range(rounds):
            for method in methods:
                rate, cpu_s = bench.run(method)
                rates[method].append(rate)
                cpu[method].append(cpu_s)
    finally:
        bench.close()
    medians = {method: statistics.median(values) for method, values in rates.items()}
    ratios = {f"{ours} / {plain}": medians[ours] / medians[plain] for ours, plain in RATIOS}
    return {
        "page_bytes": page_bytes,
        "bytes": bench.num_bytes,
        "gb_s": medians,
        "cpu_s_per_gb": {method: statistics.median(values) for method, values in cpu.items()},
        "ratios": ratios,
        "rounds_gb_s": rates,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\npages of {result['page_bytes']:,} bytes, {result['bytes'] / 2**20:.0f} MiB a run")
    for method, median in result["gb_s"].items():
        values, cpu_s = result["rounds_gb_s"][method], result["cpu_s_per_gb"][method]
        print(f"  {method:16} {median:6.2f} GB/s   ({min(values):.2f} .. {max(values):.2f})   {cpu_s:.3f} CPU s/GB")
    for name, ratio in result["ratios"].items():
        print(f"  {name:24} {ratio:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256, help="bytes moved per run, in MiB")
    parser.add_argument("--page-bytes", type=int, nargs="+", default=list(PAGE_SIZES))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    machine = describe_machine()
    print("  ".join(f"{name}={value}" for name, value in machine.items()))
    results = []
    for page_bytes in arguments.page_bytes:
        results.append(measure(page_bytes, arguments.mib << 20, arguments.rounds))
        show(results[-1])
    if arguments.json:
        command = "python " + " ".join(["benchmarks/transfer.py", *sys.argv[1:]])
        arguments.json.write_text(json.dumps({"command": command, "machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
