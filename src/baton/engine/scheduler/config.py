"""Settings of one scheduler, checked in one pass. Plain values: where they come from (flags, a simulation) is not here."""

from dataclasses import dataclass
from typing import Literal, get_args

from baton.protocol.rank import Mode

Policy = Literal["fcfs", "lpm", "random", "lof"]

CLIP_MAX_NEW_TOKENS = 4096
"""No more than this is reserved for one request's output, whatever it asks for (SGLang's estimate)."""
KNOWN_BUT_UNSUPPORTED_POLICIES = ("dfs-weight", "priority")


class SchedulerConfigError(ValueError):
    """Every setting that is wrong, one a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    context_len: int
    """Tokens of prompt and output together."""
    mode: Mode = "null"
    policy: Policy = "fcfs"
    eos_token_ids: tuple[int, ...] = ()
    max_running_requests: int = 256
    max_queued_requests: int | None = None
    """Requests that wait (all queues together); None: no bound. The next one is refused with 503."""
    chunked_prefill_size: int | None = 4096
    """Tokens of one prefill step; a longer prompt is computed in several. None: whole prompts."""
    max_prefill_tokens: int = 16384
    """Tokens of one prefill step of several prompts; a single longer prompt is let through when chunking is off."""
    enable_mixed_chunk: bool = False
    """Decode rows join prefill steps."""
    schedule_conservativeness: float = 1.0
    enable_priority: bool = False
    """Order the queue by `Submit.priority` first. Order only: a running request is never preempted for another."""
    low_priority_values_first: bool = False
    num_reserved_decode_tokens: int = 512
    """Decode mode: room kept for the output of each request before another one is let in."""
    bootstrap_timeout_s: float = 300.0
    """Prefill mode: how long the decode side may take to ask for the KV."""
    receive_timeout_s: float = 300.0
    """Decode mode: how long the KV may take to come, from the request for it."""
    take_back_after_s: float = 1.0
    """Mode both: how long a prompt that a peer waits for may lack pages that are being received into (`take_back`)."""
    default_bootstrap_port: int = 8998
    pipeline_depth: int = 1
    """Steps that may be in flight: scheduled, and not applied yet."""

    def __post_init__(self) -> None:
        problems = [f"{name} {rule}" for name, good, rule in self._checks() if not good]
        if problems:
            raise SchedulerConfigError("\n".join(problems))

    def _checks(self) -> list[tuple[str, bool, str]]:
        policy_rule = f"must be one of {', '.join(get_args(Policy))}, got {self.policy!r}"
        if self.policy in KNOWN_BUT_UNSUPPORTED_POLICIES:
            policy_rule = f"{self.policy!r} is not supported; use one of {', '.join(get_args(Policy))}"
        chunk = self.chunked_prefill_size
        queued = self.max_queued_requests
        return [
            ("context_len", self.context_len >= 1, f"must be positive, got {self.context_len}"),
            ("mode", self.mode in get_args(Mode), f"must be one of {', '.join(get_args(Mode))}, got {self.mode!r}"),
            ("schedule_policy", self.policy in get_args(Policy), policy_rule),
            (
                "max_running_requests",
                self.max_running_requests >= 1,
                f"must be positive, got {self.max_running_requests}",
            ),
            ("max_queued_requests", queued is None or queued >= 1, f"must be positive, got {queued}"),
            ("chunked_prefill_size", chunk is None or chunk >= 1, f"must be positive, got {chunk}"),
            ("max_prefill_tokens", self.max_prefill_tokens >= 1, f"must be positive, got {self.max_prefill_tokens}"),
            (
                "schedule_conservativeness",
                self.schedule_conservativeness >= 0,
                f"must be at least 0, got {self.schedule_conservativeness}",
            ),
            (
                "num_reserved_decode_tokens",
                self.num_reserved_decode_tokens >= 0,
                f"must be at least 0, got {self.num_reserved_decode_tokens}",
            ),
            ("bootstrap_timeout_s", self.bootstrap_timeout_s > 0, f"must be positive, got {self.bootstrap_timeout_s}"),
            ("receive_timeout_s", self.receive_timeout_s > 0, f"must be positive, got {self.receive_timeout_s}"),
            ("pipeline_depth", self.pipeline_depth >= 1, f"must be positive, got {self.pipeline_depth}"),
        ]
