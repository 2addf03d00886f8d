"""What several ranks on one host cost and save: memory of each, and what a collective takes.

    .venv/bin/python benchmarks/ranks.py [--tp 2] [--pp 2] [--json FILE]

- memory: peak of each rank process until the worker is ready (anonymous, and the whole resident set with mapped files), for one
  rank, for --tp ranks and for --pp stages, from safetensors and (with --gguf FILE) from GGUF;
- collectives between two processes: a meeting in shared memory, and gather and sum over TCP links and over gloo of the message sizes
  that a decoder of hidden size 576 sends (tokens x 576).
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from ctypes import byref
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from baton.engine.distributed.collective import ProcessGroupCollective, open_store
from baton.engine.distributed.exchange import MemoryOffer, fetch, reach
from baton.engine.distributed.links import LinkCollective
from baton.engine.kernels.native import load_kernels
from baton.engine.weights.demo import prepare_demo_model
from engine import free_port
from host import describe_machine, family

HIDDEN = 576
TOKENS = (1, 8, 32, 256, 2048)


def rank_peaks(model: Path, tp_size: int, pp_size: int, load_format: str) -> dict[str, Any]:
    """Peak memory in MB of each rank of a worker, sampled every 10 ms until it is ready, and the seconds to get there."""
    port = free_port()
    command = [sys.executable, "-m", "baton.cli", "engine", "--model-path", str(model), "--port", str(port),
               "--tp-size", str(tp_size), "--pp-size", str(pp_size), "--max-total-tokens", "8192", "--load-format", load_format]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"BATON_RANKS_PER_HOST": "8"}
    )
    peaks: dict[int, tuple[int, int]] = {}
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise SystemExit(f"the worker ended with {process.returncode}: {' '.join(command)}")
            for pid in family(process.pid):
                sample(pid, peaks)
            time.sleep(0.01)
        ready_s = time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(20)
    ordered = [peaks[pid] for pid in sorted(peaks)]
    return {
        "ready_s": round(ready_s, 1),
        "anonymous_mb": [round(one[0] / 1024) for one in ordered],
        "resident_mb": [round(one[1] / 1024) for one in ordered],
    }


def sample(pid: int, peaks: dict[int, tuple[int, int]]) -> None:
    """Keep the largest anonymous and resident sizes (kB) of a rank process."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"baton.engine.rank" not in command and b"distributed.follower" not in command:
            return
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return
    sizes = {key: int(value) for key, value in re.findall(r"(RssAnon|VmHWM):\s+(\d+)", status)}
    anonymous, resident = peaks.get(pid, (0, 0))
    peaks[pid] = (max(anonymous, sizes.get("RssAnon", 0)), max(resident, sizes.get("VmHWM", 0)))


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except OSError:
        return False


def time_collectives(rank: int, store_port: int, link_port: int, name: str, pipe: Connection) -> None:
    """One of two ranks; rank 0 reports microseconds."""
    torch.set_num_threads(1)
    store = open_store("127.0.0.1", store_port, is_leader=False)
    gloo = ProcessGroupCollective(store, "two", rank, 2, torch.device("cpu"), "127.0.0.1")
    links = LinkCollective(rank, {1 - rank: link_to_other(rank, link_port)})
    connection = reach(name)
    assert connection is not None
    exchange, _ = fetch(connection, rank, 2, 1, 4096)
    kernels = load_kernels()
    assert exchange is not None and kernels is not None
    figures: dict[str, Any] = {
        "meeting_us": 1e6 * timed(lambda: kernels.bt_exchange_meet(byref(exchange.struct)), 20000)
    }
    for tokens in TOKENS:
        rows = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
        partial = torch.zeros(tokens, HIDDEN)
        repeats = 2000 if tokens <= 32 else 200
        figures[str(tokens)] = {
            "tcp_gather_columns_us": 1e6 * timed(lambda rows=rows: links.gather_columns(rows, [0, 288, 576]), repeats),
            "tcp_ordered_sum_us": 1e6 * timed(lambda partial=partial: links.all_reduce(partial), repeats),
            "gloo_gather_columns_us": 1e6 * timed(lambda rows=rows: gloo.gather_columns(rows, [0, 288, 576]), repeats),
            "gloo_ordered_sum_us": 1e6 * timed(lambda partial=partial: gloo.all_reduce(partial), repeats),
            "gloo_all_reduce_us": 1e6 * timed(lambda partial=partial: gloo._group.allreduce([partial]).wait(), repeats),
        }
    pipe.send(figures)


def link_to_other(rank: int, port: int) -> socket.socket:
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as listener:
            link, _ = listener.accept()
    else:
        while True:
            try:
                link = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def timed(call: Any, repeats: int) -> float:
    """Seconds of one call, in the best of 20 runs: on a machine that others use too, the others' time is not ours."""
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(repeats // 20):
            call()
        best = min(best, (time.perf_counter() - started) / (repeats // 20))
    return best


def collectives() -> dict[str, Any]:
    store = open_store("127.0.0.1", 0, is_leader=True)
    offer = MemoryOffer(1, 4096)
    threading.Thread(target=offer.give, args=(2,), daemon=True).start()
    context = get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    link_port = free_port()
    ranks = [
        context.Process(target=time_collectives, args=(rank, store.port, link_port, offer.name, ends[rank][1]))
        for rank in range(2)
    ]
    for one in ranks:
        one.start()
    figures: dict[str, Any] = ends[0][0].recv()
    for one in ranks:
        one.join()
    offer.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--gguf", type=Path, help="a GGUF file, to measure too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"collectives_of_two": collectives(), "memory": {}}
    models = {"safetensors": prepare_demo_model()}
    if options.gguf:
        models["gguf"] = options.gguf
    for load_format, model in models.items():
        for tp_size, pp_size in ((1, 1), (options.tp, 1), (1, options.pp)):
            name = f"{load_format}-tp{tp_size}" + (f"-pp{pp_size}" if pp_size > 1 else "")
            results["memory"][name] = rank_peaks(model, tp_size, pp_size, load_format)
    report = {"command": " ".join(sys.argv), "machine": describe_machine(), "results": results}
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
