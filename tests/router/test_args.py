"""Command lines of mini_lb and launch_router, as manifests write them, and what a wrong one is told."""

import pytest

from baton.router.args import BATON, LAUNCH_ROUTER, MINI_LB, parse_args
from baton.router.config import KvSource, WorkerSpec

PD = ["--prefill", "http://p0:8000", "http://p1:8000", "--decode", "http://d0:8000"]


def specs(argv, flavour=MINI_LB):
    return parse_args(argv, flavour)[0].workers


def test_the_manifests_command():
    argv = [*PD, "--prefill-bootstrap-ports", "34000", "34001", "--host", "0.0.0.0", "--port", "8000"]
    config, notes = parse_args(argv, MINI_LB)
    assert config.workers == (
        WorkerSpec("http://p0:8000", "prefill", 34000),
        WorkerSpec("http://p1:8000", "prefill", 34001),
        WorkerSpec("http://d0:8000", "decode"),
    )
    assert config.pd
    assert notes == []


@pytest.mark.parametrize(
    ("flavour", "host", "port", "policy", "timeout_s"),
    [
        (MINI_LB, "0.0.0.0", 8000, "random", 600),
        (LAUNCH_ROUTER, "0.0.0.0", 30000, "cache_aware", 1800),
        (BATON, "127.0.0.1", 8000, "cache_aware", 1800),
    ],
)
def test_defaults(flavour, host, port, policy, timeout_s):
    config, _ = parse_args(PD, flavour)
    assert (config.host, config.port, config.request_timeout_s) == (host, port, timeout_s)
    assert config.prefill_policy == config.decode_policy == policy
    assert [worker.bootstrap_port for worker in config.workers] == [None, None, None]


def test_one_bootstrap_port_serves_all():
    assert [w.bootstrap_port for w in specs([*PD, "--prefill-bootstrap-ports", "9"])[:2]] == [9, 9]


def test_a_wrong_number_of_ports_is_mini_lb_s_error():
    with pytest.raises(ValueError, match=r"^Number of prefill URLs must match number of bootstrap ports$"):
        specs([*PD, "--prefill-bootstrap-ports", "1", "2", "3"])


def test_launch_router_s_form():
    argv = ["--pd-disaggregation", "--prefill", "http://a:1", "9000", "--prefill", "http://b:1", "none"]
    argv += ["--prefill", "http://c:1", "--decode", "http://d:1", "--decode", "http://e:1"]
    argv += ["--prefill-policy", "cache_aware", "--decode-policy", "power_of_two", "--policy", "random"]
    config, _ = parse_args(argv, LAUNCH_ROUTER)
    assert [(w.url, w.bootstrap_port) for w in config.workers[:3]] == [
        ("http://a:1", 9000), ("http://b:1", None), ("http://c:1", None),
    ]  # fmt: skip
    assert [w.role for w in config.workers[3:]] == ["decode", "decode"]
    assert (config.prefill_policy, config.decode_policy) == ("cache_aware", "power_of_two")


@pytest.mark.parametrize(
    ("argv", "protocol", "note"),
    [
        (PD, None, None),
        (["--pd-disaggregation", *PD], None, None),
        ([*PD, "--prefill-bootstrap-ports", "9"], "sglang", None),
        (["--prefill", "http://a:1", "9000", "--decode", "http://b:1"], "sglang", None),
        (["--prefill", "http://a:1", "none", "--decode", "http://b:1"], None, None),
        (["--vllm-pd-disaggregation", *PD, "--kv-connector", "nixl"], "vllm", None),
        (["--vllm-pd-disaggregation"], "vllm", None),
        (["--vllm-pd-disaggregation", *PD, "--prefill-bootstrap-ports", "9"], "vllm", "bootstrap ports"),
        ([*PD, "--kv-connector", "nixl"], None, "--kv-connector"),
        ([*PD, "--disable-health-check"], None, "--disable-health-check"),
    ],
)
def test_the_hand_over_protocol(argv, protocol, note):
    config, notes = parse_args(argv)
    assert config.pd
    assert config.pd_protocol == protocol
    assert [one.startswith(note) for one in notes] == ([True] if note else [])


def test_one_url_may_be_prefill_and_decode():
    both = ["--prefill", "http://a:1", "http://b:1", "--decode", "http://b:1/", "http://a:1"]
    assert [worker.role for worker in specs(both)] == ["prefill", "prefill", "decode", "decode"]


def test_worker_urls_are_regular():
    config, _ = parse_args(["--worker-urls", "http://a:1", "http://b:1", "--policy", "po2"], LAUNCH_ROUTER)
    assert not config.pd
    assert {w.role for w in config.workers} == {"regular"}
    assert config.decode_policy == "power_of_two"


