"""Prefill and decode workers whose ranks have a pool each, as processes: whatever the ranks of either, the answers are those of one worker."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.models import hf_model
from tests.fakes.rank_group import WAIT_S, random_prompts
from tests.fakes.rank_workers import GroupWorker, Worker, numbers
from tests.fakes.transfer_pair import bootstrap_server

from baton.engine.distributed.connect import COLLECTIVE
from baton.protocol.rank import Abort, Bootstrap, CheckIntegrity, FlushCache
from baton.transfer.base import FirstToken

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
def workers(model: Path, mode: str, port: int, tp: int, pp: int = 1) -> Iterator[tuple[Worker, list[int]]]:
    """A worker and the processes of its followers."""
    flags = [*FLAGS, "--disaggregation-mode", mode, "--disaggregation-bootstrap-port", str(port)]
    if tp * pp == 1:
        with Worker(model, *flags) as alone:
            yield alone, []
    else:
        with GroupWorker(model, tp, *flags, pp_size=pp) as group:
            yield group.worker, [one.pid for one in group.followers if one.pid is not None]


def submit(prefill: Worker, decode: Worker, prompt: list[int], port: int) -> None:
    room = next(ROOMS)
    decode.submit(prompt, bootstrap=Bootstrap("127.0.0.1", port, room, "decode"))
    prefill.submit(prompt, bootstrap=Bootstrap("127.0.0.1", port, room, "prefill"))


def answer_of(prefill: Worker, decode: Worker, prompt: list[int], port: int) -> list[float]:
    submit(prefill, decode, prompt, port)
    outputs = decode.outputs()
    for last in (outputs[-1], prefill.outputs()[-1]):
        assert last.finish is not None and last.finish.error is None, last.finish
    return numbers(outputs)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((2, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 2), (2, 1))],
    ids=["2 to 1", "1 to 2", "2 to 3", "2 stages to 2"],
)
def test_answers_are_those_of_one_worker(
    model: Path, expected: list[Any], prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    with (
        bootstrap_server() as port,
        workers(model, "prefill", port, *prefill) as (first, _),
        workers(model, "decode", port, *decode) as (second, _),
    ):
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            assert answer_of(first, second, prompt, port) == answer
        for one in (first, second):
            assert one.ask(CheckIntegrity(1)).ok


def test_workers_of_both_parts_hand_over_to_one_another(model: Path, expected: list[Any]) -> None:
    with (
        bootstrap_server() as port,
        bootstrap_server() as other_port,
        workers(model, "both", port, 2) as (first, _),
        workers(model, "both", other_port, 3) as (second, _),
    ):
        assert answer_of(first, second, PROMPTS[0], port) == expected[0]
        assert answer_of(second, first, PROMPTS[1], other_port) == expected[1]
        for one in (first, second):
            assert one.ask(CheckIntegrity(1)).ok


def test_an_abort_ends_the_transfer_on_every_rank(
    model: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        bootstrap_server() as port,
        workers(model, "prefill", port, 2) as (prefill, _),
        workers(model, "decode", port, 3) as (decode, _),
    ):
        with monkeypatch.context() as patch:
            is_held = hold_last_part(prefill.prefill, patch)
            submit(prefill, decode, PROMPTS[0], port)
            assert is_held.wait(WAIT_S)
            decode.tell(Abort("r", "no longer wanted"))
            ends = [one.outputs()[-1].finish for one in (decode, prefill)]
        assert [end.type for end in ends if end is not None] == ["abort", "abort"]
        assert ends[1] is not None and ends[1].error is not None
        assert "The decode side ended the transfer: no longer wanted" in ends[1].error.message
        assert answer_of(prefill, decode, PROMPTS[0], port) == expected[0]
        for one in (prefill, decode):
            assert one.ask(CheckIntegrity(1)).ok
            assert one.ask(FlushCache(2)).ok, "no page is held"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_rank_that_dies_in_a_transfer_costs_that_request_alone(
    model: Path, expected: list[Any], victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two chunks. The other side gives the request up, and gets every page back."""
    survivor = "decode" if victim == "prefill" else "prefill"
    with bootstrap_server() as port, contextlib.ExitStack() as stack, contextlib.ExitStack() as mortal:
        worker, followers = dict[str, Worker](), dict[str, list[int]]()
        for mode in ("prefill", "decode"):
            side = mortal if mode == victim else stack
            worker[mode], followers[mode] = side.enter_context(workers(model, mode, port, 2))
        with monkeypatch.context() as patch:
            is_held = hold_last_part(worker["prefill"].prefill, patch)
            submit(worker["prefill"], worker["decode"], PROMPTS[0], port)
            assert is_held.wait(WAIT_S)
            os.kill(followers[victim][0], signal.SIGKILL)
            finish = worker[survivor].outputs()[-1].finish
        assert finish is not None and finish.error is not None
        assert f"Losing connection with {victim} instance" in finish.error.message
        assert finish.error.retryable
        assert worker[survivor].ask(CheckIntegrity(1)).ok
        assert worker[survivor].ask(FlushCache(2)).ok, "no page is held"
        mortal.close()
        worker[victim], _ = stack.enter_context(workers(model, victim, port, 1))
        assert answer_of(worker["prefill"], worker["decode"], PROMPTS[0], port) == expected[0]


def hold_last_part(transfer: Any, patch: pytest.MonkeyPatch) -> threading.Event:
    """Let no room of the prefill worker end. The event: one has come that far."""
    is_held, send = threading.Event(), transfer.send

    def hold(room: int, first_page_idx: int, page_ids: list[int], first_token: FirstToken | None) -> None:
        if first_token is None:
            send(room, first_page_idx, page_ids, None)
        else:
            is_held.set()

    patch.setattr(transfer, "send", hold)
    return is_held
