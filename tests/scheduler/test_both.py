"""A worker of mode "both": each request says whether it prefills, decodes or is served whole, all on one pool."""

from typing import Any

import msgspec
import pytest
from tests.fakes.paged_runner import oracle
from tests.scheduler.machine import Pair, Worker, submit
from tests.scheduler.test_pd import BROKEN, PROMPT, received, start_receiving

from baton.engine.scheduler.pd import AbortTransfer, Expect, Receive
from baton.engine.scheduler.waiting import MAX_BYPASSED
from baton.protocol.rank import Finish, Mode, Side, Submit
from baton.transfer.base import Bootstrapped, Failed


def both_worker(**config: Any) -> Worker:
    return Worker(mode="both", **{"num_reserved_decode_tokens": 8, **config})


def half(request: Submit, side: Side) -> Submit:
    """`request` as the worker gets it that is to be its `side`; the prefill's proxy gives it an id of its own."""
    assert request.bootstrap is not None
    bootstrap = msgspec.structs.replace(request.bootstrap, side=side)
    rid = request.rid if side == "decode" else f"prefill-{request.rid}"
    return msgspec.structs.replace(request, rid=rid, bootstrap=bootstrap)


def test_two_workers_of_mode_both_prefill_for_each_other_and_serve_plain_requests() -> None:
    pair = Pair(both_worker(), both_worker())
    there, back = submit("there", PROMPT, 6, room=1), submit("back", range(30, 40), 6, room=2)
    plain = submit("plain", range(60, 70), 6)
    for prefill, decode, request in ((pair.prefill, pair.decode, there), (pair.decode, pair.prefill, back)):
        prefill.add(half(request, "prefill"))
        decode.add(half(request, "decode"))
    pair.decode.add(plain)
    pair.run()
    for worker, request in ((pair.decode, there), (pair.prefill, back), (pair.decode, plain)):
        assert worker.ledger.tokens[request.rid] == oracle(request.input_ids, 6)
    for worker, request in ((pair.prefill, there), (pair.decode, back)):
        assert worker.ledger.tokens[f"prefill-{request.rid}"] == oracle(request.input_ids, 1)
        assert worker.cache.match_len(request.input_ids, None, 10) == 8, "the prefilled prompt is a prefix of either"
    for worker in (pair.prefill, pair.decode):
        assert worker.scheduler.state().kv_transfer_bootstrap_ms > 0


def test_workers_whose_pools_wait_for_each_other_take_pages_back_after_a_while() -> None:
    """Each pool holds one prompt, and each has given it to what the other is to prefill."""
    pair = Pair(*(both_worker(num_pages=4, take_back_after_s=7.0) for _ in range(2)))
    there, back = submit("there", PROMPT, 5, room=1), submit("back", range(30, 40), 5, room=2)
    pair.decode.add(half(there, "decode"))
    pair.prefill.add(half(back, "decode"))
    pair.step()
    pair.prefill.add(half(there, "prefill"))
    pair.decode.add(half(back, "prefill"))
    for _ in range(10):
        pair.step()
    assert [pair.decode.state_of("there"), pair.prefill.state_of("back")] == ["receiving", "receiving"]
    deadline = pair.prefill.scheduler.next_deadline()
    assert deadline == pytest.approx(7.0, abs=0.5)
    pair.prefill.now = deadline
    pair.run()
    assert pair.prefill.scheduler.state().num_retracted_total == 1
    assert pair.prefill.ledger.tokens["back"] == oracle(back.input_ids, 5), "computed by the one who decodes"
    assert pair.decode.ledger.finishes["prefill-back"].type == "abort"
    assert pair.decode.ledger.tokens["there"] == oracle(there.input_ids, 5), "handed over"
    assert pair.prefill.scheduler.next_deadline() is None


