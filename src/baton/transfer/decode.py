"""The receiving side's front door: `open_decode_transfer` gives the rank's loop its `DecodeTransfer`.

Owns the thread and one route per engine of a prefill worker. Neighbours: `decode_route` (one such engine), `decode_session` (one rank of it),
`decode_rooms` (what happens to a room).
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial

from baton.transfer.base import DecodeTransfer, Event, PageLayout, Wake
from baton.transfer.config import TransferConfig
from baton.transfer.decode_rooms import DecodeRooms
from baton.transfer.decode_route import DecodeRoute
from baton.transfer.decode_session import DecodeContext
from baton.transfer.errors import aborted, broken, room_in_use
from baton.transfer.fake import FakeDecodeTransfer
from baton.transfer.frames import PROTOCOL_VERSION, Hello
from baton.transfer.pages import Pages
from baton.transfer.ranks import WorkerRanks, check_page_bytes
from baton.transfer.stats import TransferStats
from baton.transfer.thread import TransferThread
from baton.transfer.timers import LoopTimers, MakeTimers

log = logging.getLogger(__name__)


def open_decode_transfer(
    memory: Pages,
    layout: PageLayout,
    config: TransferConfig,
    *,
    host: str,
    wake: Wake,
    ranks: WorkerRanks | None = None,
    make_timers: MakeTimers = LoopTimers,
) -> DecodeTransfer:
    """Sessions are dialled when the first room of a bootstrap server comes; nothing listens here, `host` is only the name
    that the prefill's log gives this worker. `ranks`: those of this worker with a pool each; None: one. With `config.backend == "fake"`
    nothing is opened.

    Raises `TransferConfigError` for a layout that is not the memory's."""
    ranks = ranks or WorkerRanks.alone(layout)
    check_page_bytes(memory, layout, ranks.slices[ranks.rank])
    if config.backend == "fake":
        return FakeDecodeTransfer(wake)
    return RankDecodeTransfer(memory, layout, config, host, ranks, wake, make_timers)


class RankDecodeTransfer:
    """Implements `base.DecodeTransfer` over routes to prefill workers."""

    def __init__(
        self,
        memory: Pages,
        layout: PageLayout,
        config: TransferConfig,
        host: str,
        ranks: WorkerRanks,
        wake: Wake,
        make_timers: MakeTimers = LoopTimers,
    ) -> None:
        self._memory = memory
        self._open: set[int] = set()  # Rooms whose end event the rank has not polled yet. Rank's loop only.
        # Transfer's thread only:
        self._routes: dict[tuple[tuple[str, int], int], DecodeRoute] = {}
        """By bootstrap server and data-parallel engine of its worker."""
        self._dp_sizes: dict[tuple[str, int], int] = {}
        """How many engines the worker of a bootstrap server has, as it last said."""
        self._thread = TransferThread("baton-decode-transfer", config.copy_threads, wake)
        timers = make_timers(self._thread.loop)
        self._rooms = DecodeRooms(memory.page_bytes, timers, self._thread.emit, leads=ranks.rank == 0)
        hello = Hello(PROTOCOL_VERSION, f"{host}/{os.getpid()}", layout, worker=ranks.worker, rank=ranks.rank)
        self._context = DecodeContext(self._thread, self._rooms, memory, hello, ranks.slices, config, timers)

    # base.DecodeTransfer

    def receive(
        self,
        room: int,
        bootstrap_host: str,
        bootstrap_port: int,
        first_page_idx: int,
        page_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        """Raises `RequestError` (400) when the room is in use, ValueError for a page that is not in the pool."""
        if room in self._open:
            raise room_in_use(room)
        if any(not 0 <= page_id < self._memory.num_pages for page_id in page_ids):
            raise ValueError(f"page ids of room {room} must be in [0, {self._memory.num_pages}): {list(page_ids)}")
        self._open.add(room)
        address = (bootstrap_host, bootstrap_port)
        self._post(room, lambda: self._receive(room, address, first_page_idx, tuple(page_ids), timeout_s))

    def abort(self, room: int, reason: str) -> None:
        self._post(room, partial(self._rooms.stop, room, aborted(reason)))

    def poll(self) -> list[Event]:
        events = self._thread.take_events()
        self._open.difference_update(event.room for event in events)
        return events

    def close(self) -> None:
        """End every room and session; the end events can be polled afterwards."""
        self._thread.close(self._stop)

    # Beyond the contract

    def stats(self) -> TransferStats:
        return self._rooms.stats

    def num_rooms(self) -> int:
        """Open rooms (for self-checks; waits for the transfer's thread)."""
        return self._thread.ask(lambda: self._rooms.num_open)

    def session_modes(self) -> dict[tuple[tuple[str, int], int], str | None]:
        """How pages travel, by bootstrap server and data-parallel engine; None: being connected. Waits for the transfer's thread."""
        return self._thread.ask(lambda: {key: route.mode for key, route in self._routes.items()})

    # On the thread

    def _receive(
        self, room: int, address: tuple[str, int], first_page_idx: int, page_ids: Sequence[int], timeout_s: float
    ) -> None:
        # SGLang's rule: the room says on which engine of the prefill worker its request is.
        route = self._route(address, room % self._dp_sizes.get(address, 1))
        self._rooms.receive(room, route, first_page_idx, page_ids, timeout_s)

    def _route(self, address: tuple[str, int], dp_group: int) -> DecodeRoute:
        route = self._routes.get((address, dp_group))
        if route is None:
            route = DecodeRoute(self._context, address, dp_group, self._on_dp_size, self._route_closed)
            self._routes[address, dp_group] = route
        return route

    def _on_dp_size(self, route: DecodeRoute, dp_size: int) -> None:
        """`route` has asked: the rooms that wait for it go to the engines that they are on."""
        self._dp_sizes[route.address] = dp_size
        for state in route.take_waiting():
            self._rooms.move(state, self._route(route.address, state.room % dp_size))
        if route.dp_group >= dp_size:
            route.close("the prefill worker came back with fewer engines")

    def _route_closed(self, route: DecodeRoute) -> None:
        key = (route.address, route.dp_group)
        if self._routes.get(key) is route:
            del self._routes[key]

    def _post(self, room: int, call: Callable[[], None]) -> None:
        def run() -> None:
            try:
                call()
            except Exception as error:  # A bug of ours: costs this room, reported as its end.
                log.exception("transfer call failed", extra={"room": room})
                self._rooms.stop(room, broken(f"internal error: {error!r}"))

        self._thread.post(run)

    def _stop(self) -> None:
        self._rooms.close("the decode worker is shutting down")
        for route in list(self._routes.values()):
            route.close("the decode worker is shutting down")
