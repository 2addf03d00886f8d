"""What this machine can do at most, and what that means for a model: measured in the same run as everything else."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
