"""The contract of KV hand-over: what the rank's loop says to a transfer and what it hears back.

Ownership: from `receive`/`send` until the room's one end event (`Received`, `Sent` or `Failed`), the pages named there
belong to the transfer; after the end event the transfer never reads or writes them again. An `abort` therefore ends a room
only when the peer can no longer touch its pages: it said so, or its connection is gone. Each room gets exactly one end
event, whatever happens.

All methods return at once and are called from the rank's loop only; the work happens on the transfer's own threads, which
call `wake` (thread-safe) when `poll` has something new. Rooms are SGLang's bootstrap rooms; page indices count pages in a
sequence's page table, page ids count pages in a pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec

from baton.protocol.errors import ErrorInfo


class PageLayout(msgspec.Struct, frozen=True):
    """What both sides must agree on before a page can be handed over byte for byte: whole pages, also where each rank of a worker has
    only its part of them (`slices`).

    A page is (num_layers, 2, num_kv_heads, page_size, head_dim) of dtype, contiguous; 2 is K, then V.
    """

    model: str
    """Fingerprint of config and weights, never a path."""
    dtype: str
    page_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_bytes: int


class FirstToken(msgspec.Struct, frozen=True):
    """Metadata that follows the last page: what the prefill computed beyond the KV (SGLang's aux data)."""

    token_id: int
    cached_tokens: int
    logprobs: bytes = b""
    """msgpack of `protocol.rank.TokenLogprobs`, or empty."""
    input_logprobs: bytes = b""
    """msgpack of list[TokenLogprobs], or empty."""
    cached_host: int = 0
    """Of `cached_tokens`: from the prefill's host tier."""
    cached_store: int = 0
    """Of `cached_tokens`: from the store."""


NO_TOKEN = FirstToken(token_id=0, cached_tokens=0)
"""What ranks that do not lead their worker pass on and hear: the token travels between the leading ranks alone."""


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """Prefill: the decode side allocated its pages and waits. Pages before `first_page_idx` it already has."""

    room: int
    first_page_idx: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Prefill, end: every page and the metadata were written and acknowledged by the decode side."""

    room: int
    num_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Received:
    """Decode, end: every page is in place, checksums verified."""

    room: int
    first_token: FirstToken
    num_bytes: int
    duration_s: float
    bootstrap_duration_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Either side, end: aborted, timed out, or broken. Nothing touches the room's pages any more."""

    room: int
    error: ErrorInfo


Event = Bootstrapped | Sent | Received | Failed
Wake = Callable[[], None]


@runtime_checkable
class PrefillTransfer(Protocol):
    """The sending side, one per prefill rank."""

    def expect(self, room: int, timeout_s: float) -> None:
        """A request of this room was accepted. The decode's notice may have come before or comes later; no notice within
        `timeout_s` is a `Failed`."""

    def send(self, room: int, first_page_idx: int, page_ids: Sequence[int], first_token: FirstToken | None) -> None:
        """Hand over consecutive pages (only after `Bootstrapped`). `first_token` marks the last call of a room; it may come
        with no pages at all. Pages before the decode's own `first_page_idx` are never passed in."""

    def abort(self, room: int, reason: str) -> None: ...

    def poll(self) -> list[Event]: ...

    def close(self) -> None: ...


@runtime_checkable
class DecodeTransfer(Protocol):
    """The receiving side, one per decode rank."""

    def receive(
        self,
        room: int,
        bootstrap_host: str,
        bootstrap_port: int,
        first_page_idx: int,
        page_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        """Have pages first_page_idx, first_page_idx + 1, ... of the room written into `page_ids`."""

    def abort(self, room: int, reason: str) -> None: ...

    def poll(self) -> list[Event]: ...

    def close(self) -> None: ...
