"""What a failed try means: whether another try can help, after how long, and whom it speaks against. Pure.

The rule for workers that are gone: a request for which there was a pair when it came is held until there is one again, for
`migration_wait_s` and within its deadline, however it learns of the loss (its answer breaks off, a kept-alive connection
closes, nobody listens, another request or the health check saw it first). A request that comes when there is no pair is
refused at once. So retries are counted for what workers answer, not for workers that are not there.
"""

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

from baton.protocol.errors import WORKER_LOST
from baton.router.config import RetryConfig

Kind = Literal["connect", "stale", "lost", "status", "event", "handover"]
RETRYABLE_STATUSES = frozenset((408, 429, 500, 502, 503, 504))
BUSY_STATUSES = frozenset((429, 503))
MAX_BUSY_BACKOFF_S = 1.0
MAX_STALE = 3


class Answer(NamedTuple):
    """A worker's whole answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass
class Failure:
    """One failed try. `connect`: no connection; `stale`: a kept-alive connection had been closed; `lost`: the connection
    ended in mid-answer; `status`: an error answer; `event`: an error event in a stream; `handover`: a prefill's good answer
    that hands nothing over."""

    kind: Kind
    role: str
    url: str
    message: str
    answer: Answer | None = None
    info: dict[str, Any] = field(default_factory=dict)
    """The worker's error object, when it could be read."""
    peer_url: str = ""
    """The other worker of the pair."""
    event: bytes = b""
    """The error event of kind `event`."""

    @property
    def is_busy(self) -> bool:
        return self.answer is not None and self.answer.status in BUSY_STATUSES and not self.is_worker_lost

    @property
    def is_worker_lost(self) -> bool:
        """The worker that had the request is gone: it closed in mid-answer, or said that its model process ended."""
        return self.kind == "lost" or self.info.get("type") == WORKER_LOST

    @property
    def is_peer_lost(self) -> bool:
        """The KV did not come across: the worker that tells may be well, its peer may be gone."""
        return self.info.get("stage") == "transfer" and self.can_retry

    @property
    def is_about_peer(self) -> bool:
        """The peer is as suspect as the worker that tells: the hand-over failed, or decode tells of its prefill."""
        stage = self.info.get("stage")
        return stage == "transfer" or (stage == "prefill" and self.role == "decode")

    @property
    def can_retry(self) -> bool:
        """Whether the same request may succeed elsewhere. A worker's own word (`retryable`) beats the status."""
        hint = self.info.get("retryable")
        if isinstance(hint, bool):
            return hint
        if self.kind == "status":
            assert self.answer is not None
            return self.answer.status in RETRYABLE_STATUSES
        if self.kind == "event":
            code = self.info.get("code")
            return isinstance(code, int) and code in RETRYABLE_STATUSES
        return True


def blames(failure: Failure) -> bool:
    """Whether the failure counts against its worker's breaker.

    Not: 4xx, a full queue (503, 429), a deadline (408, 504), a stale connection; nor an error of a decode worker that
    says it happened at another stage (its prefill or the transfer).
    """
    if failure.kind in ("connect", "lost", "handover"):
        return True
    stage = failure.info.get("stage")
    if failure.role == "decode" and stage in ("prefill", "transfer"):
        return False
    status = failure.answer.status if failure.answer is not None else failure.info.get("code")
    return isinstance(status, int) and status >= 500 and status not in (503, 504)


@dataclass
class RetryState:
    """What has been tried for one request."""

    retries: int = 0
    stale: int = 0
    busy: int = 0
    migrations: int = 0
    lost_worker: bool = False
    """A worker that had accepted the request is gone: from now on only the deadline ends the search for another."""
    missed_worker: bool = False
    """One that was to get it was gone already: others may be full of what it had, so a full queue is waited for."""
    had_pair: bool = False
    """There was a pair for it once."""
    tried: Counter[str] = field(default_factory=Counter)
    """Failures by URL of workers to avoid."""

    def note(self, failure: Failure) -> None:
        if failure.kind == "stale":
            self.missed_worker = True
            return
        self.tried[failure.url] += 1
        if failure.peer_url and failure.is_about_peer:
            self.tried[failure.peer_url] += 1
        if failure.is_worker_lost or failure.is_peer_lost or (failure.kind == "connect" and self.stale):
            # A connection that closed under the request, and then nobody there: the worker may well have had it.
            self.lost_worker = True
        elif failure.kind == "connect":
            self.missed_worker = True


def backoff_s(count: int, config: RetryConfig, rng: Random) -> float:
    """Exponential in `count` (0 for the first), bounded, with jitter."""
    delay = min(config.max_backoff_s, config.initial_backoff_s * config.multiplier ** min(count, 64))
    return delay * (1 + config.jitter * (2 * rng.random() - 1))


def next_try_s(failure: Failure, state: RetryState, config: RetryConfig, rng: Random) -> float | None:
    """Seconds until the next try; None: give up. Updates the counters of `state`; call `state.note` first."""
    if failure.kind == "stale" and state.stale < MAX_STALE:
        state.stale += 1
        return 0.0
    if not failure.can_retry or config.max_retries == 0:
        return None
    waits_for_room = failure.is_busy and (state.lost_worker or state.missed_worker)
    if waits_for_room or (failure.kind == "connect" and state.lost_worker):
        state.busy += 1
        return min(backoff_s(state.busy - 1, config, rng), MAX_BUSY_BACKOFF_S)
    if failure.kind == "connect" and state.tried[failure.url] == 1:
        return 0.0  # whoever is left can have it at once
    if state.retries >= config.max_retries:
        return None
    state.retries += 1
    if state.retries == 1 and (failure.kind == "stale" or failure.is_worker_lost):
        return 0.0  # another worker can have it at once
    return backoff_s(state.retries - 1, config, rng)


def hold_s(state: RetryState, config: RetryConfig) -> float:
    """How long the request waits for a pair when there is none."""
    return config.migration_wait_s if state.had_pair and config.max_retries else 0.0
