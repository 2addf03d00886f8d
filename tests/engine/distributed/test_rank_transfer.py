"""Prefill and decode workers whose ranks have a pool each, as processes: whatever the ranks of either, the answers are those of one worker."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.models import hf_model
from tests.fakes.rank_group import random_prompts
from tests.fakes.rank_workers import GroupWorker, Worker, numbers
from tests.fakes.transfer_pair import bootstrap_server

from baton.engine.distributed.connect import COLLECTIVE
from baton.protocol.rank import Bootstrap, CheckIntegrity

PROMPTS = random_prompts(68, 35)
FLAGS = ["--dtype", "float32", "--chunked-prefill-size", "32"]
ROOMS = itertools.count(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_model("qwen2", num_attention_heads=6, num_key_value_heads=3, hidden_size=96).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Any]:
    """Of one worker alone."""
    with Worker(model, *FLAGS) as alone:
        return [pytest.approx(alone.generate(prompt)[0], abs=1e-4) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COLLECTIVE, "tcp")


@contextlib.contextmanager
def worker(model: Path, mode: str, port: int, tp: int, pp: int) -> Iterator[Worker]:
    flags = [*FLAGS, "--disaggregation-mode", mode, "--disaggregation-bootstrap-port", str(port)]
    if tp * pp == 1:
        with Worker(model, *flags) as alone:
            yield alone
    else:
        with GroupWorker(model, tp, *flags, pp_size=pp) as group:
            yield group.worker


@pytest.mark.parametrize(
    ("prefill", "decode"), [((2, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (3, 1))], ids=["2 to 1", "1 to 2", "2 to 3"]
)
def test_answers_are_those_of_one_worker(
    model: Path, expected: list[Any], prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    with (
        bootstrap_server() as port,
        worker(model, "prefill", port, *prefill) as first,
        worker(model, "decode", port, *decode) as second,
    ):
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            meeting = Bootstrap("127.0.0.1", port, next(ROOMS))
            second.submit(prompt, bootstrap=meeting)
            first.submit(prompt, bootstrap=meeting)
            outputs = second.outputs()
            assert outputs[-1].finish is not None and outputs[-1].finish.error is None, outputs[-1].finish
            assert numbers(outputs) == answer
            finish = first.outputs()[-1].finish
            assert finish is not None and finish.error is None, finish
        for one in (first, second):
            assert one.ask(CheckIntegrity(1)).ok
