"""The worker's command line: SGLang's flags and defaults, every error at once, and what is said of flags without effect."""

import pytest

from baton.engine import launch
from baton.engine.args import EngineArgs, engine_args, parse_engine_args, public_args, start_notes
from baton.engine.flags import FlagError, flags_of

SEED_PREFILL = (
    "--tp 2 --model-path /models/Qwen3-32B/ --disaggregation-mode prefill --port 8000 "
    "--disaggregation-bootstrap-port 34000 --host 10.1.2.3 --enable-metrics"
)
SEED_MULTI_NODE = (
    "--model-path /models/m --tp 16 --dist-init-addr h:6379 --nnodes 2 --node-rank 1 --trust-remote-code "
    "--enable-hierarchical-cache --hicache-storage-backend mooncake"
)


def problems(command: str) -> list[str]:
    with pytest.raises(FlagError) as caught:
        engine_args(command.split())
    return caught.value.problems


def test_manifests_commands_are_understood() -> None:
    args = engine_args(SEED_PREFILL.split())
    assert (args.tp_size, args.port, args.host, args.disaggregation_bootstrap_port) == (2, 8000, "10.1.2.3", 34000)
    assert (args.disaggregation_mode, args.enable_metrics, args.name) == ("prefill", True, "/models/Qwen3-32B/")
    args = engine_args(SEED_MULTI_NODE.split())
    assert (args.tp_size, args.nnodes, args.node_rank, args.dist_init_addr) == (16, 2, 1, "h:6379")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tp 3 --nnodes 2 --dist-init-addr h:1", "--tp-size 3 must be a multiple of --nnodes 2"),
        ("--tp 2 --nnodes 2", "--nnodes above 1 needs --dist-init-addr HOST:PORT"),
        ("--dist-init-addr 20000", "--dist-init-addr must be HOST:PORT, got '20000'"),
        ("--tp 2 --nnodes 2 --node-rank 2 --dist-init-addr h:1", "--node-rank must be below --nnodes (2), got 2"),
        (
            "--tp 3 --pp 3 --nnodes 2 --dist-init-addr h:1",
            "--tp-size 3 times --pp-size 3 must be a multiple of --nnodes 2",
        ),
        ("--pp 0", "--pp must be at least 1"),
        (
            "--dp 2 --tp 2 --nnodes 2 --dist-init-addr h:1",
            "--dp-size 2 with --nnodes 2: the engines of a worker are on one",
        ),
        ("--dp 3 --tp 4 --enable-dp-attention", "--dp-size 3 must divide --tp-size 4 with --enable-dp-attention"),
        (
            "--dp 2 --load-balance-method follow_bootstrap_room",
            "--load-balance-method follow_bootstrap_room needs --disag",
        ),
        (
            '--dp 2 --kv-events-config {"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558"}',
            "--kv-events-config: endpoint and replay_endpoint must be --dp-size 2 ports apart",
        ),
        (
            '--dp 9 --kv-events-config {"publisher":"zmq","endpoint":"tcp://*:65530"}',
            "--kv-events-config: port 65530 (--dp-rank counts up) and the 8 behind it",
        ),
        (
            '--dp-rank 9 --kv-events-config {"publisher":"zmq","endpoint":"tcp://*:65530"}',
            "--kv-events-config: port 65539 (--dp-rank",
        ),
        ("--ep 2", "--ep-size 2 must divide --tp-size 1"),
    ],
)
def test_parallel_layouts_that_cannot_be_are_named(flags: str, named: str) -> None:
    (problem,) = problems(f"--model m {flags}")
    assert problem.startswith(named)


def test_defaults_are_sglangs() -> None:
    args = engine_args(["--model", "m"])
    expected: dict[str, object] = {
        "host": "127.0.0.1", "port": 30000, "tp_size": 1, "dtype": "auto", "load_format": "auto",
        "max_prefill_tokens": 16384, "schedule_policy": "fcfs", "schedule_conservativeness": 1.0, "page_size": None,
        "stream_interval": 1, "watchdog_timeout": 300, "decode_log_interval": 40, "sampling_defaults": "model",
        "disaggregation_mode": "null", "disaggregation_bootstrap_port": 8998, "num_reserved_decode_tokens": 512,
        "disaggregation_transfer_backend": "mooncake", "hicache_ratio": 2.0, "hicache_write_policy": "write_through",
        "log_level": "info", "log_requests_level": 2, "chunked_prefill_size": None, "mem_fraction_static": None,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "command",
    [
        "--model m --tensor-parallel-size 2",
        "--model=m --tp-size=2",
        "--model-path m --tp 4 --tp 2",
        "--model m --tensor 2",
    ],
)
def test_aliases_equal_signs_prefixes_and_repeats(command: str) -> None:
    args = engine_args(command.split())
    assert (args.model_path, args.tp_size) == ("m", 2)


def test_negative_numbers_lists_and_switches() -> None:
    command = "--model m --chunked-prefill-size -1 --bucket-time-to-first-token 0.1 1 --disable-radix-cache"
    args = engine_args(command.split())
    assert args.chunked_prefill_size == -1
    assert args.bucket_time_to_first_token == (0.1, 1.0)
    assert args.disable_radix_cache


