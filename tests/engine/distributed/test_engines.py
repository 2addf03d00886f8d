"""How many engines run on a host and what each gets: by flags, device and environment alone."""

import pytest

from baton.engine.args import engine_args
from baton.engine.distributed.engines import DEVICES, THREADS, EnginesPlan, plan_engines
from baton.engine.distributed.topology import RANKS_PER_HOST
from baton.engine.errors import ModelError


def plan(flags: str, device: str, num_gpus: int = 0, num_cores: int = 16, **environ: str) -> EnginesPlan:
    args = engine_args(["--model", "m", *flags.split()])
    return plan_engines(args, device, environ, num_cores=num_cores, num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("flags", "forced", "engines"),
    [
        ("--dp 2", 1, 1), ("--dp 2", 2, 2), ("--dp 3", 2, 2), ("--dp 2", 8, 2), ("--dp 2 --tp 2", 1, 1),
        ("--dp 2 --tp 2", 2, 1), ("--dp 2 --tp 2", 3, 1), ("--dp 2 --tp 2", 4, 2), ("--dp 4 --pp 2", 6, 3), ("--dp 1", 4, 1),
    ],
)  # fmt: skip
def test_a_cpu_host_is_one_rank_unless_told_otherwise(flags: str, forced: int, engines: int) -> None:
    found = plan(flags, "cpu", **{RANKS_PER_HOST: str(forced)})
    assert [one.dp_rank for one in found.engines] == list(range(engines))
    asked = int(flags.split()[1])
    assert (found.note is None) == (engines == asked)
    if found.note is not None:
        runs = "1 engine runs" if engines == 1 else f"{engines} engines run"
        assert found.note.startswith(f"--dp-size {asked}: {runs}, since a rank is a whole CPU")
        assert RANKS_PER_HOST in found.note


def test_engines_of_a_cpu_host_share_its_cores() -> None:
    forced = {RANKS_PER_HOST: "4"}
    assert [one.environ for one in plan("--dp 2 --tp 2", "cpu", **forced).engines] == [{THREADS: "4"}] * 2
    assert plan("--dp 4", "cpu", num_cores=2, **forced).engines[0].environ == {THREADS: "1"}
    assert plan("--dp 2", "cpu", **forced, **{THREADS: "6"}).engines[1].environ == {THREADS: "6"}
    assert plan("--dp 2", "cpu", **forced, **{THREADS: "16"}).engines[1].environ == {THREADS: "8"}
    assert plan("--dp 1", "cpu", **forced).engines[0].environ == {}


@pytest.mark.parametrize(
    ("flags", "environ", "gpus"),
    [
        ("--dp 2 --tp 2", {}, ["0,1", "2,3"]),
        ("--dp 2", {DEVICES: "5, GPU-7,2"}, ["5", "GPU-7"]),
        ("--dp 2 --base-gpu-id 1 --gpu-id-step 2", {}, ["1", "3"]),
        ("--tp 2 --base-gpu-id 2", {}, ["2,3"]),
        ("--dp 2 --tp 2 --enable-dp-attention", {}, ["0,1"]),
    ],
)
def test_engines_of_a_gpu_host_have_gpus_of_their_own(flags: str, environ: dict[str, str], gpus: list[str]) -> None:
    found = plan(flags, "cuda", num_gpus=4, **environ)
    assert [one.environ for one in found.engines] == [{DEVICES: one} for one in gpus]


def test_too_few_gpus_are_named() -> None:
    with pytest.raises(ModelError, match=r"--dp-size 2 of 2 GPUs each.*GPU 3 is wanted, and 3 are there"):
        plan("--dp 2 --tp 2", "cuda", num_gpus=3)


def test_attention_by_heads_serves_dp_attention() -> None:
    found = plan("--dp 2 --tp 2 --enable-dp-attention", "cpu", **{RANKS_PER_HOST: "8"})
    assert len(found.engines) == 1
    assert found.note is not None and "the answers are the same" in found.note


def test_numbers_begin_where_they_are_told_to() -> None:
    assert [one.dp_rank for one in plan("--dp 2 --dp-rank 6", "cuda", num_gpus=2).engines] == [6, 7]
