"""Settings of the KV hand-over and where they come from: flags and SGLang's environment variables, read once at the edge."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from baton.protocol.errors import BatonError

Backend = Literal["auto", "tcp", "fake"]

BACKEND_NAMES: dict[str, tuple[Backend, str]] = {
    "auto": ("auto", ""),
    "mooncake": (
        "auto",
        "built-in transfer: shared memory on one host, TCP between hosts; Mooncake's engine is not loaded",
    ),
    "nixl": ("auto", "built-in transfer: shared memory on one host, TCP between hosts; NIXL is not loaded"),
    "ascend": ("auto", "built-in transfer: shared memory on one host, TCP between hosts; no Ascend device is used"),
    "mori": ("auto", "built-in transfer: shared memory on one host, TCP between hosts; MORI is not loaded"),
    "mooncake_tcp": ("tcp", "built-in transfer over TCP, on one host too; Mooncake's engine is not loaded"),
    "tcp": ("tcp", ""),
    "fake": ("fake", "no KV is moved: every transfer succeeds at once and page contents are arbitrary"),
}
"""`--disaggregation-transfer-backend` value -> (our back end, what to tell the operator; empty: nothing)."""


class TransferConfigError(BatonError):
    """Settings that cannot be used; the message names every bad field or variable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    backend: Backend = "auto"
    """auto: shared memory when both sides are on one host, TCP otherwise."""
    dp_rank: int = 0
    """Of this engine among those of its worker."""
    dp_size: int = 1
    heartbeat_interval_s: float = 5.0
    heartbeat_max_failure: int = 2
    """Pings in a row without any sign of life before a peer counts as gone."""
    bootstrap_timeout_s: float = 300.0
    """Prefill: how long the notice of a room may wait for its request, or an ended room is remembered."""
    waiting_timeout_s: float = 300.0
    """Prefill: how long the decode side may take to acknowledge after the last page."""
    connect_timeout_s: float = 5.0
    """Decode: from asking the bootstrap server to a usable session. Prefill: how long a new connection may be silent."""
    registration_interval_s: float = 10.0
    """Prefill: how often the registration is repeated, so that a restarted bootstrap server knows us again."""
    copy_threads: int = 1
    chunk_bytes: int = 8 << 20
    """Pages are summed and announced in groups that grow up to about this size: small first ones let both sides work at
    the same time, large later ones cost fewer messages."""
    max_frame_bytes: int = 16 << 20
    """Limit of one control frame from the peer (the largest holds the input log-probabilities)."""
    max_pending_rooms: int = 8192
    """Prefill: rooms noticed by decode sides whose request has not come, and ended rooms remembered."""

    def __post_init__(self) -> None:
        problems = [
            f"{field.name} must be positive and finite, got {value}"
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), int | float)
            and field.name != "dp_rank"
            and not 0 < value < math.inf
        ]
        if not 0 <= self.dp_rank < self.dp_size:
            problems.append(f"dp_rank must be in [0, dp_size = {self.dp_size}), got {self.dp_rank}")
        if problems:
            raise TransferConfigError("; ".join(problems))

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **settings: Any) -> "TransferConfig":
        """`settings` are fields; SGLang's variables fill the rest. Raises `TransferConfigError` naming a bad variable."""
        problems: list[str] = []
        for name, (field, parse, minimum) in _ENVIRONMENT.items():
            text = environ.get(name)
            if text is None or field in settings:
                continue
            try:
                settings[field] = max(parse(text), minimum)
            except ValueError:
                problems.append(f"{name} must be a number, got {text!r}")
        if problems:
            raise TransferConfigError("; ".join(problems))
        return cls(**settings)


_ENVIRONMENT: dict[str, tuple[str, type[int] | type[float], float]] = {
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": ("heartbeat_interval_s", float, 2.0),
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": ("heartbeat_max_failure", int, 1),
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": ("bootstrap_timeout_s", float, 0.0),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": ("waiting_timeout_s", float, 0.0),
    "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE": ("copy_threads", int, 1),
}
"""Variable -> (field, type, smallest value: smaller ones are raised to it, as SGLang does)."""


def parse_backend(name: str) -> tuple[Backend, str]:
    """Our back end for a `--disaggregation-transfer-backend` value and a note for the log (may be empty).

    Raises `TransferConfigError` for an unknown name."""
    if name not in BACKEND_NAMES:
        choices = ", ".join(BACKEND_NAMES)
        raise TransferConfigError(f"--disaggregation-transfer-backend must be one of {choices}, got {name!r}")
    return BACKEND_NAMES[name]
