"""The messages of one session between a decode rank and a prefill rank, and their encoding.

A session is between one rank of each worker. Workers of several ranks with a pool each have a session between every two ranks that have
something of each other's pages (`slices`), and a room is open in all of them.

A frame is a 4-byte little-endian length and that many bytes of msgpack. `Page` alone is followed by a body: the page's raw
bytes. Every frame names a `transfer_id`, not a room: the decode worker numbers its attempts, alike on all its ranks, so a late
frame of an ended attempt can never be taken for one of a new attempt with the same room. All arrives in order.

    decode                                   prefill
      Hello(layout, part) ──────────────────────►
      ◄──────────────────── Welcome(shm offer) or Refuse
      Mode(shm | tcp) ─────────────────────────►
      Notice(room, pages) ─────────────────────►            pages are allocated, send them
      ◄──── Chunk(page ids, checksums)  (shm: the decode copies them out of the prefill's pool)
      ◄──── Page(index, checksum) + bytes  (tcp)
      ◄──── Last(number of pages, first token)
      Ack ─────────────────────────────────────►            end on both sides
      Cancel ──────────────────────────────────►            "I have stopped, stop too": end on both sides
      ◄──── Cancel, answered by Cancelled ─────►            "stop, and tell me when you have"
"""

from typing import Literal

import msgspec

from baton.transfer.base import FirstToken, PageLayout
from baton.transfer.errors import TransferError
from baton.transfer.slices import Slice

PROTOCOL_VERSION = 2
HANDSHAKE_FRAME_BYTES = 64 << 10
"""Limit of a frame before the hello is accepted: a stranger cannot make us allocate more."""
LENGTH_BYTES = 4


class Hello(msgspec.Struct, tag="hello", frozen=True):
    version: int
    name: str
    """Who the decode side is, for the prefill's log."""
    layout: PageLayout
    """Of whole pages, whatever part of them this rank has."""
    part: Slice | None = None
    """What of each page travels in this session; None: all that the prefill rank has."""
    worker: str = ""
    """The same for all ranks of the decode worker and for nobody else."""
    rank: int = 0
    num_takers: int = 1
    """Ranks of the decode worker that take something from this prefill rank."""


class ShmOffer(msgspec.Struct, frozen=True):
    """Where the prefill's pool can be had: an abstract Unix socket that gives its descriptor for the nonce."""

    socket_name: str
    nonce: bytes
    num_pages: int


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    shm: ShmOffer | None


class Refuse(msgspec.Struct, tag="refuse", frozen=True):
    field: str
    message: str


class Mode(msgspec.Struct, tag="mode", frozen=True):
    """How pages will travel in this session; the decode side knows whether it could map the offer."""

    kind: Literal["shm", "tcp"]


class Notice(msgspec.Struct, tag="notice", frozen=True):
    """The decode side allocated pages first_page_idx .. first_page_idx + num_pages - 1 of the room and waits for them."""

    transfer_id: int
    room: int
    first_page_idx: int
    num_pages: int


class Chunk(msgspec.Struct, tag="chunk", frozen=True):
    """Pages first_page_idx, ... lie ready in the prefill's pool."""

    transfer_id: int
    first_page_idx: int
    page_ids: list[int]
    checksums: list[int]


class Page(msgspec.Struct, tag="page", frozen=True):
    """One page; the bytes of the session's part of it follow the frame, packed (l, 2, k, S, D)."""

    transfer_id: int
    page_idx: int
    checksum: int


class Last(msgspec.Struct, tag="last", frozen=True):
    transfer_id: int
    num_pages: int
    """Pages sent for this transfer in all: what the decode side must have."""
    first_token: FirstToken | None
    """Between the leading ranks of both workers; None elsewhere."""


class Ack(msgspec.Struct, tag="ack", frozen=True):
    transfer_id: int


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """From the decode side: it has stopped. From the prefill side: please stop."""

    transfer_id: int
    reason: str


class Cancelled(msgspec.Struct, tag="cancelled", frozen=True):
    """The decode side no longer touches any page of this transfer, its own or the prefill's."""

    transfer_id: int


class Ping(msgspec.Struct, tag="ping", frozen=True):
    pass


class Pong(msgspec.Struct, tag="pong", frozen=True):
    pass


Frame = Hello | Welcome | Refuse | Mode | Notice | Chunk | Page | Last | Ack | Cancel | Cancelled | Ping | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    body = _encoder.encode(frame)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def decode(body: bytes | bytearray | memoryview) -> Frame:
    """Raises `TransferError` for anything that is not exactly one known message."""
    try:
        frame: Frame = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransferError(f"broken frame: {error}") from None
    return frame


def layout_mismatch(ours: PageLayout, theirs: PageLayout) -> tuple[str, str] | None:
    """Name of the first field that differs and a sentence for the operator; None when pages can be exchanged."""
    for name in PageLayout.__struct_fields__:
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            return name, f"KV page layout differs in {name}: prefill has {here!r}, decode has {there!r}"
    return None
