"""The sampler against exact probabilities and transformers' logits processors, and alone against in a batch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.engine.batch import PromptLogprobsRow, SampleRow
from baton.engine.sampling.distribution import Distribution, kept_tokens, top_ids
from baton.engine.sampling.draws import uniform
from baton.engine.sampling.sampler import Sampler
from baton.protocol.sampling import SamplingParams

SAMPLER = Sampler()


def row(**kw: Any) -> SampleRow:
    names = {*SampleRow.__struct_fields__}
    own = {name: kw.pop(name) for name in list(kw) if name in names}
    defaults = {"seq_idx": 0, "position": 10, "seed": 1, "prompt_ids": [1, 2, 3], "output_ids": []}
    return SampleRow(sampling=SamplingParams(**kw), **(defaults | own))


def random_logits(shape: tuple[int, ...], seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits: torch.Tensor, num: int, **kw: Any) -> NDArray[np.int64]:
    """`num` tokens for one row of logits, at positions 0.. of one seed."""
    chosen = [SAMPLER.sample(logits[None], [row(position=position, **kw)])[0][0] for position in range(num)]
    return np.asarray(chosen)


# Draws


def test_uniforms_look_uniform_over_positions_and_over_seeds() -> None:
    """Kolmogorov-Smirnov at failure probability 1e-6 each; seeds are fixed, so this either holds or does not."""
    bound = np.sqrt(-np.log(1e-6 / 2) / 2 / 20_000)
    for values in (
        [uniform(7, position) for position in range(20_000)],
        [uniform(seed, 0) for seed in range(20_000)],
        [uniform(seed - 10_000, 5) for seed in range(20_000)],
    ):
        steps = np.arange(1, 20_001) / 20_000
        assert np.abs(np.sort(values) - steps).max() < bound
        assert np.abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04


def test_a_draw_is_a_constant_of_seed_and_position() -> None:
    assert uniform(42, 0) == uniform(42, 0)
    assert uniform(42, 0) != uniform(42, 1)
    assert uniform(42, 1) != uniform(43, 0)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
    # Recorded: workers of different versions must go on with each other's requests.
    assert uniform(42, 7) == RECORDED_DRAW


RECORDED_DRAW = 0.029079585975335775


def chi_square(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """In standard deviations above the mean, by Wilson and Hilferty's cube root."""
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0
    common = expected >= 5
    rest_counts, rest_expected = counts[~common].sum(), expected[~common].sum()
    statistic = float((((counts - expected) ** 2)[common] / expected[common]).sum())
    degrees = int(common.sum()) - 1
    if rest_expected >= 5:
        statistic += (rest_counts - rest_expected) ** 2 / rest_expected
        degrees += 1
    cube_root = (statistic / degrees) ** (1 / 3)
    return float((cube_root - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"logit_bias": {"3": 4.0}, "frequency_penalty": 1.0, "output_ids": [5, 5, 6]},
    ],
)
def test_draws_follow_the_exact_distribution(options: dict[str, Any]) -> None:
    """4,000 draws over 600 tokens; a correct sampler fails this with probability 3e-7 (5 standard deviations)."""
    logits = random_logits((600,), seed=3)
    exact = exact_probabilities(logits, row(**options))
    counts = np.bincount(draws(logits, 4000, seed=11, **options), minlength=600)
    assert chi_square(counts, exact) < 5


def exact_probabilities(logits: torch.Tensor, sample_row: SampleRow) -> NDArray[np.float64]:
    """Written independently in float64: penalties, temperature, then each filter on the whole distribution."""
    sampling = sample_row.sampling
    values = logits.double()
    for token in sample_row.output_ids:
        values[token] -= sampling.frequency_penalty
    for token in set(sample_row.output_ids):
        values[token] -= sampling.presence_penalty
    for key, bias in (sampling.logit_bias or {}).items():
        values[int(key)] += bias
    scaled = values / sampling.temperature
    filtered = intersection_of_warpers(scaled, sampling)
    return torch.softmax(filtered, -1).numpy()


