"""What rank 0's scheduler hears of a room in which several ranks take part, out of what each of them says for itself.

Pure: who listens to the ranks and who aborts is `transfer`.
"""

from dataclasses import dataclass, field, replace

from baton.engine.distributed.control import GroupError
from baton.protocol.errors import ErrorInfo
from baton.transfer.base import Bootstrapped, Event, Failed, Received, Sent
from baton.transfer.errors import broken


@dataclass(slots=True)
class _Room:
    """What the ranks said of a room, by rank."""

    first_page_idx: dict[int, int] = field(default_factory=dict)
    ends: dict[int, Sent | Received | Failed] = field(default_factory=dict)
    failure: ErrorInfo | None = None
    """The first one: what comes after it is its consequence."""


class RoomMerge:
    """One event of all ranks out of their own. Invariant: a room is here from `open` until every rank has ended it."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._rooms: dict[int, _Room] = {}
        self._to_abort: list[tuple[int, str]] = []

    def __contains__(self, room: int) -> bool:
        return room in self._rooms

    def open(self, room: int) -> None:
        self._rooms[room] = _Room()

    def add(self, rank: int, event: Event) -> Event | None:
        """What the scheduler may hear now. Raises `GroupError` for an event of a room that is not open, or that ends it twice."""
        state = self._rooms.get(event.room)
        if state is None or rank in state.ends:
            raise GroupError(f"rank {rank} says {type(event).__name__} of room {event.room}, which it does not have")
        if isinstance(event, Bootstrapped):
            return self._add_bootstrapped(rank, event, state)
        state.ends[rank] = event
        if isinstance(event, Failed):
            self._fail(event.room, state, event.error)
        if len(state.ends) < self._num_ranks:
            return None
        del self._rooms[event.room]
        return _end(event.room, state)

    def take_aborts(self) -> list[tuple[int, str]]:
        """(room, reason): one rank failed, the others must stop too. Each room comes once."""
        aborts, self._to_abort = self._to_abort, []
        return aborts

    def _add_bootstrapped(self, rank: int, event: Bootstrapped, state: _Room) -> Event | None:
        state.first_page_idx[rank] = event.first_page_idx
        if state.failure is not None or len(state.first_page_idx) < self._num_ranks:
            return None
        if len(set(state.first_page_idx.values())) > 1:
            self._fail(event.room, state, broken("the decode ranks do not want the same pages"))
            return None
        return event

    def _fail(self, room: int, state: _Room, error: ErrorInfo) -> None:
        if state.failure is None:
            state.failure = error
            if len(state.ends) < self._num_ranks:
                self._to_abort.append((room, error.message))


def _end(room: int, state: _Room) -> Event:
    if state.failure is not None:
        return Failed(room, state.failure)
    ends = [end for end in state.ends.values() if not isinstance(end, Failed)]
    num_bytes, duration_s = sum(end.num_bytes for end in ends), max(end.duration_s for end in ends)
    leaders = state.ends[0]
    assert not isinstance(leaders, Failed)
    return replace(leaders, num_bytes=num_bytes, duration_s=duration_s)
