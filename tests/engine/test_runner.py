"""The model runner as the scheduler sees it: tokens and log-probabilities out of batches, weights that do not fit refused."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import CPU, baton_config
from tests.fakes.models import hf_model
from tests.fakes.thread_ranks import ThreadRanks
from transformers import PreTrainedModel

from baton.engine.batch import PromptLogprobsRow, SampleRow
from baton.engine.errors import ModelError
from baton.engine.kernels.native import load_kernels
from baton.engine.models.shard import Shard
from baton.engine.runner import ModelRunner, kv_from_pages, kv_page_bytes, run_step
from baton.protocol.sampling import SamplingParams

PAGE_SIZE = 16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hf_model("llama")


def make_runner(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    weights: Iterator[tuple[str, torch.Tensor]] | None = None,
) -> ModelRunner:
    config = baton_config(model)
    pages = np.zeros((64, kv_page_bytes(config, dtype, PAGE_SIZE)), np.uint8)
    return ModelRunner(
        config,
        weights or iter(model.state_dict().items()),
        dtype=dtype,
        device=CPU,
        kv=kv_from_pages(pages, config, dtype, PAGE_SIZE),
        attention_backend=backend,
    )


def greedy(seq_idx: int, position: int) -> SampleRow:
    return SampleRow(seq_idx, SamplingParams(temperature=0.0), position, 0, [], [])


def generate(runner: ModelRunner, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations, all prompts together."""
    sequences = PagedSequences([prompt + [0] * num_tokens for prompt in prompts], PAGE_SIZE)
    done = [0] * len(prompts)
    stops = [len(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        queries = [Query(seq, done[seq], stops[seq]) for seq in range(len(prompts))]
        samples = [greedy(seq, stops[seq]) for seq in range(len(prompts))]
        output = run_step(runner, sequences.batch(queries, samples=samples))
        for seq, token_id in enumerate(output.next_token_ids):
            done[seq], stops[seq] = stops[seq], stops[seq] + 1
            sequences.tokens[seq][stops[seq] - 1] = token_id
    return [ids[len(prompt) :].tolist() for ids, prompt in zip(sequences.tokens, prompts, strict=True)]


def test_greedy_tokens_are_those_of_transformers(model: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [9] * 40, list(range(100))]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(done[0, len(prompt) :].tolist())
    assert generate(make_runner(model), prompts, 12) == expected


def test_only_sampled_rows_are_drawn(model: PreTrainedModel) -> None:
    """A chunk that does not end its prompt has no sample."""
    runner = make_runner(model)
    sequences = PagedSequences([[5] * 20, [6] * 20, [7] * 20], PAGE_SIZE)
    queries = [Query(seq, 0, 20) for seq in range(3)]
    every = run_step(runner, sequences.batch(queries, samples=[greedy(seq, 20) for seq in range(3)]))
    one = run_step(runner, sequences.batch(queries, samples=[greedy(1, 20)]))
    none = run_step(runner, sequences.batch(queries))
    assert one.next_token_ids == every.next_token_ids[1:2]
    assert none.next_token_ids == [] and none.logprobs == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs_over_chunks(model: PreTrainedModel, dtype: torch.dtype) -> None:
    tokens = np.random.default_rng(3).integers(0, 256, 200).tolist()
    sequences = PagedSequences([[1] * 7, tokens], PAGE_SIZE)
    runner = make_runner(model, dtype=dtype)
    first = PromptLogprobsRow(1, 1, tokens[1:91])
    second = PromptLogprobsRow(0, 91, tokens[91:200], top_logprobs_num=2)
    queries = [Query(0, 0, 7), Query(1, 0, 90)]
    found = run_step(runner, sequences.batch(queries, prompt_logprobs=[first])).prompt_logprobs[0]
    found += run_step(runner, sequences.batch([Query(1, 90, 200)], prompt_logprobs=[second])).prompt_logprobs[0]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert [row.token_id for row in found] == tokens[1:]
    values = [expected[position - 1, tokens[position]].item() for position in range(1, 200)]
    np.testing.assert_allclose([row.logprob for row in found], values, atol=2e-4 if dtype == torch.float32 else 0.05)
    assert [len(row.top) for row in found[90:]] == [2] * 109


def test_kernels_and_torch_agree_on_greedy_text(model: PreTrainedModel) -> None:
    if load_kernels() is None:
        pytest.skip("no C kernels on this machine")
    fast = make_runner(model, dtype=torch.bfloat16, backend="cpu")
    assert fast.is_batch_invariant and fast.attention_backend == "cpu"
    slow = make_runner(model, dtype=torch.bfloat16, backend="torch_native")
    assert not slow.is_batch_invariant and slow.attention_backend == "torch_native"
    assert generate(fast, [[5, 6, 7]], 4) == generate(slow, [[5, 6, 7]], 4)


def test_kernels_refuse_float32_by_name(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="--attention-backend cpu needs --dtype bfloat16"):
        make_runner(model, backend="cpu")


def test_unknown_backend_is_refused_by_name(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="--attention-backend flashy is unknown; known: auto, cpu, torch_native"):
        make_runner(model, backend="flashy")


def test_kv_memory_of_the_wrong_size_is_refused(model: PreTrainedModel) -> None:
    config = baton_config(model)
    pages = np.zeros((4, kv_page_bytes(config, torch.bfloat16, PAGE_SIZE)), np.uint8)
    with pytest.raises(ValueError, match="do not hold"):
        kv_from_pages(pages, config, torch.float32, PAGE_SIZE)


def changed(model: PreTrainedModel, name: str, tensor: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = dict(model.state_dict())
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return iter(tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_do_not_fit_are_named(model: PreTrainedModel, dtype: torch.dtype) -> None:
    gate, bias = "model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.gate_proj.bias"
    with pytest.raises(ModelError, match=rf"missing tensor {gate}"):
        make_runner(model, dtype=dtype, weights=changed(model, gate, None))
    with pytest.raises(ModelError, match=rf"{gate} has shape \[8, 8\], the config implies \[96, 64\]"):
        make_runner(model, dtype=dtype, weights=changed(model, gate, torch.zeros(8, 8)))
    with pytest.raises(ModelError, match=rf"{bias} is not part of a LlamaForCausalLM"):
        make_runner(model, dtype=dtype, weights=changed(model, bias, torch.zeros(96)))
    twice = [*model.state_dict().items(), (gate, model.state_dict()[gate])]
    with pytest.raises(ModelError, match=rf"{gate} was given twice"):
        make_runner(model, dtype=dtype, weights=iter(twice))


def test_rotary_buffers_of_old_checkpoints_are_ignored(model: PreTrainedModel) -> None:
    make_runner(model, weights=changed(model, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)))


def test_spans_of_ranks_cover_everything_once() -> None:
    for total in (1, 2, 7, 9, 64):
        for size in range(1, 6):
            spans = [Shard(rank, size, ThreadRanks(size).of_rank(rank)).span(total) for rank in range(size)]
            assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
            assert spans[0][0] == 0 and spans[-1][1] == total
