"""What this machine can do at most, and what that means for a model: measured in the same run as everything else."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "commit": commit,
    }


def median_s(call: Callable[[], object], repeats: int = 9) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_limits() -> dict[str, float]:
    """Memory read bandwidth (GB/s) and bf16 GEMM rate (GFLOP/s, M=512, through oneDNN), all cores."""
    big = torch.ones(128 << 20, dtype=torch.float32)
    read_s = median_s(lambda: big.sum())
    a, b = torch.randn(512, 1536, dtype=torch.bfloat16), torch.randn(3072, 1536, dtype=torch.bfloat16)
    gemm_s = median_s(lambda: torch.nn.functional.linear(a, b), 21)
    return {
        "memory_read_gb_s": big.numel() * 4 / read_s / 1e9,
        "bf16_gemm_gflop_s": 2 * 512 * 1536 * 3072 / gemm_s / 1e9,
    }


def roofline(model: Path, limits: dict[str, float], prompt_len: int, concurrency: tuple[int, ...]) -> dict[str, Any]:
    """Tokens/s if linear layers and KV reads ran at the measured limits and nothing else took time (bf16)."""
    c = json.loads((model / "config.json").read_text())
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    per_layer = (
        c["hidden_size"] * head_dim * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
        + 3 * c["hidden_size"] * c["intermediate_size"]
    )
    layers, head = c["num_hidden_layers"] * per_layer, c["hidden_size"] * c["vocab_size"]
    kv_bytes = c["num_hidden_layers"] * 2 * c["num_key_value_heads"] * head_dim * 2
    flops, bandwidth = limits["bf16_gemm_gflop_s"] * 1e9, limits["memory_read_gb_s"] * 1e9
    attention_flops = 2 * c["num_hidden_layers"] * c["num_attention_heads"] * head_dim * prompt_len
    result: dict[str, Any] = {}
    for n in concurrency:
        compute_s = 2 * n * (layers + head) / flops
        memory_s = (2 * (layers + head) + n * kv_bytes * prompt_len) / bandwidth
        result[str(n)] = {
            "prefill_tokens_per_s": flops / (2 * layers + attention_flops),
            "decode_tokens_per_s": n / max(compute_s, memory_s),
        }
    return result


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    members = {pid}
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def memory_mb(pid: int) -> float:
    """Resident memory (MB) of a process and its descendants now; shared pages count once for each process."""
    total = 0
    for member in family(pid):
        try:
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total / 1e6


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its living descendants so far."""
    ticks = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_quiet(limit_s: float = 10.0, share: float = 0.05) -> float:
    """Wait until the cores have been idle for a third of a second: what the last server still does (spinning threads,
    writing logs) must not be charged to the next. Returns the busy share that was left."""
    deadline, busy = time.monotonic() + limit_s, 1.0
    while time.monotonic() < deadline:
        before = _cpu_ticks()
        time.sleep(0.33)
        after = _cpu_ticks()
        busy = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
        if busy < share:
            break
    return busy


def _cpu_ticks() -> tuple[int, int]:
    """(all, idle) clock ticks of all cores since boot."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]
