"""What any transfer must do, run on every back end, and what only real ones can be asked (bytes, aborts, damage)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tests.fakes.transfer_pair import FIRST_TOKEN, PAGE_BYTES, Pair, open_pair

from baton.protocol.errors import RequestError
from baton.transfer import prefill_session
from baton.transfer.base import Bootstrapped, DecodeTransfer, Failed, FirstToken, PrefillTransfer, Received, Sent
from baton.transfer.pages import checksum_pages, sum_pages

REAL = ("shm", "tcp")


@pytest.fixture(params=[*REAL, "fake"])
def pair(request: pytest.FixtureRequest, bootstrap_port: int) -> Iterator[Pair]:
    with open_pair(request.param, bootstrap_port) as opened:
        yield opened


@pytest.fixture(params=REAL)
def real_pair(request: pytest.FixtureRequest, bootstrap_port: int) -> Iterator[Pair]:
    with open_pair(request.param, bootstrap_port) as opened:
        yield opened


def check_transport(pair: Pair) -> None:
    """The contract of `transfer.base` that every implementation keeps, fakes included."""
    assert isinstance(pair.prefill.transfer, PrefillTransfer)
    assert isinstance(pair.decode.transfer, DecodeTransfer)
    check_order(pair, room=1, decode_first=True)
    check_order(pair, room=2, decode_first=False)
    check_order(pair, room=1, decode_first=True)  # A room number may be used again after its end.
    pair.prefill.transfer.abort(99, "never heard of")
    pair.decode.transfer.abort(99, "never heard of")
    pair.prefill.transfer.expect(3, 60.0)
    with pytest.raises(RequestError) as refused:
        pair.prefill.transfer.expect(3, 60.0)
    assert refused.value.info.param == "bootstrap_room"
    pair.prefill.transfer.abort(3, "no longer wanted")
    failed = pair.prefill.wait(3, Failed)
    assert failed.error.message == "no longer wanted"
    assert failed.error.stage == "transfer"
    pair.prefill.transfer.abort(3, "again")
    pair.prefill.log = [event for event in pair.prefill.log if not isinstance(event, Bootstrapped)]
    pair.assert_no_room_left()


def check_order(pair: Pair, room: int, *, decode_first: bool) -> None:
    """One transfer in two sends, both sides starting in either order; one end each."""
    target_ids, source_ids = [5, 3, 0], [1, 2, 15]
    pair.target.array[:] = 0
    if decode_first:
        pair.receive(room, target_ids)
    pair.prefill.transfer.expect(room, 60.0)
    if not decode_first:
        pair.receive(room, target_ids)
    assert pair.prefill.wait(room, Bootstrapped).first_page_idx == 0
    pair.prefill.transfer.send(room, 0, source_ids[:2], None)
    pair.prefill.transfer.send(room, 2, source_ids[2:], FIRST_TOKEN)
    received, sent = pair.decode.wait(room), pair.prefill.wait(room)
    assert isinstance(received, Received) and isinstance(sent, Sent)
    if pair.moves_bytes:
        assert received.first_token == FIRST_TOKEN
        assert received.num_bytes == sent.num_bytes == 3 * PAGE_BYTES
        assert np.array_equal(pair.target.array[target_ids], pair.source.array[source_ids])
        others = [page_id for page_id in range(16) if page_id not in target_ids]
        assert not pair.target.array[others].any()


def test_every_back_end_keeps_the_contract(pair: Pair) -> None:
    check_transport(pair)


def test_back_end_is_the_one_asked_for(real_pair: Pair) -> None:
    real_pair.begin(1, [0])
    assert real_pair.decode.transfer.session_modes() == {(("127.0.0.1", real_pair.port), 0): real_pair.backend}


def test_only_pages_behind_the_decode_sides_prefix_travel(real_pair: Pair) -> None:
    real_pair.prefill.transfer.expect(1, 60.0)
    real_pair.receive(1, [7, 8], first_page_idx=2)
    assert real_pair.prefill.wait(1, Bootstrapped) == Bootstrapped(1, 2)
    real_pair.prefill.transfer.send(1, 2, [4, 5], FIRST_TOKEN)
    assert real_pair.decode.wait(1).num_bytes == 2 * PAGE_BYTES
    assert np.array_equal(real_pair.target.array[[7, 8]], real_pair.source.array[[4, 5]])


def test_nothing_but_the_first_token_when_decode_has_every_page(real_pair: Pair) -> None:
    real_pair.begin(1, [], first_page_idx=3)
    real_pair.prefill.transfer.send(1, 3, [], FIRST_TOKEN)
    assert real_pair.decode.wait(1) == Received(1, FIRST_TOKEN, 0, 0.0, pytest.approx(0, abs=60))
    assert isinstance(real_pair.prefill.wait(1), Sent)


def test_large_metadata_crosses_and_too_large_fails_its_room_only(bootstrap_port: int) -> None:
    with open_pair("tcp", bootstrap_port, max_frame_bytes=1 << 20) as pair:
        for room, size, kind in ((1, 900_000, Received), (2, 2_000_000, Failed), (3, 10, Received)):
            pair.begin(room, [0])
            pair.prefill.transfer.send(room, 0, [0], FirstToken(1, 0, input_logprobs=b"x" * size))
            assert isinstance(pair.decode.wait(room), kind)
            end = pair.prefill.wait(room)
            if kind is Failed:
                assert "log-probabilities" in end.error.message


def test_many_rooms_at_once(real_pair: Pair) -> None:
    for room in range(12):
        real_pair.receive(room, [room])
        real_pair.prefill.transfer.expect(room, 60.0)
    for room in reversed(range(12)):
        real_pair.prefill.wait(room, Bootstrapped)
        real_pair.prefill.transfer.send(room, 0, [11 - room], FIRST_TOKEN)
    for room in range(12):
        assert isinstance(real_pair.decode.wait(room), Received)
        assert isinstance(real_pair.prefill.wait(room), Sent)
    assert np.array_equal(real_pair.target.array[:12], real_pair.source.array[11::-1])
    real_pair.assert_no_room_left()
    assert real_pair.decode.transfer.stats().num_succeeded == 12


# Aborts


@pytest.mark.parametrize("state", ["before the other side", "bootstrapped", "half sent"])
@pytest.mark.parametrize("by", ["prefill", "decode"])
def test_an_abort_ends_the_room_on_both_sides(real_pair: Pair, by: str, state: str) -> None:
    pair = real_pair
    aborting, other = (pair.prefill, pair.decode) if by == "prefill" else (pair.decode, pair.prefill)
    if state == "before the other side":
        pair.prefill.transfer.expect(1, 60.0) if by == "prefill" else pair.receive(1, [1, 2])
    else:
        pair.begin(1, [1, 2])
    if state == "half sent":
        pair.prefill.transfer.send(1, 0, [4], None)
    aborting.transfer.abort(1, "client went away")
    assert aborting.wait(1, Failed).error.message == "client went away"
    if state == "before the other side":
        # The room that comes too late is not left waiting for its time-out.
        pair.receive(1, [1, 2]) if by == "prefill" else pair.prefill.transfer.expect(1, 60.0)
    failed = other.wait(1, Failed)
    assert "client went away" in failed.error.message
    assert failed.error.retryable
    # Depending on who was faster, the prefill may have been told that it can begin.
    pair.prefill.log = [event for event in pair.prefill.log if not isinstance(event, Bootstrapped)]
    check_order(pair, room=1, decode_first=True)
    pair.assert_no_room_left()


def test_after_its_end_an_aborted_room_touches_no_page(bootstrap_port: int) -> None:
    for backend in REAL:
        with open_pair(backend, bootstrap_port, num_pages=64, page_bytes=1 << 18) as pair:
            for room in range(10):
                pair.begin(room, list(range(32)))
                pair.prefill.transfer.send(room, 0, range(32), None)
                pair.decode.transfer.abort(room, "stop")
                pair.decode.wait(room, Failed)
                pair.target.array[:32] = 7  # The pages belong to somebody else now.
                pair.prefill.wait(room, Failed)
                # A transfer on the same session arrives behind everything that was still under way.
                pair.begin(100 + room, [40])
                pair.prefill.transfer.send(100 + room, 0, [0], FIRST_TOKEN)
                assert isinstance(pair.decode.wait(100 + room), Received)
                assert (pair.target.array[:32] == 7).all()
                pair.prefill.wait(100 + room, Sent)
            pair.assert_no_room_left()


# Damage and misuse


def test_a_damaged_page_fails_its_room_and_no_other(real_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = real_pair

    def damaging(work: Any) -> Any:
        def sum_first(pages: Any, page_ids: Sequence[int], stopped: Any) -> Any:
            summed = work(pages, page_ids, stopped)
            if 9 in page_ids:
                pair.source.array[9, 4000] ^= 1
            return summed

        return sum_first

    for work in (checksum_pages, sum_pages):
        monkeypatch.setattr(prefill_session, work.__name__, damaging(work))
    pair.begin(1, [0, 1, 2])
    pair.begin(2, [3])
    pair.prefill.transfer.send(1, 0, [8, 9, 10], FIRST_TOKEN)
    pair.prefill.transfer.send(2, 0, [11], FIRST_TOKEN)
    error = pair.decode.wait(1, Failed).error
    assert (error.stage, error.retryable) == ("transfer", True)
    assert "checksum" in error.message
    assert "checksum" in pair.prefill.wait(1, Failed).error.message
    assert isinstance(pair.decode.wait(2), Received)
    assert isinstance(pair.prefill.wait(2), Sent)
    pair.assert_no_room_left()


@pytest.mark.parametrize(
    ("sends", "message"),
    [
        ([(0, [1], FIRST_TOKEN)], "prefill has 1 pages to send, the decode side waits for 2"),
        ([(0, [1, 2, 3], None)], "prefill has 3 pages to send, the decode side waits for 2"),
        ([(1, [1], None)], "page 0 is next, got page 1"),
    ],
)
def test_pages_that_do_not_fit_fail_the_room(real_pair: Pair, sends: list[Any], message: str) -> None:
    real_pair.begin(1, [0, 1])
    for first_page_idx, page_ids, first_token in sends:
        real_pair.prefill.transfer.send(1, first_page_idx, page_ids, first_token)
    assert message in real_pair.prefill.wait(1, Failed).error.message
    assert message in real_pair.decode.wait(1, Failed).error.message
    real_pair.assert_no_room_left()


def test_pages_outside_the_pool_are_refused_at_once(real_pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 16\)"):
        real_pair.receive(1, [16])
    with pytest.raises(ValueError, match=r"must be in \[0, 16\)"):
        real_pair.prefill.transfer.send(1, 0, [-1], None)


def test_a_bug_on_the_copy_thread_costs_one_room(real_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(prefill_session, "checksum_pages", broken)
        patch.setattr(prefill_session, "sum_pages", broken)
        real_pair.begin(1, [0])
        real_pair.prefill.transfer.send(1, 0, [0], FIRST_TOKEN)
        assert "out of luck" in real_pair.prefill.wait(1, Failed).error.message
        real_pair.decode.wait(1, Failed)
    check_order(real_pair, room=2, decode_first=True)


def test_closing_ends_every_room(real_pair: Pair) -> None:
    real_pair.begin(1, [0])
    real_pair.prefill.transfer.expect(2, 60.0)
    real_pair.prefill.transfer.close()
    assert "shutting down" in real_pair.prefill.wait(1, Failed).error.message
    assert "shutting down" in real_pair.prefill.wait(2, Failed).error.message
    assert isinstance(real_pair.decode.wait(1), Failed)
    real_pair.receive(3, [1])
    real_pair.decode.transfer.close()
    assert isinstance(real_pair.decode.wait(3), Failed)
