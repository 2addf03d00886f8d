"""The flags of one engine worker: SGLang's names, aliases and defaults, each with what it does here.

`EngineArgs` is the one table: parsing, --help, /get_server_info and the notes at start are all derived from its fields.
Values stay as given (None: "choose"); what the engine chooses for them is decided where it is used. Not here: how flags are
parsed (`flags`), model configuration, torch.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from baton.engine.flags import (
    FlagError,
    HelpRequested,
    effect_notes,
    flag,
    flags_of,
    format_help,
    is_given,
    option,
    parse_flags,
    refusals,
)
from baton.protocol.kv_events import DEFAULT_PORT, KvEventsConfig, parse_kv_events_config, split_endpoint
from baton.protocol.pod import manifest_path

USAGE = "usage: baton engine --model-path DIR [flags]    (python3 -m sglang.launch_server takes the same)"
_LATER = "not served yet"
_KERNELS = "kernels are chosen by the device"
_STORES = ("file", "mooncake", "dynamic")


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """One worker's settings. Units are in the help texts."""

    # One line a flag: it is a table.
    # fmt: off
    # Model and tokenizer.
    model_path: str = flag("", "model directory, .gguf file or hub id", aliases=("--model",), is_required=True)
    tokenizer_path: str | None = flag(None, "directory of the tokenizer; none: the model's")
    tokenizer_mode: str = flag("auto", "auto or slow", choices=("auto", "slow"), effect="no effect", reason="there is one tokenizer, the fast one")
    skip_tokenizer_init: bool = flag(False, "token ids in, token ids out; no text")
    load_format: str = flag("auto", "how weights are stored", choices=("auto", "safetensors", "gguf", "dummy"))
    trust_remote_code: bool = flag(False, "accepted for manifests", effect="no effect", reason="no code from a model directory is ever run")
    context_length: int | None = flag(None, "context length in tokens; none: the model's", kind=int, minimum=1)
    is_embedding: bool = flag(False, "serve embeddings", effect="refused", reason=f"embeddings are {_LATER}")
    revision: str | None = flag(None, "revision of a hub id")
    dtype: str = flag("auto", "of weights and activations", choices=("auto", "half", "float16", "bfloat16", "float", "float32"))
    quantization: str | None = flag(None, "quantisation method", effect="refused", reason=f"quantised computation is {_LATER}; GGUF files are dequantised")
    kv_cache_dtype: str = flag("auto", "of the KV cache", effect="refused", reason=f"a KV cache of another dtype than the model's is {_LATER}", accepts=("auto",))
    json_model_override_args: str = flag("{}", "overrides of the model's config", effect="refused", reason=f"config overrides are {_LATER}", accepts=("{}",))
    lora_paths: tuple[str, ...] | None = flag(None, "LoRA adapters", is_list=True, effect="refused", reason=f"LoRA is {_LATER}")
    enable_lora: bool = flag(False, "LoRA", effect="refused", reason=f"LoRA is {_LATER}")
    max_loras_per_batch: int = flag(8, "LoRA adapters in one batch", effect="no effect", reason=f"LoRA is {_LATER}")

    # HTTP.
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "port to listen on; 0: any free one", minimum=0, maximum=65535)
    skip_server_warmup: bool = flag(False, "do not generate once before being ready")
    api_key: str | None = flag(None, "clients must send it as a Bearer token")
    served_model_name: str | None = flag(None, "name in the OpenAI routes; none: --model-path")
    chat_template: str | None = flag(None, "Jinja file; none: the model's own")
    enable_cache_report: bool = flag(False, "fill usage.prompt_tokens_details.cached_tokens")
    sampling_defaults: str = flag("model", "defaults of the OpenAI routes: the model's generation_config.json, or OpenAI's", choices=("model", "openai"))
    reasoning_parser: str | None = flag(None, "split reasoning from content", effect="not served", reason="reasoning stays in the content")
    tool_call_parser: str | None = flag(None, "parse tool calls", effect="not served", reason="requests with tools are refused")
    grammar_backend: str | None = flag(None, "for structured output", effect="not served", reason="requests that need a grammar are refused")
    constrained_json_whitespace_pattern: str | None = flag(None, "for structured output", effect="not served", reason="requests that need a grammar are refused")
    stream_interval: int = flag(1, "tokens per stream event", minimum=1)
    stream_output: bool = flag(False, "/generate streams carry new output_ids only")
    config: str | None = flag(None, "YAML file of flags", effect="refused", reason="give the flags on the command line")

    # Scheduling and memory.
    mem_fraction_static: float | None = flag(None, "share of device memory for weights and KV", kind=float, minimum=0, maximum=1, effect="gpu only", reason="on a CPU the KV pool is sized by --max-total-tokens or the machine's free memory")
    max_running_requests: int | None = flag(None, "requests in one decode batch; none: as many as fit", kind=int, minimum=1)
    max_queued_requests: int | None = flag(None, "requests that may wait; more are answered 503; none: no bound; ignored with prefill-decode disaggregation", kind=int, minimum=1)
    max_total_tokens: int | None = flag(None, "KV pool size in tokens", kind=int, minimum=1)
    chunked_prefill_size: int | None = flag(None, "tokens of one prefill step; -1: no chunking; none: 2048 on a CPU, 4096 on a GPU, divided by the pipeline stages", kind=int, minimum=-1)
    max_prefill_tokens: int = flag(16384, "prompt tokens of one batch", minimum=1)
    schedule_policy: Literal["fcfs", "lpm", "random", "lof"] = flag("fcfs", "order of waiting requests (SGLang's dfs-weight and priority are not served; for priorities see --enable-priority-scheduling)", choices=("fcfs", "lpm", "random", "lof"))
    enable_priority_scheduling: bool = flag(False, "higher `priority` first; a running request is never preempted")
    schedule_low_priority_values_first: bool = flag(False, "lower `priority` first")
    priority_scheduling_preemption_threshold: int = flag(10, "preemption by priority", effect="not served", reason="a running request is never preempted for another")
    schedule_conservativeness: float = flag(1.0, "above 1: fewer requests at once, fewer retractions", minimum=0.0)
    page_size: int | None = flag(None, "tokens of one KV page; none: the attention backend's (16 on a CPU)", kind=int, minimum=1)
    radix_eviction_policy: Literal["lru", "lfu"] = flag("lru", "which cached pages go first", choices=("lru", "lfu"))
    disable_radix_cache: bool = flag(False, "no prefix cache")
    device: str | None = flag(None, "cpu or cuda; none: cuda if there is one", choices=("cpu", "cuda"))
    num_continuous_decode_steps: int = flag(1, "decode steps between two schedules", minimum=1, effect="not served", reason="the schedule is made anew for every step")
    enable_mixed_chunk: bool = flag(False, "prefill chunks and decode in one step")
    disable_overlap_schedule: bool = flag(False, "schedule and compute in turn", effect="no effect", reason="they take turns anyway")
    random_seed: int | None = flag(None, "seed of requests that bring none", kind=int)
    watchdog_timeout: float = flag(300.0, "seconds without an answer after which the model process counts as hung", minimum=1)

    # Parallelism.
    tp_size: int = flag(1, "tensor-parallel ranks: a GPU each; a CPU host is one rank however many it is asked for", aliases=("--tp", "--tensor-parallel-size"), minimum=1)
    pp_size: int = flag(1, "pipeline stages of --tp-size ranks each; on CPUs fewer where fewer hosts are there (SGLANG_PP_LAYER_PARTITION=10,12: layers of each)", aliases=("--pp", "--pipeline-parallel-size"), minimum=1)
    pp_max_micro_batch_size: int | None = flag(None, "with several --pp-size stages: decoding requests of one step, a step of which is in each stage; none: --max-running-requests decides", aliases=("--max-micro-batch-size",), kind=int, minimum=1)
    dp_size: int = flag(1, "data-parallel engines behind this worker's port, each with its own ranks and KV pool; a CPU host runs one", aliases=("--dp", "--data-parallel-size"), minimum=1)
    dp_rank: int = flag(0, "number of the first engine, where several workers are the engines of one service: counts up the port of --kv-events-config, and names the engine in metrics", minimum=0)
    enable_dp_attention: bool = flag(False, "attention by whole requests on each of --dp-size groups of the --tp-size ranks")
    enable_dp_lm_head: bool = flag(False, "logits by whole requests, with --enable-dp-attention", effect="no effect", reason="logits are split by vocabulary over the --tp-size ranks; the answers are the same")
    ep_size: int = flag(1, "parts into which a layer's experts are dealt out over the --tp-size ranks; 1: every rank has a part of every expert", aliases=("--ep", "--expert-parallel-size"), minimum=1)
    load_balance_method: str = flag("auto", "which engine of --dp-size gets a prompt: round_robin; total_requests (shortest_queue): the one with the fewest; total_tokens (minimum_tokens): with the fewest tokens in progress; cache_aware: the one that had the beginning of the prompt, unless it is much busier; follow_bootstrap_room: bootstrap_room modulo the engines, which always decides on a prefill worker; auto: round_robin", choices=("auto", "round_robin", "total_requests", "shortest_queue", "total_tokens", "minimum_tokens", "cache_aware", "follow_bootstrap_room"))
    dist_init_addr: str | None = flag(None, "HOST:PORT where the ranks meet, on the host of --node-rank 0", aliases=("--nccl-init-addr",))
    nnodes: int = flag(1, "nodes of this worker; only --node-rank 0 serves HTTP, the others at most /health (with --port)", minimum=1)
    node_rank: int = flag(0, "this node's number", minimum=0)
    dist_timeout: int | None = flag(None, "seconds that a rank waits for the others at start; none: 1800", kind=int, minimum=1)
    base_gpu_id: int = flag(0, "first GPU, counted in CUDA_VISIBLE_DEVICES where that is set", minimum=0, effect="gpu only", reason="ranks run on the CPU")
    gpu_id_step: int = flag(1, "from one rank's GPU to the next one's", minimum=1, effect="gpu only", reason="ranks run on the CPU")

    # Kernels.
    attention_backend: str | None = flag(None, "attention kernels: torch_native or cpu; none: the device's best", effect="not served", reason=_KERNELS, accepts=("torch_native", "cpu", "auto"))
    sampling_backend: str | None = flag(None, "sampling kernels", effect="no effect", reason=_KERNELS)
    disable_cuda_graph: bool = flag(False, "launch kernels one by one", effect="no effect", reason="CUDA graphs are not used yet")
    cuda_graph_max_bs: int | None = flag(None, "largest batch in a CUDA graph", kind=int, effect="no effect", reason="CUDA graphs are not used yet")
    cuda_graph_bs: tuple[int, ...] | None = flag(None, "batch sizes of CUDA graphs", kind=int, is_list=True, effect="no effect", reason="CUDA graphs are not used yet")
    enable_torch_compile: bool = flag(False, "compile the model", effect="no effect", reason="the model is not compiled")
    torch_compile_max_bs: int = flag(32, "largest batch compiled for", effect="no effect", reason="the model is not compiled")
    speculative_algorithm: str | None = flag(None, "speculative decoding", effect="not served", reason="decoding is not speculative; answers are the same")
    speculative_draft_model_path: str | None = flag(None, "draft model", effect="not served", reason="decoding is not speculative; answers are the same")
    speculative_num_steps: int | None = flag(None, "draft steps", kind=int, effect="not served", reason="decoding is not speculative; answers are the same")
    speculative_eagle_topk: int | None = flag(None, "draft width", kind=int, effect="not served", reason="decoding is not speculative; answers are the same")
    speculative_num_draft_tokens: int | None = flag(None, "draft tokens", kind=int, effect="not served", reason="decoding is not speculative; answers are the same")

    # Tiers of the KV cache.
    enable_hierarchical_cache: bool = flag(False, "keep KV pages in host memory too, and in a store with --hicache-storage-backend")
    hicache_ratio: float = flag(2.0, "host tier size by device tier size; above 1", minimum=0.0)
    hicache_size: float = flag(0.0, "host tier size in GB; 0: --hicache-ratio decides", minimum=0.0)
    hicache_write_policy: Literal["write_back", "write_through", "write_through_selective"] = flag("write_through", "pages go to the host tier when they are computed, at their second use (selective), or when the device evicts them (write_back)", choices=("write_back", "write_through", "write_through_selective"))
    hicache_eviction_policy: Literal["lru", "lfu"] = flag("lru", "which pages leave the host tier first", choices=("lru", "lfu"))
    hicache_io_backend: str = flag("kernel", "how pages move", choices=("kernel", "direct"), effect="no effect", reason="whole pages are copied between two steps")
    hicache_mem_layout: str = flag("layer_first", "layout of the host tier", choices=("layer_first", "page_first", "page_first_direct", "page_head", "page_first_kv_split"), effect="no effect", reason="a page is one contiguous region in every tier")
    hicache_storage_backend: str | None = flag(None, "store tier: file (a directory of this host), mooncake, or dynamic (a class of yours)")
    hicache_storage_key_scheme: Literal["default", "unified"] = flag("default", "objects of the store: a page with all heads of a rank, or one head each, which workers of any --tp-size share", choices=("default", "unified"))
    hicache_storage_prefetch_policy: Literal["best_effort", "wait_complete", "timeout"] = flag("best_effort", "whether a request waits for its pages from the store: never, until they came, or for a while", choices=("best_effort", "wait_complete", "timeout"))
    hicache_storage_backend_extra_config: str | None = flag(None, "JSON object, or @FILE with one: settings of the store and of the prefetch")
    enable_lmcache: bool = flag(False, "LMCache as the tiers", effect="not served", reason="use --enable-hierarchical-cache")

    # Logs and metrics.
    log_level: str = flag("info", "debug, info, warning, error", choices=("debug", "info", "warning", "error", "critical"))
    log_level_http: str | None = flag(None, "of the access log; none: --log-level", choices=("debug", "info", "warning", "error", "critical"))
    log_requests: bool = flag(False, "log every request")
    log_requests_level: int = flag(2, "0: ids and counts; 1: and sampling; 2: and cut-off text; 3: and all text", minimum=0)
    show_time_cost: bool = flag(False, "log time costs", effect="no effect", reason="--log-requests shows times")
    enable_metrics: bool = flag(False, "serve /metrics")
    decode_log_interval: int = flag(40, "decode steps between two log lines", minimum=1, effect="no effect", reason="no line is logged per step; see /metrics")
    enable_request_time_stats_logging: bool = flag(False, "log the times of every request", effect="no effect", reason="--log-requests shows times")
    bucket_time_to_first_token: tuple[float, ...] | None = flag(None, "histogram buckets in seconds", kind=float, is_list=True)
    bucket_inter_token_latency: tuple[float, ...] | None = flag(None, "histogram buckets in seconds", kind=float, is_list=True)
    bucket_e2e_request_latency: tuple[float, ...] | None = flag(None, "histogram buckets in seconds", kind=float, is_list=True)
    collect_tokens_histogram: bool = flag(False, "histograms of prompt and generated tokens")
    kv_events_config: str | None = flag(None, 'JSON: publish what the prefix cache holds, for routers: {"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558", ...}; without endpoint: port 5557 of --host')
    enable_trace: bool = flag(False, "OpenTelemetry", effect="not served", reason="no traces are sent")
    otlp_traces_endpoint: str = flag("localhost:4317", "OpenTelemetry", effect="not served", reason="no traces are sent")

    # Prefill and decode on separate workers.
    disaggregation_mode: Literal["null", "prefill", "decode", "both"] = flag("null", "this worker's part; both: each request says, in vLLM's words (`vllm serve` only)", choices=("null", "prefill", "decode", "both"))
    disaggregation_transfer_backend: str = flag("mooncake", "how KV pages travel: shared memory on one host and TCP between hosts, whichever of SGLang's names is given; tcp: never shared memory; fake: not at all", choices=("mooncake", "mooncake_tcp", "nixl", "ascend", "mori", "auto", "tcp", "fake"))
    disaggregation_bootstrap_port: int = flag(8998, "where decode workers meet a prefill worker; 0: any free one", minimum=0, maximum=65535)
    disaggregation_decode_tp: int | None = flag(None, "ranks of the decode workers; none: as here", kind=int, minimum=1, effect="no effect", reason="whole pages are handed over, whatever the ranks of either side")
    disaggregation_decode_dp: int | None = flag(None, "decode engines; none: as here", kind=int, minimum=1, effect="no effect", reason="a decode worker picks the engine of a request by itself")
    disaggregation_prefill_pp: int = flag(1, "stages of the prefill workers", minimum=1, effect="no effect", reason="whole pages are handed over, whatever the ranks of either side")
    disaggregation_ib_device: str | None = flag(None, "RDMA devices", effect="no effect", reason="RDMA is not used")
    disaggregation_decode_enable_offload_kvcache: bool = flag(False, "decode puts the KV of what it generated into the store, for the next turn's prefill")
    disaggregation_decode_polling_interval: int = flag(1, "loops between two polls", minimum=1, effect="no effect", reason="transfers wake the scheduler; nothing polls")
    disaggregation_decode_enable_radix_cache: bool = flag(False, "prefix cache on decode", effect="no effect", reason="it is on unless --disable-radix-cache")
    disaggregation_decode_allocation_policy: str = flag("early", "when decode reserves pages", choices=("early", "prefill_complete"), effect="not served", reason="pages are reserved early", accepts=("early",))
    disaggregation_enable_kv_checksum: bool = flag(False, "check every page", effect="no effect", reason="every page is always checked")
    disaggregation_decode_retraction_backup: str | None = flag(None, "where retracted KV goes", effect="not served", reason="a retracted request keeps what the prefix cache keeps")
    disaggregation_decode_extra_slots: int | None = flag(None, "requests in transfer beside the running ones", kind=int, effect="not served", reason="requests in transfer are bounded by pages")
    disaggregation_decode_host_receive_threshold: float = flag(1.0, "when to receive into host memory", effect="not served", reason="pages are received into the device pool")
    num_reserved_decode_tokens: int = flag(512, "tokens kept free for each running request on decode", minimum=0)
    prefill_round_robin_balance: bool = flag(False, "among data-parallel prefill engines", effect="no effect", reason="bootstrap_room picks the prefill engine, and decode asks the prefill worker how many there are")
    enable_pd_role_switch: bool = flag(False, "change roles while running", effect="not served", reason="a worker keeps its role")
    pdlb_url: str | None = flag(None, "register with a load balancer", effect="not served", reason="name this worker on the router's command line")
    # fmt: on

    @property
    def own_attention_backend(self) -> Literal["auto", "cpu", "torch_native"]:
        """--attention-backend where it names one of ours; SGLang's other names mean "choose"."""
        given = self.attention_backend
        return given if given in ("cpu", "torch_native") else "auto"  # type: ignore[return-value]

    @property
    def dp_group(self) -> int:
        """In a rank: which of its worker's --dp-size engines it belongs to, by SGLang's rule that a request is on engine
        bootstrap_room modulo --dp-size. Engines have consecutive numbers, so all are different here too."""
        return self.dp_rank % self.dp_size

    @property
    def prefills_for_others(self) -> bool:
        """Whether decode workers meet this one at its bootstrap server."""
        return self.disaggregation_mode in ("prefill", "both")

    @property
    def decodes_for_others(self) -> bool:
        """Whether this worker goes on with what prefill workers computed."""
        return self.disaggregation_mode in ("decode", "both")

    @property
    def has_tiers(self) -> bool:
        """Whether there is a host tier."""
        return self.enable_hierarchical_cache or self.disaggregation_decode_enable_offload_kvcache

    @property
    def dist_timeout_s(self) -> float:
        """How long ranks wait for one another at start (torch.distributed's default, which SGLang keeps)."""
        return float(self.dist_timeout or 1800)

    @property
    def kv_events(self) -> KvEventsConfig | None:
        """--kv-events-config, where it asks for events. Raises ValueError for one that cannot be used."""
        config = None if self.kv_events_config is None else parse_kv_events_config(self.kv_events_config)
        return config if config is not None and config.is_on else None

    @property
    def name(self) -> str:
        """What the OpenAI routes call the model."""
        return self.served_model_name or manifest_path(self.model_path)


