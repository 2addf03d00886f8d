"""The CPU kernels and the model runner on their own, beside oneDNN, torch and the machine's limits, all in one run.

    .venv/bin/python benchmarks/kernels.py [--threads 2] [--json FILE]

Sizes are SmolLM2-135M's, weights are random (speed does not depend on them). Times are the best of several rounds, in
milliseconds for all 30 layers, because other work on the machine only ever adds to them; "floor" is bytes over the measured
memory bandwidth or FLOP over the measured rate, whichever is longer.
"""

import argparse
import json
import time
from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from baton.engine.attention.cpu import CpuAttention
from baton.engine.attention.torch_native import TorchAttention
from baton.engine.batch import ForwardBatch, SampleRow
from baton.engine.kernels.native import OUT_BF16, OUT_F32, OUT_SILU_MUL, PackedLinear, RowsStruct, load_kernels
from baton.engine.models.spec import ModelConfig
from baton.engine.runner import ModelRunner, kv_from_pages, kv_page_bytes, run_step
from baton.engine.weights.dummy_weights import dummy_weights
from baton.protocol.sampling import SamplingParams
from host import describe_machine
from machine import measure_limits

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    rope_scaling=None,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    attention_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(2,),
    bos_token_id=1,
    dtype="bfloat16",
)
LAYER_SHAPES = ((960, 576, False), (576, 576, False), (1536, 576, True), (576, 1536, False))
"""(outputs, inputs, gate and up in one) of a layer's products."""
PAGE_SIZE, CONTEXT = 16, 512
DECODE_ROWS = (1, 8, 32)


def best_ms(call: Callable[[], object], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(0.05).bfloat16()


class Linears:
    """Every linear layer of the model three times: packed for our kernels, packed by oneDNN, and plain."""

    def __init__(self, num_threads: int) -> None:
        kernels = load_kernels()
        if kernels is None:
            raise SystemExit("The C kernels are not available on this machine.")
        self.kernels, self.num_threads = kernels, num_threads
        shapes = [*LAYER_SHAPES * CONFIG.num_layers, (CONFIG.vocab_size, CONFIG.hidden_size, False)]
        self.plain = [random_bf16(n * 2 if paired else n, k) for n, k, paired in shapes]
        self.paired = [paired for _, _, paired in shapes]
        self.ours = [PackedLinear(kernels, w, paired=p) for w, p in zip(self.plain, self.paired, strict=True)]

    def pack_onednn(self, rows: int) -> None:
        self.onednn = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in self.plain]

    def run_ours(self, inputs: dict[int, torch.Tensor], head_rows: int) -> None:
        for index, linear in enumerate(self.ours):
            is_head = index == len(self.ours) - 1
            x = inputs[linear.k][:head_rows] if is_head else inputs[linear.k]
            y = torch.empty(len(x), linear.n, dtype=torch.float32 if is_head else torch.bfloat16)
            rows = RowsStruct(x.data_ptr(), x.stride(0), y.data_ptr(), linear.n, len(x))
            epilogue = OUT_F32 if is_head else OUT_SILU_MUL if self.paired[index] else OUT_BF16
            self.kernels.bt_linear(byref(linear.struct), epilogue, byref(rows), self.num_threads)

    def run_torch(
        self, product: Callable[[int, torch.Tensor], object], inputs: dict[int, torch.Tensor], head_rows: int
    ) -> None:
        for index, weight in enumerate(self.plain):
            x = inputs[weight.shape[1]]
            product(index, x[:head_rows] if index == len(self.plain) - 1 else x)

    def measure(self, rows: int, limits: dict[str, float]) -> dict[str, float]:
        """`rows` tokens through all layers, the head for at most 32 of them."""
        inputs = {k: random_bf16(rows, k) for k in (CONFIG.hidden_size, CONFIG.intermediate_size)}
        head_rows, rounds = min(rows, 32), 5 if rows > 64 else 15
        self.pack_onednn(rows)
        flop = sum(2 * w.numel() * (head_rows if w is self.plain[-1] else rows) for w in self.plain)
        weight_bytes = sum(w.numel() * 2 for w in self.plain)
        return {
            "ours": best_ms(lambda: self.run_ours(inputs, head_rows), rounds),
            "onednn_packed": best_ms(lambda: self.run_torch(self._packed_product, inputs, head_rows), rounds),
            "f_linear": best_ms(
                lambda: self.run_torch(lambda i, x: F.linear(x, self.plain[i]), inputs, head_rows), rounds
            ),
            "floor": max(flop / limits["bf16_gemm_gflop_s"], weight_bytes / limits["memory_read_gb_s"]) / 1e6,
        }

    def _packed_product(self, index: int, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.onednn[index], None, "none", [], "")
        return result


