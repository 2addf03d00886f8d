"""Messages between a worker's HTTP process and its rank process (ZeroMQ, msgpack).

The HTTP process owns text: it tokenises, detokenises and matches stop strings. The rank owns token ids, pages and the
model. Every `Submit` is answered by `StepOutput` rows; the row with a `finish` is the last one for its rid, and there
is exactly one such row for each rid, whatever happens.
"""

from typing import Literal

import msgspec

from baton.protocol.errors import ErrorInfo, Stage
from baton.protocol.sampling import SamplingParams

FAKE_BOOTSTRAP_HOST = "2.2.2.2"
"""SGLang's address of nobody, of warm-up and health requests: such a request is served locally, without a hand-over."""


Side = Literal["prefill", "decode"]
Part = Literal["null", "prefill", "decode"]
"""What a worker does for one request: all of it, or one side of a hand-over."""
Mode = Literal["null", "prefill", "decode", "both"]
"""What a worker does for every request; both: each request says."""
STAGE_OF_MODE: dict[Mode, Stage] = {"null": "server", "prefill": "prefill", "decode": "decode", "both": "server"}


class Bootstrap(msgspec.Struct, frozen=True):
    """Where prefill and decode of one request meet (SGLang's bootstrap_host, bootstrap_port, bootstrap_room)."""

    host: str
    port: int | None
    room: int
    side: Side | None = None
    """Which of the two a worker of mode "both" is; others know it from their mode."""


def part_of(mode: Mode, bootstrap: Bootstrap | None) -> Part:
    """What a worker of `mode` does for a request."""
    if mode != "both":
        return mode
    if bootstrap is None or bootstrap.host == FAKE_BOOTSTRAP_HOST:
        return "null"
    return bootstrap.side or "null"


class Submit(msgspec.Struct, tag="submit", frozen=True, kw_only=True):
    """One sequence to generate. `n > 1` and batches are split by the HTTP process: one `Submit` each."""

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = []
    """Tokens generated before (migration): generation goes on behind them; they count as output everywhere."""
    return_logprob: bool = False
    logprob_start_len: int = -1
    """First prompt position whose logprob is wanted; -1: none."""
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] | None = None
    extra_key: str | None = None
    """Isolation key of the prefix cache (`cache_salt`, LoRA id)."""
    priority: int = 0
    bootstrap: Bootstrap | None = None
    timeout_s: float | None = None
    """Seconds this request may live, from arrival; every hop inherits what is left."""


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """End `rid` with an abort; unknown rids are ignored. `reason` becomes the finish message."""

    rid: str
    reason: str = "Aborted"
    matched_stop: str | None = None
    """Set when the HTTP process saw a stop string: the request is finished, not failed."""


class FlushCache(msgspec.Struct, tag="flush_cache", frozen=True):
    call_id: int


class ClearStore(msgspec.Struct, tag="clear_store", frozen=True):
    """Forget every object in the store tier."""

    call_id: int


class DrainStore(msgspec.Struct, tag="drain_store", frozen=True):
    """Answered when every page that is to be in the store is there (or was refused): a worker that ends well asks so."""

    call_id: int


class GetState(msgspec.Struct, tag="get_state", frozen=True):
    call_id: int


class CheckIntegrity(msgspec.Struct, tag="check_integrity", frozen=True):
    """Ask for the self-check of page ownership (tests and /get_server_info)."""

    call_id: int


ToRank = Submit | Abort | FlushCache | ClearStore | DrainStore | GetState | CheckIntegrity


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of one position. `logprob` is None for the first prompt token, which has no predecessor."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = []
    """(token id, logprob), best first."""
    requested: list[tuple[int, float]] = []
    """For `token_ids_logprob`."""


class Finish(msgspec.Struct, frozen=True):
    """Why a sequence ended. `matched` is the stop token id; stop strings are matched by the HTTP process."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    error: ErrorInfo | None = None
    """Set for type "abort"."""


class RequestOutput(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """What one step gave one request. `token_ids` are new since the last output of this rid."""

    rid: str
    token_ids: list[int] = []
    finish: Finish | None = None
    cached_tokens: int = 0
    """Prompt tokens not computed because their pages were cached (set from the first token on)."""
    logprobs: list[TokenLogprobs] = []
    """One per token in token_ids, when asked for."""
    input_logprobs: list[TokenLogprobs] = []
    """With the first output only, when asked for."""
    num_retractions: int = 0
    queue_time_s: float = 0.0
    cached_host: int = 0
    """Of `cached_tokens`: loaded from the host tier."""
    cached_store: int = 0
    """Of `cached_tokens`: brought from the store."""


class StepOutput(msgspec.Struct, tag="step", frozen=True):
    outputs: list[RequestOutput]


class SchedulerState(msgspec.Struct, tag="state", frozen=True, kw_only=True):
    """A snapshot for /metrics, /get_server_info and health; all counts are of requests unless the name says tokens."""

    call_id: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    num_retracted_total: int = 0
    cache_hit_rate: float = 0.0
    gen_throughput: float = 0.0
    new_token_ratio: float = 0.0
    num_prefill_prealloc: int = 0
    num_prefill_inflight: int = 0
    num_decode_prealloc: int = 0
    num_decode_transfer: int = 0
    num_bootstrap_failed_total: int = 0
    num_transfer_failed_total: int = 0
    kv_transfer_speed_gb_s: float = 0.0
    kv_transfer_latency_ms: float = 0.0
    kv_transfer_bootstrap_ms: float = 0.0
    kv_transfer_alloc_ms: float = 0.0
    free_pages: int = 0
    evictable_pages: int = 0
    protected_pages: int = 0
    in_use_pages: int = 0
    tiers: dict[str, float] = {}
    """Numbers of the host tier by name (`kvcache.tiered_cache.TierCounters`); empty without tiers."""
    store: dict[str, float] = {}
    """Numbers of the store and its worker by name; empty without a store."""


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Answer to FlushCache, ClearStore, DrainStore and CheckIntegrity."""

    call_id: int
    ok: bool
    message: str = ""


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The rank's first message: what it loaded."""

    max_total_num_tokens: int
    max_req_input_len: int
    context_len: int
    vocab_size: int
    page_size: int
    bootstrap_port: int | None
    """The prefill's bound bootstrap port (differs from the flag when the flag was 0)."""
    load_weights_s: float
    device: str
    attention_backend: str


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The rank cannot start or go on; the worker exits with this message."""

    message: str


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """The rank's process runs, however long its step takes: said every second, by a thread of its own."""

    pid: int


FromRank = StepOutput | SchedulerState | Reply | Ready | Fatal | Beat
