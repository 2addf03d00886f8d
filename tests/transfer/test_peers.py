"""Peers that are wrong, mute, slow or gone: each costs its own session and nothing else, within a known time."""

import contextlib
import socket
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from tests.fakes.raw_peer import RawPeer, RawPrefill
from tests.fakes.timers import ManualClock
from tests.fakes.transfer_pair import FIRST_TOKEN, PAGE_BYTES, Pair, open_pair, page_layout

from baton.transfer.base import Bootstrapped, Failed, PageLayout, Received, Sent
from baton.transfer.frames import (
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    Cancelled,
    Chunk,
    Hello,
    Last,
    Mode,
    Notice,
    Page,
    Refuse,
    Welcome,
    encode,
)
from baton.transfer.pages import checksum
from baton.transfer.slices import Slice

HELLO = Hello(PROTOCOL_VERSION, "raw", page_layout())


def works(pair: Pair, room: int = 77) -> bool:
    """A whole transfer on the pair's own session."""
    pair.begin(room, [0])
    pair.prefill.transfer.send(room, 0, [3], FIRST_TOKEN)
    return isinstance(pair.decode.wait(room), Received) and isinstance(pair.prefill.wait(room), Sent)


# Time-outs, in virtual time


def test_a_request_that_no_decode_side_asks_for(bootstrap_port: int) -> None:
    clock = ManualClock()
    with open_pair("shm", bootstrap_port, clock=clock) as pair:
        pair.prefill.transfer.expect(1, 300.0)
        pair.prefill.transfer.num_rooms()  # The thread has taken it.
        clock.advance(299.0)
        pair.prefill.nothing_more()
        clock.advance(1.0)
        error = pair.prefill.wait(1, Failed).error
        assert (error.code, error.stage, error.retryable) == (504, "transfer", True)
        assert "no decode side asked for it within 300 s" in error.message


def test_kv_that_does_not_come(bootstrap_port: int) -> None:
    clock = ManualClock()
    with open_pair("shm", bootstrap_port, clock=clock, heartbeat_interval_s=1e6) as pair:
        pair.prefill.transfer.expect(1, 1000.0)
        pair.receive(1, [0], timeout_s=300.0)
        pair.prefill.wait(1, Bootstrapped)
        clock.advance(300.0)
        error = pair.decode.wait(1, Failed).error
        assert (error.code, error.retryable) == (504, True)
        assert "the KV did not arrive within 300 s" in error.message
        assert "did not arrive" in pair.prefill.wait(1, Failed).error.message
        assert works(pair)


def test_a_room_whose_request_never_comes_is_forgotten_on_both_sides(bootstrap_port: int) -> None:
    clock = ManualClock()
    with open_pair("tcp", bootstrap_port, clock=clock, bootstrap_timeout_s=120, heartbeat_interval_s=1e6) as pair:
        assert works(pair)
        pair.receive(1, [0], timeout_s=1000.0)
        with RawPeer.as_decode(pair.prefill.transfer.address) as raw:
            raw.send(Notice(1, 2, 0, 1), Notice(2, 3, 0, 1), Cancel(2, "changed my mind"))
            raw.send(Notice(3, 2, 0, 1))  # The answer to this one shows that all the others were taken.
            assert raw.read() == Cancel(3, "bootstrap_room 2 is in use by another request")
            pair.decode.transfer.num_rooms()
            while pair.prefill.transfer.num_rooms() != (2, 1):
                pass
            clock.advance(120.0)
            assert "no request with this room came within 120 s" in pair.decode.wait(1, Failed).error.message
            assert isinstance(raw.read(), Cancel)
            raw.send(Cancelled(1))
            while pair.prefill.transfer.num_rooms()[0]:
                pass
            clock.advance(120.0)
            assert pair.prefill.transfer.num_rooms() == (0, 0)
        pair.assert_no_room_left()


