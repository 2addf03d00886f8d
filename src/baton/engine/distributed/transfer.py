"""Hand-over by ranks that do not share their KV pool: each sends or receives its slice of every page.

Rank 0's scheduler decides. What it decides goes to every rank over the control connection, in order with the steps, so that a rank
sends a page when it has written it and receives into one that no step of its own still reads. Each rank's transfer does its part
by itself; the scheduler hears of a room what all ranks can stand for (`room_merge`), so pages have an owner until every rank has let
go of them. Which rank exchanges what with whom: `transfer.slices`. Only rank 0 has the first token.
"""

import ipaddress
import logging
import queue
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from typing import assert_never

import msgspec
import numpy as np

from baton.engine.distributed.answers import Take
from baton.engine.distributed.control import GroupError, Phases
from baton.engine.distributed.group import FollowerGroup, LeaderGroup
from baton.engine.distributed.messages import (
    AbortRoom,
    ExpectRoom,
    ReceiveRoom,
    RoomNews,
    SendRoom,
    TransferOrder,
)
from baton.engine.distributed.room_merge import RoomMerge
from baton.protocol.rank import Side
from baton.transfer.base import (
    NO_TOKEN,
    Bootstrapped,
    DecodeTransfer,
    Event,
    Failed,
    FirstToken,
    PageLayout,
    PrefillTransfer,
    Received,
    Sent,
    Wake,
)
from baton.transfer.config import TransferConfig
from baton.transfer.decode import RankDecodeTransfer
from baton.transfer.errors import broken, room_in_use
from baton.transfer.pages import Pages
from baton.transfer.prefill import RankPrefillTransfer, registration, split_url
from baton.transfer.ranks import WorkerRanks
from baton.transfer.slices import Slice

logger = logging.getLogger(__name__)


class _Seat(msgspec.Struct, frozen=True):
    """A rank, as the others must know it."""

    slice: Slice
    address: tuple[str, int] = ("", 0)
    """Of a prefill rank: where decode ranks reach it."""
    worker: str = ""


def open_prefill_rank(
    group: Phases,
    memory: Pages,
    layout: PageLayout,
    own: Slice,
    config: TransferConfig,
    host: str,
    bootstrap_url: str,
    wake: Wake,
) -> RankPrefillTransfer:
    """This rank's part of a prefill worker. All ranks call it at the same time; rank 0 registers them all with the bootstrap server of
    its HTTP process. `host`: where rank 0 listens, and who is on its host; the others do at the address by which they reach it.

    Raises `GroupError`, `TransferConfigError`, OSError."""
    leads, reached_at = group.rank == 0, group.own_host
    is_beside = leads or ipaddress.ip_address(reached_at).is_loopback
    bootstrap = split_url(bootstrap_url)
    transfer = RankPrefillTransfer(
        memory, layout, config, host if is_beside else reached_at, own, wake, facing=bootstrap[0], leads=leads
    )
    seats = _meet(group, "prefill", _Seat(own, transfer.address))
    if leads:
        sizes = group.topology.tp_size, group.topology.pp_size
        entries = [registration(rank, *sizes, seat.address, seat.slice) for rank, seat in enumerate(seats)]
        transfer.register(bootstrap, entries)
    return transfer


def open_decode_rank(
    group: Phases, memory: Pages, layout: PageLayout, own: Slice, config: TransferConfig, host: str, wake: Wake
) -> RankDecodeTransfer:
    """This rank's part of a decode worker. All ranks call it at the same time. Raises `GroupError`."""
    seats = _meet(group, "decode", _Seat(own, worker=secrets.token_hex(8)))
    ranks = WorkerRanks(group.rank, tuple(seat.slice for seat in seats), seats[0].worker)
    return RankDecodeTransfer(memory, layout, config, host, ranks, wake)


def _meet(group: Phases, side: Side, own: _Seat) -> list[_Seat]:
    values = group.phase(f"{side} transfer", msgspec.json.encode(own).decode())
    return [msgspec.json.decode(value, type=_Seat) for value in values]


class _Leading:
    """What both sides of rank 0 have in common. `wake` is called from other threads when `poll` has news."""

    side: Side

    def __init__(self, own: PrefillTransfer | DecodeTransfer, group: LeaderGroup, wake: Wake) -> None:
        self._group, self._wake = group, wake
        self._merge = RoomMerge(group.size)
        self._inbox: deque[tuple[int, Event]] = deque()
        self._any_own = own

    def abort(self, room: int, reason: str) -> None:
        if room in self._merge:
            self._group.send(AbortRoom(self.side, room, reason))
            self._any_own.abort(room, reason)

    def poll(self) -> list[Event]:
        """Raises `GroupError` for news that do not fit, and when a rank is gone."""
        events = [(0, event) for event in self._any_own.poll()]
        while self._inbox:
            events.append(self._inbox.popleft())
        merged = [self._merge.add(rank, event) for rank, event in events]
        for room, reason in self._merge.take_aborts():
            self.abort(room, reason)
        return [event for event in merged if event is not None]

    def close(self) -> None:
        """The followers' transfers end with their processes."""
        self._any_own.close()

    def take(self, rank: int, news: RoomNews) -> None:
        """What a follower's transfer of this side said; in that rank's thread."""
        self._inbox.append((rank, _decode_event(news)))
        self._wake()

    def _open(self, room: int) -> None:
        if room in self._merge:
            raise room_in_use(room)
        self._merge.open(room)


