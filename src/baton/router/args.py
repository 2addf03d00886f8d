"""Command line of the router: the flags of SGLang's mini_lb, of sglang_router.launch_router and of vllm-router, as a `RouterConfig`.

One parser serves three programs that differ in defaults only (`Flavour`). Unknown flags are errors that name the nearest
known one; flags that are taken for compatibility but do nothing here are returned as notes, to be said once at start.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from baton.protocol.kv_events import split_endpoint
from baton.router.config import (
    DURATION_BUCKETS_S,
    BreakerConfig,
    CacheAwareConfig,
    HealthConfig,
    KvSource,
    LimitsConfig,
    PdProtocol,
    PolicyName,
    RetryConfig,
    RouterConfig,
    WorkerSpec,
)
from baton.router.workers import parse_url


@dataclass(frozen=True)
class Flavour:
    """Defaults in which the programs differ."""

    prog: str
    host: str
    port: int
    policy: str
    timeout_s: float


BATON = Flavour("baton router", "127.0.0.1", 8000, "cache_aware", 1800)
MINI_LB = Flavour("python3 -m sglang.srt.disaggregation.mini_lb", "0.0.0.0", 8000, "random", 600)
LAUNCH_ROUTER = Flavour("python3 -m sglang_router.launch_router", "0.0.0.0", 30000, "cache_aware", 1800)

_POLICY_NAMES: dict[str, PolicyName] = {
    "random": "random",
    "round_robin": "round_robin",
    "power_of_two": "power_of_two",
    "po2": "power_of_two",
    "cache_aware": "cache_aware",
}
_NO_EFFECT_FLAGS = ("--rust-lb", "--mini-lb", "--dp-aware", "--enable-igw", "--tokenizer-cache-enable-l0",
                    "--tokenizer-cache-enable-l1", "--enable-trace")  # fmt: skip
_NO_EFFECT_VALUES = (
    "--log-interval", "--bucket-adjust-interval-secs", "--max-idle-secs", "--assignment-mode", "--log-dir",
    "--worker-startup-timeout-secs", "--worker-startup-check-interval",
    "--tokenizer-cache-l0-max-entries", "--tokenizer-cache-l1-max-memory", "--reasoning-parser", "--tool-call-parser", "--history-backend",
    "--otlp-traces-endpoint",
)  # fmt: skip
_NO_EFFECT_LISTS = ("--cors-allowed-origins",)
_UNSUPPORTED = {
    "--service-discovery": "workers are given by URL (--prefill, --decode, --worker-urls) or added with POST /workers",
    "--vllm-discovery-address": "workers are given by URL; connectors that meet by addresses in request ids (P2pNccl) are not spoken to",
    "--tls-cert-path": "the router speaks plain HTTP; put TLS in front of it",
    "--tls-key-path": "the router speaks plain HTTP; put TLS in front of it",
    "--client-cert-path": "workers are spoken to over plain HTTP",
    "--client-key-path": "workers are spoken to over plain HTTP",
    "--mcp-config-path": "there is no tool server client in the router",
    "--rate-limit-tokens-per-second": "limit requests in progress with --max-concurrent-requests",
}
_UNSUPPORTED_PREFIXES = {
    "--service-discovery-": _UNSUPPORTED["--service-discovery"],
    "--intra-node-data-parallel-size": "a worker is one URL; its engines are its own to balance",
    "--selector": _UNSUPPORTED["--service-discovery"],
    "--prefill-selector": _UNSUPPORTED["--service-discovery"],
    "--decode-selector": _UNSUPPORTED["--service-discovery"],
    "--oracle-": "the router keeps no history",
    "--postgres-": "the router keeps no history",
    "--redis-": "the router keeps no history",
    "--jwt-": "clients are known by --api-key only",
    "--control-plane-": "clients are known by --api-key only",
    "--ca-cert-paths": "workers are spoken to over plain HTTP",
}


class _Parser(argparse.ArgumentParser):
    def known_flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        flag = next((token for token in unknown if token.startswith("-")), unknown[0]).partition("=")[0]
        reason = _UNSUPPORTED.get(flag) or next(
            (why for prefix, why in _UNSUPPORTED_PREFIXES.items() if flag.startswith(prefix)), None
        )
        if reason is not None:
            self.error(f"{flag} is not supported: {reason}")
        near = difflib.get_close_matches(flag, self.known_flags(), 1, 0.5)
        self.error(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))


def build_parser(flavour: Flavour) -> _Parser:
    """Every flag with the default that `flavour` has."""
    parser = _Parser(prog=flavour.prog, description="Route requests to prefill and decode workers.", allow_abbrev=False)
    add = parser.add_argument
    add("--host", default=flavour.host, help="address to listen on")
    add("--port", type=int, default=flavour.port)
    _add_worker_flags(parser, flavour)
    cache, retry, breaker, health, limits = (
        CacheAwareConfig(), RetryConfig(), BreakerConfig(), HealthConfig(), LimitsConfig(),
    )  # fmt: skip
    add("--cache-threshold", type=float, default=cache.threshold)
    add("--balance-abs-threshold", type=int, default=cache.balance_abs)
    add("--balance-rel-threshold", type=float, default=cache.balance_rel)
    add("--eviction-interval-secs", type=float, default=cache.eviction_interval_s)
    add("--max-tree-size", type=int, default=cache.max_tree_size, help="bytes of text remembered per worker")
    _add_kv_event_flags(parser)
    add("--retry-max-retries", type=int, default=retry.max_retries)
    add("--retry-initial-backoff-ms", type=float, default=retry.initial_backoff_s * 1000)
    add("--retry-max-backoff-ms", type=float, default=retry.max_backoff_s * 1000)
    add("--retry-backoff-multiplier", type=float, default=retry.multiplier)
    add("--retry-jitter-factor", type=float, default=retry.jitter)
    add("--disable-retries", action="store_true")
    add("--migration-limit", type=int, default=retry.migration_limit, help="how often one stream may move; 0: never")
    add("--migration-wait-secs", type=float, default=retry.migration_wait_s,
        help="how long a request whose workers are gone waits for a healthy pair")  # fmt: skip
    add("--cb-failure-threshold", type=int, default=breaker.failure_threshold)
    add("--cb-success-threshold", type=int, default=breaker.success_threshold)
    add("--cb-timeout-duration-secs", type=float, default=breaker.open_s)
    add("--cb-window-duration-secs", type=float, default=breaker.window_s)
    add("--disable-circuit-breaker", action="store_true")
    add("--health-failure-threshold", type=int, default=health.failure_threshold)
    add("--health-success-threshold", type=int, default=health.success_threshold)
    add("--health-check-timeout-secs", type=float, default=health.timeout_s)
    add("--health-check-interval-secs", type=float, default=health.interval_s)
    add("--health-check-endpoint", default=health.endpoint)
    add("--disable-health-check", action="store_true")
    add("--max-payload-size", type=int, default=limits.max_payload_bytes, help="bytes of a request body")
    add("--max-concurrent-requests", type=int, default=limits.max_concurrent, help="-1: no limit")
    add("--queue-size", type=int, default=limits.queue_size)
    add("--queue-timeout-secs", type=float, default=limits.queue_timeout_s)
    add("--request-timeout-secs", "--timeout", type=float, default=flavour.timeout_s)
    add("--shutdown-grace-period-secs", type=float, default=RouterConfig.shutdown_grace_s)
    add("--api-key", help="clients must present it; presented to the workers")
    add("--request-id-headers", nargs="*", default=list(RouterConfig.request_id_headers))
    add("--prometheus-host", default=RouterConfig.prometheus_host)
    add("--prometheus-port", type=int, help="a second port for /metrics (always on the main port too)")
    add("--prometheus-duration-buckets", nargs="+", type=float, default=list(DURATION_BUCKETS_S), metavar="SECONDS")
    add("--log-level", default="info", choices=["debug", "info", "warn", "error"])
    add("--access-log", action="store_true", help="one log line per request")
    _add_compatibility_flags(parser)
    return parser


def _add_kv_event_flags(parser: _Parser) -> None:
    add = parser.add_argument
    add("--tokenizer-path", metavar="DIR", help="the workers' tokenizer: places text prompts by the workers' KV events")
    add("--model-path", metavar="DIR",
        help="the workers' model; its tokenizer is used where --tokenizer-path is not given")  # fmt: skip
    add("--chat-template", metavar="FILE", help="Jinja file, as the workers have it; none: the tokenizer's own")
    add("--kv-events-endpoint", nargs="+", action="extend", default=[], metavar="WORKER=ENDPOINT[,REPLAY]",
        help="where a worker that does not tell by itself publishes its KV events, as http://w:8000=tcp://w:5557")  # fmt: skip
    add("--max-kv-blocks", type=int, default=CacheAwareConfig.max_kv_blocks, help="blocks remembered per worker")


def _add_worker_flags(parser: _Parser, flavour: Flavour) -> None:
    add = parser.add_argument
    choices = list(_POLICY_NAMES)
    add("--pd-disaggregation", action="store_true", help="implied by --prefill and --decode")
    add("--vllm-pd-disaggregation", action="store_true",
        help="hand over by vLLM's protocol (kv_transfer_params); a bootstrap port says SGLang's; else as the workers speak")  # fmt: skip
    add("--kv-connector", choices=["nixl"], help="vLLM's connectors whose prefill answers with kv_transfer_params")
    add("--prefill", nargs="+", action="append", default=[], metavar="URL", help="URL [BOOTSTRAP_PORT|none] ...")
    add("--decode", nargs="+", action="append", default=[], metavar="URL")
    add("--prefill-bootstrap-ports", nargs="+", type=int, metavar="PORT", help="one for all, or one per --prefill URL")
    add("--worker-urls", nargs="*", default=[], metavar="URL", help="workers that do prefill and decode")
    add("--policy", default=flavour.policy, choices=choices)
    add("--prefill-policy", choices=choices)
    add("--decode-policy", choices=choices)


def _add_compatibility_flags(parser: _Parser) -> None:
    for flag in _NO_EFFECT_FLAGS:
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    for flag in _NO_EFFECT_VALUES:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    for flag in _NO_EFFECT_LISTS:
        parser.add_argument(flag, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--backend", choices=["sglang", "openai"], help=argparse.SUPPRESS)


def parse_args(argv: Sequence[str], flavour: Flavour = BATON) -> tuple[RouterConfig, list[str]]:
    """The configuration, and notes to be logged once. Exits with status 2 and a message on a bad command line;
    raises ValueError when the numbers of prefill URLs and bootstrap ports differ (as mini_lb does)."""
    parser = build_parser(flavour)
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        parser.refuse_unknown(unknown)
    _check_numbers(parser, args)
    workers, is_pd = _workers(parser, args)
    policy = _POLICY_NAMES[args.policy]
    config = RouterConfig(
        host=args.host,
        port=args.port,
        pd=is_pd,
        pd_protocol=_protocol(parser, args, workers),
        workers=workers,
        prefill_policy=_POLICY_NAMES[args.prefill_policy] if args.prefill_policy else policy,
        decode_policy=_POLICY_NAMES[args.decode_policy] if args.decode_policy else policy,
        cache_aware=CacheAwareConfig(
            args.cache_threshold, args.balance_abs_threshold, args.balance_rel_threshold, args.max_tree_size,
            args.eviction_interval_secs, args.max_kv_blocks,
        ),
        retry=RetryConfig(
            0 if args.disable_retries else args.retry_max_retries, args.retry_initial_backoff_ms / 1000,
            args.retry_max_backoff_ms / 1000, args.retry_backoff_multiplier, args.retry_jitter_factor,
            0 if args.disable_retries else args.migration_limit, args.migration_wait_secs,
        ),
        breaker=BreakerConfig(
            not args.disable_circuit_breaker, args.cb_failure_threshold, args.cb_success_threshold,
            args.cb_timeout_duration_secs, args.cb_window_duration_secs,
        ),
        health=HealthConfig(
            enabled=not args.disable_health_check, endpoint=args.health_check_endpoint,
            interval_s=args.health_check_interval_secs, timeout_s=args.health_check_timeout_secs,
            failure_threshold=args.health_failure_threshold, success_threshold=args.health_success_threshold,
        ),
        limits=LimitsConfig(
            max_payload_bytes=args.max_payload_size, max_concurrent=args.max_concurrent_requests,
            queue_size=args.queue_size, queue_timeout_s=args.queue_timeout_secs,
        ),
        request_timeout_s=args.request_timeout_secs,
        shutdown_grace_s=args.shutdown_grace_period_secs,
        api_key=args.api_key,
        request_id_headers=tuple(args.request_id_headers),
        kv_sources=_kv_sources(parser, args.kv_events_endpoint),
        tokenizer=_tokenizer(parser, args),
        chat_template=args.chat_template,
        prometheus_host=args.prometheus_host,
        prometheus_port=args.prometheus_port,
        duration_buckets_s=tuple(args.prometheus_duration_buckets),
        log_level=args.log_level,
        access_log=args.access_log,
    )  # fmt: skip
    return config, _notes(args, config)


def _workers(parser: _Parser, args: argparse.Namespace) -> tuple[tuple[WorkerSpec, ...], bool]:
    prefill = _prefill_specs(parser, args)
    decode = [WorkerSpec(url, "decode") for group in args.decode for url in group]
    is_pd = bool(args.pd_disaggregation or args.vllm_pd_disaggregation or prefill or decode)
    if is_pd and args.worker_urls:
        parser.error("--worker-urls cannot be combined with --prefill, --decode or --[vllm-]pd-disaggregation")
    specs = [*prefill, *decode, *(WorkerSpec(url, "regular") for url in args.worker_urls)]
    seen: set[tuple[str, str]] = set()
    for spec in specs:
        flag = {"regular": "--worker-urls"}.get(spec.role, f"--{spec.role}")
        try:
            url = parse_url(spec.url)[0]
        except ValueError as error:
            parser.error(f"{flag}: {error}")
        if (url, spec.role) in seen:  # once as prefill and once as decode is vLLM's kv_both
            parser.error(f"{flag}: worker {url} was given already")
        seen.add((url, spec.role))
    if not specs:
        # Neither kind was named: a router whose workers register later. PD is what SGLang's mini_lb would be.
        is_pd = True
    return tuple(specs), is_pd


def _protocol(parser: _Parser, args: argparse.Namespace, workers: Sequence[WorkerSpec]) -> PdProtocol | None:
    """As the flags say; a bootstrap port is SGLang's."""
    if args.vllm_pd_disaggregation:
        return "vllm"
    if all(worker.bootstrap_port is None for worker in workers):
        return None
    prefill, decode = ({parse_url(one.url)[0] for one in workers if one.role == role} for role in ("prefill", "decode"))
    for url in prefill & decode:
        parser.error(f"--decode: worker {url} was given already (--prefill); only vLLM's workers can be both")
    return "sglang"


