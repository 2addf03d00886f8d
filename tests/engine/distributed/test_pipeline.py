"""Pipeline stages as processes: their tokens are those of one rank, whatever the stages and the ranks of each."""

import os
import signal
from pathlib import Path

import pytest
from tests.fakes.models import hf_model
from tests.fakes.rank_group import WAIT_S, RankGroup, generate, random_prompts, single

from baton.engine.distributed.connect import COLLECTIVE
from baton.engine.kernels.native import load_kernels

PROMPTS = random_prompts(40, 7, 133)
NEW_TOKENS = 8

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C kernels on this machine")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_model("qwen3-moe", num_hidden_layers=5, mlp_only_layers=[1]).save_pretrained(directory)
    return directory


@needs_kernels
@pytest.mark.parametrize(
    ("collective", "tp_size", "pp_size", "ep_size"),
    [("auto", 1, 2, 1), ("tcp", 1, 3, 1), ("auto", 2, 2, 1), ("auto", 2, 2, 2), ("tcp", 2, 2, 2), ("gloo", 2, 2, 1)],
)
def test_bfloat16_stages_give_the_bits_of_one_rank(
    model: Path, collective: str, tp_size: int, pp_size: int, ep_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COLLECTIVE, collective)
    expected = generate(single(model, "--dtype", "bfloat16"), PROMPTS, NEW_TOKENS)
    flags = ("--dtype", "bfloat16", "--ep-size", str(ep_size))
    with RankGroup(model, tp_size, *flags, pp_size=pp_size) as group:
        assert generate(group.runner, PROMPTS, NEW_TOKENS) == expected


def test_float32_stages_give_the_greedy_tokens_of_one_rank(model: Path) -> None:
    expected = generate(single(model, "--dtype", "float32"), PROMPTS, NEW_TOKENS)
    with RankGroup(model, 2, "--dtype", "float32", pp_size=2) as group:
        found = generate(group.runner, PROMPTS, NEW_TOKENS)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)


def test_the_loss_of_a_stage_ends_the_group_by_name(model: Path) -> None:
    with RankGroup(model, 1, pp_size=3) as group:
        pid = group.followers[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert group.lost.wait(WAIT_S)
        assert group.reason == "rank 2 (node 2) is gone: its connection was closed"
    assert [one.exitcode for one in group.followers] == [1, -signal.SIGKILL]
