"""Layers with experts on a CPU: the C kernels beside torch, in one run.

    .venv/bin/python benchmarks/experts.py [--layers 1] [--threads 2] [--json FILE]

Layers are those of Qwen3-30B-A3B (128 experts, 8 a token), weights are random, the vocabulary is small so that the head counts for
little. Times are the best of several steps, because other work on the machine only ever adds to them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from baton.engine.batch import ForwardBatch, SampleRow
from baton.engine.models.spec import ExpertsConfig, ModelConfig
from baton.engine.runner import ModelRunner, kv_from_pages, kv_page_bytes, run_step
from baton.engine.weights.dummy_weights import dummy_weights
from baton.protocol.sampling import SamplingParams
from host import describe_machine

PAGE_SIZE, CONTEXT = 16, 512
STEPS = {"decode 1": (1, 1), "decode 8": (8, 1), "decode 32": (32, 1), "prefill 128": (1, 128), "prefill 512": (1, 512)}
"""Name -> (sequences, new tokens of each)."""


def config_of(num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3MoeForCausalLM",
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=1024,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attention_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=True,
        eos_token_ids=(),
        bos_token_id=None,
        dtype="bfloat16",
        experts=ExpertsConfig(128, 8, 768, True, tuple(range(num_layers))),
    )


def make_batch(num_seqs: int, new_tokens: int) -> ForwardBatch:
    pages = CONTEXT // PAGE_SIZE
    count = num_seqs * new_tokens
    return ForwardBatch(
        token_ids=np.random.default_rng(0).integers(0, 1024, count),
        positions=np.tile(np.arange(CONTEXT - new_tokens, CONTEXT), num_seqs),
        query_lens=np.full(num_seqs, new_tokens, np.int32),
        context_lens=np.full(num_seqs, CONTEXT, np.int32),
        page_tables=np.arange(num_seqs * pages, dtype=np.int32).reshape(num_seqs, pages),
        samples=[
            SampleRow(seq, SamplingParams(temperature=0.0), CONTEXT, 0, [], []) for seq in range(num_seqs)
        ],
    )  # fmt: skip


def best_ms(runner: ModelRunner, batch: ForwardBatch) -> float:
    run_step(runner, batch)
    times = []
    ends = time.perf_counter() + 2.0
    while len(times) < 3 or time.perf_counter() < ends:
        started = time.perf_counter()
        run_step(runner, batch)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, cpu = config_of(options.layers), torch.device("cpu")
    found: dict[str, dict[str, float]] = {name: {} for name in STEPS}
    for backend in ("cpu", "torch_native"):
        pages = np.zeros((32 * CONTEXT // PAGE_SIZE, kv_page_bytes(config, torch.bfloat16, PAGE_SIZE)), np.uint8)
        runner = ModelRunner(
            config,
            dummy_weights(config),
            dtype=torch.bfloat16,
            device=cpu,
            kv=kv_from_pages(pages, config, torch.bfloat16, PAGE_SIZE),
            attention_backend=backend,
            num_threads=options.threads,
        )
        for name, shape in STEPS.items():
            found[name][backend] = best_ms(runner, make_batch(*shape))
        del runner
    print(f"{options.layers} layer(s), {options.threads} threads; ms for a step")
    for name, times in found.items():
        print(f"{name:12} C {times['cpu']:8.2f}  torch {times['torch_native']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "ms": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
