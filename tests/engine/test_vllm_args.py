"""vLLM's flags: commands of manifests and guides are understood, what does nothing is said, what cannot be is refused."""

import json

import pytest

from baton.engine.args import EngineArgs, engine_args
from baton.engine.flags import FlagError, effect_notes, flags_of
from baton.engine.vllm.args import VllmArgs, engine_flags, token_count, vllm_args
from baton.engine.vllm.launch import cli_main, dialect_of, flags_of_nodes, nodes_for


def parsed(command: str) -> VllmArgs:
    return vllm_args(command.split())


def ours(command: str) -> EngineArgs:
    """The worker's settings that come of a vLLM command."""
    return engine_args(engine_flags(parsed(command)))


def problems(command: str) -> list[str]:
    with pytest.raises(FlagError) as caught:
        vllm_args(command.split())
    return caught.value.problems


def test_the_manifests_command() -> None:
    args = ours("--port 8000 --model /models/Qwen3-32B --tensor-parallel-size 2")
    assert (args.host, args.port, args.tp_size, args.name) == ("0.0.0.0", 8000, 2, "/models/Qwen3-32B")
    assert args.enable_metrics, "vLLM always serves /metrics"


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("-tp 4", "tp_size", 4),
        ("--tensor_parallel_size=2 -pp 3", "tp_size", 2),
        ("--tensor_parallel_size=2 -pp 3", "pp_size", 3),
        ("-tp 2 -pp 3 --enable-expert-parallel", "ep_size", 2),
        ("--max-model-len 8k", "context_length", 8000),
        ("--max-model-len 8K", "context_length", 8192),
        ("--gpu-memory-utilization 0.5", "mem_fraction_static", 0.5),
        ("--max-num-seqs 7", "max_running_requests", 7),
        ("--max-num-batched-tokens 512", "chunked_prefill_size", 512),
        ("--max-num-batched-tokens 512", "max_prefill_tokens", 512),
        ("--no-enable-chunked-prefill --max-num-batched-tokens 512", "chunked_prefill_size", -1),
        ("--no-enable-prefix-caching", "disable_radix_cache", True),
        ("--enable-prefix-caching", "disable_radix_cache", False),
        ("--block-size 32", "page_size", 32),
        ("--num-gpu-blocks-override 10 --block-size 32", "max_total_tokens", 320),
        ("--scheduling-policy priority", "schedule_low_priority_values_first", True),
        ("--served-model-name a b", "served_model_name", "a"),
        ("--tokenizer /t", "tokenizer_path", "/t"),
        ("--seed 0", "random_seed", 0),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--api-key k", "api_key", "k"),
        ("--chat-template t.jinja", "chat_template", "t.jinja"),
        ("--generation-config vllm", "sampling_defaults", "openai"),
        ("--enable-prompt-tokens-details", "enable_cache_report", True),
        ("--disable-log-stats", "enable_metrics", False),
        ("--disable-uvicorn-access-log", "log_level_http", "warning"),
        ("--enable-log-requests", "log_requests", True),
        ("-n 2 -r 1 --master-addr h --master-port 9 -tp 2", "dist_init_addr", "h:9"),
        ("--host 127.0.0.1", "host", "127.0.0.1"),
        ("--device cpu", "device", "cpu"),
        ("-dp 4", "dp_size", 4),
        ("-dp 4", "load_balance_method", "total_requests"),
        ('-dp 4 --kv-transfer-config {"kv_role":"kv_producer"}', "load_balance_method", "auto"),
        ("-dp 4 -dpl 4 -dpa 10.0.0.1 -dpp 13345", "dp_size", 4),
        ("-dp 4 -dpl 2 -dpr 2 --data-parallel-hybrid-lb", "dp_size", 2),
        ("-dp 4 -dpl 2 -dpr 2 --data-parallel-hybrid-lb", "dp_rank", 2),
        ("-dp 4 -dpn 3", "dp_size", 1),
        ("-dp 4 -dpn 3 --data-parallel-external-lb", "dp_rank", 3),
        ('-dp 4 -dpn 3 --kv-transfer-config {"kv_role":"kv_producer"}', "disaggregation_bootstrap_port", 5603),
    ],
)
def test_flags_with_an_effect(flags: str, field: str, value: object) -> None:
    assert getattr(ours(f"--model m {flags}"), field) == value


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-dp 4 --headless", "--headless with --data-parallel-size: a node without HTTP"),
        (
            "-dp 4 -dpl 2",
            "--data-parallel-size-local 2 of --data-parallel-size 4: engines of other nodes are not served",
        ),
        ("-dp 4 -dpr 2", "--data-parallel-start-rank needs --data-parallel-hybrid-lb"),
        ("-dp 4 --data-parallel-hybrid-lb", "--data-parallel-hybrid-lb needs --data-parallel-size-local"),
        ("-dp 4 -dph -dpl 2 -dpr 3", "--data-parallel-start-rank 3 and --data-parallel-size-local 2 make more engines"),
        ("-dp 4 -dpn 4", "--data-parallel-rank must be below --data-parallel-size (4), got 4"),
        ("-dp 4 -dpn 1 -dpl 2", "--data-parallel-size-local 2 with --data-parallel-rank, which is one engine"),
        ("-dp 4 -dpn 1 -dph", "--data-parallel-rank is for one engine"),
        ("-dp 4 --data-parallel-external-lb", "--data-parallel-external-lb needs --data-parallel-rank"),
        ("-dp 2 -tp 2 -n 2", "--dp-size 2 with --nnodes 2"),
    ],
)
def test_data_parallel_layouts_that_cannot_be_are_named(flags: str, named: str) -> None:
    (problem,) = problems(f"--model m {flags}")
    assert problem.startswith(named)


