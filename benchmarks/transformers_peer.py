"""transformers as a peer: eager bf16 with sdpa, one batch at a time. Prints one JSON line. Used by engine.py."""

import json
import sys
import time
from pathlib import Path

import torch
import transformers

from load import random_prompts


@torch.inference_mode()
def main() -> None:
    path, prompt_len, new_tokens, *concurrency = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(Path(path), dtype=torch.bfloat16).eval()
    figures: dict[str, dict[str, float]] = {}
    for n in map(int, concurrency):
        ids = torch.tensor(random_prompts(n, int(prompt_len), n))
        model(ids[:1, :8])
        started = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - started
        steps = min(int(new_tokens), 24 if n > 1 else 64)
        started = time.perf_counter()
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        figures[str(n)] = {
            "prefill_tokens_per_s": n * int(prompt_len) / prefill_s,
            "decode_tokens_per_s": n * steps / (time.perf_counter() - started),
        }
    print(json.dumps(figures))


main()