def make_batch(num_seqs: int, query_len: int, context_len: int, *, sampled: bool = False) -> ForwardBatch:
    """Every sequence has the same lengths; pages are scattered."""
    width = -(-context_len // PAGE_SIZE)
    pages = np.random.default_rng(0).permutation(num_seqs * width).astype(np.int32).reshape(num_seqs, width)
    positions = np.arange(context_len - query_len, context_len, dtype=np.int64)
    greedy = SamplingParams(temperature=0.0)
    return ForwardBatch(
        token_ids=np.random.default_rng(1).integers(0, CONFIG.vocab_size, num_seqs * query_len),
        positions=np.tile(positions, num_seqs),
        query_lens=np.full(num_seqs, query_len, np.int32),
        context_lens=np.full(num_seqs, context_len, np.int32),
        page_tables=pages,
        samples=[SampleRow(seq, greedy, context_len, 0, [], []) for seq in range(num_seqs)] if sampled else [],
    )


def measure_attention(
    num_seqs: int, query_len: int, context_len: int, num_threads: int, limits: dict[str, float]
) -> dict[str, float]:
    kernels = load_kernels()
    assert kernels is not None
    batch = make_batch(num_seqs, query_len, context_len)
    shape = (batch.page_tables.size, CONFIG.num_layers, 2, CONFIG.num_kv_heads, PAGE_SIZE, CONFIG.head_dim)
    kv = torch.randn(shape, dtype=torch.bfloat16)
    q = torch.randn(len(batch.token_ids), CONFIG.num_heads, CONFIG.head_dim, dtype=torch.bfloat16)
    results: dict[str, float] = {}
    for name, backend in (("ours", CpuAttention(kernels, kv, num_threads)), ("torch_native", TorchAttention(kv))):
        backend.plan(batch)
        rounds = 15 if name == "ours" else 3
        results[name] = best_ms(lambda b=backend: [b.forward(i, q) for i in range(CONFIG.num_layers)], rounds)  # type: ignore[misc]
    pairs = num_seqs * sum(range(context_len - query_len + 1, context_len + 1))
    flop = 4 * pairs * CONFIG.num_heads * CONFIG.head_dim * CONFIG.num_layers
    kv_bytes = num_seqs * context_len * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * CONFIG.num_layers
    results["floor"] = max(flop / limits["bf16_gemm_gflop_s"], kv_bytes / limits["memory_read_gb_s"]) / 1e6
    return results


def measure_runner(num_threads: int) -> dict[str, dict[str, float]]:
    """Whole steps of the model runner, sampling included: tokens/s of prefill (one prompt a step) and decode."""
    bf16 = torch.bfloat16
    num_pages = max(DECODE_ROWS) * (CONTEXT // PAGE_SIZE + 1)
    pages = np.zeros((num_pages, kv_page_bytes(CONFIG, bf16, PAGE_SIZE)), np.uint8)
    kv = kv_from_pages(pages, CONFIG, bf16, PAGE_SIZE)
    runner = ModelRunner(
        CONFIG, dummy_weights(CONFIG, 0), dtype=bf16, device=torch.device("cpu"), kv=kv, num_threads=num_threads
    )
    results: dict[str, dict[str, float]] = {}
    prompt = make_batch(1, CONTEXT, CONTEXT, sampled=True)
    prefill_ms = best_ms(lambda: run_step(runner, prompt), 10)
    results["prefill 512"] = {"ms": prefill_ms, "tokens_per_s": CONTEXT / prefill_ms * 1e3}
    for rows in DECODE_ROWS:
        batch = make_batch(rows, 1, CONTEXT + 1, sampled=True)
        step_ms = best_ms(lambda b=batch: run_step(runner, b), 40)  # type: ignore[misc]
        results[f"decode {rows}"] = {"ms": step_ms, "tokens_per_s": rows / step_ms * 1e3}
    return results


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    print(f"\n{title:<26}" + "".join(f"{column:>15}" for column in columns))
    for name, row in table.items():
        print(f"{name:<26}" + "".join(f"{row[column]:>15.2f}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    limits = measure_limits()
    print(f"threads {args.threads}; limits", {name: round(value, 1) for name, value in limits.items()})
    linears = Linears(args.threads)
    report: dict[str, Any] = {"machine": describe_machine(), "threads": args.threads, "limits": limits}
    report["linears_ms"] = {f"{rows} rows": linears.measure(rows, limits) for rows in (*DECODE_ROWS, 512)}
    show("all linear layers, ms", report["linears_ms"])
    cases = [(rows, 1, CONTEXT) for rows in DECODE_ROWS] + [(1, 1, 8192)] + [(1, n, n) for n in (128, 512, 2048)]
    report["attention_ms"] = {
        f"{n} x {query} of {context}": measure_attention(n, query, context, args.threads, limits)
        for n, query, context in cases
    }
    show("attention, ms", report["attention_ms"])
    report["runner"] = measure_runner(args.threads)
    show("model runner", report["runner"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
