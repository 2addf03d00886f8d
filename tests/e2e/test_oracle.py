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


def logits_of(oracle: Any, body: dict[str, Any], tokens: list[int]) -> torch.Tensor:
    """(T, vocabulary) float32: what transformers makes of each place of an answer, given all before it; in one pass."""
    model, tokenizer = oracle
    prompt = tokenizer(body["text"])["input_ids"]
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits


def test_float32_greedy_text_is_that_of_transformers(float32_worker: Process, oracle: Any) -> None:
    """Each token is the best one after those before it: so the whole is what greedy generation gives."""
    for body, answer in zip(bodies(), generate_all(float32_worker.url, bodies(), 5), strict=True):
        tokens = answer["output_ids"]
        assert len(tokens) == NUM_TOKENS
        assert tokens == logits_of(oracle, body, tokens).argmax(-1).tolist(), body["text"]
        assert answer["text"] == oracle[1].decode(tokens, skip_special_tokens=True)


def test_bfloat16_greedy_tokens_are_the_best_or_nearly_so_by_transformers_in_float32(
    aggregated: Process, oracle: Any
) -> None:
    for body, answer in zip(bodies(), generate_all(aggregated.url, bodies(), 5), strict=True):
        tokens = answer["output_ids"]
        logits = logits_of(oracle, body, tokens)
        gap = logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(gap.max()) < NEAR_TIE, (body["text"], int(gap.argmax()), float(gap.max()))