class LeadingPrefill(_Leading):
    """Implements `transfer.base.PrefillTransfer` on rank 0 for all ranks."""

    side: Side = "prefill"

    def __init__(self, own: PrefillTransfer, group: LeaderGroup, wake: Wake) -> None:
        super().__init__(own, group, wake)
        self._own = own

    def expect(self, room: int, timeout_s: float) -> None:
        """Raises `RequestError` (400) when the room is in use."""
        self._open(room)
        self._group.send(ExpectRoom(room, timeout_s))
        self._own.expect(room, timeout_s)

    def send(self, room: int, first_page_idx: int, page_ids: Sequence[int], first_token: FirstToken | None) -> None:
        if room in self._merge:
            self._group.send(SendRoom(room, first_page_idx, _bytes(page_ids), first_token is not None))
            self._own.send(room, first_page_idx, page_ids, first_token)


class LeadingDecode(_Leading):
    """Implements `transfer.base.DecodeTransfer` on rank 0 for all ranks."""

    side: Side = "decode"

    def __init__(self, own: DecodeTransfer, group: LeaderGroup, wake: Wake) -> None:
        super().__init__(own, group, wake)
        self._own = own

    def receive(
        self,
        room: int,
        bootstrap_host: str,
        bootstrap_port: int,
        first_page_idx: int,
        page_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        """Raises `RequestError` (400) when the room is in use."""
        self._open(room)
        order = ReceiveRoom(room, bootstrap_host, bootstrap_port, first_page_idx, _bytes(page_ids), timeout_s)
        self._group.send(order)
        self._own.receive(room, bootstrap_host, bootstrap_port, first_page_idx, page_ids, timeout_s)


def takers_of(sides: Sequence[LeadingPrefill | LeadingDecode]) -> dict[type, Take]:
    """Who takes what the followers send of hand-overs (`answers`)."""
    by_side = {one.side: one for one in sides}
    return {RoomNews: lambda rank, news: by_side[news.side].take(rank, news)} if sides else {}


class FollowingTransfers:
    """The sides of any other rank, for its main thread; a thread of its own sends what they say."""

    def __init__(self, group: FollowerGroup) -> None:
        self._group = group
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._prefill: PrefillTransfer | None = None
        self._decode: DecodeTransfer | None = None

    def wake(self) -> None:
        """From any thread: a transfer has something to say."""
        self._news.put(None)

    def start(self, prefill: PrefillTransfer | None, decode: DecodeTransfer | None) -> None:
        self._prefill, self._decode = prefill, decode
        threading.Thread(target=self._send, name="transfer-news", daemon=True).start()

    def obey(self, order: TransferOrder) -> None:
        match order:
            case ExpectRoom(room, timeout_s):
                assert self._prefill is not None
                self._prefill.expect(room, timeout_s)
            case SendRoom(room, first_page_idx, page_ids, is_last):
                assert self._prefill is not None
                self._prefill.send(room, first_page_idx, _page_ids(page_ids), NO_TOKEN if is_last else None)
            case ReceiveRoom(room, host, port, first_page_idx, page_ids, timeout_s):
                assert self._decode is not None
                self._decode.receive(room, host, port, first_page_idx, _page_ids(page_ids), timeout_s)
            case AbortRoom(side, room, reason):
                transfer = self._prefill if side == "prefill" else self._decode
                assert transfer is not None
                transfer.abort(room, reason)
            case _:
                assert_never(order)

    def _send(self) -> None:
        sides: list[tuple[Side, PrefillTransfer | DecodeTransfer | None]] = [
            ("prefill", self._prefill),
            ("decode", self._decode),
        ]
        try:
            while True:
                self._news.get()
                for side, transfer in sides:
                    for event in transfer.poll() if transfer is not None else ():
                        self._group.send(_encode_event(side, event))
        except GroupError as error:
            logger.debug("the leader hears no more of transfers: %s", error)


def _encode_event(side: Side, event: Event) -> RoomNews:
    match event:
        case Bootstrapped(room, first_page_idx):
            return RoomNews(side, "bootstrapped", room, first_page_idx)
        case Sent(room, num_bytes, duration_s):
            return RoomNews(side, "sent", room, num_bytes=num_bytes, duration_s=duration_s)
        case Received(room, _, num_bytes, duration_s, bootstrap_duration_s):
            times = duration_s, bootstrap_duration_s
            return RoomNews(side, "received", room, 0, num_bytes, *times)
        case Failed(room, error):
            return RoomNews(side, "failed", room, error=error)
        case _:
            assert_never(event)


def _decode_event(news: RoomNews) -> Event:
    match news.kind:
        case "bootstrapped":
            return Bootstrapped(news.room, news.first_page_idx)
        case "sent":
            return Sent(news.room, news.num_bytes, news.duration_s)
        case "received":
            return Received(news.room, NO_TOKEN, news.num_bytes, news.duration_s, news.bootstrap_duration_s)
        case "failed":
            return Failed(news.room, news.error or broken("a rank failed and did not say why"))
        case _:
            assert_never(news.kind)


def _bytes(page_ids: Sequence[int]) -> bytes:
    return np.array(page_ids, dtype="<i4").tobytes()


def _page_ids(data: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(data, dtype="<i4").tolist()
    return ids
