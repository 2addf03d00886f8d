"""Transfers without a peer: every room succeeds as soon as its own side has done its part; page contents are arbitrary.

`--disaggregation-transfer-backend fake` measures one side alone with them. Same contract, no thread. Not here: requests
with bootstrap_host 2.2.2.2 (SGLang's warm-up and health checks), which the scheduler serves without any transfer.
"""

from collections.abc import Sequence

from baton.transfer.base import Bootstrapped, Event, Failed, FirstToken, Received, Sent, Wake
from baton.transfer.errors import aborted, room_in_use
from baton.transfer.stats import TransferStats


class FakePrefillTransfer:
    """Implements `base.PrefillTransfer`."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._rooms: set[int] = set()
        self._events: list[Event] = []

    def expect(self, room: int, timeout_s: float) -> None:
        """Raises `RequestError` (400) when the room is in use."""
        if room in self._rooms:
            raise room_in_use(room)
        self._rooms.add(room)
        self._emit(Bootstrapped(room, 0))

    def send(self, room: int, first_page_idx: int, page_ids: Sequence[int], first_token: FirstToken | None) -> None:
        if first_token is not None and room in self._rooms:
            self._rooms.remove(room)
            self._emit(Sent(room, 0, 0.0))

    def abort(self, room: int, reason: str) -> None:
        if room in self._rooms:
            self._rooms.remove(room)
            self._emit(Failed(room, aborted(reason)))

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        for room in list(self._rooms):
            self.abort(room, "the prefill worker is shutting down")

    def wait_registered(self, timeout_s: float) -> bool:
        """There is nothing to register."""
        return True

    def stats(self) -> TransferStats:
        """Nothing is moved, nothing is counted."""
        return TransferStats()

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._wake()


class FakeDecodeTransfer:
    """Implements `base.DecodeTransfer`. The first token is token 0."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._events: list[Event] = []

    def receive(
        self,
        room: int,
        bootstrap_host: str,
        bootstrap_port: int,
        first_page_idx: int,
        page_ids: Sequence[int],
        timeout_s: float,
    ) -> None:
        """Raises `RequestError` (400) when the room's end was not polled yet."""
        if any(event.room == room for event in self._events):
            raise room_in_use(room)
        self._events.append(Received(room, FirstToken(token_id=0, cached_tokens=0), 0, 0.0, 0.0))
        self._wake()

    def abort(self, room: int, reason: str) -> None:
        """Nothing is ever open: a room has ended when `receive` returns."""

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        pass

    def stats(self) -> TransferStats:
        """Nothing is moved, nothing is counted."""
        return TransferStats()
