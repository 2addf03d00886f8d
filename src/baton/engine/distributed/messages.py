"""What crosses the control connections between ranks: msgpack frames of these structures, nothing else.

Arrays travel as little-endian int32 bytes. Not here: sockets (`control`), tensors (`collective`, `exchange`).
"""

import struct
from collections.abc import Sequence
from typing import Any, Literal, assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch
from baton.kvcache.tiers import (
    Cancel,
    Copies,
    Found,
    Late,
    PagesRead,
    Query,
    Read,
    StoreAction,
    StoreEvent,
    Write,
    Written,
)
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import Side

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


class EndStep(msgspec.Struct, tag="end_step", frozen=True, array_like=True):
    """To the first stage of a pipeline: the logits of the oldest step that has begun."""


class Order(msgspec.Struct, frozen=True, array_like=True):
    """A `StoreAction`."""

    kind: Literal["query", "read", "write", "cancel"]
    op: int
    keys: list[bytes] = []
    host_pages: bytes = b""


class Move(msgspec.Struct, tag="move", frozen=True, array_like=True):
    """What every rank does next between its tiers: first the copies, then the orders."""

    saves: bytes
    """Pairs of device and host page."""
    loads: bytes
    """Pairs of host and device page."""
    orders: list[Order]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """A `StoreEvent` of one rank."""

    kind: Literal["found", "read", "written", "late"]
    op: int
    first: int = 0
    """Of "found": how many pages."""
    ok: list[bool] = []
    is_last: bool = True


class Answers(msgspec.Struct, tag="answers", frozen=True, array_like=True):
    """Up to the leader: what this rank's store answered."""

    answers: list[Answer]


class Clear(msgspec.Struct, tag="clear", frozen=True, array_like=True):
    """Empty the store."""


class Cleared(msgspec.Struct, tag="cleared", frozen=True, array_like=True):
    """Up to the leader, one for each `Clear`, in order."""

    ok: bool


class AskStore(msgspec.Struct, tag="ask_store", frozen=True, array_like=True):
    """How is the store?"""


class StoreIs(msgspec.Struct, tag="store_is", frozen=True, array_like=True):
    """Up to the leader, one for each `AskStore`."""

    up: bool


class ExpectRoom(msgspec.Struct, tag="expect_room", frozen=True, array_like=True):
    """`PrefillTransfer.expect`"""

    room: int
    timeout_s: float


class SendRoom(msgspec.Struct, tag="send_room", frozen=True, array_like=True):
    """`PrefillTransfer.send`; the first token stays with the leader."""

    room: int
    first_page_idx: int
    page_ids: bytes
    is_last: bool


class ReceiveRoom(msgspec.Struct, tag="receive_room", frozen=True, array_like=True):
    """`DecodeTransfer.receive`"""

    room: int
    bootstrap_host: str
    bootstrap_port: int
    first_page_idx: int
    page_ids: bytes
    timeout_s: float


class AbortRoom(msgspec.Struct, tag="abort_room", frozen=True, array_like=True):
    """`abort` of either side's transfer."""

    side: Side
    room: int
    reason: str


class RoomNews(msgspec.Struct, tag="room_news", frozen=True, array_like=True):
    """Up to the leader: a `transfer.base.Event` of one rank."""

    side: Side
    kind: Literal["bootstrapped", "sent", "received", "failed"]
    room: int
    first_page_idx: int = 0
    num_bytes: int = 0
    duration_s: float = 0.0
    bootstrap_duration_s: float = 0.0
    error: ErrorInfo | None = None


TierOrder = Move | Clear | AskStore
TransferOrder = ExpectRoom | SendRoom | ReceiveRoom | AbortRoom
FromLeader = Step | EndStep | TierOrder | TransferOrder
"""While the group runs; followers act in the order of these."""
TierAnswer = Answers | Cleared | StoreIs
FromFollower = TierAnswer | RoomNews
"""While the group runs."""
Message = Hello | Watch | Welcome | Refused | Done | Go | FromLeader | FromFollower


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


def encode_move(copies: Copies, actions: Sequence[StoreAction]) -> Move:
    return Move(_pairs_bytes(copies.saves), _pairs_bytes(copies.loads), [_order(action) for action in actions])


def decode_move(move: Move) -> tuple[Copies, list[StoreAction]]:
    return Copies(_pairs(move.saves), _pairs(move.loads)), [_action(order) for order in move.orders]


def _order(action: StoreAction) -> Order:
    match action:
        case Query(op, keys):
            return Order("query", op, keys)
        case Read(op, keys, host_pages):
            return Order("read", op, keys, _bytes(np.array(host_pages)))
        case Write(op, keys, host_pages):
            return Order("write", op, keys, _bytes(np.array(host_pages)))
        case Cancel(op):
            return Order("cancel", op)
        case _:
            assert_never(action)


def _action(order: Order) -> StoreAction:
    match order.kind:
        case "query":
            return Query(order.op, order.keys)
        case "read":
            return Read(order.op, order.keys, _array(order.host_pages).tolist())
        case "write":
            return Write(order.op, order.keys, _array(order.host_pages).tolist())
        case "cancel":
            return Cancel(order.op)
        case _:
            assert_never(order.kind)


def encode_event(event: StoreEvent) -> Answer:
    match event:
        case Found(op, num_pages):
            return Answer("found", op, num_pages)
        case PagesRead(op, first, ok, is_last):
            return Answer("read", op, first, ok, is_last)
        case Written(op, ok):
            return Answer("written", op, ok=ok)
        case Late(op):
            return Answer("late", op)
        case _:
            assert_never(event)


def decode_event(answer: Answer) -> StoreEvent:
    match answer.kind:
        case "found":
            return Found(answer.op, answer.first)
        case "read":
            return PagesRead(answer.op, answer.first, answer.ok, answer.is_last)
        case "written":
            return Written(answer.op, answer.ok)
        case "late":
            return Late(answer.op)
        case _:
            assert_never(answer.kind)


def _pairs_bytes(pairs: list[tuple[int, int]]) -> bytes:
    return _bytes(np.array(pairs, dtype="<i4").reshape(-1))


def _pairs(data: bytes) -> list[tuple[int, int]]:
    return [(first, second) for first, second in _array(data).reshape(-1, 2).tolist()]


def _bytes(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, "<i4").tobytes()


def _array(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data, "<i4").astype(np.int32)  # a copy: the message's own bytes are read-only