def _prefill_specs(parser: _Parser, args: argparse.Namespace) -> list[WorkerSpec]:
    """`--prefill URL URL`, `--prefill URL PORT` and `--prefill URL none` in any mixture."""
    found: list[tuple[str, int | None]] = []
    ports_given = False
    for group in args.prefill:
        previous_is_url = False
        for token in group:
            if token.isdigit() or token.lower() == "none":
                if not previous_is_url:
                    parser.error(f"--prefill: bootstrap port {token} does not follow a URL")
                port = int(token) if token.isdigit() else None
                if port is not None and not 0 < port < 65536:
                    parser.error(f"--prefill: bootstrap port {token} must be between 1 and 65535")
                found[-1] = (found[-1][0], port)
                ports_given = True
                previous_is_url = False
            else:
                found.append((token, None))
                previous_is_url = True
    ports: list[int] | None = args.prefill_bootstrap_ports
    if ports is None:
        return [WorkerSpec(url, "prefill", port) for url, port in found]
    if ports_given:
        parser.error("--prefill-bootstrap-ports cannot be combined with ports in --prefill")
    if len(ports) == 1:
        ports = ports * len(found)
    if len(ports) != len(found):
        raise ValueError("Number of prefill URLs must match number of bootstrap ports")
    return [WorkerSpec(url, "prefill", port) for (url, _), port in zip(found, ports, strict=True)]


