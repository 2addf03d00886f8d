"""The engine on one CUDA device: greedy text beside transformers, then speed. Needs a GPU; `make bench-gpu`.

    .venv/bin/python benchmarks/gpu.py [--model DIR] [--json FILE]

Scheduler and runner run in this process (no HTTP). Text is compared in float32, where near-ties do not flip; speed is bf16.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from baton.engine.models.config import load_config
from baton.engine.models.spec import ModelConfig
from baton.engine.runner import ModelRunner, run_step
from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.scheduler import Scheduler
from baton.engine.weights.loader import open_weights
from baton.engine.weights.resolve import resolve_model
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.rank import Submit
from baton.protocol.sampling import SamplingParams
from load import random_prompts

PAGE_SIZE, NUM_PAGES, PROMPT_LEN, NEW_TOKENS = 16, 8192, 512, 128


class Engine:
    """Scheduler and runner on one device, driven to the end of its requests."""

    def __init__(self, path: Path, config: ModelConfig, dtype: torch.dtype, device: str) -> None:
        shape = (NUM_PAGES, config.num_layers, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        self.runner = ModelRunner(
            config, open_weights(path, "auto", config), dtype=dtype, device=torch.device(device),
            kv=torch.zeros(shape, dtype=dtype, device=device), num_positions=4096,
        )  # fmt: skip
        self.scheduler = Scheduler(
            SchedulerConfig(context_len=4096, eos_token_ids=config.eos_token_ids),
            PrefixCache(NUM_PAGES, PAGE_SIZE),
            random.Random(0),
        )

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, *, ignore_eos: bool
    ) -> tuple[list[list[int]], dict[str, float]]:
        """Tokens of each prompt; seconds until all first tokens, and from there to the end, and tokens in that time."""
        sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self.scheduler.add(Submit(rid=str(index), input_ids=prompt, sampling=sampling), time.monotonic())
        tokens: list[list[int]] = [[] for _ in prompts]
        first_s, after = 0.0, 0
        while not self.scheduler.is_idle:
            batch = self.scheduler.schedule(time.monotonic())
            assert batch is not None
            for output in self.scheduler.apply(run_step(self.runner, batch), time.monotonic()):
                tokens[int(output.rid)] += output.token_ids
                after += len(output.token_ids) if first_s else 0
            if not first_s and all(tokens):
                first_s = time.perf_counter() - started
        self.scheduler.check_integrity()
        return tokens, {"first_s": first_s, "decode_s": time.perf_counter() - started - first_s, "decode_tokens": after}


def check_text(path: Path, config: ModelConfig, device: str) -> int:
    """Greedy tokens equal transformers' on the same device in float32; the number of tokens compared."""
    engine = Engine(path, config, torch.float32, device)
    options: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    directory = path.parent if path.suffix == ".gguf" else path
    oracle = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).to(device).eval()
    )
    prompts = [prompt[: 20 + 37 * index] for index, prompt in enumerate(random_prompts(8, 400, 5))]
    ours, _ = engine.generate(prompts, 48, ignore_eos=True)
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt], device=device)
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, min_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
        assert tokens == expected[0, len(prompt) :].tolist(), "greedy tokens differ from transformers"
    return 48 * len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="directory, .gguf file or hub id")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = resolve_model(options.model)
    config = load_config(path)
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    report: dict[str, Any] = {"command": " ".join(sys.argv), "device": name, "torch": torch.__version__}
    report["greedy_tokens_equal_to_transformers"] = check_text(path, config, options.device)
    engine = Engine(path, config, torch.bfloat16, options.device)
    for concurrency in (1, 8, 32, 128):
        engine.generate(random_prompts(concurrency, PROMPT_LEN, 1), 4, ignore_eos=True)
        _, timing = engine.generate(random_prompts(concurrency, PROMPT_LEN, 2), NEW_TOKENS, ignore_eos=True)
        report[f"x{concurrency}"] = {
            "prefill_tokens_per_s": round(concurrency * PROMPT_LEN / timing["first_s"]),
            "decode_tokens_per_s": round(timing["decode_tokens"] / timing["decode_s"]),
        }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