def test_every_error_is_reported_at_once() -> None:
    found = problems(
        "--modl-pth x --port many --schedule-policy best --quantization fp8 --page-size 0 stray --enable-metrics=7 --host"
    )
    assert [line for line in found if "unknown flag --modl-pth; nearest known: --model-path" in line]
    for part in (
        "--port needs a whole number, got 'many'", "--schedule-policy must be one of fcfs, lpm, random, lof; got 'best'",
        "--quantization fp8: ", "--page-size must be at least 1", "unexpected argument 'stray'",
        "--enable-metrics takes no value, got '7'", "--host needs a value", "--model-path is required",
    ):  # fmt: skip
        assert [line for line in found if part in line], part


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "much"])
def test_a_number_is_finite(value: str) -> None:
    [line] = problems(f"--model m --hicache-size={value}")
    assert line == f"--hicache-size needs a finite number, got {value!r}"


@pytest.mark.parametrize(
    ("flags", "limit"),
    [("--port 77777", 65535), ("--disaggregation-bootstrap-port 65536", 65535), ("--mem-fraction-static 1.5", 1)],
)
def test_a_number_above_its_range_is_refused(flags: str, limit: int) -> None:
    [line] = problems(f"--model m {flags}")
    assert line == f"{flags.split()[0]} must be at most {limit}, got {flags.split()[1]}"


def test_an_ambiguous_prefix_lists_the_candidates() -> None:
    [line] = problems("--model m --hicache-s 3")
    assert line.startswith("ambiguous flag --hicache-s: it could be --hicache-size, --hicache-storage-backend")


@pytest.mark.parametrize(
    "flags",
    ["--quantization fp8", "--kv-cache-dtype fp8_e5m2", "--lora-paths a=b", "--json-model-override-args {}x",
     "--config f.yaml", "--node-rank 1", "--chunked-prefill-size 0", "--is-embedding"],
)  # fmt: skip
def test_flags_that_would_change_answers_are_refused_by_name(flags: str) -> None:
    [line] = problems(f"--model m {flags}")
    assert flags.split()[0].removeprefix("--")[:2] in line


def test_values_that_change_nothing_are_fine() -> None:
    assert (
        start_notes(
            engine_args(
                ["--model", "m", "--kv-cache-dtype", "auto", "--dp", "1", "--attention-backend", "torch_native"]
            ),
            "cpu",
        )
        == []
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--enable-hierarchical-cache --disable-radix-cache", "--disable-radix-cache leaves nothing"),
        ("--enable-hierarchical-cache --hicache-ratio 1", "--hicache-ratio must be above 1, got 1"),
        ("--enable-hierarchical-cache --hicache-storage-backend nixl", "--hicache-storage-backend nixl is not served"),
        ("--enable-hierarchical-cache --hicache-write-policy often", "--hicache-write-policy"),
        ("--disaggregation-decode-enable-offload-kvcache --hicache-storage-backend file", "--disaggregation-decode-enable-offload-kvcache is for --disaggregation-mode decode"),
        ("--disaggregation-mode decode --disaggregation-decode-enable-offload-kvcache", "--disaggregation-decode-enable-offload-kvcache needs --hicache-storage-backend"),
    ],
)  # fmt: skip
def test_tiers_that_cannot_be_are_named(flags: str, named: str) -> None:
    (problem,) = problems(f"--model m {flags}")
    assert problem.startswith(named)


def test_flags_of_tiers_that_are_off_say_so() -> None:
    alone = start_notes(
        engine_args(["--model", "m", "--hicache-ratio", "3", "--hicache-storage-backend", "file"]), "cpu"
    )
    assert "--hicache-ratio has no effect without --enable-hierarchical-cache" in alone
    assert "--hicache-storage-backend has no effect without --enable-hierarchical-cache" in alone
    host_only = engine_args(
        [
            "--model",
            "m",
            "--enable-hierarchical-cache",
            "--hicache-storage-prefetch-policy",
            "timeout",
            "--hicache-io-backend",
            "direct",
        ]
    )
    assert start_notes(host_only, "cpu") == [
        "--hicache-io-backend has no effect: whole pages are copied between two steps",
        "--hicache-storage-prefetch-policy has no effect without --hicache-storage-backend",
    ]


def test_flags_without_effect_are_named_with_the_reason_once() -> None:
    command = (
        "--model m --tp 2 --mem-fraction-static 0.8 --trust-remote-code --disable-cuda-graph --attention-backend triton "
        "--speculative-algorithm EAGLE --max-queued-requests 5 --disaggregation-mode decode"
    )
    notes = start_notes(engine_args(command.split()), "cpu")
    assert "--trust-remote-code has no effect: no code from a model directory is ever run" in notes
    for name in ("--mem-fraction-static", "--disable-cuda-graph", "--attention-backend", "--speculative-algorithm",
                 "--max-queued-requests"):  # fmt: skip
        assert len([note for note in notes if note.startswith(name)]) == 1, name
    on_gpu = start_notes(engine_args(command.split()), "cuda")
    assert not [note for note in on_gpu if note.startswith("--mem-fraction-static")]


def test_every_flag_without_effect_has_a_reason() -> None:
    for name, one in flags_of(EngineArgs).items():
        assert bool(one.reason) == (one.effect != "effective"), name


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_engine_args(["--nope", "1"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "unknown flag --nope; nearest known: --" in error
    with pytest.raises(SystemExit) as caught:
        parse_engine_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--tp-size, --tp, --tensor-parallel-size INT" in text
    assert "[default: fcfs]" in text
    assert "(no effect: no code from a model directory is ever run)" in text


def test_a_worker_of_both_parts_needs_requests_that_say_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--model-path", "m", "--disaggregation-mode", "both"]) == 2
    assert "--disaggregation-mode both is for `vllm serve`" in capsys.readouterr().err


def test_the_api_key_is_not_shown() -> None:
    args = engine_args(["--model", "m", "--api-key", "hush"])
    assert "hush" not in str(public_args(args))
    assert public_args(args)["model_path"] == "m"
