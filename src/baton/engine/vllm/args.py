"""The flags of vLLM's API server (0.10, and later names): each with what it does here, and what it is called in `EngineArgs`.

`VllmArgs` is the table; `engine_flags` turns settings into the command line of our worker, which is what ranks and other nodes
are started with. Not here: what the flags of the worker do (`engine.args`), who the other nodes are (`cluster`).
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baton.engine.args import engine_args
from baton.engine.flags import (
    FlagError,
    HelpRequested,
    flag,
    flags_of,
    format_help,
    is_given,
    option,
    parse_flags,
    refusals,
)
from baton.engine.vllm.data_parallel import LocalEngines, local_engines
from baton.protocol.rank import Mode

USAGE = (
    "usage: vllm serve MODEL [flags]    (python3 -m vllm.entrypoints.openai.api_server takes the same, with --model)"
)
_LATER = "not served yet"
_OWN_ENGINES = "a server's engines are on its own host and start with it"
_DIST = "ranks are processes of ours, whatever starts them"
_TOKENIZER = "there is one tokenizer, the fast one"
_TLS = "put a proxy in front"
_COMPILE = "the model is not compiled"
_GRAMMAR = "requests that need a grammar are refused"
_LORA = f"LoRA is {_LATER}"
_TEXT = "only text is served"
_MEMORY = "the KV pool lies on the device; for host memory see Baton's --enable-hierarchical-cache"
_SPECULATIVE = "decoding is not speculative; answers are the same"
SIDE_CHANNEL_PORT = 5600
"""NixlConnector's."""
_LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
_SHORT = {
    "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size", "-n": "--nnodes",
    "-dpl": "--data-parallel-size-local", "-dpn": "--data-parallel-rank", "-dpr": "--data-parallel-start-rank", "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port", "-dpb": "--data-parallel-backend", "-dph": "--data-parallel-hybrid-lb", "-dpe": "--data-parallel-external-lb",
    "-r": "--node-rank", "-q": "--quantization", "-O": "--compilation-config",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VllmArgs:
    """Settings of one API server. Units are in the help texts."""

    # One line a flag: it is a table.
    # fmt: off
    # Model and tokenizer.
    model: str = flag("", "model directory, .gguf file or hub id", is_required=True)
    served_model_name: tuple[str, ...] | None = flag(None, "names in the OpenAI routes, the first one in answers; none: --model", is_list=True)
    tokenizer: str | None = flag(None, "directory of the tokenizer; none: the model's")
    tokenizer_mode: str = flag("auto", "tokenizer", choices=("auto", "slow", "mistral", "custom"), effect="no effect", reason=_TOKENIZER)
    skip_tokenizer_init: bool = flag(False, "token ids in; no text")
    trust_remote_code: bool = flag(False, "accepted for manifests", effect="no effect", reason="no code from a model directory is ever run")
    load_format: str = flag("auto", f"how weights are stored: {', '.join(_LOAD_FORMATS)}", effect="refused", reason=f"only {', '.join(_LOAD_FORMATS)}", accepts=_LOAD_FORMATS)
    download_dir: str | None = flag(None, "where hub models go", effect="not served", reason="set HF_HOME instead")
    revision: str | None = flag(None, "revision of a hub id")
    tokenizer_revision: str | None = flag(None, "revision of the tokenizer", effect="not served", reason="the model's revision is used")
    code_revision: str | None = flag(None, "revision of the model's code", effect="no effect", reason="no code from a model directory is ever run")
    hf_token: str | None = flag(None, "hub token", effect="not served", reason="set HF_TOKEN instead")
    hf_overrides: str = flag("{}", "overrides of the model's config", effect="refused", reason=f"config overrides are {_LATER}", accepts=("{}",))
    config_format: str = flag("auto", "format of the model's config", effect="refused", reason="only config.json and GGUF are read", accepts=("auto", "hf"))
    task: str = flag("auto", "what the model is for", effect="refused", reason="only text generation is served", accepts=("auto", "generate"))
    runner: str = flag("auto", "what the model is for", effect="refused", reason="only text generation is served", accepts=("auto", "generate"))
    dtype: str = flag("auto", "of weights and activations", choices=("auto", "half", "float16", "bfloat16", "float", "float32"))
    quantization: str | None = flag(None, "quantisation method", effect="refused", reason=f"quantised computation is {_LATER}; GGUF files are dequantised", accepts=("gguf",))
    kv_cache_dtype: str = flag("auto", "of the KV cache", effect="refused", reason=f"a KV cache of another dtype than the model's is {_LATER}", accepts=("auto",))
    max_model_len: str | None = flag(None, "context length in tokens (8192, 8k, 8K); none: the model's")
    seed: int | None = flag(None, "seed of requests that bring none", kind=int)
    generation_config: str = flag("auto", "sampling defaults: auto: the model's generation_config.json; vllm: none", effect="refused", reason="only auto and vllm", accepts=("auto", "vllm"))
    override_generation_config: str = flag("{}", "sampling defaults", effect="refused", reason="send them with the requests", accepts=("{}",))
    max_logprobs: int = flag(20, "log-probabilities a request may ask for at each position", minimum=-1)
    logits_processor_pattern: str | None = flag(None, "logits processors", effect="no effect", reason="code from a request is never run")
    enable_lora: bool = flag(False, "LoRA", effect="refused", reason=_LORA)
    lora_modules: tuple[str, ...] | None = flag(None, "LoRA adapters", is_list=True, effect="refused", reason=_LORA)
    max_loras: int = flag(1, "LoRA adapters in one batch", effect="no effect", reason=_LORA)
    max_lora_rank: int = flag(16, "LoRA ranks", effect="no effect", reason=_LORA)
    limit_mm_per_prompt: str | None = flag(None, "images a prompt", effect="no effect", reason=_TEXT)
    mm_processor_kwargs: str | None = flag(None, "images", effect="no effect", reason=_TEXT)
    allowed_local_media_path: str | None = flag(None, "images", effect="no effect", reason=_TEXT)

    # HTTP.
    host: str | None = flag(None, "address to listen on; none: all of them")
    port: int = flag(8000, "port to listen on; 0: any free one", minimum=0, maximum=65535)
    api_key: str | None = flag(None, "clients must send it as a Bearer token; none: VLLM_API_KEY")
    chat_template: str | None = flag(None, "Jinja file; none: the model's own")
    chat_template_content_format: str = flag("auto", "how message contents reach the template", choices=("auto", "string", "openai"), effect="no effect", reason="contents are text")
    response_role: str = flag("assistant", "role of answers")
    return_tokens_as_token_ids: bool = flag(False, "log-probabilities name tokens as token_id:N")
    enable_prompt_tokens_details: bool = flag(False, "fill usage.prompt_tokens_details")
    enable_force_include_usage: bool = flag(False, "every stream ends with its usage")
    enable_server_load_tracking: bool = flag(False, "count requests for /load")
    enable_request_id_headers: bool = flag(False, "answers carry X-Request-Id", effect="no effect", reason="they always do")
    enable_log_requests: bool = flag(False, "log every request")
    disable_log_requests: bool = flag(False, "do not log requests", effect="no effect", reason="they are logged with --enable-log-requests only")
    max_log_len: int | None = flag(None, "characters of a logged prompt", kind=int, effect="not served", reason="2048 are shown")
    disable_log_stats: bool = flag(False, "no /metrics")
    uvicorn_log_level: str = flag("info", "of the access log", choices=("debug", "info", "warning", "error", "critical", "trace"))
    disable_uvicorn_access_log: bool = flag(False, "no access log")
    disable_fastapi_docs: bool = flag(False, "no /docs", effect="no effect", reason="there is no such page")
    allowed_origins: str = flag('["*"]', "CORS", effect="not served", reason="no CORS headers are sent")
    allowed_methods: str = flag('["*"]', "CORS", effect="not served", reason="no CORS headers are sent")
    allowed_headers: str = flag('["*"]', "CORS", effect="not served", reason="no CORS headers are sent")
    allow_credentials: bool = flag(False, "CORS", effect="not served", reason="no CORS headers are sent")
    ssl_keyfile: str | None = flag(None, "TLS", effect="refused", reason=_TLS)
    ssl_certfile: str | None = flag(None, "TLS", effect="refused", reason=_TLS)
    ssl_ca_certs: str | None = flag(None, "TLS", effect="refused", reason=_TLS)
    root_path: str | None = flag(None, "path prefix behind a proxy", effect="no effect", reason="no answer names a path")
    middleware: tuple[str, ...] | None = flag(None, "ASGI middleware", is_list=True, effect="refused", reason="code named on the command line is not run")
    api_server_count: int = flag(1, "HTTP processes", effect="not served", reason="one process serves HTTP")
    disable_frontend_multiprocessing: bool = flag(False, "HTTP and engine in one process", effect="no effect", reason="the engine has a process of its own")
    enable_auto_tool_choice: bool = flag(False, "parse tool calls", effect="not served", reason="requests with tools are refused")
    tool_call_parser: str | None = flag(None, "parse tool calls", effect="not served", reason="requests with tools are refused")
    tool_parser_plugin: str | None = flag(None, "parse tool calls", effect="not served", reason="requests with tools are refused")
    reasoning_parser: str | None = flag(None, "split reasoning from content", effect="not served", reason="reasoning stays in the content")
    enable_reasoning: bool = flag(False, "split reasoning from content", effect="not served", reason="reasoning stays in the content")
    config: str | None = flag(None, "YAML file of flags", effect="refused", reason="give the flags on the command line")

    # Scheduling and memory.
    gpu_memory_utilization: float = flag(0.9, "share of device memory for weights and KV", minimum=0.0, maximum=1.0)
    max_num_seqs: int | None = flag(None, "requests in one decode batch; none: as many as fit", kind=int, minimum=1)
    max_num_batched_tokens: int | None = flag(None, "prompt tokens of one step", kind=int, minimum=1)
    enable_prefix_caching: bool = flag(True, "keep KV of past prompts (--no-enable-prefix-caching)")
    prefix_caching_hash_algo: str = flag("builtin", "hash of cached blocks", effect="no effect", reason="the cache is a tree of tokens")
    enable_chunked_prefill: bool = flag(True, "long prompts in several steps (--no-enable-chunked-prefill)")
    block_size: int | None = flag(None, "tokens of one KV block; none: 16 on a CPU", kind=int, minimum=1)
    num_gpu_blocks_override: int | None = flag(None, "KV pool size in blocks", kind=int, minimum=1)
    swap_space: float = flag(4.0, "GB of host memory for preempted requests", effect="no effect", reason=_MEMORY)
    cpu_offload_gb: float = flag(0.0, "GB of weights in host memory", effect="not served", reason="weights stay on the device")
    scheduling_policy: str = flag("fcfs", "order of waiting requests; priority: the lower `priority` first", choices=("fcfs", "priority"))
    preemption_mode: str | None = flag(None, "swap or recompute", effect="no effect", reason="a retracted request keeps what the prefix cache keeps")
    num_scheduler_steps: int = flag(1, "decode steps between two schedules", effect="not served", reason="the schedule is made anew for every step")
    max_num_partial_prefills: int = flag(1, "prompts prefilled at once", effect="not served", reason="the chunk is filled in order")
    long_prefill_token_threshold: int = flag(0, "what counts as a long prompt", effect="not served", reason="the chunk is filled in order")
    async_scheduling: bool = flag(False, "schedule beside the computation", effect="no effect", reason="scheduling takes microseconds")
    enforce_eager: bool = flag(False, "no CUDA graphs", effect="no effect", reason="CUDA graphs are not used yet")
    cuda_graph_sizes: tuple[int, ...] | None = flag(None, "batch sizes of CUDA graphs", kind=int, is_list=True, effect="no effect", reason="CUDA graphs are not used yet")
    compilation_config: str | None = flag(None, "JSON or level", effect="no effect", reason=_COMPILE)
    additional_config: str | None = flag(None, "of other platforms", effect="no effect", reason="it is for platforms that are not served")
    guided_decoding_backend: str = flag("auto", "structured output", effect="not served", reason=_GRAMMAR)
    speculative_config: str | None = flag(None, "JSON: speculative decoding", effect="not served", reason=_SPECULATIVE)
    stream_interval: int = flag(1, "tokens per stream event", minimum=1)
    device: str = flag("auto", "cpu or cuda; auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    disable_sliding_window: bool = flag(False, "attention", effect="no effect", reason="no served model has a sliding window")
    disable_cascade_attn: bool = flag(False, "attention", effect="no effect", reason="kernels are chosen by the device")
    calculate_kv_scales: bool = flag(False, "fp8 KV", effect="no effect", reason="the KV cache has the model's dtype")

    # Parallelism.
    tensor_parallel_size: int = flag(1, "tensor-parallel ranks", minimum=1)
    pipeline_parallel_size: int = flag(1, "pipeline stages of --tensor-parallel-size ranks each (VLLM_PP_LAYER_PARTITION=10,12: layers of each)", minimum=1)
    data_parallel_size: int = flag(1, "data-parallel engines, behind this one port unless another flag says where they are; a CPU host runs one", minimum=1)
    data_parallel_size_local: int | None = flag(None, "engines of this node, with --data-parallel-hybrid-lb; none: all", kind=int, minimum=1)
    data_parallel_rank: int | None = flag(None, "this server is the one engine of that number, and a balancer is in front of it and its like", kind=int, minimum=0)
    data_parallel_start_rank: int | None = flag(None, "number of this node's first engine, with --data-parallel-hybrid-lb", kind=int, minimum=0)
    data_parallel_hybrid_lb: bool = flag(False, "this server has the engines of its node, every node has one, and a balancer is in front")
    data_parallel_external_lb: bool = flag(False, "as --data-parallel-rank, which it needs")
    data_parallel_address: str | None = flag(None, "address of the first node", effect="no effect", reason=_OWN_ENGINES)
    data_parallel_rpc_port: int | None = flag(None, "port of the first node", kind=int, effect="no effect", reason=_OWN_ENGINES)
    data_parallel_backend: str = flag("mp", "what starts engines", choices=("mp", "ray"), effect="no effect", reason="engines are processes of this node")
    enable_expert_parallel: bool = flag(False, "whole experts on each rank, instead of a part of every expert")
    distributed_executor_backend: str | None = flag(None, "ray: over the nodes that multi-node-serving.sh gathered; mp, uni: this node; none: ray where nodes are gathered", choices=("ray", "mp", "uni"))
    nnodes: int = flag(1, "nodes of this engine, each started with the same flags", minimum=1)
    node_rank: int = flag(0, "this node's number", minimum=0)
    master_addr: str = flag("127.0.0.1", "address of node 0")
    master_port: int = flag(29501, "where the nodes meet", minimum=1, maximum=65535)
    headless: bool = flag(False, "no HTTP on this node", effect="no effect", reason="nodes above 0 serve none")
    max_parallel_loading_workers: int | None = flag(None, "ranks that load at once", kind=int, effect="no effect", reason=_DIST)
    ray_workers_use_nsight: bool = flag(False, "profiling", effect="not served", reason=_DIST)
    disable_custom_all_reduce: bool = flag(False, "all-reduce kernels", effect="no effect", reason="kernels are chosen by the device")

    # Prefill and decode apart; observability.
    kv_transfer_config: str | None = flag(None, 'JSON: prefill and decode on separate servers: {"kv_connector": ANY, "kv_role": "kv_producer", "kv_consumer" or "kv_both" (as each request says)}; who prefills meets who decodes at VLLM_NIXL_SIDE_CHANNEL_HOST:VLLM_NIXL_SIDE_CHANNEL_PORT (5600)')
    kv_events_config: str | None = flag(None, 'JSON: publish what the prefix cache holds: {"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557", ...}')
    otlp_traces_endpoint: str | None = flag(None, "OpenTelemetry", effect="not served", reason="no traces are sent")
    collect_detailed_traces: str | None = flag(None, "OpenTelemetry", effect="not served", reason="no traces are sent")
    show_hidden_metrics_for_version: str | None = flag(None, "old metric names", effect="no effect", reason="the old names are served")
    # fmt: on

    @property
    def names(self) -> tuple[str, ...]:
        """What the OpenAI routes call the model, where names are given."""
        return self.served_model_name or ()

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def local_engines(self) -> LocalEngines:
        """The engines of this server. Raises ValueError for flags that cannot be."""
        return local_engines(
            size=self.data_parallel_size,
            size_local=self.data_parallel_size_local,
            rank=self.data_parallel_rank,
            start_rank=self.data_parallel_start_rank,
            hybrid_lb=self.data_parallel_hybrid_lb,
            external_lb=self.data_parallel_external_lb,
            headless=self.headless,
        )


_SAME = {
    "model": "model_path", "tokenizer": "tokenizer_path", "skip_tokenizer_init": "skip_tokenizer_init",
    "trust_remote_code": "trust_remote_code", "load_format": "load_format", "revision": "revision", "dtype": "dtype",
    "seed": "random_seed", "port": "port", "api_key": "api_key", "chat_template": "chat_template",
    "enable_prompt_tokens_details": "enable_cache_report", "enable_log_requests": "log_requests",
    "gpu_memory_utilization": "mem_fraction_static", "max_num_seqs": "max_running_requests", "block_size": "page_size",
    "stream_interval": "stream_interval", "nnodes": "nnodes", "node_rank": "node_rank",
    "tensor_parallel_size": "tp_size", "pipeline_parallel_size": "pp_size",
}  # fmt: skip
"""Ours under another name: the value is passed on where it is given."""


_MODE_OF_ROLE: dict[str, Mode] = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


def parse_vllm_args(argv: Sequence[str]) -> VllmArgs:
    """Settings from a command line. Prints every problem and exits with 2 when there is one; prints help and exits with 0."""
    try:
        return vllm_args(argv)
    except HelpRequested:
        sys.stdout.write(format_help(VllmArgs, USAGE) + "\n")
        raise SystemExit(0) from None
    except FlagError as error:
        sys.stderr.write("".join(f"vllm: {problem}\n" for problem in error.problems))
        raise SystemExit(2) from None


def vllm_args(argv: Sequence[str]) -> VllmArgs:
    """Like `parse_vllm_args`, but raises `FlagError` or `HelpRequested`."""
    return parse_flags(VllmArgs, list(_spelled_out(argv)), _problems)


def _spelled_out(argv: Sequence[str]) -> Iterator[str]:
    """vLLM's spellings as ours: -tp, --max_model_len, --no-enable-prefix-caching."""
    flags = {option(field): one for field, one in flags_of(VllmArgs).items()}
    for token in argv:
        name, equals, value = token.partition("=")
        name = _SHORT.get(name, name)
        if name.startswith("--"):
            name = name.replace("_", "-")
        positive = "--" + name.removeprefix("--no-")
        if name.startswith("--no-") and not equals and positive in flags and flags[positive].kind is bool:
            yield f"{positive}=false"
        else:
            yield name + equals + value if token.startswith("-") else token


def _problems(args: VllmArgs) -> list[str]:
    problems = refusals(args)
    if args.max_model_len is not None:
        try:
            token_count(args.max_model_len)
        except ValueError as error:
            problems.append(f"--max-model-len {error}")
    if args.max_logprobs < 0 and is_given(args, "max_logprobs"):
        problems.append("--max-logprobs -1 (the whole vocabulary) is not served; give a number")
    if args.node_rank >= args.nnodes:
        problems.append(f"--node-rank must be below --nnodes ({args.nnodes}), got {args.node_rank}")
    try:
        _ = args.local_engines
    except ValueError as error:
        problems.append(str(error))
    try:
        kv_mode(args)
    except ValueError as error:
        problems.append(f"--kv-transfer-config: {error}")
    if problems:
        return problems
    try:
        engine_args(engine_flags(args))
    except FlagError as error:  # under our names: their values come from these flags
        problems += error.problems
    return problems


def kv_mode(args: VllmArgs) -> Mode:
    """What this server does. Raises ValueError for a --kv-transfer-config that cannot be."""
    if args.kv_transfer_config is None:
        return "null"
    try:
        value = json.loads(args.kv_transfer_config)
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    role = value.get("kv_role")
    if not isinstance(role, str) or role not in _MODE_OF_ROLE:
        raise ValueError(f"kv_role must be one of {', '.join(_MODE_OF_ROLE)}, got {role!r}")
    return _MODE_OF_ROLE[role]


def token_count(text: str) -> int:
    """vLLM's spelling of a number of tokens: 8192, 8k (8000), 8K (8192), 1.5m. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text)
    factor = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    value = float(found[1]) * factor[found[2]] if found else 0.0
    if value < 1 or value != int(value):
        raise ValueError(f"must be a number of tokens such as 8192, 8k or 8K, got {text!r}")
    return int(value)


def engine_flags(args: VllmArgs, api_key: str | None = None, side_channel_port: int = SIDE_CHANNEL_PORT) -> list[str]:
    """The same settings as flags of our worker."""
    found: dict[str, Any] = {
        ours: getattr(args, theirs) for theirs, ours in _SAME.items() if is_given(args, theirs) or theirs == "port"
    }
    found["host"] = args.host or "0.0.0.0"
    if args.names:
        found["served_model_name"] = args.names[0]
    if args.kv_events_config is not None:
        found["kv_events_config"] = _kv_events(args.kv_events_config)
    if args.max_model_len is not None:
        found["context_length"] = token_count(args.max_model_len)
    if not args.enable_prefix_caching:
        found["disable_radix_cache"] = True
    if not args.enable_chunked_prefill:
        found["chunked_prefill_size"] = -1
    elif args.max_num_batched_tokens is not None:
        found["chunked_prefill_size"] = args.max_num_batched_tokens
    if args.max_num_batched_tokens is not None:
        found["max_prefill_tokens"] = args.max_num_batched_tokens
    if args.num_gpu_blocks_override is not None:
        found["max_total_tokens"] = args.num_gpu_blocks_override * (args.block_size or 16)
    if args.scheduling_policy == "priority":
        found |= {"enable_priority_scheduling": True, "schedule_low_priority_values_first": True}
    if args.device != "auto":
        found["device"] = args.device
    if args.generation_config == "vllm":
        found["sampling_defaults"] = "openai"
    if args.enable_expert_parallel and args.tensor_parallel_size > 1:
        found["ep_size"] = args.tensor_parallel_size
    mode = kv_mode(args)
    engines = args.local_engines
    if engines.first_rank:
        found["dp_rank"] = engines.first_rank
    if engines.count > 1:
        found["dp_size"] = engines.count
        if mode != "prefill":  # there the room decides
            found["load_balance_method"] = "total_requests"  # as vLLM's, which counts waiting ones four times
    if mode != "null":
        found["disaggregation_mode"] = mode
    if mode in ("prefill", "both"):
        found["disaggregation_bootstrap_port"] = side_channel_port + engines.first_rank
    if args.nnodes > 1:
        found["dist_init_addr"] = f"{args.master_addr}:{args.master_port}"
    found["log_level_http"] = _access_log_level(args)
    found["enable_metrics"] = not args.disable_log_stats
    if api_key is not None:
        found["api_key"] = api_key
    return list(_spelled(found))


def _access_log_level(args: VllmArgs) -> str:
    level = {"trace": "debug"}.get(args.uvicorn_log_level, args.uvicorn_log_level)
    return "warning" if args.disable_uvicorn_access_log and level in ("debug", "info") else level


def _spelled(settings: dict[str, Any]) -> Iterator[str]:
    for field, value in settings.items():
        if value is True:
            yield option(field)
        elif value is not False and value is not None:
            yield f"{option(field)}={value}"


def _kv_events(text: str) -> str:
    """--kv-events-config in our words: vLLM has a switch beside the publisher, and it is off unless set."""
    try:
        value = json.loads(text)
    except ValueError:
        return text  # the worker's own check says what is wrong
    if not isinstance(value, dict):
        return text
    is_on = value.pop("enable_kv_cache_events", False) is True
    value["publisher"] = value.get("publisher") or "zmq" if is_on else "null"
    return json.dumps(value)