def intersection_of_warpers(scaled: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    warpers: list[Any] = []
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    out = scaled.clone()
    for warper in warpers:
        alone = warper(torch.zeros((1, 1), dtype=torch.long), scaled[None].clone())[0]
        out[alone == -torch.inf] = -torch.inf
    return out


# Filters, penalties


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10_000},
        {"top_p": 0.05},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7},
        {"top_k": 20, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_filters_keep_what_transformers_keeps(scale: float, options: dict[str, Any]) -> None:
    for seed in range(5):
        logits = random_logits((1000,), seed, scale)
        sampling = SamplingParams(temperature=0.8, **options)
        theirs = np.flatnonzero(intersection_of_warpers(logits.double() / 0.8, sampling).isfinite().numpy())
        distribution = Distribution(logits.numpy(), 0.8)
        kept = kept_tokens(distribution.weights, distribution.total, sampling)
        assert np.array_equal(np.arange(1000) if kept is None else kept, theirs)


def test_among_equals_the_lower_id_stays() -> None:
    weights = np.ones(6, np.float32)
    assert kept_tokens(weights, 6.0, SamplingParams(top_k=4)).tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert kept_tokens(weights, 6.0, SamplingParams(top_p=0.5)).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert top_ids(weights, 2).tolist() == [0, 1]
    assert SAMPLER.sample(torch.zeros(1, 9), [row(temperature=0.0)])[0] == [0]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_kept_tokens_are_the_shortest_likeliest_prefix(data: st.DataObject) -> None:
    """Against a direct reading of the definition, with many equal weights."""
    levels = data.draw(st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), min_size=1, max_size=40))
    weights = np.asarray([*levels, 1.0], np.float32)
    top_k = data.draw(st.sampled_from([-1, 1, 2, 5, 30]))
    top_p = data.draw(st.sampled_from([1.0, 0.3, 0.75, 0.9]))
    min_p = data.draw(st.sampled_from([0.0, 0.2, 0.5]))
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    expected, mass = [], 0.0
    for rank, token in enumerate(order):
        if (
            (top_k > 0 and rank >= top_k)
            or (top_p < 1 and mass >= top_p * weights.sum())
            or weights[token] < np.float32(min_p)
        ):
            break
        expected.append(token)
        mass += float(weights[token])
    kept = kept_tokens(weights, float(weights.sum()), SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))
    assert (list(range(len(weights))) if kept is None else kept.tolist()) == sorted(expected)


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output() -> None:
    logits = random_logits((1, 50))
    prompt, output = [3, 4, 4], [7, 9]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    penalised = row(temperature=0.0, repetition_penalty=1.3, prompt_ids=prompt, output_ids=output, **LOGPROBS)
    entry = SAMPLER.sample(logits, [penalised])[1][0]
    assert entry is not None
    expected = torch.log_softmax(theirs.double(), -1)[0]
    assert [token for token, _ in entry.requested] == list(range(50))
    np.testing.assert_allclose([value for _, value in entry.requested], expected, rtol=1e-5)


LOGPROBS: dict[str, Any] = {"return_logprob": True, "token_ids_logprob": tuple(range(50))}


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    logits = random_logits((1, 50))
    penalised = row(
        temperature=0.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        prompt_ids=[8, 8],
        output_ids=[7, 7, 9],
        **LOGPROBS,
    )
    expected = logits.double().clone()
    expected[0, 7] -= 2 * 0.5 + 0.25
    expected[0, 9] -= 0.5 + 0.25
    entry = SAMPLER.sample(logits, [penalised])[1][0]
    assert entry is not None
    np.testing.assert_allclose(
        [value for _, value in entry.requested], torch.log_softmax(expected, -1)[0], rtol=1e-5, atol=1e-6
    )


def test_greedy_takes_the_largest_logit_after_biases_and_blocks() -> None:
    logits = random_logits((1, 50))
    best, second = logits[0].topk(2).indices.tolist()
    assert SAMPLER.sample(logits, [row(temperature=0.0)])[0] == [best]
    assert SAMPLER.sample(logits, [row(temperature=1.0, top_k=1)])[0] == [best]
    assert SAMPLER.sample(logits, [row(temperature=0.0, blocked_ids=(best,))])[0] == [second]
    assert SAMPLER.sample(logits, [row(temperature=0.0, logit_bias={"33": 100.0})])[0] == [33]
    blocked_and_biased = row(temperature=0.0, logit_bias={str(best): 100.0}, blocked_ids=(best,))
    assert SAMPLER.sample(logits, [blocked_and_biased])[0] == [second]


def test_a_blocked_token_is_never_drawn() -> None:
    logits = torch.zeros(20)
    logits[4] = 12.0
    chosen = draws(logits, 300, blocked_ids=(4, 5))
    assert not {4, 5} & set(chosen.tolist())
    assert len(set(chosen.tolist())) == 18


def test_logits_are_not_written_to() -> None:
    logits = random_logits((3, 50))
    before = logits.clone()
    rows = [
        row(frequency_penalty=1.0, output_ids=[1], blocked_ids=(2,)),
        row(temperature=0.5, top_p=0.5),
        row(repetition_penalty=1.5, logit_bias={"3": 1.0}, temperature=0.0),
    ]
    SAMPLER.sample(logits, rows)
    assert torch.equal(logits, before)