def test_what_does_nothing_is_said_once_with_its_reason() -> None:
    command = (
        "--model m --trust-remote-code --enforce-eager --swap-space 8 --disable-log-requests --tensor-parallel-size 2"
    )
    found = effect_notes(parsed(command), "cuda")
    assert [note.split()[0] for note in found] == [
        "--trust-remote-code", "--disable-log-requests", "--swap-space", "--enforce-eager"
    ]  # fmt: skip
    assert effect_notes(vllm_args(["--model", "m"]), "cuda") == []


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = problems(
        "--mdel m --quantization fp8 --max-model-len many --enable-lora --node-rank 3 --tensor-parallel-size 0"
    )
    for part in (
        "unknown flag --mdel; nearest known: --model", "--quantization fp8: ", "--max-model-len must be a number of tokens",
        "--enable-lora True: LoRA", "--node-rank must be below --nnodes", "--tensor-parallel-size must be at least 1",
        "--model is required",
    ):  # fmt: skip
        assert [line for line in found if part in line], (part, found)


def test_every_flag_without_effect_has_a_reason() -> None:
    for name, one in flags_of(VllmArgs).items():
        assert bool(one.reason) == (one.effect != "effective"), name


@pytest.mark.parametrize(
    ("config", "is_on"),
    [({"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv"}, True), ({"publisher": "zmq"}, False),
     ({"enable_kv_cache_events": True}, True)],
)  # fmt: skip
def test_kv_events_have_a_switch_of_their_own(config: dict[str, object], is_on: bool) -> None:
    args = engine_args(engine_flags(vllm_args(["--model", "m", "--kv-events-config", json.dumps(config)])))
    assert (args.kv_events is not None) == is_on


def test_kv_events_config_is_checked() -> None:
    [line] = problems('--model m --kv-events-config {"nope":1}')
    assert "unknown key 'nope'" in line


@pytest.mark.parametrize("text", ["", "0", "k", "1.5", "-3", "8kk"])
def test_token_counts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="number of tokens"):
        token_count(text)


def test_other_nodes_get_the_model_and_nothing_of_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_VOLUME_PATHS", "/slot/root/models=/models")
    flags = engine_flags(parsed("--model /slot/root/models/a --served-model-name b -tp 2 --port 1 --host h"), "key")
    assert flags_of_nodes(flags) == ["--model-path=/models/a", "--tp-size=2", "--log-level-http=info"]


def test_ranks_are_spread_evenly() -> None:
    assert [nodes_for(2, 2), nodes_for(2, 3), nodes_for(8, 3), nodes_for(1, 4), nodes_for(6, 5)] == [2, 2, 2, 1, 3]


def test_settings_of_the_dialect() -> None:
    args = parsed("--model m --served-model-name a b --max-logprobs 5 --response-role bot --enable-force-include-usage")
    dialect = dialect_of(args)
    assert (dialect.served_names, dialect.max_logprobs, dialect.response_role) == (("a", "b"), 5, "bot")
    assert dialect.wants_usage(False)


def test_the_vllm_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(["--version"]) == 0
    assert cli_main(["bench"]) == 2
    assert "only `vllm serve MODEL [flags]`" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli_main(["serve", "m", "--nope"])
    assert caught.value.code == 2
    assert "vllm: unknown flag --nope" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli_main(["serve", "--help"])
    assert caught.value.code == 0
    assert "--tensor-parallel-size INT" in capsys.readouterr().out