def _tokenizer(parser: _Parser, args: argparse.Namespace) -> str | None:
    """--tokenizer-path must be one; --model-path is taken if it is one, since manifests give it for other reasons too."""
    for flag, path in (("--tokenizer-path", args.tokenizer_path), ("--model-path", args.model_path)):
        if path is None:
            continue
        if (Path(path) / "tokenizer.json").is_file() or (Path(path).name == "tokenizer.json" and Path(path).is_file()):
            return str(path)
        if flag == "--tokenizer-path":
            parser.error(f"{flag}: there is no tokenizer.json in {path}")
    return None


def _kv_sources(parser: _Parser, given: list[str]) -> dict[str, KvSource]:
    sources: dict[str, KvSource] = {}
    for text in given:
        worker, _, endpoints = text.partition("=")
        endpoint, _, replay = endpoints.partition(",")
        try:
            url = parse_url(worker)[0]
            for one in filter(None, (endpoint, replay)):
                split_endpoint(one)
            if not endpoint:
                raise ValueError(f"{text!r} must be WORKER=ENDPOINT or WORKER=ENDPOINT,REPLAY")
        except ValueError as error:
            parser.error(f"--kv-events-endpoint: {error}")
        sources[url] = KvSource(endpoint, replay or None)
    return sources


def _check_numbers(parser: _Parser, args: argparse.Namespace) -> None:
    """Every number in its range; the message names the flag."""
    at_least: dict[str, float] = {
        "balance_abs_threshold": 0, "balance_rel_threshold": 1, "max_tree_size": 1, "eviction_interval_secs": 0,
        "retry_max_retries": 0, "retry_initial_backoff_ms": 0, "retry_max_backoff_ms": 0, "retry_backoff_multiplier": 1,
        "migration_limit": 0, "migration_wait_secs": 0, "cb_failure_threshold": 1, "cb_success_threshold": 1,
        "cb_timeout_duration_secs": 0, "cb_window_duration_secs": 0, "health_failure_threshold": 1,
        "health_success_threshold": 1, "max_payload_size": 1, "max_concurrent_requests": -1, "queue_size": 0,
        "queue_timeout_secs": 0, "shutdown_grace_period_secs": 0, "port": 0, "max_kv_blocks": 1,
    }  # fmt: skip
    for name, minimum in at_least.items():
        value: Any = getattr(args, name)
        if not value >= minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum:g}, got {value:g}")
    for name in ("request_timeout_secs", "health_check_timeout_secs", "health_check_interval_secs"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0, got {getattr(args, name):g}")
    for name in ("cache_threshold", "retry_jitter_factor"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(args, name):g}")
    for name in ("port", "prometheus_port"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 65536:
            parser.error(f"--{name.replace('_', '-')} must be a port number, got {value}")
    buckets = args.prometheus_duration_buckets
    if buckets != sorted(set(buckets)):
        parser.error("--prometheus-duration-buckets must ascend")
    if args.max_concurrent_requests == 0:
        parser.error("--max-concurrent-requests must be at least 1, or -1 for no limit")


def _notes(args: argparse.Namespace, config: RouterConfig) -> list[str]:
    notes: list[str] = []
    if config.pd_protocol == "vllm" and any(worker.bootstrap_port is not None for worker in config.workers):
        notes.append("bootstrap ports have no effect with --vllm-pd-disaggregation")
    if args.kv_connector is not None and config.pd_protocol != "vllm":
        notes.append("--kv-connector has no effect without --vllm-pd-disaggregation")
    if args.disable_health_check and config.pd and config.pd_protocol is None:
        notes.append(
            "--disable-health-check: workers are not asked what they speak; SGLang's hand-over protocol is used"
        )
    for flag in (*_NO_EFFECT_FLAGS, *_NO_EFFECT_VALUES, *_NO_EFFECT_LISTS, "--backend"):
        if getattr(args, flag[2:].replace("-", "_")) not in (None, False):
            notes.append(f"{flag} has no effect in this router")
    policies = {_POLICY_NAMES[name] for name in (args.prefill_policy or args.policy, args.decode_policy or args.policy)}
    tokenizer_flags = [f for f in ("tokenizer_path", "model_path", "chat_template") if getattr(args, f) is not None]
    for name in tokenizer_flags:
        flag = f"--{name.replace('_', '-')}"
        if "cache_aware" not in policies:
            notes.append(f"{flag} has no effect: no policy is cache_aware")
        elif config.tokenizer is None:
            notes.append(f"{flag} has no effect: there is no tokenizer.json in --model-path, so text is placed by text")
    if args.kv_events_endpoint and "cache_aware" not in policies:
        notes.append("--kv-events-endpoint has no effect: no policy is cache_aware")
    if args.disable_retries and args.migration_limit != RetryConfig.migration_limit:
        notes.append("--migration-limit has no effect with --disable-retries")
    return notes
