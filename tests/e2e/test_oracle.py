"""The demo model through the whole worker, beside transformers running the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.e2e.clients import generate_all
from tests.e2e.service import Process, running

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at a lower temperature on a mountain because",
    "1, 2, 3, 4, 5, 6, " * 60,
)
NUM_TOKENS = 40
NEAR_TIE = 0.25
"""Logits in bfloat16 carry 8 bits; a choice this close to the best one (float32 logits of about 20) may go either way."""


@pytest.fixture(scope="module")
def oracle(demo_model: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def float32_worker(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(demo_model, tmp_path_factory.mktemp("float32")) as service:
        worker = service.worker("float32", "null", "--dtype", "float32")
        service.wait_ready()
        yield worker


def bodies() -> list[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    return [{"text": prompt, "sampling_params": sampling} for prompt in PROMPTS]


def test_float32_greedy_text_is_that_of_transformers(float32_worker: Process, oracle: Any) -> None:
    model, tokenizer = oracle
    for body, answer in zip(bodies(), generate_all(float32_worker.url, bodies(), 5), strict=True):
        ids = torch.tensor([tokenizer(body["text"])["input_ids"]])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert answer["output_ids"] == expected, body["text"]
        assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_bfloat16_greedy_tokens_are_the_best_or_nearly_so_by_transformers_in_float32(
    aggregated: Process, oracle: Any
) -> None:
    model, tokenizer = oracle
    for body, answer in zip(bodies(), generate_all(aggregated.url, bodies(), 5), strict=True):
        prompt, tokens = tokenizer(body["text"])["input_ids"], answer["output_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        gap = logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(gap.max()) < NEAR_TIE, (body["text"], int(gap.argmax()), float(gap.max()))
