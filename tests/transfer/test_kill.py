"""The other process is killed (SIGKILL) or frozen (SIGSTOP) at each state of a transfer: ours ends the room, keeps its
pages to itself, and serves the next process."""

import signal

import numpy as np
import pytest
from tests.fakes.transfer_child import NUM_PAGES, OneSide, children
from tests.fakes.transfer_pair import FIRST_TOKEN

from baton.transfer.base import Bootstrapped, Failed, Received, Sent

STATES = ("bootstrapped", "half sent", "in full flow")


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_prefill_survives_the_death_of_decode_processes(bootstrap_port: int, backend: str) -> None:
    pair = OneSide("prefill", backend, bootstrap_port)
    with children("decode", backend, bootstrap_port, len(STATES) + 1) as victims:
        for room, state in enumerate(STATES):
            child = victims[room]
            child.call("start")
            child.call("receive", room, list(range(NUM_PAGES)))
            pair.prefill.transfer.expect(room, 60.0)
            pair.prefill.wait(room, Bootstrapped)
            if state != "bootstrapped":
                pair.prefill.transfer.send(room, 0, range(1 if state == "half sent" else NUM_PAGES), None)
            child.kill()
            error = pair.prefill.wait(room, Failed).error
            assert "Losing connection with decode instance" in error.message
            assert error.retryable
        survivor = victims[-1]
        survivor.call("start")
        survivor.call("receive", 9, [1])
        pair.prefill.transfer.expect(9, 60.0)
        pair.prefill.wait(9, Bootstrapped)
        pair.prefill.transfer.send(9, 0, [0], FIRST_TOKEN)
        assert isinstance(pair.prefill.wait(9), Sent)
        assert [survivor.read(), survivor.read()] == [["open"], ["Received", 9]]
        assert pair.prefill.transfer.num_rooms() == (0, 0)
        pair.prefill.nothing_more()
    pair.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_decode_survives_the_death_of_prefill_processes(bootstrap_port: int, backend: str) -> None:
    pair = OneSide("decode", backend, bootstrap_port)
    with children("prefill", backend, bootstrap_port, len(STATES) + 1) as victims:
        for room, state in enumerate(STATES):
            child = victims[room]
            child.call("start")
            assert child.read() == ["open"]
            pair.receive(room, list(range(NUM_PAGES)))
            child.call("expect", room)
            assert child.read() == ["Bootstrapped", room]
            if state != "bootstrapped":
                child.call("send", room, list(range(1 if state == "half sent" else NUM_PAGES)), False)
            child.kill()
            error = pair.decode.wait(room, Failed).error
            assert "Losing connection with prefill instance" in error.message
            assert error.retryable
            pair.target.array[:] = room  # The pages have another owner now.
            assert pair.decode.transfer.num_rooms() == 0
        survivor = victims[-1]
        survivor.call("start")
        assert survivor.read() == ["open"]
        pair.receive(9, [1])
        survivor.call("expect", 9)
        assert survivor.read() == ["Bootstrapped", 9]
        survivor.call("send", 9, [0], True)
        assert isinstance(pair.decode.wait(9), Received)
        others = [page_id for page_id in range(NUM_PAGES) if page_id != 1]
        assert (pair.target.array[others] == np.uint8(room)).all()
        pair.decode.nothing_more()
    pair.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_frozen_prefill_holds_no_page(bootstrap_port: int, backend: str) -> None:
    """Nobody answers our abort, and still the room ends at once; when the frozen process goes on, nothing is written."""
    pair = OneSide("decode", backend, bootstrap_port)
    with children("prefill", backend, bootstrap_port, 1) as (child,):
        child.call("start")
        assert child.read() == ["open"]
        pair.receive(1, list(range(NUM_PAGES)))
        child.call("expect", 1)
        assert child.read() == ["Bootstrapped", 1]
        child.call("send", 1, list(range(NUM_PAGES)), False)
        child.process.send_signal(signal.SIGSTOP)
        pair.decode.transfer.abort(1, "client went away")
        assert pair.decode.wait(1, Failed).error.message == "client went away"
        pair.target.array[:] = 7
        child.process.send_signal(signal.SIGCONT)
        assert child.read() == ["Failed", 1]
        pair.receive(2, [5])
        child.call("expect", 2)
        assert child.read() == ["Bootstrapped", 2]
        child.call("send", 2, [0], True)
        assert isinstance(pair.decode.wait(2), Received)
        others = [page_id for page_id in range(NUM_PAGES) if page_id != 5]
        assert (pair.target.array[others] == 7).all()
    pair.close()