def test_a_mute_decode_side_loses_its_rooms(bootstrap_port: int) -> None:
    clock = ManualClock()
    with open_pair("tcp", bootstrap_port, clock=clock, heartbeat_interval_s=5.0, heartbeat_max_failure=2) as pair:
        with RawPeer.as_decode(pair.prefill.transfer.address) as raw:
            raw.send(Notice(1, 5, 0, 1))
            pair.prefill.transfer.expect(5, 1000.0)
            pair.prefill.wait(5, Bootstrapped)
            for _ in range(3):
                clock.advance(5.0)
                pair.prefill.transfer.num_rooms()  # The beat has been taken.
            assert "no sign of life for 10 s" in pair.prefill.wait(5, Failed).error.message
        assert works(pair)


def test_a_mute_prefill_loses_its_rooms(bootstrap_port: int) -> None:
    clock = ManualClock()
    with open_pair("tcp", bootstrap_port, clock=clock) as pair, RawPrefill(bootstrap_port) as prefill:
        pair.receive(1, [0], timeout_s=1000.0)
        with prefill.accept() as raw:
            assert isinstance(raw.read(), Notice)
            for _ in range(3):
                clock.advance(5.0)
                pair.decode.transfer.num_rooms()
            message = pair.decode.wait(1, Failed).error.message
            assert f"Losing connection with prefill instance (bootstrap_addr: 127.0.0.1:{pair.port})" in message
            assert "no sign of life" in message


def test_a_decode_side_that_does_not_answer_a_cancel_loses_its_session(bootstrap_port: int) -> None:
    clock = ManualClock()
    with (
        open_pair("tcp", bootstrap_port, clock=clock, heartbeat_interval_s=50.0, heartbeat_max_failure=1) as pair,
        RawPeer.as_decode(pair.prefill.transfer.address) as raw,
    ):
        raw.send(Notice(1, 5, 0, 1))
        pair.prefill.transfer.expect(5, 1000.0)
        pair.prefill.wait(5, Bootstrapped)
        pair.prefill.transfer.abort(5, "stop")
        assert raw.read() == Cancel(1, "stop")
        pair.prefill.nothing_more()  # It may still be reading our pages.
        for _ in range(4):
            raw.sock.sendall(encode(Ack(999)))  # Alive, but deaf.
            clock.advance(20.0)
        assert pair.prefill.wait(5, Failed).error.message == "stop"
        assert raw.closed_by_peer()


def test_a_silent_stranger_is_dropped(bootstrap_port: int) -> None:
    clock = ManualClock()
    with open_pair("tcp", bootstrap_port, clock=clock) as pair:
        with RawPeer(socket.create_connection(pair.prefill.transfer.address)) as stranger:
            while clock.num_pending == 0:
                pass
            clock.advance(5.0)
            assert stranger.closed_by_peer()
        assert works(pair)


# Cancelling in the middle of a stream


def test_a_cancelled_stream_stops_in_the_middle_and_stays_in_step(bootstrap_port: int) -> None:
    page_bytes, num_pages = 1 << 20, 128
    with (
        open_pair("tcp", bootstrap_port, num_pages=num_pages, page_bytes=page_bytes) as pair,
        RawPeer.as_decode(pair.prefill.transfer.address, page_bytes) as raw,
    ):
        raw.send(Notice(1, 5, 0, num_pages))
        pair.prefill.transfer.expect(5, 60.0)
        pair.prefill.wait(5, Bootstrapped)
        pair.prefill.transfer.send(5, 0, range(num_pages), FIRST_TOKEN)
        assert isinstance(raw.read(), Page)
        raw.send(Cancel(1, "enough"), Notice(2, 6, 0, 0))
        pair.prefill.transfer.expect(6, 60.0)
        num_read = 1
        pair.prefill.wait(6, Bootstrapped)
        pair.prefill.transfer.send(6, 0, [], FIRST_TOKEN)
        while isinstance(frame := raw.read(), Page):
            num_read += 1
        # What the kernel had taken still comes, whole pages only, and then the next room's word.
        assert frame == Last(2, 0, FIRST_TOKEN)
        assert num_read < num_pages
        assert "enough" in pair.prefill.wait(5, Failed).error.message
        raw.send(Ack(2))
        pair.prefill.wait(6, Sent)
        pair.assert_no_room_left()


# Broken peers