def test_pages_are_not_taken_back_for_what_no_peer_waits_for() -> None:
    worker = both_worker(num_pages=4, take_back_after_s=0.0)
    worker.add(half(submit("comes", PROMPT, 5, room=1), "decode"))
    worker.step()
    worker.add(submit("plain", range(30, 40), 5))
    worker.run()
    assert [worker.state_of(rid) for rid in ("comes", "plain")] == ["receiving", "waiting"]
    assert [type(action) for action in worker.scheduler.drain_actions()] == [Receive]


def test_what_was_taken_back_goes_on_if_its_kv_came_all_the_same() -> None:
    worker = both_worker(num_pages=4, take_back_after_s=0.0)
    request = half(submit("comes", PROMPT, 5, room=1), "decode")
    start_receiving(worker, request)
    worker.add(half(submit("other", range(30, 40), 5, room=2), "prefill"))
    worker.scheduler.on_transfer_event(Bootstrapped(2, 0), worker.now)
    worker.run()
    assert worker.state_of("comes") == "withdrawing"
    assert [type(action) for action in worker.scheduler.drain_actions()] == [Expect, AbortTransfer]
    worker.scheduler.on_transfer_event(received(1, oracle(PROMPT, 1)[0]), worker.now)
    worker.run()
    assert worker.ledger.tokens["comes"] == oracle(PROMPT, 5)


def test_a_hand_over_to_itself_is_computed_once_by_the_half_that_decodes() -> None:
    worker = both_worker(num_pages=4)
    request = submit("a", PROMPT, 5, room=1)
    worker.add(half(request, "prefill"))
    worker.add(half(request, "decode"))
    worker.run()
    assert worker.ledger.tokens == {"prefill-a": [], "a": oracle(PROMPT, 5)}
    assert worker.ledger.finishes == {"prefill-a": Finish("length"), "a": Finish("length")}
    assert [type(action) for action in worker.scheduler.drain_actions()] == [Expect, AbortTransfer]
    worker.scheduler.on_transfer_event(Failed(1, BROKEN), worker.now)
    worker.step()
    assert worker.scheduler.is_idle


def test_a_request_to_receive_is_overtaken_by_so_many_and_no_more() -> None:
    """Short plain requests keep coming; the prompt that a peer holds for us needs most of the pool."""
    worker = both_worker(num_pages=8)
    worker.add(submit("plain-0", [1], 6))
    worker.step()
    worker.add(half(submit("large", range(40, 66), 4, room=1), "decode"))
    for i in range(1, 4 * MAX_BYPASSED):
        worker.add(submit(f"plain-{i}", [i % 40], 6))
        for _ in range(4):
            worker.step()
        if worker.state_of("large") == "receiving":
            break
    assert worker.state_of("large") == "receiving"
    assert MAX_BYPASSED <= len(worker.ledger.finishes) < MAX_BYPASSED + 5


@pytest.mark.parametrize("mode", ["decode", "both"])
def test_a_room_that_waits_for_pages_is_in_use(mode: Mode) -> None:
    worker = Worker(mode=mode, num_pages=4)
    requests = [half(submit(rid, PROMPT, 5, room=room), "decode") for rid, room in (("a", 1), ("b", 2), ("c", 2))]
    for request in requests:
        worker.add(request)
    worker.step()
    assert [worker.state_of(rid) for rid in ("a", "b")] == ["receiving", "prealloc"]
    error = worker.ledger.finishes["c"].error
    assert error is not None and (error.code, error.param, error.stage) == (400, "bootstrap_room", "decode")


def test_errors_name_the_stage_of_the_half_that_the_worker_was() -> None:
    worker = both_worker(num_pages=4)
    requests = [half(submit("p", PROMPT, 5, room=1), "prefill"), half(submit("d", PROMPT, 5, room=2), "decode")]
    for request in (*requests, submit("whole", PROMPT, 5)):
        too_long = msgspec.structs.replace(request, input_ids=list(range(199)))
        worker.add(too_long)
    stages = {rid: finish.error and finish.error.stage for rid, finish in worker.ledger.finishes.items()}
    assert stages == {"prefill-p": "prefill", "d": "decode", "whole": "server"}
