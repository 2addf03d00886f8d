"""Ranks as processes, with the collectives that serve: their tokens are those of one rank, and they end together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.fakes.models import hf_model
from tests.fakes.rank_follower import run_with_other_pages
from tests.fakes.rank_group import WAIT_S, RankGroup, generate, random_prompts, single

from baton.engine.distributed.connect import COLLECTIVE
from baton.engine.distributed.control import GroupError
from baton.engine.distributed.processes import stop_ranks
from baton.engine.kernels.native import load_kernels

PROMPTS = random_prompts(40, 7, 133)
NEW_TOKENS = 12

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C kernels on this machine")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's 9 query and 3 kv heads."""
    directory = tmp_path_factory.mktemp("model")
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 90, "head_dim": 16}
    hf_model("llama-tied-biased", **sizes).save_pretrained(directory)
    return directory


@needs_kernels
@pytest.mark.parametrize(("collective", "size"), [("auto", 2), ("auto", 4), ("tcp", 2), ("tcp", 4), ("gloo", 2)])
def test_bfloat16_ranks_give_the_bits_of_one(
    model: Path, collective: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COLLECTIVE, collective)
    expected = generate(single(model, "--dtype", "bfloat16"), PROMPTS, NEW_TOKENS)
    with RankGroup(model, size, "--dtype", "bfloat16") as group:
        assert generate(group.runner, PROMPTS, NEW_TOKENS) == expected
        alone = [generate(group.runner, [prompt], NEW_TOKENS)[0] for prompt in PROMPTS]
    assert alone == expected, "what a request is batched with changes nothing"


def test_float32_ranks_give_the_greedy_tokens_of_one(model: Path) -> None:
    expected = generate(single(model, "--dtype", "float32"), PROMPTS, NEW_TOKENS)
    with RankGroup(model, 2, "--dtype", "float32") as group:
        found = generate(group.runner, PROMPTS, NEW_TOKENS)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)


def test_ranks_of_one_host_share_its_cores(model: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    try:
        with RankGroup(model, 2):
            assert torch.get_num_threads() == max(1, cores // 2)
    finally:
        torch.set_num_threads(1)


def test_the_loss_of_a_rank_ends_the_group_by_name(model: Path) -> None:
    with RankGroup(model, 2) as group:
        pid = group.followers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert group.lost.wait(WAIT_S)
        assert group.reason == "rank 1 (node 1) is gone: its connection was closed"


def test_followers_end_with_their_leader(model: Path) -> None:
    with RankGroup(model, 2) as group:
        pass
    assert [one.exitcode for one in group.followers] == [1]


def test_followers_of_a_leader_that_was_told_to_stop_end_without_failure(model: Path) -> None:
    with RankGroup(model, 3) as group:
        group.group.say_stopped()
    assert [one.exitcode for one in group.followers] == [0, 0]


def test_a_rank_that_is_told_to_stop_says_goodbye_whatever_it_is_doing() -> None:
    code = (
        "import time; from baton.engine.distributed.processes import end_when_told\n"
        "end_when_told(lambda: print('goodbye', flush=True)); print('up', flush=True); time.sleep(60)"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    words = [one.stdout for one in ranks]
    assert all(one is not None and one.readline() == "up\n" for one in words)
    stop_ranks(ranks[:1], on_purpose=True)
    stop_ranks(ranks[1:], on_purpose=False)
    assert [one.read() for one in words if one is not None] == ["goodbye\n", ""]
    assert [one.returncode for one in ranks] == [0, -signal.SIGKILL]
    for one in words:
        assert one is not None
        one.close()


def test_ranks_that_were_started_differently_say_how(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = RankGroup(model, 2, "--page-size", "16")
    monkeypatch.setattr("tests.fakes.rank_group.run_follower", run_with_other_pages)
    with pytest.raises(GroupError, match=r"--page-size: 16 on rank 0 and 32 on rank 1 \(node 1\)"), group:
        pass
    assert [one.exitcode for one in group.followers] == [1]
