"""Stopping in the middle: the exact page, the exact byte."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from tests.fakes.raw_peer import RawPrefill
from tests.fakes.timers import ManualClock
from tests.fakes.transfer_pair import FIRST_TOKEN, PAGE_BYTES, open_pair, page_layout

from baton.kvcache.page_memory import PageMemory
from baton.transfer.base import Bootstrapped, Event, Failed, Received
from baton.transfer.config import TransferConfig
from baton.transfer.frames import PROTOCOL_VERSION, Ack, Cancel, Frame, Hello, Last, Mode, Notice, Page, encode
from baton.transfer.pages import checksum, copy_pages
from baton.transfer.prefill_rooms import PrefillRooms
from baton.transfer.prefill_session import PrefillContext, PrefillSession
from baton.transfer.slices import whole_slice


class LoopThread:
    """The parts of `TransferThread` that a session uses, on the test's own loop."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work, name=name))

    def copy(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().run_in_executor(None, work)


class CancellingWire:
    """A wire whose peer cancels while the page number `cancel_at` is being sent."""

    max_frame_bytes = 0

    def __init__(self, session: PrefillSession, cancel_at: int) -> None:
        self.session, self.cancel_at = session, cancel_at
        self.num_pages = 0

    def send(self, frame: Frame) -> None:
        assert not isinstance(frame, Last)

    async def send_page(self, frame: Frame, body: memoryview) -> None:
        self.num_pages += 1
        if self.num_pages == self.cancel_at:
            self.session.on_frame(Cancel(1, "enough"))


async def test_no_page_is_sent_after_the_one_during_which_the_cancel_came() -> None:
    thread, clock, events = LoopThread(), ManualClock(), list[Event]()
    with PageMemory.create(32, PAGE_BYTES) as memory:
        config = TransferConfig(backend="tcp")
        rooms = PrefillRooms(config, clock.timers(), events.append)
        layout = page_layout()
        context = PrefillContext(thread, rooms, memory, layout, whole_slice(layout), True, config, clock.timers(), None)  # type: ignore[arg-type]
        session = PrefillSession(context, "peer", lambda _: None)
        wire = CancellingWire(session, cancel_at=11)
        session.attach(wire)  # type: ignore[arg-type]
        for frame in (Hello(PROTOCOL_VERSION, "raw", page_layout()), Mode("tcp"), Notice(1, 5, 0, 32)):
            session.on_frame(frame)
        rooms.expect(5, 60.0)
        rooms.send(5, 0, range(32), FIRST_TOKEN)
        while not any(isinstance(event, Failed) for event in events):  # noqa: ASYNC110 - the pump is what we yield to
            await asyncio.sleep(0)
        session.on_lost("test over")
        await asyncio.gather(*thread.tasks)
    assert wire.num_pages == 11
    assert [type(event) for event in events] == [Bootstrapped, Failed]


def test_a_page_half_received_is_left_alone_after_the_abort(bootstrap_port: int) -> None:
    page = np.full(PAGE_BYTES, 3, dtype=np.uint8)
    words = encode(Page(1, 0, checksum(page))) + page.tobytes()
    half = len(words) // 2
    with open_pair("tcp", bootstrap_port) as pair, RawPrefill(bootstrap_port) as prefill:
        pair.receive(1, [4])
        with prefill.accept() as raw:
            assert raw.read() == Notice(1, 1, 0, 1)
            raw.sock.sendall(words[:half])
            while not pair.target.array[4].any():
                pass  # Until the first half is in the page.
            pair.decode.transfer.abort(1, "stop")
            pair.decode.wait(1, Failed)
            pair.target.array[4] = 7  # The page belongs to somebody else now.
            pair.receive(2, [5])
            raw.sock.sendall(words[half:] + encode(Page(2, 0, checksum(page))) + page.tobytes())
            raw.send(Last(2, 1, FIRST_TOKEN))
            assert isinstance(pair.decode.wait(2), Received)
            assert (pair.target.array[4] == 7).all()
            assert (pair.target.array[5] == 3).all()
            assert [raw.read(), raw.read(), raw.read()] == [Cancel(1, "stop"), Notice(2, 2, 0, 1), Ack(2)]


def test_copying_stops_within_one_page() -> None:
    source = np.full((8, 4096), 5, dtype=np.uint8)
    target = np.zeros_like(source)
    sums = [checksum(page) for page in source]
    answers = iter([False, False, True])
    assert copy_pages(source, range(8), target, range(8), sums, lambda: next(answers))
    assert target.any(axis=1).tolist() == [True, True] + [False] * 6
