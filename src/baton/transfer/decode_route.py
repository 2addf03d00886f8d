"""The way from a decode rank to one engine of a prefill worker: looking its ranks up, and a session with each that has something for us.

One lost session loses the whole route, since no room can arrive without it; the next room makes a new one. What a session does:
`decode_session`; what that means to a room: `decode_rooms`.
"""

import asyncio
import logging
from collections.abc import Callable

from baton.transfer.bootstrap import HoldingRank, PrefillRanks, look_up
from baton.transfer.decode_rooms import DecodeRoom
from baton.transfer.decode_session import DecodeContext, DecodeSession
from baton.transfer.errors import TransferError
from baton.transfer.slices import Slice, check_whole, plan_links, whole_slice

log = logging.getLogger(__name__)

_UNSPECIFIED = ("0.0.0.0", "::", "")


class DecodeRoute:
    """Implements `decode_rooms.DecodeSource` for one data-parallel engine.

    `on_dp_size(self, size)` is called with the worker's number of engines before any of its ranks is, and may take rooms away
    (`take_waiting`). `on_closed(self)` is called once; a new route may take its place then.
    """

    def __init__(
        self,
        context: DecodeContext,
        address: tuple[str, int],
        dp_group: int,
        on_dp_size: "Callable[[DecodeRoute, int], None]",
        on_closed: "Callable[[DecodeRoute], None]",
    ) -> None:
        """`address`: of the bootstrap server."""
        self.address = address
        self.dp_group = dp_group
        self._on_dp_size = on_dp_size
        self.name = f"{address[0]}:{address[1]}"
        self._context = context
        self._on_closed = on_closed
        self._sessions: list[DecodeSession] = []
        self._is_connected = self._closed = False
        self._waiting: list[DecodeRoom] = []
        context.thread.start(self._connect(), f"connect {self.name}")

    @property
    def mode(self) -> str | None:
        """How pages travel: shm, tcp, or both where it differs between ranks; None: being connected."""
        modes = {session.mode or "" for session in self._sessions if session.moves_pages}
        return "+".join(sorted(modes)) if self._is_connected else None

    def open(self, state: DecodeRoom) -> None:
        if self._is_connected:
            self._context.rooms.connected(state, self._sessions)
        else:
            self._waiting.append(state)

    def take_waiting(self) -> list[DecodeRoom]:
        """The rooms that the prefill has not heard of; they are no longer ours."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def drop(self, reason: str) -> None:
        """End all sessions; every room fails. Does nothing the second time."""
        if not self._closed:
            log.warning("prefill worker lost", extra={"bootstrap_addr": self.name, "reason": reason})
            self.close(reason)

    def close(self, reason: str) -> None:
        """As `drop`, on purpose."""
        if self._closed:
            return
        self._closed = True
        for session in self._sessions:
            session.close()
        self._on_closed(self)
        lost = f"Losing connection with prefill instance (bootstrap_addr: {self.name}): {reason}"
        self._context.rooms.lost(self, lost)

    async def _connect(self) -> None:
        limit_s = self._context.config.connect_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                found = await look_up(*self.address, self.dp_group)
                if found.dp_size:
                    self._on_dp_size(self, found.dp_size)
                if not self._closed:
                    await self._open_sessions(found)
        except TimeoutError:
            self.drop(f"no connection within {limit_s:g} s")
        except (OSError, TransferError) as error:
            self.drop(str(error))
        except asyncio.CancelledError:
            if not self._closed:  # The whole transfer is closing; a lost session has already dropped us otherwise.
                self.close("closed")
        except Exception as error:  # A bug of ours: costs this route's rooms, reported as their end.
            log.exception("connecting failed", extra={"bootstrap_addr": self.name})
            self.drop(f"internal error: {error!r}")

    async def _open_sessions(self, found: PrefillRanks) -> None:
        context = self._context
        found.need_all()
        ranks = found.ranks
        sources = _slices(ranks, whole_slice(context.hello.layout))
        links = plan_links(sources, context.slices)
        for link in links:
            if link.target != context.hello.rank or self._closed:
                continue
            rank = ranks[link.source]
            num_takers = sum(other.source == link.source for other in links)
            name = self.name if len(ranks) == 1 else f"{self.name} rank {link.source}"
            session = DecodeSession(context, name, sources[link.source], link.part, num_takers, self.drop)
            self._sessions.append(session)
            await session.connect(_reachable(rank, self.address[0]))
        if self._closed:
            return
        # After the hellos, which refuse another model by the field that differs.
        check_whole(sources, context.hello.layout)
        self._is_connected = True
        for state in self.take_waiting():
            context.rooms.connected(state, self._sessions)


def _slices(ranks: list[HoldingRank], whole: Slice) -> list[Slice]:
    if len(ranks) > 1 and any(rank.slice is None for rank in ranks):
        raise TransferError(
            "the prefill ranks did not say what they hold of a page: they are of another version than this one"
        )
    return [rank.slice or whole for rank in ranks]


def _reachable(rank: HoldingRank, bootstrap_host: str) -> tuple[str, int]:
    """A rank that listens on every address registers that; it is then on the bootstrap server's own host."""
    return (bootstrap_host if rank.rank_ip in _UNSPECIFIED else rank.rank_ip), rank.rank_port
