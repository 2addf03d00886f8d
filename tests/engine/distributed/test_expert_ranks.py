"""Qwen3-MoE over ranks as processes: experts cut, or dealt out with --ep-size, give the tokens of one rank."""

from pathlib import Path

import pytest
from tests.fakes.models import hf_model
from tests.fakes.rank_group import RankGroup, generate, random_prompts, single

from baton.engine.distributed.connect import COLLECTIVE
from baton.engine.kernels.native import load_kernels

PROMPTS = random_prompts(40, 7, 90)
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_model("qwen3-moe", num_hidden_layers=3, mlp_only_layers=[1]).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("ep_size", [1, 2])
def test_float32_ranks_give_the_greedy_tokens_of_one(model: Path, ep_size: int) -> None:
    expected = generate(single(model, "--dtype", "float32"), PROMPTS, NEW_TOKENS)
    with RankGroup(model, 2, "--dtype", "float32", "--ep-size", str(ep_size)) as group:
        found = generate(group.runner, PROMPTS, NEW_TOKENS)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)


@pytest.mark.skipif(load_kernels() is None, reason="no C kernels on this machine")
@pytest.mark.parametrize(
    ("collective", "size", "ep_size"), [("auto", 2, 1), ("auto", 4, 4), ("tcp", 3, 3), ("gloo", 2, 2)]
)
def test_bfloat16_ranks_give_the_bits_of_one(
    model: Path, collective: str, size: int, ep_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COLLECTIVE, collective)
    expected = generate(single(model, "--dtype", "bfloat16"), PROMPTS, NEW_TOKENS)
    with RankGroup(model, size, "--dtype", "bfloat16", "--ep-size", str(ep_size)) as group:
        assert generate(group.runner, PROMPTS, NEW_TOKENS) == expected
