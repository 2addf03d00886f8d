"""Pipeline stages as processes: their tokens are those of one rank, whatever the stages and the ranks of each."""

import os
import signal
from pathlib import Path

import pytest
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.models import hf_model
from tests.fakes.rank_group import PAGE_SIZE, WAIT_S, RankGroup, generate, random_prompts, single

from baton.engine.args import engine_args
from baton.engine.assemble import max_running_requests, scheduler_config
from baton.engine.batch import ForwardBatch, PromptLogprobsRow, SampleRow
from baton.engine.distributed.connect import COLLECTIVE
from baton.engine.kernels.native import load_kernels
from baton.engine.models.config import load_config
from baton.engine.runner import run_step
from baton.protocol.rank import TokenLogprobs
from baton.protocol.sampling import SamplingParams

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


@needs_kernels
@pytest.mark.parametrize(("collective", "tp_size"), [("auto", 2), ("tcp", 1)])
def test_steps_in_flight_do_not_mix(
    model: Path, collective: str, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests take turns, a step of each in flight; then prompts follow one another whose log-probabilities are all wanted."""
    monkeypatch.setenv(COLLECTIVE, collective)
    alone = single(model, "--dtype", "bfloat16")
    expected = [generate(alone, [prompt], NEW_TOKENS)[0] for prompt in PROMPTS[:2]]
    scores = [run_step(alone, prompt_batch(prompt)) for prompt in PROMPTS]
    sequences = PagedSequences([[*prompt, *([0] * NEW_TOKENS)] for prompt in PROMPTS[:2]], PAGE_SIZE)
    found: list[list[TokenLogprobs | None]] = [[], []]
    with RankGroup(model, tp_size, "--dtype", "bfloat16", pp_size=2) as group:
        runner = group.runner
        assert runner.depth == 2
        for seq in range(2):
            runner.submit(next_step(sequences, seq, 0))
        for step in range(NEW_TOKENS):
            for seq in range(2):
                output = runner.collect()
                found[seq] += output.logprobs
                sequences.tokens[seq][len(PROMPTS[seq]) + step] = output.next_token_ids[0]
                if step + 1 < NEW_TOKENS:
                    runner.submit(next_step(sequences, seq, step + 1))
        assert found == expected
        runner.submit(prompt_batch(PROMPTS[0]))
        runner.submit(prompt_batch(PROMPTS[1]))
        assert runner.collect() == scores[0]
        runner.submit(prompt_batch(PROMPTS[2]))
        assert [runner.collect(), runner.collect()] == scores[1:]


def next_step(sequences: PagedSequences, seq: int, step: int) -> ForwardBatch:
    """The prompt, or the token that the step before drew; one greedy token is wanted."""
    length = len(PROMPTS[seq]) + step
    sampling = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    sample = SampleRow(0, sampling, length, 0, PROMPTS[seq], [], return_logprob=True)
    return sequences.batch([Query(seq, 0 if step == 0 else length - 1, length)], samples=[sample])


@pytest.mark.parametrize(
    ("flags", "depth", "expected"),
    [("--pp-max-micro-batch-size 3", 2, 6), ("--max-micro-batch-size 3 --max-running-requests 5", 2, 5),
     ("--pp-max-micro-batch-size 3", 1, 256), ("--max-running-requests 7", 4, 7)],
)  # fmt: skip
def test_a_bound_of_micro_batches_bounds_what_runs(flags: str, depth: int, expected: int) -> None:
    """Those that decode are spread over `depth` steps."""
    assert max_running_requests(engine_args(["--model", "m", *flags.split()]), depth) == expected


def test_the_chunks_in_flight_are_together_what_one_stage_has_unless_the_flag_says(model: Path) -> None:
    config = load_config(model)
    found = [
        scheduler_config(
            engine_args(["--model", "m", *flags]), config, 64, torch.device("cpu"), depth
        ).chunked_prefill_size
        for flags, depth in (
            ([], 1),
            ([], 2),
            (["--chunked-prefill-size", "4096"], 2),
            (["--chunked-prefill-size", "-1"], 2),
        )
    ]
    assert found == [2048, 1024, 4096, None]


def prompt_batch(prompt: list[int]) -> ForwardBatch:
    """A prompt's log-probabilities, and no token drawn."""
    sequences = PagedSequences([prompt], PAGE_SIZE)
    return sequences.batch(
        [Query(0, 0, len(prompt))], prompt_logprobs=[PromptLogprobsRow(0, 1, prompt[1:], top_logprobs_num=2)]
    )


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
