"""What crosses the control connections between ranks: msgpack frames of these structures, nothing else.

Arrays travel as little-endian int32 bytes. Not here: sockets (`control`), tensors (`collective`, `exchange`).
"""

import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch

FRAME_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30
MAX_GREETING_BYTES = 1 << 16
"""Before a peer is known to be a rank of this group."""


class Hello(msgspec.Struct, tag="hello", frozen=True, array_like=True):
    """A rank's first message on its control connection."""

    rank: int
    facts: dict[str, str]
    """What must be equal on all ranks, by the name of the flag that decides it."""
    num_pages: int
    """KV pages this rank has room for."""
    nonce: str = ""
    """Ties the heartbeat connection to this one: two processes may claim to be the same rank."""


class Watch(msgspec.Struct, tag="watch", frozen=True, array_like=True):
    """A rank's first message on its heartbeat connection; it comes after its `Hello`."""

    rank: int
    nonce: str


class Welcome(msgspec.Struct, tag="welcome", frozen=True, array_like=True):
    """The leader's answer to everyone when all ranks are there."""

    num_pages: int


class Refused(msgspec.Struct, tag="refused", frozen=True, array_like=True):
    reason: str


class Done(msgspec.Struct, tag="done", frozen=True, array_like=True):
    """This rank finished a phase of starting up; `value` is what the others need to know of it."""

    phase: str
    value: str = ""


class Go(msgspec.Struct, tag="go", frozen=True, array_like=True):
    """All ranks finished the phase; `values` of all ranks in order."""

    phase: str
    values: list[str]


class Step(msgspec.Struct, tag="step", frozen=True, array_like=True):
    """One forward pass: what a follower needs of a `ForwardBatch`. Sampling parameters stay with the leader."""

    token_ids: bytes
    query_lens: bytes
    context_lens: bytes
    page_tables: bytes
    logit_rows: list[bytes]
    """Token rows of each call for logits, in order."""


Message = Hello | Watch | Welcome | Refused | Done | Go | Step


def encode_step(batch: ForwardBatch, logit_rows: list[NDArray[np.int64]]) -> Step:
    return Step(
        _bytes(batch.token_ids),
        _bytes(batch.query_lens),
        _bytes(batch.context_lens),
        _bytes(batch.page_tables),
        [_bytes(rows) for rows in logit_rows],
    )


def decode_step(step: Step) -> tuple[ForwardBatch, list[NDArray[np.int64]]]:
    """The batch without its samples, and the rows whose logits are wanted."""
    query_lens, context_lens = _array(step.query_lens), _array(step.context_lens)
    starts = np.cumsum(query_lens) - query_lens
    offsets = np.repeat(context_lens - query_lens - starts, query_lens)
    token_ids = _array(step.token_ids).astype(np.int64)
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=np.arange(len(token_ids), dtype=np.int64) + offsets,
        query_lens=query_lens,
        context_lens=context_lens,
        page_tables=_array(step.page_tables).reshape(len(query_lens), -1),
    )
    return batch, [_array(rows).astype(np.int64) for rows in step.logit_rows]


def _bytes(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, "<i4").tobytes()


def _array(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)