def test_flags_reach_their_settings():
    argv = [
        *PD, "--retry-max-retries", "2", "--retry-initial-backoff-ms", "10", "--cb-failure-threshold", "4",
        "--health-check-interval-secs", "7", "--max-payload-size", "1000", "--max-concurrent-requests", "9",
        "--queue-size", "3", "--cache-threshold", "0.5", "--migration-limit", "1", "--api-key", "k", "--timeout", "5",
        "--prometheus-port", "29000", "--access-log", "--log-level", "warn",
    ]  # fmt: skip
    config, _ = parse_args(argv)
    assert (config.retry.max_retries, config.retry.initial_backoff_s, config.retry.migration_limit) == (2, 0.01, 1)
    assert (config.breaker.failure_threshold, config.health.interval_s) == (4, 7)
    assert (config.limits.max_payload_bytes, config.limits.max_concurrent, config.limits.queue_size) == (1000, 9, 3)
    assert (config.cache_aware.threshold, config.api_key, config.request_timeout_s) == (0.5, "k", 5)
    assert (config.prometheus_port, config.access_log, config.log_level) == (29000, True, "warn")


def test_disable_flags():
    config, _ = parse_args([*PD, "--disable-retries", "--disable-circuit-breaker", "--disable-health-check"])
    assert config.retry.max_retries == config.retry.migration_limit == 0
    assert not config.breaker.enabled
    assert not config.health.enabled


def test_flags_without_effect_are_named():
    _, notes = parse_args([*PD, "--rust-lb", "--log-interval", "5", "--model-path", "m"], MINI_LB)
    assert [note.split()[0] for note in notes] == ["--rust-lb", "--log-interval", "--model-path"]


def test_a_tokenizer_and_endpoints_for_kv_events(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    events = ["--kv-events-endpoint", "http://w:8000=tcp://w:5557,tcp://w:5558", "http://v:8000=tcp://v:5557"]
    config, notes = parse_args([*PD, "--model-path", str(tmp_path), "--max-kv-blocks", "9", *events])
    assert config.tokenizer == str(tmp_path)
    assert config.cache_aware.max_kv_blocks == 9
    assert config.kv_sources == {
        "http://w:8000": KvSource("tcp://w:5557", "tcp://w:5558"), "http://v:8000": KvSource("tcp://v:5557"),
    }  # fmt: skip
    assert notes == []
    _, notes = parse_args([*PD, "--policy", "random", "--tokenizer-path", str(tmp_path), *events])
    assert [note.split()[0] for note in notes] == ["--tokenizer-path", "--kv-events-endpoint"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokenizer-path", "/nowhere"], "--tokenizer-path: there is no tokenizer.json in /nowhere"),
        (["--kv-events-endpoint", "http://w:1"], "must be WORKER=ENDPOINT"),
        (["--kv-events-endpoint", "http://w:1=udp://w:2"], "--kv-events-endpoint: must be tcp://HOST:PORT"),
        (["--max-kv-blocks", "0"], "--max-kv-blocks must be at least 1"),
        (["--polcy", "random"], "did you mean --policy"),
        (["--prefil", "http://a:1"], "did you mean --prefill"),
        (["--service-discovery"], "POST /workers"),
        (["--rate-limit-tokens-per-second", "5"], "--max-concurrent-requests"),
        (["--jwt-issuer", "x"], "--api-key"),
        (["--prefill-selector", "a=b"], "POST /workers"),
        (["--policy", "best"], "invalid choice"),
        (["--prefill", "9000"], "does not follow a URL"),
        (["--prefill", "http://a:1", "99999"], "between 1 and 65535"),
        (["--prefill", "https://a:1"], "only http://"),
        (["--decode", "http://a:1/v1"], "must have no path"),
        (["--decode", "http://a:1", "http://a:1"], "given already"),
        (["--decode", "http://a:x"], "--decode"),
        (["--prefill", "http://a:1", "9", "--decode", "http://a:1"], "only vLLM's workers can be both"),
        (["--vllm-pd-disaggregation", "--worker-urls", "http://a:1"], "cannot be combined"),
        (["--vllm-pd-disaggregation", "--kv-connector", "mooncake"], "--kv-connector: invalid choice"),
        (["--vllm-discovery-address", "0.0.0.0:1"], "given by URL"),
        (["--worker-urls", "http://a:1", "--decode", "http://b:1"], "cannot be combined"),
        (["--prefill", "http://a:1", "9000", "--prefill-bootstrap-ports", "1"], "cannot be combined"),
        (["--retry-max-retries", "-1"], "--retry-max-retries must be at least 0"),
        (["--cache-threshold", "2"], "--cache-threshold must be between 0 and 1"),
        (["--request-timeout-secs", "nan"], "--request-timeout-secs must be more than 0"),
        (["--prometheus-duration-buckets", "1", "0.5"], "must ascend"),
        (["--port", "70000"], "--port must be a port number"),
        (["--max-concurrent-requests", "0"], "-1 for no limit"),
    ],
)
def test_bad_command_lines_name_the_flag(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(argv, BATON)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
