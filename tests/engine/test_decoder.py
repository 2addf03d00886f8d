"""The decoder against transformers: prefill, chunks, decode, prefix hits, in fp32 and bf16, in torch and in C kernels."""

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import make_decoder, run_steps
from tests.fakes.models import FAMILIES, hf_model
from tests.fakes.oracle import assert_logits_close, hf_rounded, oracle_logits
from transformers import PreTrainedModel

from baton.engine.kernels.native import load_kernels

KINDS = ("torch-float32", "torch-bfloat16", "kernels")
LENGTHS = (70, 1, 37, 150)
STEPS = {
    "prefill": [[Query(seq, 0, length) for seq, length in enumerate(LENGTHS)]],
    "one by one": [[Query(seq, 0, length)] for seq, length in enumerate(LENGTHS)],
    "chunks": [
        [Query(0, 0, 32), Query(1, 0, 1)],
        [Query(3, 0, 129), Query(2, 0, 5)],
        [Query(0, 32, 33), Query(2, 5, 37), Query(3, 129, 150)],
        [Query(0, 33, 70)],
    ],
    "decode": [
        [Query(seq, 0, max(1, length - 8)) for seq, length in enumerate(LENGTHS)],
        *([Query(seq, LENGTHS[seq] - left, LENGTHS[seq] - left + 1) for seq in (0, 2, 3)] for left in range(8, 0, -1)),
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return hf_model(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "kernels" and load_kernels() is None:
        pytest.skip("no C kernels on this machine")
    return str(request.param)


def random_tokens(lengths: tuple[int, ...], vocab_size: int = 256) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_logits_are_those_of_transformers(model: PreTrainedModel, kind: str, steps: list[list[Query]]) -> None:
    tokens = random_tokens(LENGTHS)
    sequences = PagedSequences(tokens, page_size=16)
    found = run_steps(make_decoder(kind, model, sequences.num_pages, 16), sequences, steps)
    for seq, logits in found.items():
        assert_logits_close(logits, tokens[seq], model, kind)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_prefix_pages_of_another_sequence_serve_as_own(kind: str, page_size: int) -> None:
    model = hf_model("qwen3")
    first = random_tokens((96,))[0]
    second = first[:48] + random_tokens((60,))[0]
    sequences = PagedSequences([first, second], page_size, shared={1: (0, 48 // page_size)})
    decoder = make_decoder(kind, model, sequences.num_pages, page_size)
    steps = [[Query(0, 0, 96)], [Query(1, 48, 108)]]
    found = run_steps(decoder, sequences, steps)[1]
    assert_close_tail(found, second, model, kind)


def assert_close_tail(found: torch.Tensor, tokens: list[int], model: PreTrainedModel, kind: str) -> None:
    """As `assert_logits_close` for the last rows only."""
    oracle = oracle_logits(hf_rounded(model) if kind != "torch-float32" else model, [tokens], torch.float32)[0]
    tolerance = 2e-4 if kind == "torch-float32" else 0.03
    torch.testing.assert_close(found, oracle[-len(found) :], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_embeddings(scaling: dict[str, float]) -> None:
    model = hf_model("llama", rope_parameters={"rope_theta": 10000.0} | scaling)
    tokens = random_tokens((200,))
    sequences = PagedSequences(tokens, page_size=16)
    found = run_steps(make_decoder("torch-float32", model, sequences.num_pages, 16), sequences, [[Query(0, 0, 200)]])
    assert_logits_close(found[0], tokens[0], model, "torch-float32")