# Independence of the batch

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([-1, 1, 3, 50]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "position": st.integers(0, 10_000),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "return_logprob": st.booleans(),
        "top_logprobs_num": st.sampled_from([0, 4]),
        "output_ids": st.lists(st.integers(0, 299), max_size=5),
    }
)


@given(rows=st.lists(OPTIONS, min_size=1, max_size=6), seed=st.integers(0, 2**30), vocab=st.sampled_from([300, 70_000]))
@settings(max_examples=60, deadline=None)
def test_a_row_alone_gives_what_it_gives_in_any_batch(rows: list[dict[str, Any]], seed: int, vocab: int) -> None:
    """To the last bit, log-probabilities included: the rows of a batch never see each other."""
    logits = random_logits((len(rows), vocab), seed)
    batch = [row(**options) for options in rows]
    token_ids, logprobs = SAMPLER.sample(logits, batch)
    for index, alone in enumerate(batch):
        assert SAMPLER.sample(logits[index : index + 1].clone(), [alone]) == ([token_ids[index]], [logprobs[index]])
    backwards = list(reversed(range(len(batch))))
    again = SAMPLER.sample(logits[backwards], [batch[index] for index in backwards])
    assert again == ([token_ids[index] for index in backwards], [logprobs[index] for index in backwards])


def test_an_empty_batch_has_no_tokens() -> None:
    assert SAMPLER.sample(torch.zeros(0, 10), []) == ([], [])


# Log-probabilities


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_logprobs_are_after_temperature_and_before_filters(temperature: float) -> None:
    logits = random_logits((1, 400))
    options: dict[str, Any] = {"top_k": 3, "top_p": 0.5} if temperature else {}
    asked = row(
        temperature=temperature, return_logprob=True, top_logprobs_num=6, token_ids_logprob=(5, 0, 399), **options
    )
    (token,), (entry,) = SAMPLER.sample(logits, [asked])
    expected = torch.log_softmax(logits[0].double() / (temperature or 1.0), -1)
    assert entry is not None
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert [top for top, _ in entry.top] == expected.topk(6).indices.tolist()
    np.testing.assert_allclose([value for _, value in entry.top], expected.topk(6).values, atol=1e-5)
    assert [asked_id for asked_id, _ in entry.requested] == [5, 0, 399]
    np.testing.assert_allclose([value for _, value in entry.requested], expected[[5, 0, 399]], atol=1e-5)


def test_the_logprob_of_a_blocked_token_is_a_finite_number() -> None:
    asked = row(temperature=0.0, blocked_ids=(4,), return_logprob=True, token_ids_logprob=(4,))
    entry = SAMPLER.sample(torch.zeros(1, 10), [asked])[1][0]
    assert entry is not None
    assert entry.requested == [(4, float(np.finfo(np.float32).min))]


def test_prompt_logprobs_are_the_models_own() -> None:
    logits = random_logits((3, 200))
    asked = PromptLogprobsRow(0, 1, [7, 8, 9], top_logprobs_num=2, token_ids_logprob=(1,))
    entries = SAMPLER.prompt_logprobs(logits, asked)
    expected = torch.log_softmax(logits.double(), -1)
    for index, entry in enumerate(entries):
        assert entry.token_id == 7 + index
        assert entry.logprob == pytest.approx(float(expected[index, 7 + index]), abs=1e-5)
        assert [token for token, _ in entry.top] == expected[index].topk(2).indices.tolist()
        assert entry.requested == [(1, pytest.approx(float(expected[index, 1]), abs=1e-5))]


# Extremes


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0, 1e6])
@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
def test_broken_and_extreme_logits_still_give_a_token_of_the_vocabulary(fill: float, temperature: float) -> None:
    logits = random_logits((2, 30))
    logits[0, :] = fill
    logits[1, 3] = fill
    for options in ({}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.3}):
        token_ids, logprobs = SAMPLER.sample(
            logits, [row(temperature=temperature, return_logprob=True, top_logprobs_num=3, **options)] * 2
        )
        assert all(0 <= token < 30 for token in token_ids)
        assert all(entry is not None and np.isfinite(entry.logprob) for entry in logprobs)


def test_blocking_every_token_ends_in_some_token() -> None:
    assert 0 <= SAMPLER.sample(torch.zeros(1, 4), [row(blocked_ids=(0, 1, 2, 3))])[0][0] < 4


# Other devices


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    logits = random_logits((4, 49_152))
    rows = [
        row(temperature=0.0),
        row(temperature=0.7, top_p=0.9, seed=5, **LOGPROBS),
        row(temperature=0.0, repetition_penalty=1.2, output_ids=[int(logits[2].argmax())]),
        row(top_k=40, seed=9),
    ]
    assert SAMPLER.sample(logits.cuda(), rows) == SAMPLER.sample(logits, rows)