BROKEN_DECODES: dict[str, bytes] = {
    "garbage": b"\x10\x00\x00\x00" + b"\xff" * 16,
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a huge frame": (1 << 30).to_bytes(4, "little"),
    "an empty frame": bytes(4),
    "no hello": encode(Notice(1, 1, 0, 1)),
    "two hellos": encode(HELLO) * 2,
    "mode before hello": encode(Mode("shm")),
    "frames of the other side": encode(HELLO) + encode(Mode("tcp")) + encode(Last(1, 0, FIRST_TOKEN)),
    "an unknown mode": encode(HELLO) + encode(Mode("rdma")),  # type: ignore[arg-type]
    "shared memory that was not offered": encode(HELLO) + encode(Mode("shm")),
    "a transfer id twice": encode(HELLO)
    + encode(Mode("tcp"))
    + encode(Notice(1, 901, 0, 1))
    + encode(Notice(1, 902, 0, 1)),
    "an early ack": encode(HELLO) + encode(Mode("tcp")) + encode(Notice(1, 901, 0, 1)) + encode(Ack(1)),
    "an answer nobody asked for": encode(HELLO)
    + encode(Mode("tcp"))
    + encode(Notice(1, 901, 0, 1))
    + encode(Cancelled(1)),
    "half a frame": b"\x10\x00\x00\x00abc",
}


@pytest.mark.parametrize("words", BROKEN_DECODES.values(), ids=BROKEN_DECODES)
def test_a_broken_decode_side_costs_its_session_only(bootstrap_port: int, words: bytes) -> None:
    with open_pair("tcp", bootstrap_port) as pair:
        with RawPeer(socket.create_connection(pair.prefill.transfer.address)) as raw:
            raw.sock.sendall(words)
            raw.sock.shutdown(socket.SHUT_WR)
            assert raw.closed_by_peer()
        assert works(pair)


def page_of(page_idx: int, transfer_id: int = 1, damage: int = 0) -> bytes:
    """A page of zeros on the wire; `damage` spoils its checksum."""
    page = np.zeros(PAGE_BYTES, dtype=np.uint8)
    return encode(Page(transfer_id, page_idx, checksum(page) ^ damage)) + page.tobytes()


BROKEN_PREFILLS: dict[str, tuple[bytes, str]] = {
    "garbage": (b"\x10\x00\x00\x00" + b"\xff" * 16, "broken frame"),
    "a huge frame": ((1 << 30).to_bytes(4, "little"), "over the limit"),
    "frames of the other side": (encode(Notice(1, 1, 0, 1)), "unexpected Notice"),
    "a second welcome": (encode(Welcome(None)), "second hello reply"),
    "a transfer that does not exist": (encode(Cancel(99, "x")), "unknown transfer id 99"),
    "a chunk without shared memory": (encode(Chunk(1, 0, [0], [0])), "bad chunk"),
    "a page nobody asked for": (page_of(2), "sent page 2"),
    "a page before the first": (page_of(-1), "sent page -1"),
    "a page twice": (page_of(0) * 2, "twice"),
    "an early end": (page_of(0) + encode(Last(1, 1, FIRST_TOKEN)), "ended after 1 of 2 pages"),
    "a wrong count": (page_of(0) + page_of(1) + encode(Last(1, 3, FIRST_TOKEN)), "says 3"),
    "a damaged page": (page_of(0, damage=1), "checksum"),
    "half a page": (page_of(0)[:-1], "closed by the peer"),
    "a cancel": (encode(Cancel(1, "out of memory")), "The prefill side ended the transfer: out of memory"),
    "nothing": (b"", "closed by the peer"),
}


