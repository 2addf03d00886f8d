"""A prefill and a decode transfer in this process, wired through a real bootstrap server, and a way to wait for events."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn
from tests.fakes.timers import ManualClock

from baton.kvcache.page_memory import PageMemory
from baton.transfer.base import Bootstrapped, DecodeTransfer, Event, FirstToken, PageLayout, PrefillTransfer
from baton.transfer.bootstrap import bootstrap_app
from baton.transfer.config import TransferConfig
from baton.transfer.decode import open_decode_transfer
from baton.transfer.prefill import open_prefill_transfer

DEADLINE_S = 30.0
"""Real seconds after which a test gives up; never waited for in a passing test."""
PAGE_BYTES = 8192
FIRST_TOKEN = FirstToken(token_id=42, cached_tokens=3, logprobs=b"abc")


def page_layout(page_bytes: int = PAGE_BYTES, dtype: str = "bfloat16") -> PageLayout:
    return PageLayout("model", dtype, 16, 2, 2, page_bytes // 256, page_bytes)


@contextlib.contextmanager
def bootstrap_server() -> Iterator[int]:
    """A bootstrap server with an empty registry; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(bootstrap_app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listener.close()


class Side:
    """One transfer and everything it has said."""

    def __init__(self, transfer: PrefillTransfer | DecodeTransfer | None, wake: threading.Event) -> None:
        self.transfer: Any = transfer
        self.log: list[Event] = []
        self._wake = wake

    def wait(self, room: int, *kinds: type[Event]) -> Any:
        """The oldest event of `room` of one of `kinds` that was not waited for yet; any end event when no kind is named."""
        while True:
            self.log += self.transfer.poll()
            for event in self.log:
                wanted = isinstance(event, kinds) if kinds else not isinstance(event, Bootstrapped)
                if event.room == room and wanted:
                    self.log.remove(event)
                    return event
            assert self._wake.wait(DEADLINE_S), f"room {room}: nothing of {kinds} came, only {self.log}"
            self._wake.clear()

    def nothing_more(self) -> None:
        """Everything said was waited for."""
        self.log += self.transfer.poll()
        assert self.log == []


class Pair:
    """Prefill and decode with a pool each; the prefill's is random, the decode's zero. `backend`: shm, tcp or fake."""

    def __init__(
        self,
        backend: str,
        port: int,
        *,
        num_pages: int = 16,
        page_bytes: int = PAGE_BYTES,
        decode_layout: PageLayout | None = None,
        clock: ManualClock | None = None,
        **settings: Any,
    ) -> None:
        self.backend, self.port = backend, port
        self.moves_bytes = backend != "fake"
        self.config = TransferConfig(backend={"shm": "auto", "tcp": "tcp", "fake": "fake"}[backend], **settings)  # type: ignore[arg-type]
        self.source = PageMemory.create(num_pages, page_bytes)
        self.target = PageMemory.create(num_pages, page_bytes)
        shape = self.source.array.shape
        self.source.array[:] = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        self._timers = {} if clock is None else {"make_timers": clock.timers}
        self._layouts = page_layout(page_bytes), decode_layout or page_layout(page_bytes)
        self.prefill, self.decode = self.open_prefill(), self.open_decode()

    def open_prefill(self) -> Side:
        wake = threading.Event()
        transfer = open_prefill_transfer(
            self.source,
            self._layouts[0],
            self.config,
            host="127.0.0.1",
            bootstrap_url=f"http://127.0.0.1:{self.port}",
            wake=wake.set,
            **self._timers,  # type: ignore[arg-type]
        )
        assert transfer.wait_registered(DEADLINE_S)  # type: ignore[attr-defined]
        return Side(transfer, wake)

    def open_decode(self) -> Side:
        wake = threading.Event()
        transfer = open_decode_transfer(
            self.target,
            self._layouts[1],
            self.config,
            host="test",
            wake=wake.set,
            **self._timers,  # type: ignore[arg-type]
        )
        return Side(transfer, wake)

    def receive(self, room: int, page_ids: list[int], first_page_idx: int = 0, timeout_s: float = 60.0) -> None:
        self.decode.transfer.receive(room, "127.0.0.1", self.port, first_page_idx, page_ids, timeout_s)

    def begin(self, room: int, page_ids: list[int], first_page_idx: int = 0) -> None:
        """Both sides know the room and the prefill may send."""
        self.prefill.transfer.expect(room, 60.0)
        self.receive(room, page_ids, first_page_idx)
        self.prefill.wait(room, Bootstrapped)

    def assert_no_room_left(self) -> None:
        for side in (self.prefill, self.decode):
            side.nothing_more()
        if self.moves_bytes:
            assert self.prefill.transfer.num_rooms()[0] == 0
            assert self.decode.transfer.num_rooms() == 0

    def close(self) -> None:
        self.decode.transfer.close()
        self.prefill.transfer.close()
        self.source.close()
        self.target.close()


@contextlib.contextmanager
def open_pair(backend: str, port: int, **settings: Any) -> Iterator[Pair]:
    pair = Pair(backend, port, **settings)
    try:
        yield pair
    finally:
        pair.close()