def split_address(address: str) -> tuple[str, int]:
    """--dist-init-addr as (host, port). Raises ValueError."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--dist-init-addr must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def _refusals(args: EngineArgs) -> list[str]:
    problems = refusals(args)
    try:
        _ = args.kv_events
    except ValueError as error:
        problems.append(f"--kv-events-config: {error}")
    if args.node_rank >= args.nnodes:
        problems.append(f"--node-rank must be below --nnodes ({args.nnodes}), got {args.node_rank}")
    if args.tp_size * args.pp_size % args.nnodes:
        sizes = f"--tp-size {args.tp_size}" + (f" times --pp-size {args.pp_size}" if args.pp_size > 1 else "")
        problems.append(f"{sizes} must be a multiple of --nnodes {args.nnodes}")
    if args.tp_size % args.ep_size:
        problems.append(f"--ep-size {args.ep_size} must divide --tp-size {args.tp_size}, whose ranks hold the experts")
    if args.nnodes > 1 and args.dist_init_addr is None:
        problems.append("--nnodes above 1 needs --dist-init-addr HOST:PORT, where the nodes meet")
    if args.dist_init_addr is not None:
        try:
            split_address(args.dist_init_addr)
        except ValueError as error:
            problems.append(str(error))
    if args.chunked_prefill_size == 0:
        problems.append("--chunked-prefill-size must be -1 (no chunking) or at least 1, got 0")
    problems += _dp_refusals(args)
    problems += _tier_refusals(args)
    if args.disaggregation_mode == "decode":
        for field in ("disaggregation_decode_tp", "disaggregation_decode_dp"):
            if getattr(args, field) is not None:
                problems.append(f"{option(field)} is for prefill workers; this one is decode")
    return problems


def _dp_refusals(args: EngineArgs) -> list[str]:
    problems = []
    if args.enable_dp_attention:
        if args.tp_size % args.dp_size:
            problems.append(f"--dp-size {args.dp_size} must divide --tp-size {args.tp_size} with --enable-dp-attention")
    elif args.dp_size > 1 and args.nnodes > 1:
        problems.append(
            f"--dp-size {args.dp_size} with --nnodes {args.nnodes}: the engines of a worker are on one host, unless "
            "--enable-dp-attention makes them one; start a worker on each host, and a router in front"
        )
    if args.dp_size > 1 and args.load_balance_method == "follow_bootstrap_room" and args.disaggregation_mode == "null":
        problems.append("--load-balance-method follow_bootstrap_room needs --disaggregation-mode prefill or decode")
    with contextlib.suppress(ValueError):  # `_refusals` says what is wrong with it
        problems += [] if args.kv_events is None else _event_port_refusals(args, args.kv_events)
    return problems


def _event_port_refusals(args: EngineArgs, events: KvEventsConfig) -> list[str]:
    """Every engine counts up from the ports that are given."""
    given = (events.endpoint or f"tcp://*:{DEFAULT_PORT}", events.replay_endpoint)
    ports = [split_endpoint(one)[1] + args.dp_rank for one in given if one is not None]
    num_engines = 1 if args.enable_dp_attention else args.dp_size
    if max(ports) + num_engines > 65536:
        return [
            f"--kv-events-config: port {max(ports)} (--dp-rank counts up) and the {num_engines - 1} behind it (--dp-size) are not all ports"
        ]
    if len(ports) == 2 and abs(ports[0] - ports[1]) < num_engines:
        return [
            f"--kv-events-config: endpoint and replay_endpoint must be --dp-size {args.dp_size} ports apart, since every "
            f"engine counts up from both; got {ports[0]} and {ports[1]}"
        ]
    return []


def _tier_refusals(args: EngineArgs) -> list[str]:
    problems: list[str] = []
    backend = args.hicache_storage_backend
    offloads = args.disaggregation_decode_enable_offload_kvcache
    if backend is not None and backend not in _STORES:
        problems.append(f"--hicache-storage-backend {backend} is not served; use one of {', '.join(_STORES)}")
    if args.has_tiers and args.disable_radix_cache:
        problems.append(
            "--disable-radix-cache leaves nothing for --enable-hierarchical-cache to keep; give one of them"
        )
    if args.has_tiers and not args.hicache_size and args.hicache_ratio <= 1:
        problems.append(
            f"--hicache-ratio must be above 1, got {args.hicache_ratio:g}: the host tier keeps a copy of the device's pages"
        )
    if offloads and args.disaggregation_mode != "decode":
        problems.append("--disaggregation-decode-enable-offload-kvcache is for --disaggregation-mode decode")
    if offloads and backend is None:
        problems.append(
            "--disaggregation-decode-enable-offload-kvcache needs --hicache-storage-backend: a store is where the prefill finds it"
        )
    return problems


def parse_engine_args(argv: Sequence[str]) -> EngineArgs:
    """Settings from a command line. Prints every problem and exits with 2 when there is one; prints help and exits with 0."""
    try:
        return engine_args(argv)
    except HelpRequested:
        sys.stdout.write(format_help(EngineArgs, USAGE) + "\n")
        raise SystemExit(0) from None
    except FlagError as error:
        sys.stderr.write("".join(f"baton engine: {problem}\n" for problem in error.problems))
        raise SystemExit(2) from None


def engine_args(argv: Sequence[str]) -> EngineArgs:
    """Like `parse_engine_args`, but raises `FlagError` or `HelpRequested`."""
    return parse_flags(EngineArgs, argv, _refusals)


def start_notes(args: EngineArgs, device: str) -> list[str]:
    """One line for each flag that was given and does nothing on `device` ("cpu", "cuda"): its name and the reason."""
    notes = effect_notes(args, device)
    if not args.has_tiers:
        notes += [
            f"{option(field)} has no effect without --enable-hierarchical-cache"
            for field, one in flags_of(EngineArgs).items()
            if field.startswith("hicache_") and one.effect == "effective" and is_given(args, field)
        ]
    elif args.hicache_storage_backend is None:
        notes += [
            f"{option(field)} has no effect without --hicache-storage-backend"
            for field in flags_of(EngineArgs)
            if field.startswith("hicache_storage_") and is_given(args, field)
        ]
    if args.pp_max_micro_batch_size is not None and args.pp_size == 1:
        notes.append("--pp-max-micro-batch-size has no effect without --pp-size above 1")
    if args.kv_events_config is not None and args.disable_radix_cache:
        notes.append("--kv-events-config has no effect: with --disable-radix-cache nothing is cached")
    if (
        args.dp_size > 1
        and args.disaggregation_mode == "prefill"
        and args.load_balance_method not in ("auto", "follow_bootstrap_room")
    ):
        notes.append("--load-balance-method has no effect on a prefill worker: bootstrap_room picks the engine")
    if args.max_queued_requests is not None and args.disaggregation_mode != "null":
        notes.append(
            "--max-queued-requests has no effect: with prefill-decode disaggregation the router bounds requests"
        )
    return notes


def public_args(args: EngineArgs) -> dict[str, object]:
    """Every setting by name, for /get_server_info; secrets are left out."""
    values = {one.name: getattr(args, one.name) for one in dataclasses.fields(args)}
    values["api_key"] = None if args.api_key is None else "***"
    return values
