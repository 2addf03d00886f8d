"""Flags that cut a model into more than it has are refused by name before any process starts, on every node alike."""

import subprocess
from pathlib import Path

import pytest
from tests.fakes.models import hf_model

from baton.engine import launch
from baton.engine.args import engine_args
from baton.engine.distributed.fits import need_fit_of_model
from baton.engine.distributed.topology import RANKS_PER_HOST
from baton.engine.errors import ModelError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine query heads, two layers."""
    directory = tmp_path_factory.mktemp("dense")
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 90, "head_dim": 16}
    hf_model("llama-tied-biased", **sizes).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tp-size 10", "--tp-size 10: 10 ranks cannot share the model's 9 query heads"),
        ("--pp-size 4", "--pp-size 4: the model has 2 layers"),
        ("--tp-size 2 --ep-size 2", "--ep-size 2: this LlamaForCausalLM has no experts"),
    ],
)
@pytest.mark.parametrize("node_rank", ["0", "1"])
def test_what_does_not_fit_is_refused_before_processes_start(
    dense: Path,
    flags: str,
    message: str,
    node_rank: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    monkeypatch.setenv(RANKS_PER_HOST, "16")
    nodes = ["--nnodes", "2", "--dist-init-addr", "127.0.0.1:1", "--node-rank", node_rank]
    assert launch.main(["--model-path", str(dense), "--port", "0", *flags.split(), *nodes]) == 1
    assert message in caplog.text


def test_a_cpu_that_runs_fewer_ranks_serves_what_gpus_could_not(dense: Path) -> None:
    args = engine_args(["--model-path", str(dense), "--tp-size", "10"])
    need_fit_of_model(args, dense, {})
    with pytest.raises(ModelError, match="--tp-size 10"):
        need_fit_of_model(engine_args(["--model-path", str(dense), "--tp-size", "10", "--device", "cuda"]), dense, {})