@pytest.mark.parametrize(("words", "message"), BROKEN_PREFILLS.values(), ids=BROKEN_PREFILLS)
def test_a_broken_prefill_costs_its_room_and_a_new_session_heals(
    bootstrap_port: int, words: bytes, message: str
) -> None:
    with open_pair("tcp", bootstrap_port) as pair, RawPrefill(bootstrap_port) as prefill:
        pair.receive(1, [0, 1])
        with prefill.accept() as raw:
            assert raw.read() == Notice(1, 1, 0, 2)
            raw.sock.sendall(words)
            raw.sock.shutdown(socket.SHUT_WR)
            error = pair.decode.wait(1, Failed).error
            assert message in error.message
            assert (error.stage, error.retryable) == ("transfer", True)
            assert raw.closed_by_peer()
        pair.decode.transfer.num_rooms()
        pair.receive(2, [5])
        with prefill.accept() as raw:
            assert raw.read() == Notice(2, 2, 0, 1)
            raw.sock.sendall(page_of(0, transfer_id=2))
            raw.send(Last(2, 1, FIRST_TOKEN))
            assert isinstance(pair.decode.wait(2), Received)
        pair.decode.nothing_more()
        assert pair.decode.transfer.num_rooms() == 0


# Peers that do not match, or are not there


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_another_layout_is_refused_by_its_field(bootstrap_port: int, backend: str) -> None:
    with open_pair(backend, bootstrap_port, decode_layout=page_layout(dtype="float16")) as pair:
        pair.receive(1, [0])
        message = pair.decode.wait(1, Failed).error.message
        assert "KV page layout differs in dtype: prefill has 'bfloat16', decode has 'float16'" in message


class FirstHello(msgspec.Struct, tag="hello", frozen=True):
    """As version 1 had it."""

    version: int
    name: str
    layout: PageLayout


@pytest.mark.parametrize(
    ("hello", "field"),
    [
        (Hello(99, "raw", page_layout()), "version"),
        (FirstHello(1, "raw", page_layout()), "version"),
        (Hello(PROTOCOL_VERSION, "raw", page_layout(), Slice((0, 3), (0, 2))), "part"),
        (Hello(PROTOCOL_VERSION, "raw", page_layout(), Slice((0, 2), (-1, 1))), "part"),
        (Hello(PROTOCOL_VERSION, "raw", page_layout(), num_takers=0), "num_takers"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_by_its_field(bootstrap_port: int, hello: Hello, field: str) -> None:
    with (
        open_pair("tcp", bootstrap_port) as pair,
        RawPeer(socket.create_connection(pair.prefill.transfer.address)) as raw,
    ):
        raw.send(hello)
        refusal = raw.read()
        assert isinstance(refusal, Refuse)
        assert refusal.field == field
        assert raw.closed_by_peer()


def unreachable_bootstrap(port: int) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(("find", "message"), [(unreachable_bootstrap, "Connect"), (lambda port: port, "Connect")])
def test_a_prefill_that_is_not_there_fails_the_room_at_once(
    bootstrap_port: int, find: Callable[[int], int], message: str
) -> None:
    with open_pair("tcp", bootstrap_port) as pair:
        with RawPrefill(bootstrap_port):
            pass  # Registered, and gone again.
        pair.decode.transfer.receive(1, "127.0.0.1", find(bootstrap_port), 0, [0], 60.0)
        assert message in pair.decode.wait(1, Failed).error.message
        assert pair.decode.transfer.num_rooms() == 0


def test_a_prefill_that_comes_back_is_found_again(bootstrap_port: int) -> None:
    for backend in ("shm", "tcp"):
        with open_pair(backend, bootstrap_port) as pair:
            assert works(pair)
            pair.begin(1, [0])
            pair.prefill.transfer.close()
            assert isinstance(pair.decode.wait(1), Failed)
            pair.prefill = pair.open_prefill()
            assert works(pair)


def test_frames_survive_any_fragmentation(bootstrap_port: int) -> None:
    """The prefill's words arrive byte by byte, page bodies included."""
    with open_pair("tcp", bootstrap_port) as pair, RawPrefill(bootstrap_port) as prefill:
        pair.receive(1, [0, 1])
        with prefill.accept() as raw, contextlib.suppress(BrokenPipeError):
            raw.read()
            raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            words = page_of(0) + page_of(1) + encode(Last(1, 2, FIRST_TOKEN))
            for start in range(0, len(words), 37):
                raw.sock.sendall(words[start : start + 37])
            assert isinstance(pair.decode.wait(1), Received)
            assert raw.read() == Ack(1)
